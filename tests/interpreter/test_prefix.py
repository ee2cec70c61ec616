"""Kernels of attention with a learned prefix, through the public function: values and every gradient against fp64."""

import itertools

import pytest
import torch
from prefix_oracle import NAMES, concatenated, draw, features, in_double, run, sdpa
from torch import Tensor

from csrc_triton.common import tuning
from csrc_triton.prefix import attention as fwd, attention_bwd as bwd, decode
from numerics import assert_as_accurate
from peft_fast.ops import functional

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INT = dict(dtype=torch.int32, device=DEVICE)
# rows 0 and 3 share a prefix, row 1 has none, row 2 uses a part of the first one and the gap behind it
STARTS, LENGTHS, MAX_LENGTH, SLOTS = [0, 40, 20, 0], [33, 0, 17, 33], 33, 70
PREFILL = dict(B=4, Hq=4, Hkv=2, L=65, S=70, D=32, T=33)
DECODE = dict(PREFILL, L=1)
CALLS = {
    "causal": (PREFILL, ["causal"]),
    "window-rows": (dict(PREFILL, L=66), ["rows", "window"]),
    "bool-rows": (PREFILL, ["rows", "bool", "bias"]),
    "mask-window-rows": (PREFILL, ["rows", "mask+window"]),
    "padding-rows": (PREFILL, ["rows", "padding+causal"]),
    "padding-window": (PREFILL, ["padding+window", "softcap"]),
    "padding-dropout": (dict(PREFILL, S=100), ["padding+causal", "dropout"]),
    "T5": (dict(PREFILL, Hkv=4, T=20), ["additive", "bias"]),
    "BERT": (dict(PREFILL, Hkv=4, L=70), ["bool", "dropout"]),
    "gpt-oss": (dict(PREFILL, Hkv=1, D=80, T=20), ["causal", "sinks+softcap+scale"]),
    "head-96": (dict(PREFILL, B=2, L=40, S=37, D=96, T=1), []),
    "head-128": (dict(PREFILL, B=1, D=128, Hq=1, Hkv=1, T=3), []),
    "head-256": (dict(PREFILL, B=1, L=40, S=37, D=256, Hq=2, Hkv=1, T=3), ["causal"]),
    "decode-256": (dict(DECODE, B=1, Hq=2, Hkv=1, S=40, D=256, T=3), []),
    "no-keys": (dict(PREFILL, S=0), []),
    "no-prefix": (dict(PREFILL, T=0, S=5), ["causal"]),
    "decode": (dict(DECODE, S=130, Hkv=1), ["causal"]),
    "decode-cache": (dict(DECODE, L=3, S=150), ["rows", "bool"]),
    "decode-padding": (dict(DECODE, L=3, S=150), ["rows", "padding+causal", "bias"]),
    "decode-window-rows": (dict(DECODE, L=2), ["rows", "window", "bias"]),
    "decode-17": (dict(DECODE, L=17, Hkv=4, D=128), ["rows", "additive", "sinks"]),
    "decode-dropout": (dict(DECODE, L=3, S=40, D=80), ["rows", "causal", "dropout", "softcap"]),
    "decode-no-keys": (dict(DECODE, S=0, D=7), ["rows"]),
    "decode-nothing": (dict(DECODE, S=0, T=0), ["sinks"]),
}


def kernels(*tensors, **options):
    return functional.prefix_attention(*tensors, **options, implementation="kernel")


def rows() -> dict:
    starts, lengths = torch.tensor(STARTS, **INT), torch.tensor(LENGTHS, **INT)
    return dict(starts=starts, lengths=lengths, max_length=MAX_LENGTH, order=starts.argsort(stable=True).int())


def call_of(shape, names):
    """The shape, with room for the rows' prefixes if there are several, and the options."""
    options, T = {}, shape["T"]
    if "rows" in names:
        options, shape = rows(), dict(shape, T=SLOTS)
        T = MAX_LENGTH
    for name in names:
        if name == "window":  # the oldest slots have slid out for the first queries, all for the last ones
            options |= dict(causal_offset=2, window=20, past=torch.tensor([2], device=DEVICE))
        elif name == "mask+window":
            options |= features(shape, DEVICE)["mask+window"] | dict(window=45)
        elif name != "rows":
            chosen = features(shape, DEVICE)[name]
            options |= chosen(T) if callable(chosen) else chosen
    return shape, options


def check(shape, options, dtype, draws=1):
    """Over several draws if values are few: plain torch may be lucky."""
    bare = {n: o for n, o in options.items() if n != "order"}
    explicit = {"softcap", "sinks", "seed"} & options.keys() or shape["S"] + shape["T"] == 0
    got, same, exact = [], [], []
    for _ in range(draws):
        tensors = draw(dtype, DEVICE, **shape)
        dout = torch.randn(shape["B"], shape["L"], shape["Hq"], shape["D"], device=DEVICE, dtype=dtype)
        got.append(run(kernels, tensors, dout, **options))
        same.append(run((lambda *t, **o: concatenated(*t, **o)[0]) if explicit else sdpa, tensors, dout, **bare))
        exact.append(run(concatenated, [t.double() for t in tensors], dout.double(), **in_double(bare)))
    for i, name in enumerate(NAMES):
        g, e = (torch.stack([r[i] for r in rs]) for rs in (got, exact))
        if name == "lse":
            assert g.dtype == torch.float32
            close = 1e-5 if dtype == torch.float32 else 2e-3 if dtype == torch.float16 else 2e-2
            torch.testing.assert_close(g.double(), e, rtol=close, atol=close)
        else:
            assert g.dtype == dtype, name
            # with few queries a gradient is a sum of few terms, and the log that they have in common was rounded often
            factor = 3.5 if dtype == torch.float32 and shape["L"] <= 3 else 2.0
            assert_as_accurate(name, g, torch.stack([r[i] for r in same]), e, factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_values(call, dtype):
    shape, options = call_of(*call)
    check(shape, options, dtype, draws=1 if shape["L"] > 17 else 6)


def test_fp16():
    for shape, names in (CALLS["bool-rows"], CALLS["decode-17"]):
        check(*call_of(shape, names), torch.float16)


@pytest.mark.parametrize("names", [["rows", "causal"], ["window"], ["rows", "bool", "dropout"], ["bias", "sinks"]])
def test_decode_and_prefill_agree(names, monkeypatch):
    for L in (1, 5):
        shape, options = call_of(dict(DECODE, L=L), names)
        tensors = draw(torch.float32, DEVICE, **shape)
        results = []
        for queries in (0, fwd.DECODE_QUERIES):
            monkeypatch.setattr(fwd, "DECODE_QUERIES", queries)
            results.append(kernels(*tensors, **options))
        torch.testing.assert_close(results[0], results[1])


def test_which_kernels_run(launches):
    for L, expected in ((16, ["prefix_decode", "prefix_merge"]), (17, ["prefix_fwd"])):
        launches.clear()
        kernels(*draw(torch.float32, DEVICE, **dict(PREFILL, L=L, Hkv=1)))
        assert launches == expected


def test_only_gradients_that_are_asked_for(launches):
    tensors, dout = draw(torch.float32, DEVICE, **PREFILL), torch.randn(4, 65, 4, 32, device=DEVICE)
    want = run(kernels, tensors, dout)[2:]
    ran = {0: ["dq"], 1: ["dkv"], 2: ["dkv"], 3: ["dprefix", "sum_planes", "sum_planes"]}
    for asked, expected in ran.items():
        launches.clear()
        leaves = [t.detach().requires_grad_(i == asked) for i, t in enumerate(tensors)]
        kernels(*leaves)[0].backward(dout)
        assert [name.removeprefix("prefix_") for name in launches] == ["fwd", "delta", *expected]
        assert torch.equal(leaves[asked].grad, want[asked])


@pytest.mark.parametrize("L", [2, 65])
def test_a_row_depends_on_no_other(L):
    """The same bits of a row whatever prefixes the others have, in whatever order; and of everything, run again."""
    shape, options = call_of(dict(PREFILL, L=L), ["rows"])
    tensors, dout = draw(torch.bfloat16, DEVICE, **shape), torch.randn(4, L, 4, 32, device=DEVICE)
    expected = run(kernels, tensors, dout, **options)
    assert all(torch.equal(a, b) for a, b in zip(run(kernels, tensors, dout, **options), expected, strict=True))
    for order in ([3, 2, 1, 0], [1, 0, 2, 3], None):
        turned = dict(options, order=None if order is None else torch.tensor(order, **INT))
        assert torch.equal(kernels(*tensors, **turned)[0], expected[0])
    others = dict(options, starts=torch.tensor([0, 3, 9, 30], **INT), lengths=torch.tensor([33, 20, 5, 0], **INT))
    got = run(kernels, tensors, dout, **others)
    assert torch.equal(got[0][0], expected[0][0]) and torch.equal(got[2][0], expected[2][0])


@pytest.mark.parametrize("L", [2, 65])
def test_infinities_of_a_prefix_stay_in_its_rows(L):
    shape, options = call_of(dict(PREFILL, L=L), ["rows"])
    options["starts"] = torch.tensor([0, 40, 33, 0], **INT)  # that of row 2 begins where another ends, inside a tile
    tensors = draw(torch.float32, DEVICE, **shape)
    before = kernels(*tensors, **options)[0]
    for prefix in tensors[3:]:
        prefix[33:50] = float("inf")
    after = kernels(*tensors, **options)[0]
    assert torch.equal(after[[0, 1, 3]], before[[0, 1, 3]]) and after[2].isnan().any()


@pytest.mark.parametrize("hide", ["bool", "infinite", "lowest", "causal"])
@pytest.mark.parametrize("kind", ["plain", "softcap", "dropout"])
def test_a_query_that_sees_nothing(hide, kind):
    """Row 1 has no prefix: a query of it that sees no key gives zeros and no gradient; the others see their prefix."""
    for L in (6, 66) if kind == "plain" else (33,):
        shape, options = call_of(dict(PREFILL, L=L), ["rows", kind])
        tensors, dout = draw(torch.float32, DEVICE, **shape), torch.randn(4, L, 4, 32, device=DEVICE)
        keep = (torch.arange(L, device=DEVICE)[:, None] >= 4).expand(1, 1, L, 70)
        number = dict(infinite=float("-inf"), lowest=torch.finfo(torch.float32).min).get(hide, 0.0)
        mask = keep if hide == "bool" else torch.zeros(keep.shape, device=DEVICE).masked_fill(~keep, number)
        options |= dict(causal_offset=-4) if hide == "causal" else dict(mask=mask)
        out, lse, *gradients = run(kernels, tensors, dout, **options)
        assert all(t.isfinite().all() for t in (out, *gradients))
        assert (out[1, :4] == 0).all() and (gradients[0][1, :, :4] == 0).all()
        seen = torch.ones(4, L, dtype=torch.bool, device=DEVICE)
        seen[1, :4] = False
        assert (lse.isfinite().all(1) == seen).all()
        assert (gradients[3][37:] == 0).all() and (gradients[3][:37] != 0).any()  # slots that no row uses, and others


@pytest.mark.parametrize("L", [3, 65])
def test_strides_and_masks_that_repeat(L):
    """Slices of a static cache, a table of all layers, transposed masks; what lies around is NaN."""
    shape = dict(PREFILL, L=L)
    tensors = draw(torch.float32, DEVICE, **shape)
    cache = torch.full((2, 4, 2, 90, 32), float("nan"), device=DEVICE)
    cache[0, :, :, :70], cache[1, :, :, :70] = tensors[1:3]
    wide = torch.full((33, 2, 64), float("nan"), device=DEVICE)
    wide[..., :32] = tensors[3]
    odd = [tensors[0].contiguous(), cache[0, :, :, :70], cache[1, :, :, :70], wide[..., :32], tensors[4].contiguous()]
    dout = torch.randn(4, L, 4, 32, device=DEVICE)
    turned = torch.randn(32, 4, L, 4, device=DEVICE).permute(1, 2, 3, 0).copy_(dout)
    for sizes in ((4, 1, L, 1), (1, 4, L, 70)):
        mask = torch.rand(sizes, device=DEVICE) > 0.3
        bias = torch.randn(*sizes[:3], 1 if sizes[3] == 1 else 33, device=DEVICE)
        want = run(kernels, tensors, dout, mask=mask, prefix_bias=bias)
        mask, bias = (t.transpose(2, 3).contiguous().transpose(2, 3).expand(4, 4, L, -1) for t in (mask, bias))
        got = run(kernels, odd, turned, mask=mask, prefix_bias=bias)
        torch.testing.assert_close(got, want)
        exact = run(concatenated, tensors, dout, mask=mask, prefix_bias=bias)
        torch.testing.assert_close(got[0], exact[0])


def masks_with_holes() -> dict[str, Tensor]:
    """Masks that a look at the first and the last visible key alone would read wrongly; two rows, S = 80, L = 40."""
    row = (torch.arange(80, device=DEVICE) >= torch.tensor([[0], [21]], device=DEVICE))[:, None, None]
    hole = row.clone()
    hole[:, :, :, 50] = False
    full = row.repeat(1, 1, 40, 1)
    full[:, :, 33, 45] = False
    late = row.repeat(1, 1, 40, 1)
    late[:, :, 20:24, :30] = False
    added = torch.zeros(row.shape, device=DEVICE).masked_fill(~row, float("-inf"))
    added[:, :, :, 60] = 1.5
    return dict(one_row=hole, one_query=full, late_queries=late, number=added, number_each=added.repeat(1, 1, 40, 1))


@pytest.mark.parametrize("name", ["one_row", "one_query", "late_queries", "number", "number_each"])
def test_masks_with_holes(name):
    shape = dict(B=2, Hq=2, Hkv=1, L=40, S=80, D=32, T=5)
    check(shape, dict(mask=masks_with_holes()[name], causal_offset=45), torch.float32)


@pytest.mark.parametrize("L", [1, 65])
def test_padding_is_what_a_mask_of_every_query_would_be(L):
    """One row of a mask for all queries and heads takes another way through the kernels; the same numbers come out."""
    shape = dict(B=3, Hq=2, Hkv=1, L=L, S=70, D=32, T=5)
    tensors, dout = draw(torch.float32, DEVICE, **shape), torch.randn(3, L, 2, 32, device=DEVICE)
    row = (torch.arange(70, device=DEVICE) >= torch.tensor([[0], [33], [70]], device=DEVICE))[:, None, None]
    for mask in (row, torch.zeros(row.shape, device=DEVICE).masked_fill(~row, float("-inf"))):
        got = run(kernels, tensors, dout, mask=mask, causal_offset=70 - L)
        want = run(kernels, tensors, dout, mask=mask.repeat(1, 2, L, 1), causal_offset=70 - L)
        torch.testing.assert_close(got, want)


def test_decode_of_one_row_gives_every_tile_a_program():
    assert decode._split(1000, 64, 512, 1) == (16, 64)
    assert decode._split(1000, 64, 512, 2) == (8, 128)
    assert decode._split(1000, 64, 3, 1) == (3, 384)


@pytest.fixture
def fences(monkeypatch) -> list[tuple[Tensor, Tensor]]:
    """What lies before and behind every tensor that a launcher makes."""
    make, made = torch.Tensor.new_empty, []

    def fenced(self, size, **options):
        if isinstance(size, int):  # the interpreter's own
            return make(self, size, **options)
        whole = make(self, (torch.Size(size).numel() + 2048,), **options).fill_(11.0)
        made.append((whole[:1024], whole[-1024:]))
        return whole[1024:-1024].view(size)

    monkeypatch.setattr(torch.Tensor, "new_empty", fenced)
    return made


@pytest.mark.parametrize("name", ["bool-rows", "BERT", "decode-17", "decode-window-rows"])
def test_nothing_is_written_outside(name, fences):
    shape, options = call_of(*CALLS[name])
    tensors = draw(torch.float32, DEVICE, **dict(shape, D=40))
    run(kernels, tensors, torch.randn(4, shape["L"], 4, 40, device=DEVICE), **options)
    assert len(fences) >= 8
    assert all((side == 11.0).all() for pair in fences for side in pair)


def test_nothing_is_read_back(monkeypatch):
    """Starts, lengths, order, past and the seed stay on the device: a captured graph may be replayed with others."""

    def refuse(self, *args):
        raise AssertionError("a value was read on the host")

    (shape, options), (_, more) = call_of(*CALLS["decode-window-rows"]), call_of(DECODE, ["dropout"])
    tensors, dout = draw(torch.float32, DEVICE, **shape), torch.randn(4, 2, 4, 32, device=DEVICE)
    values = [
        options.get(n, None)
        for n in "starts lengths order max_length mask prefix_bias sinks past seed causal_offset window".split()
    ]
    arguments = [*values[:8], more["seed"], 0.1, *values[9:], 0.0, 0.3]
    with monkeypatch.context() as patch:
        for method in ("item", "tolist", "__int__", "__bool__", "__index__", "cpu", "numpy"):
            if DEVICE == "cuda" or method in ("item", "tolist", "__int__"):
                patch.setattr(torch.Tensor, method, refuse)
        out, lse = fwd.prefix_attention_fwd(*tensors, *arguments, "kernel")
        bwd.prefix_attention_bwd(dout, *tensors, out, lse, *arguments, [True] * 4, "kernel")


ALL = {
    "prefix_fwd": fwd.CANDIDATES, "prefix_decode": decode.CANDIDATES, "prefix_dq": bwd.DQ_CANDIDATES,
    "prefix_dkv": bwd.DKV_CANDIDATES, "prefix_dprefix": bwd.DPREFIX_CANDIDATES,
}  # fmt: skip
# one for all architectures and head sizes
EACH = {(f"{kernel}-{c.label}", c.itemsize): (kernel, c) for kernel, rows in ALL.items() for c in rows}


@pytest.mark.parametrize("kernel, candidate", EACH.values(), ids=[f"{name}-{8 * size}bit" for name, size in EACH])
def test_every_candidate(kernel, candidate, force):
    """On sizes that need several tiles in each direction and fill none."""
    force(kernel, candidate.config)
    L = 5 if kernel == "prefix_decode" else max(candidate.blocks["BLOCK_M"], 32) + 3
    S = max(candidate.blocks["BLOCK_N"], 32) + 11
    shape = dict(B=2, Hq=2, Hkv=1, L=L, S=S, D=20, T=40)
    starts, lengths = torch.tensor([0, 20], **INT), torch.tensor([33, 17], **INT)
    options = dict(starts=starts, lengths=lengths, max_length=MAX_LENGTH, causal_offset=S - L)
    check(shape, options, torch.float32 if candidate.itemsize == 4 else torch.bfloat16)


def test_every_kernel_has_a_default_everywhere():
    for arch, itemsize, kernel in itertools.product(tuning.ARCHS, (2, 4), ALL):
        offered = list(tuning.candidates_for(kernel, arch, itemsize))
        for M, D in itertools.product((1, 64, 1 << 20), (16, 32, 64, 128, 256)):
            assert any(M <= c.default_to and D <= c.max_rank for c in offered), (kernel, arch, itemsize, M, D)

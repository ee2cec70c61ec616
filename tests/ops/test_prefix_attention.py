"""prefix_attention against concatenation in fp64: every feature alone and together, output, lse and every gradient."""

import itertools
import types

import pytest
import torch
from prefix_oracle import (
    DTYPES,
    MAX_LENGTH,
    NAMES,
    SHAPE,
    check_accuracy,
    check_exact,
    concatenated,
    draw,
    hidden_keys,
    in_double,
    options_of,
    rows,
    run,
    sdpa,
)
from torch import Tensor

from numerics import assert_as_accurate
from peft_fast.ops.functional import prefix_attention
from peft_fast.prompts.attention import interface
from peft_fast.reference import prefix as reference_prefix

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


COMBINATIONS = list(
    itertools.product(
        ["all", "rows"],
        [
            "bidirectional", "causal", "window", "bool", "padding+causal", "padding+window", "additive", "mask+window",
        ],
        ["nothing", "bias"],
        ["plain", "softcap", "sinks", "dropout", "sinks+softcap+scale"],
    )
)  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("names", COMBINATIONS, ids="-".join)
def test_every_combination_in_fp64(names, device):
    torch.manual_seed(1)
    check_exact(SHAPE, options_of(names, SHAPE, device), device)


SHAPES = {
    "more-keys": dict(SHAPE, L=3, S=11),
    "fewer-keys": dict(SHAPE, L=8, S=3),
    "no-keys": dict(SHAPE, S=0),
    "no-slots": dict(SHAPE, T=0),
    "one-query": dict(SHAPE, L=1, S=12),
    "one-row": dict(SHAPE, B=1),
    "no-rows": dict(SHAPE, B=0),
    "one-head": dict(SHAPE, Hq=1, Hkv=1),
    "many-to-one": dict(SHAPE, Hq=6, Hkv=1),
    "no-groups": dict(SHAPE, Hq=3, Hkv=3),
    "head-1": dict(SHAPE, D=1),
    "head-7": dict(SHAPE, D=7),
    "long": dict(SHAPE, L=150, S=150, T=70),
}


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes_in_fp64(shape, causal):
    check_exact(shape, dict(causal_offset=shape["S"] - shape["L"]) if causal else {})
    check_exact(shape, dict(softcap=1.0, causal_offset=shape["S"] - shape["L"]) if causal else dict(softcap=1.0))


ALONE = {
    "all": ["all"], "rows": ["rows"], "causal": ["all", "causal"], "window": ["rows", "window"],
    "bool": ["rows", "bool"], "additive": ["all", "additive"], "bias": ["rows", "bool", "bias"],
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("names", ALONE.values(), ids=ALONE)
def test_as_accurate_as_attention_over_the_concatenation(names, dtype):
    shape = dict(SHAPE, L=33, S=33, D=64, T=40)
    check_accuracy(shape, options_of(names, shape), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [32, 80, 96, 128, 256])
def test_head_sizes(D, dtype):
    check_accuracy(dict(SHAPE, D=D), options_of(["rows", "bool"], SHAPE), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["softcap", "sinks", "dropout", "sinks+softcap+scale"])
def test_what_torch_has_no_attention_for(kind, dtype):
    check_accuracy(
        SHAPE, options_of(["rows", "causal", kind], SHAPE), dtype, baseline=lambda *a, **o: concatenated(*a, **o)[0]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_long_batch_adds_up_the_prefix_gradient_in_fp32(dtype):
    """8192 queries read every slot, and their gradients have one sign: a sum in bf16 would stop growing."""
    shape = dict(B=64, Hq=2, Hkv=2, L=128, S=4, D=32, T=16)
    tensors, dout = draw(dtype, **shape), torch.rand(64, 128, 2, 32).to(dtype)
    got = run(prefix_attention, tensors, dout)
    same = run(sdpa, tensors, dout)
    exact = run(concatenated, [t.double() for t in tensors], dout.double())
    for i in (5, 6):
        assert_as_accurate(NAMES[i], got[i], same[i], exact[i])


@pytest.mark.parametrize("S", [64, 200])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decoding_in_a_static_cache(dtype, S):
    """The first 64 positions of a cache of S, by mask and by causal_offset."""
    shape = dict(SHAPE, L=1, S=S, D=64, T=20)
    mask = torch.arange(S) < 64
    # with one query a gradient is a sum of few terms, and the log that all of them have in common was rounded three
    # times: of each source, and of both. How often plain torch rounds differs between CPUs: 3.2 to 3.9 times its error
    factor = 4.5 if dtype == torch.float32 else 2.0
    slid = dict(causal_offset=63, window=10, past=torch.tensor([63]))
    for options in (dict(mask=mask.expand(4, 1, 1, S)), dict(causal_offset=63), slid, rows() | slid | dict(window=66)):
        check_accuracy(shape, options, dtype, factor=factor)


@pytest.mark.parametrize("L", [1, 2, 3])
@pytest.mark.parametrize("past", [0, 1, 4])
def test_every_window_at_every_position(L, past):
    """The bounds of what slides out, for queries that see all, some and none of the prefix and the keys."""
    shape = dict(SHAPE, L=L, S=past + L, D=4)
    for window in range(1, 16):
        options = dict(causal_offset=past, window=window, past=torch.tensor([past]))
        check_exact(shape, options)
        check_exact(shape, rows() | options)


@pytest.mark.parametrize("offset", range(-8, 9, 2))
def test_every_causal_offset(offset):
    for shape in (dict(SHAPE, D=4), dict(SHAPE, L=2, S=2, D=4), dict(SHAPE, L=1, S=5, D=4)):
        check_exact(shape, dict(causal_offset=offset))
        check_exact(shape, rows() | dict(causal_offset=offset + 1, window=3))


def test_one_query_with_a_mask_for_every_head():
    check_exact(dict(SHAPE, L=1), dict(mask=torch.randn(4, 4, 1, 6)))
    check_exact(dict(SHAPE, L=1), rows() | dict(mask=torch.rand(1, 4, 1, 6) > 0.3, prefix_bias=torch.randn(1, 4, 1, 5)))


@pytest.mark.parametrize("kind", ["plain", "softcap"])
def test_strides_do_not_matter(kind):
    shape = dict(SHAPE, S=8)
    options = options_of(["rows", "additive", "bias", kind], shape)
    tensors = draw(torch.float32, **shape)
    q, k, v, prefix_k, prefix_v = tensors
    cache = torch.full((2, 4, 2, 50, 32), float("nan"))
    cache[0, :, :, :8], cache[1, :, :, :8] = k, v
    wide = torch.full((9, 2, 64), float("nan"))
    wide[..., :32] = prefix_k
    odd = [
        [t.contiguous() for t in tensors],
        [
            q,
            cache[0, :, :, :8],
            cache[1, :, :, :8],
            wide[..., :32],
            prefix_v.transpose(0, 1).contiguous().transpose(0, 1),
        ],
        [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in tensors],
    ]
    dout = torch.randn(4, 6, 4, 32)
    want = run(prefix_attention, tensors, dout, **options)
    for other in odd:
        turned = torch.randn(32, 4, 6, 4).permute(1, 2, 3, 0).copy_(dout)
        for name, g, w in zip(NAMES, run(prefix_attention, other, turned, **options), want, strict=True):
            torch.testing.assert_close(g, w, msg=lambda text, name=name: f"{name}: {text}")
    transposed = dict(options, mask=options["mask"].transpose(2, 3).contiguous().transpose(2, 3))
    torch.testing.assert_close(prefix_attention(*tensors, **transposed), prefix_attention(*tensors, **options))


@pytest.mark.parametrize("sizes", [(1, 1, 1, 6), (4, 1, 6, 1), (1, 4, 1, 1), (1, 1, 6, 6), (4, 4, 1, 6)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "additive", "bias"])
def test_masks_and_biases_broadcast(sizes, kind):
    if kind == "bool":
        check_exact(SHAPE, dict(mask=torch.rand(sizes) > 0.3))
    elif kind == "additive":
        check_exact(SHAPE, dict(mask=torch.randn(sizes)))
    else:
        for T, some in ((9, {}), (MAX_LENGTH, rows())):
            bias = torch.randn(*sizes[:3], 1 if sizes[3] == 1 else T)
            check_exact(SHAPE, some | dict(prefix_bias=bias))
            check_exact(SHAPE, some | dict(prefix_bias=bias, window=9, past=torch.tensor([1])))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["plain", "softcap", "dropout"])
@pytest.mark.parametrize("hide", ["bool", "infinite", "lowest", "causal"])
def test_a_query_that_sees_nothing(hide, kind, dtype):
    """Row 1 has no prefix: a query of it that sees no key gives zeros and no gradient; the others see their prefix."""
    tensors = draw(dtype, **SHAPE)
    keep = torch.arange(6)[:, None] >= 4  # the first four queries see no key
    low = torch.finfo(dtype if dtype == torch.bfloat16 else torch.float32).min
    hiding = {
        "bool": dict(mask=keep.expand(1, 1, 6, 6)),
        "infinite": dict(mask=torch.zeros(1, 1, 6, 6).masked_fill(~keep, float("-inf"))),
        "lowest": dict(
            mask=torch.zeros(1, 1, 6, 6, dtype=dtype if dtype == torch.bfloat16 else torch.float32).masked_fill(
                ~keep, low
            )
        ),
        "causal": dict(causal_offset=-4),
    }
    options = options_of(["rows", kind], SHAPE) | hiding[hide]
    dout = torch.randn(4, 6, 4, 32, dtype=dtype)
    out, lse, dq, dk, dv, dpk, dpv = run(prefix_attention, tensors, dout, **options)
    assert all(t.isfinite().all() for t in (out, dq, dk, dv, dpk, dpv))
    assert (out[1, :4] == 0).all() and (dq[1, :, :4] == 0).all() and (lse[1, :, :4] == float("-inf")).all()
    seen = torch.ones(4, 6, dtype=torch.bool)
    seen[1, :4] = False
    assert (lse.isfinite().all(1) == seen).all()
    assert (out.abs().amax((2, 3))[seen] > 0).all()
    assert (dpk[:5] != 0).any() and (dpk[5:] == 0).all() and (dpv[5:] == 0).all()  # slots that no row uses


def test_a_prefix_that_has_slid_out_of_the_window():
    """After enough tokens no query sees the prefix: as if there were none."""
    tensors, dout = draw(torch.float32, **SHAPE), torch.randn(4, 6, 4, 32)
    options = dict(causal_offset=0, window=4)
    got = run(prefix_attention, tensors, dout, past=torch.tensor([3]), **options)
    want = run(prefix_attention, [*tensors[:3], *(t[:0] for t in tensors[3:])], dout, **options)
    for name, g, w in zip(NAMES[:5], got, want, strict=False):
        torch.testing.assert_close(g, w, msg=lambda text, name=name: f"{name}: {text}")
    assert (got[5] == 0).all() and (got[6] == 0).all()


def test_sinks_that_are_off_and_bias_that_hides():
    tensors = draw(torch.float64, **SHAPE)
    off = torch.full((4,), float("-inf"))
    torch.testing.assert_close(prefix_attention(*tensors, sinks=off), prefix_attention(*tensors))
    bias = torch.zeros(1, 1, 1, 9, dtype=torch.float64)
    bias[..., :4] = float("-inf")
    fewer = [*tensors[:3], *(t[4:] for t in tensors[3:])]
    torch.testing.assert_close(prefix_attention(*tensors, prefix_bias=bias), prefix_attention(*fewer))


@pytest.mark.parametrize("kind", ["plain", "dropout", "sinks+softcap+scale"])
def test_gradcheck(kind):
    shape = dict(SHAPE, L=2, S=3, D=4)
    leaves = [t.contiguous().requires_grad_() for t in draw(torch.float64, **shape)]
    options = in_double(options_of(["rows", "causal", "bias", kind], shape))
    assert torch.autograd.gradcheck(lambda *t: prefix_attention(*t, **options)[0], leaves)


@pytest.mark.parametrize("kind", ["plain", "softcap"])
@pytest.mark.parametrize("asked", [(0,), (1,), (2,), (3,), (4,), (3, 4), (0, 1, 2)], ids=str)
def test_gradients_that_are_not_asked_for(asked, kind):
    tensors, dout = draw(torch.float32, **SHAPE), torch.randn(4, 6, 4, 32)
    options = options_of(["rows", "causal", kind], SHAPE)
    want = run(prefix_attention, tensors, dout, **options)[2:]
    leaves = [t.detach().requires_grad_(i in asked) for i, t in enumerate(tensors)]
    out, lse = prefix_attention(*leaves, **options)
    assert out.requires_grad and not lse.requires_grad
    out.backward(dout)
    for i, (leaf, w) in enumerate(zip(leaves, want, strict=True)):
        if i in asked:
            torch.testing.assert_close(leaf.grad, w)
        else:
            assert leaf.grad is None


def test_without_gradients_the_same_values():
    for names in (["all"], ["rows", "bool", "bias"], ["rows", "window", "dropout"]):
        tensors, options = draw(torch.float32, **SHAPE), options_of(names, SHAPE)
        with torch.no_grad():
            plain = prefix_attention(*tensors, **options)
        assert all(torch.equal(a, b) for a, b in zip(plain, prefix_attention(*tensors, **options), strict=True))
        assert all(t.is_contiguous() for t in plain)


def test_arguments_are_not_written_to():
    for names in (["rows", "additive", "bias", "sinks"], ["rows", "additive", "bias", "sinks+softcap+scale"]):
        tensors, options = draw(torch.float32, **SHAPE), options_of(names, SHAPE)
        before = [t.clone() for t in (*tensors, *(o for o in options.values() if isinstance(o, Tensor)))]
        run(prefix_attention, tensors, torch.randn(4, 6, 4, 32), **options)
        after = [*tensors, *(o for o in options.values() if isinstance(o, Tensor))]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_no_copy_of_the_prefix_for_every_row(monkeypatch):
    """64 rows of one prefix: no key or value that torch's attention is given, and no gradient, holds it 64 times."""
    sizes = []

    def spied(original):
        def call(*args):
            results = original(*args)
            sizes.extend(t.untyped_storage().nbytes() for t in (*args, *results) if isinstance(t, Tensor))
            return results

        return call

    flash = reference_prefix.CPU_CALLS
    spied_on = flash._replace(forward=spied(flash.forward), backward=spied(flash.backward))
    monkeypatch.setattr(reference_prefix, "CPU_CALLS", spied_on)
    shape = dict(B=64, Hq=4, Hkv=2, L=1, S=4, D=32, T=100)
    run(prefix_attention, draw(torch.float32, **shape), torch.randn(64, 1, 4, 32))
    assert sizes and max(sizes) < 64 * 100 * 2 * 32 * 4


def test_autocast_runs_in_its_dtype():
    tensors = draw(torch.float32, **SHAPE)
    leaves = [t.detach().requires_grad_() for t in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = prefix_attention(*leaves, causal_offset=0)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    out.float().sum().backward()
    narrow = prefix_attention(*(t.bfloat16() for t in tensors), causal_offset=0)[0]
    assert torch.equal(out, narrow) and all(leaf.grad.dtype == torch.float32 for leaf in leaves)


@pytest.mark.parametrize(
    "causal, tokens, window", [(True, 6, None), (True, 6, 4), (False, 6, None), (True, 1, 4), (False, 6, 4)]
)
def test_padding_of_flash_attention_stays_one_row(causal, tokens, window):
    """Where the mask has two dimensions nothing of the size of queries times keys is made of it."""
    routed = types.SimpleNamespace(_attn_implementation="flash_attention_2")
    module = types.SimpleNamespace(config=types.SimpleNamespace(routed=routed), is_causal=causal)
    query, key = torch.zeros(3, 2, tokens, 8), torch.zeros(3, 2, 9, 8)
    padding = torch.arange(12) >= torch.tensor([[0], [5], [11]])  # longer than the keys: of what has left the cache too
    mask, offset = interface._visible(module, query, key, padding.long(), dict(sliding_window=window))
    age = torch.arange(tokens)[:, None] + 9 - tokens - torch.arange(9)
    visible = padding[:, None, None, -9:] & ((age >= 0) | (not causal)) & (age < (window or 99))
    assert torch.equal(hidden_keys(query, key, 0, None, mask, None, offset, window), ~visible)
    assert mask.shape == ((3, 1, 1, 9) if causal or window is None else (3, 1, 6, 9))

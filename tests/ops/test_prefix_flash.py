"""Attention with a prefix as a GPU takes it in training: two flash calls, merged; what they cannot express; no reading.

torch's operators for GPUs are computed by those for CPUs here, and hold their callers to what a GPU can do.
"""

import types

import pytest
import torch
from prefix_oracle import (
    DTYPES,
    NAMES,
    SHAPE,
    concatenated,
    draw,
    features,
    options_of,
    rows,
    run,
    sdpa,
)

from numerics import assert_as_accurate
from peft_fast.ops import choice, functional, prefix_attention as op, prefix_choice
from peft_fast.ops.functional import prefix_attention
from peft_fast.prompts.attention.prefix import Prefix, Rows
from peft_fast.reference import prefix as reference, prefix_calls as calls

GPU = torch.device("cuda", 0)


def as_on_a_gpu(programs):
    return calls.FlashCalls(calls.gpu_fwd, calls.gpu_bwd, wide=False, programs=programs)


@pytest.fixture(autouse=True, scope="module")
def a_gpus_operators_on_a_cpu():
    """torch's operators for GPUs, computed by those for CPUs, with what a GPU asks for."""

    def check(q, k, v, is_causal):
        assert q.shape[3] == k.shape[3] and k.shape == v.shape and k.shape[2] > 0 and q.shape[1] % k.shape[1] == 0
        assert not is_causal or q.shape[2] == k.shape[2]  # torch and AMD disagree on which corner is aligned
        assert all(t.stride(-1) == 1 for t in (q, k, v))

    def forward(q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
        assert dropout_p == 0 and not return_debug_mask
        check(q, k, v, is_causal)
        out, lse = calls.CPU_CALLS.forward(q, k, v, is_causal, None, scale)
        nothing = torch.empty(0)
        return out, lse.contiguous(), nothing, nothing, q.shape[2], k.shape[2], nothing, nothing, nothing

    def backward(
        dout, q, k, v, out, lse, cum_seq_q, cum_seq_k, max_q, max_k, p, is_causal, seed, offset, *, scale=None
    ):  # fmt: skip
        assert cum_seq_q is cum_seq_k is None and p == 0 and (max_q, max_k) == (q.shape[2], k.shape[2])
        check(q, k, v, is_causal)
        assert lse.is_contiguous() and lse.shape == q.shape[:3] and dout.shape == out.shape == q.shape
        return calls.CPU_CALLS.backward(dout, q, k, v, out, lse, is_causal, None, scale)

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_scaled_dot_product_flash_attention", forward, "CPU")
        library.impl("_scaled_dot_product_flash_attention_backward", backward, "CPU")
        yield


def two_calls(programs=1):
    """prefix_attention by these calls."""

    def attend(q, k, v, prefix_k, prefix_v, *, causal_offset=None, sinks=None, scale=None):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        options = (
            None,
            None,
            None,
            prefix_k.shape[0],
            None,
            None,
            sinks,
            None,
            None,
            scale,
            causal_offset,
            None,
            0.0,
            0.0,
        )
        return TwoCalls.apply(programs, options, q, k, v, prefix_k, prefix_v)

    return attend


class TwoCalls(torch.autograd.Function):
    @staticmethod
    def forward(ctx, programs, options, *tensors):
        call = reference.Options(*options)
        assert not calls.beyond_gpu_flash(tensors[0].shape[2], tensors[1].shape[2], call)
        out, lse = reference._flash_fwd(*tensors, call, as_on_a_gpu(programs))
        ctx.save_for_backward(*tensors, out, lse)
        ctx.mark_non_differentiable(lse)
        ctx.programs, ctx.call = programs, call
        return out, lse

    @staticmethod
    def backward(ctx, dout, _):
        gradients = reference._flash_bwd(dout, *ctx.saved_tensors, ctx.call, [True] * 4, as_on_a_gpu(ctx.programs))
        return None, None, *gradients


EXPRESSED = {
    "all-keys": (SHAPE, {}),
    "causal": (SHAPE, dict(causal_offset=0)),
    "more-keys": (dict(SHAPE, L=3), dict(causal_offset=0)),
    "all-past": (dict(SHAPE, L=3, S=5), dict(causal_offset=4)),
    "one-query": (dict(SHAPE, L=1, S=7), dict(causal_offset=6)),
    "one-key": (dict(SHAPE, L=1, S=1), dict(causal_offset=0)),
    "no-keys": (dict(SHAPE, S=0), dict(causal_offset=0)),
    "no-prefix": (dict(SHAPE, T=0), dict(causal_offset=0)),
    "three-rows": (dict(SHAPE, B=3, L=5, S=5), dict(causal_offset=0)),
    "one-row": (dict(SHAPE, B=1), dict(causal_offset=0)),
    "long-prefix": (dict(SHAPE, T=200), dict(causal_offset=0)),
}


@pytest.mark.parametrize("programs", [1, 12, 1000])  # the rows of a prefix as one sequence, some, one for each
@pytest.mark.parametrize("case", EXPRESSED.values(), ids=EXPRESSED)
def test_every_gradient_in_fp64(case, programs):
    shape, options = case
    torch.manual_seed(2)
    for more in ({}, dict(scale=0.3, sinks=torch.randn(4, dtype=torch.float64))):
        tensors = draw(torch.float64, **shape)
        dout = torch.randn(shape["B"], shape["L"], shape["Hq"], shape["D"], dtype=torch.float64)
        got, want = (run(fn, tensors, dout, **options, **more) for fn in (two_calls(programs), concatenated))
        for name, g, w in zip(NAMES, got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_accurate_as_attention_over_the_concatenation(dtype):
    """Also where 16-bit tensors go in as they are, and a gradient of the prefix is a sum over sequences."""
    shape, got, same, exact = dict(SHAPE, L=33, S=33, D=64, T=40), [], [], []
    options = dict(causal_offset=0)
    for _ in range(8):
        tensors, dout = draw(dtype, **shape), torch.randn(4, 33, 4, 64, dtype=dtype)
        got.append(run(two_calls(8), tensors, dout, **options))
        same.append(run(sdpa, tensors, dout, **options))
        exact.append(run(concatenated, [t.double() for t in tensors], dout.double(), **options))
    for i, name in enumerate(NAMES):
        if name != "lse":
            g, s, e = (torch.stack([r[i] for r in rs]) for rs in (got, same, exact))
            assert_as_accurate(name, g, s, e)


def test_rows_of_a_prefix_are_folded_into_enough_sequences():
    flash = as_on_a_gpu(264)
    assert reference._parts(8, 32, 128, flash) == 8  # 64 programs each
    assert reference._parts(64, 32, 128, flash) == 8
    assert reference._parts(6, 32, 1024, flash) == 1
    assert reference._parts(1, 1, 1, flash) == 1
    assert all(reference._parts(n, 4, 20, calls.CPU_CALLS) == 1 for n in (1, 7, 64))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", [dict(SHAPE, D=64), dict(SHAPE, L=1, D=128, Hq=8), dict(SHAPE, T=0)], ids=str)
def test_torchs_operators_take_these_arguments(shape, causal):
    """Shapes, dtypes and strides only: on the meta device, where the GPU's operators have versions too."""
    q, k, v, *prefix = (t.to("meta") for t in draw(torch.bfloat16, **shape))
    offset = shape["S"] - shape["L"] if causal else None
    options = reference.Options(
        None, None, None, shape["T"], None, None, None, None, None, 0.1, offset, None, 0.0, 0.0
    )  # fmt: skip
    flash = calls.FlashCalls(calls.gpu_fwd, calls.gpu_bwd, wide=False, programs=264)
    out, lse = reference._flash_fwd(q, k, v, *prefix, options, flash)
    assert out.shape == q.transpose(1, 2).shape and out.dtype == torch.bfloat16 and out.is_contiguous()
    assert lse.shape == q.shape[:3] and lse.dtype == torch.float32 and lse.is_contiguous()
    gradients = reference._flash_bwd(torch.empty_like(out), q, k, v, *prefix, out, lse, options, [True] * 4, flash)
    for gradient, tensor in zip(gradients, (q, k, v, *prefix), strict=True):
        assert gradient.shape == tensor.shape and gradient.dtype == torch.bfloat16
        assert (gradient if gradient.ndim == 3 else gradient.transpose(1, 2)).is_contiguous()


def beyond(names, **change):
    offset = {n: change.pop(n) for n in ("causal_offset",) if n in change}
    shape = dict(SHAPE, **change)
    options = {f: None for f in reference.Options._fields} | dict(max_length=9, scale=1.0, softcap=0.0, p=0.0)
    given = {"p" if n == "dropout_p" else n: o for n, o in options_of(names, shape).items()}
    return calls.beyond_gpu_flash(shape["L"], shape["S"], reference.Options(**options | given | offset))


def test_what_a_gpus_flash_attention_cannot_express():
    for names in (["all"], ["all", "causal"], ["all", "causal", "sinks"]):
        assert beyond(names) == "", names
    assert beyond(["rows", "causal"]) == "prefixes that differ by row"
    assert beyond(["window"]) == "a window" and beyond(["causal", "bias"]) == "a bias of the prefix"
    assert beyond(["bool"]) == beyond(["additive"]) == "a mask"
    for change in (dict(L=2, S=6), dict(L=6, S=5), dict(L=6, S=5, causal_offset=0)):
        assert beyond(["causal"], **change) == "queries that do not begin with the keys", change
    assert beyond(["causal"], L=1, S=6) == ""


@pytest.mark.parametrize("names", [["all", "causal"], ["rows", "window", "bias"], ["rows", "bool"]], ids="-".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forced_on_a_cpu(names, dtype):
    """There it is what plain torch is, as far as that is flash."""
    tensors, options = draw(dtype, **SHAPE), options_of(names, SHAPE)
    dout = torch.randn(4, 6, 4, 32, dtype=dtype)
    forced = run(lambda *t, **o: prefix_attention(*t, **o, implementation="flash"), tensors, dout, **options)
    assert all(torch.equal(a, b) for a, b in zip(forced, run(prefix_attention, tensors, dout, **options), strict=True))


def test_forced_beyond_what_it_can(monkeypatch):
    tensors = draw(torch.float32, **SHAPE)
    for kind, what in (("softcap", "a softcap"), ("dropout", "dropout")):
        with pytest.raises(ValueError, match=f"implementation 'flash' cannot run on cpu: {what}: leave the argument"):
            prefix_attention(*tensors, **options_of([kind], SHAPE), implementation="flash")
    monkeypatch.setenv("PEFT_FAST_PREFIX", "flash")
    with pytest.raises(ValueError, match="PEFT_FAST_PREFIX"), torch.no_grad():
        prefix_attention(*tensors, softcap=1.0)
    assert prefix_attention(*tensors)[0].isfinite().all()


# ---- nothing of a GPU is read on the host


EVERYTHING = [
    ["rows", "causal"], ["all", "window"], ["rows", "window", "dropout"],
    ["rows", "additive", "bias", "sinks+softcap+scale"],
]  # fmt: skip


@pytest.mark.parametrize("names", EVERYTHING, ids="-".join)
def test_a_matrix_of_scores_reads_nothing_on_the_host(names):
    """On the meta device there is nothing to be read: .item() and .tolist() raise."""
    given = features(SHAPE)
    options = dict.fromkeys(
        ("starts", "lengths", "order", "max_length", "mask", "prefix_bias", "sinks", "past", "seed")
    )
    options |= dict(scale=0.2, causal_offset=None, window=None, softcap=0.0, dropout_p=0.0, max_length=9)
    for name in names:
        options |= given[name](options["max_length"]) if callable(given[name]) else given[name]
    arguments = [o.to("meta") if isinstance(o, torch.Tensor) else o for o in options.values()]
    q, k, v, *prefix = (t.to("meta") for t in draw(torch.bfloat16, **SHAPE))
    out, lse = reference.prefix_attention_fwd(q, k, v, *prefix, *arguments)
    gradients = reference.prefix_attention_bwd(out, q, k, v, *prefix, out, lse, *arguments, [True] * 4)
    assert [t.shape for t in gradients] == [t.shape for t in (q, k, v, *prefix)]


def test_slots_of_another_prefix_do_not_matter_to_a_matrix_of_scores():
    """Row 1 has no prefix and row 3 a part of the first: what is infinite beyond must not become 0 times infinity."""
    tensors, options = draw(torch.float32, **SHAPE), rows() | dict(softcap=1.0)
    tensors[3], tensors[4] = tensors[3].clone(), tensors[4].clone()
    expected = run(prefix_attention, tensors, torch.ones(4, 6, 4, 32), **options)
    tensors[3][5:], tensors[4][5:] = float("inf"), float("nan")
    got = run(prefix_attention, tensors, torch.ones(4, 6, 4, 32), **options)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_window_counts_on_the_device_and_only_where_something_has_slid_out_of_it():
    def prefix(past):
        return Prefix(lambda layer: None, Rows(None, None, None, 9), 9, past)

    assert prefix(5).window(None, 2) is None
    assert prefix(5).window(16, 2) is None and prefix(5).window(15, 2) == 15
    on_device = prefix(torch.tensor([5]))  # a static cache: the host does not know
    assert on_device.window(1000, 2) == 1000
    for given in (prefix(5), on_device):
        past = given.past_on(torch.device("cpu"))
        assert past.dtype == torch.int64 and past.tolist() == [5]


# ---- which implementation runs


@pytest.fixture
def chip(monkeypatch):
    """A GPU that is described and not there; returns a function that describes another."""
    monkeypatch.setattr(choice, "has_triton", lambda: True)
    monkeypatch.setattr(prefix_choice, "triton_failure", lambda device: "")
    monkeypatch.setattr(prefix_choice, "gpu_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)

    def is_now(capability=(9, 0), kilobytes=227, name="", hip=None):
        properties = types.SimpleNamespace(shared_memory_per_block_optin=kilobytes * 1024, gcnArchName=name)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        prefix_choice.forget()
        calls.flash_fails.cache_clear()

    is_now()
    yield is_now
    prefix_choice.forget()
    calls.flash_fails.cache_clear()


def pick(D=128, dtype=torch.bfloat16, **options):
    return prefix_choice.choose_prefix(GPU, dtype, D, **options).name


NVIDIA = {(8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (9, 0): 227, (10, 0): 227, (10, 3): 227, (12, 0): 99}


@pytest.mark.parametrize("capability", NVIDIA, ids=str)
def test_every_gpu_has_both(chip, capability):
    chip(capability, NVIDIA[capability])
    assert pick() == pick(D=256) == pick(dtype=torch.float32, training=True) == "kernel"
    assert pick(training=True) == pick(D=256, training=True) == "flash"
    assert pick(training=True, beyond_flash="a mask") == "kernel"
    assert pick(dtype=torch.float64) == pick(D=257) == "torch"
    large = pick(D=200, training=True)
    assert large == ("kernel" if capability in ((8, 6), (8, 7), (8, 9), (12, 0)) else "flash")


def test_where_one_of_both_cannot_run(chip, monkeypatch):
    chip((7, 5), 64)
    no_kernel, no_flash = "kernels need 81920 bytes", "flash attention needs compute capability 8.0, not 7.5"
    found = prefix_choice.choose_prefix(GPU, torch.float16, 128)
    assert found.name == "torch" and no_kernel in found.reason and no_flash in found.reason
    chip(hip="6.4", name="gfx942:sramecc+:xnack-")
    assert pick() == pick(training=True) == "kernel"
    chip(hip="6.4", name="gfx90a")
    assert pick() == pick(training=True) == "torch"
    chip()
    monkeypatch.setattr(prefix_choice, "triton_failure", lambda device: "no compiler")
    assert prefix_choice.choose_prefix(GPU, torch.bfloat16, 64) == ("flash", "not 'kernel': no compiler")
    assert pick(beyond_flash="a mask") == "torch"
    with pytest.raises(RuntimeError, match="kernels need 81920 bytes of shared memory in a block, and a GPU has 65536"):
        chip((7, 5), 64)
        pick(implementation="kernel")


def test_a_gradient_that_is_wanted_asks_for_training(monkeypatch):
    asked = []

    def spy(*args, training=False, beyond_flash=""):
        asked.append(training)
        return choice.Choice("torch", "")

    monkeypatch.setattr(op, "choose_prefix", spy)
    tensors = draw(torch.float32, **SHAPE)
    for needed, expected in ((None, [False]), (2, [True, True]), (4, [True, True])):
        asked.clear()
        leaves = [t.detach().requires_grad_(i == needed) for i, t in enumerate(tensors)]
        out, _ = functional.prefix_attention(*leaves)
        if needed is not None:
            out.sum().backward()
        assert asked == expected

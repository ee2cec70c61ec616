"""prefix_attention as an operator: registration, torch.compile, errors and the choice of an implementation."""

import types

import pytest
import torch
from prefix_oracle import SHAPE, draw, options_of
from torch._dynamo.testing import CompileCounterWithBackend

from peft_fast.ops import choice, functional, prefix_attention as op, prefix_choice, situations
from peft_fast.ops.functional import prefix_attention
from peft_fast.ops.prefix_choice import choose_prefix


def all_arguments(names, dtype=torch.float32):
    options = options_of(names, SHAPE)
    tensors = draw(dtype, **SHAPE)
    order = ("starts", "lengths", "order", "max_length", "mask", "prefix_bias", "sinks", "past", "seed")
    values = [options.get(n) for n in order]
    values[3] = options.get("max_length", 9)
    numbers = [
        0.2,
        options.get("causal_offset"),
        options.get("window"),
        options.get("softcap", 0.0),
        options.get("dropout_p", 0.0),
    ]
    return tensors, [*values, *numbers]


OPERATOR = [["all"], ["rows", "bool", "bias", "sinks"], ["rows", "window", "dropout"], ["all", "additive", "softcap"]]


@pytest.mark.parametrize("names", OPERATOR, ids="-".join)
def test_registration(names):
    for dtype in (torch.float32, torch.float16, torch.float64):
        # all checks once; in the other dtypes those of sizes, strides and dtypes
        names_of_all = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        checks = names_of_all if dtype == torch.float32 else "test_faketensor"
        tensors, options = all_arguments(names, dtype)
        torch.library.opcheck(op.prefix_fwd, (*tensors, *options, "auto"), test_utils=checks)
        out, lse = op.prefix_fwd(*tensors, *options, "auto")
        arguments = (torch.randn_like(out), *tensors, out, lse, *options)
        torch.library.opcheck(op.prefix_bwd, (*arguments, [True] * 4, "auto"), test_utils=checks)
        for needs in ([False, True, False, True], [True, False, False, False]):
            torch.library.opcheck(op.prefix_bwd, (*arguments, needs, "auto"), test_utils="test_faketensor")
            sizes = [t.numel() for t in op.prefix_bwd(*arguments, needs, "auto")]
            assert sizes == [t.numel() * n for t, n in zip(tensors, [*needs, needs[3]], strict=True)]


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_one_graph_whatever_the_rows_and_the_past(train):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    tensors = [t.requires_grad_(train) for t in draw(torch.float32, **SHAPE)]

    def attend(past, starts, lengths):
        return prefix_attention(
            *tensors,
            starts=starts,
            lengths=lengths,
            max_length=5,
            past=past,
            window=7,
            mask=torch.ones(4, 1, 1, 6).bool(),
        )[0]

    compiled = torch.compile(attend, backend=counter, fullgraph=True)
    with torch.set_grad_enabled(train):
        for step, (starts, lengths) in enumerate(
            [([0, 1, 2, 3], [5, 4, 3, 0]), ([4, 0, 0, 4], [5, 5, 5, 5]), ([0] * 4, [0] * 4)]
        ):
            arguments = torch.tensor([step]), *(torch.tensor(t, dtype=torch.int32) for t in (starts, lengths))
            results = []
            for function in (compiled, attend):
                out = function(*arguments)
                results.append([out, *(torch.autograd.grad(out.square().sum(), tensors) if train else ())])
            for got, want in zip(*results, strict=True):
                torch.testing.assert_close(got, want)
    assert counter.frame_count == 1


def test_dynamic_lengths_share_a_graph():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def attend(mask, *tensors):
        return prefix_attention(*tensors, mask=mask)[0]

    compiled = torch.compile(attend, backend=counter, fullgraph=True, dynamic=True)
    counts = set()
    for S in (7, 11, 14):
        tensors = draw(torch.float32, **dict(SHAPE, S=S))
        mask = torch.rand(4, 1, 6, S) > 0.2
        torch.testing.assert_close(compiled(mask, *tensors), attend(mask, *tensors))
        counts.add(counter.frame_count)
    assert len(counts) == 1


# ---- errors and choice


def wrong(**change):
    """A call with one thing wrong."""
    tensors = dict(zip(("q", "k", "v", "prefix_k", "prefix_v"), draw(torch.float32, **SHAPE), strict=True))
    return tensors | change


def row_numbers(start, length=1, count=4, **change):
    """starts and lengths, equal for every row."""
    numbers = (torch.full((count,), n, dtype=torch.int32) for n in (start, length))
    return dict(zip(("starts", "lengths"), numbers, strict=True)) | change


INT = torch.int32
ERRORS = [
    (dict(q=torch.randn(4, 4, 6)), ValueError, r"q \(B, Hq, L, D\)"),
    (dict(q=torch.randn(4, 4, 0, 32)), ValueError, "L >= 1"),
    (dict(q=torch.randn(4, 3, 6, 32)), ValueError, "heads of k must divide"),
    (dict(k=torch.randn(4, 2, 6, 16)), ValueError, "must share B and D"),
    (dict(v=torch.randn(4, 2, 5, 32)), ValueError, "v must have k's shape"),
    (dict(prefix_k=torch.randn(9, 4, 32)), ValueError, "prefix_k must be"),
    (dict(prefix_v=torch.randn(8, 2, 32)), ValueError, "prefix_v must have prefix_k's shape"),
    (dict(prefix_k=torch.randn(9, 2, 32).half()), TypeError, "prefix_k must have q's dtype"),
    (dict(v=torch.randn(4, 2, 6, 32).double()), TypeError, "v must have q's dtype"),
    (dict(q=torch.randint(3, (4, 4, 6, 32))), TypeError, "q must be fp16"),
    (dict(k=torch.randn(4, 2, 6, 32, device="meta")), ValueError, "k must be on q's device"),
    (dict(starts=torch.zeros(4, dtype=INT)), ValueError, "go together"),
    (row_numbers(0), ValueError, "need max_length"),
    (row_numbers(0, count=3, max_length=1), ValueError, r"starts must be \(4,\)"),
    (row_numbers(0, starts=torch.zeros(4), max_length=1), TypeError, "starts must be torch.int32"),
    (row_numbers(0, max_length=10), ValueError, "from 0 to 9"),
    (row_numbers(8, 2, max_length=2), ValueError, "row 0 asks"),
    (row_numbers(0, 3, max_length=2), ValueError, "max_length = 2"),
    (dict(order=torch.zeros(4)), TypeError, "order must be torch.int32"),
    (dict(max_length=5), ValueError, "without lengths max_length is the number of slots 9"),
    (dict(mask=torch.ones(4, 6, 6).bool()), ValueError, "mask must broadcast"),
    (dict(mask=torch.ones(4, 2, 6, 6).bool()), ValueError, "mask must broadcast"),
    (dict(mask=torch.ones(4, 1, 6, 6).half()), TypeError, "mask must be bool, fp32 or q's dtype"),
    (dict(prefix_bias=torch.zeros(1, 4, 6, 8)), ValueError, "prefix_bias must broadcast"),
    (dict(prefix_bias=torch.zeros(1, 4, 6, 9).bool()), TypeError, "prefix_bias must be fp16"),
    (dict(sinks=torch.zeros(2)), ValueError, r"sinks must be \(Hq,\)"),
    (dict(mask=torch.zeros(1, 1, 6, 6, requires_grad=True)), ValueError, "mask gets no gradient"),
    (dict(prefix_bias=torch.zeros(1, 1, 6, 9, requires_grad=True)), ValueError, "prefix_bias gets no gradient"),
    (dict(sinks=torch.zeros(4, requires_grad=True)), ValueError, "sinks gets no gradient"),
    (dict(past=torch.tensor(3)), ValueError, r"past must be \(1,\)"),
    (dict(past=torch.tensor([3], dtype=INT)), TypeError, "past must be torch.int64"),
    (dict(window=0), ValueError, "window must be at least 1"),
    (dict(softcap=-1.0), ValueError, "softcap must be"),
    (dict(dropout_p=1.0), ValueError, "dropout_p must be in"),
    (dict(dropout_p=0.1), ValueError, "needs seed"),
    (dict(dropout_p=0.1, seed=torch.zeros(1)), TypeError, "seed must be torch.int64"),
    (dict(implementation="fast"), ValueError, "implementation must be one of"),
    (dict(implementation="kernel"), RuntimeError, "is a GPU kernel and x is on cpu"),
]  # fmt: skip


@pytest.mark.parametrize("change, kind, message", ERRORS, ids=[message for _, _, message in ERRORS])
def test_errors_say_what_is_wrong(change, kind, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(kind, match=message):
        prefix_attention(**wrong(**change))


def test_what_gets_no_gradient_may_ask_for_one_without_gradients():
    with torch.no_grad():
        prefix_attention(**wrong(sinks=torch.zeros(4, requires_grad=True)))


def test_choice(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(choice, "has_triton", lambda: True)
    monkeypatch.setattr(prefix_choice, "gpu_name", lambda device: "a GPU")
    monkeypatch.setattr(prefix_choice, "triton_failure", lambda device: "")
    chip = types.SimpleNamespace(shared_memory_per_block_optin=100 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: chip)
    monkeypatch.setattr(prefix_choice, "flash_fails", lambda device, dtype, D: "no flash")
    prefix_choice.forget()
    assert choose_prefix(cpu, torch.float32, 64) == ("torch", "cpu tensors take plain torch")
    assert choose_prefix(gpu, torch.bfloat16, 256).name == "kernel"
    assert choose_prefix(gpu, torch.bfloat16, 257).name == "torch"
    assert choose_prefix(gpu, torch.float64, 64).name == "torch"
    assert choose_prefix(gpu, torch.bfloat16, 64, "torch") == ("torch", "forced by the argument")
    with pytest.raises(ValueError, match="at most 256"):
        choose_prefix(gpu, torch.bfloat16, 257, "kernel")
    with pytest.raises(TypeError, match="no kernel for float64"):
        choose_prefix(gpu, torch.float64, 64, "kernel")
    monkeypatch.setenv("PEFT_FAST_PREFIX", "torch")
    assert choose_prefix(gpu, torch.bfloat16, 64) == ("torch", "forced by PEFT_FAST_PREFIX")
    monkeypatch.setenv("PEFT_FAST_PREFIX", "kernel")
    with pytest.raises(RuntimeError, match="PEFT_FAST_PREFIX"):
        functional.prefix_attention(*draw(torch.float32, **SHAPE))
    monkeypatch.setenv("PEFT_FAST_PREFIX", "quick")
    with pytest.raises(ValueError, match="implementation must be one of"):
        choose_prefix(cpu, torch.float32, 64)
    monkeypatch.delenv("PEFT_FAST_PREFIX")
    monkeypatch.setattr(choice, "has_triton", lambda: False)
    prefix_choice.forget()
    reason = "a matrix of scores; not 'kernel': triton is not installed; not 'flash': no flash"
    assert choose_prefix(gpu, torch.bfloat16, 64) == ("torch", reason)
    assert any(f"{row}".startswith("prefix_attention cpu, bf16, heads of 128") for row in situations.typical())
    prefix_choice.forget()

"""Bytes: every launch of every kernel moves what its model says (traffic_models.py), and asks for no more.

On sizes that fill no tile, and on several tiles in each direction. Public functions: test_traffic_ops.py.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from lora_inputs import make
from mixed_sites import Adapters
from prefix_oracle import draw as draw_attention
from test_fourbit import Quantized
from torch import Tensor
from traffic import COUNTED, ELSEWHERE, Launch, counting
from traffic_models import MODELS, check
from triton.runtime.jit import KernelInterface

from csrc_triton.common import aot
from csrc_triton.lora import linear as lora_linear
from csrc_triton.quantized import fourbit, fourbit_decode, fourbit_linear, int8_linear, int8_quantize
from peft_fast.ops import functional

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INT = dict(dtype=torch.int32, device=DEVICE)
BF16, FP32 = torch.bfloat16, torch.float32
# Tiles so small that small sizes need several in each direction.
TILES: dict[str, dict[str, int]] = {
    "lora_shrink": dict(BLOCK_M=16, BLOCK_K=16, LARGEST_R=16),
    "lora_gemm": dict(BLOCK_M=16, BLOCK_N=32, BLOCK_K=16, LARGEST_R=16),
    "lora_expand": dict(BLOCK_M=16, BLOCK_N=32, LARGEST_R=16),
    "lora_grad": dict(BLOCK_M=16, BLOCK_C=32, LARGEST_R=16, ROWS=32),
    "lora_one_launch": dict(BLOCK_M=16, BLOCK_N=32, BLOCK_K=32),
    "mixed_shrink": dict(BLOCK_M=16, BLOCK_K=16, LARGEST_R=16),
    "mixed_expand": dict(BLOCK_M=16, BLOCK_N=32, LARGEST_R=16),
    "mixed_gemm": dict(BLOCK_M=16, BLOCK_N=32, BLOCK_K=32, LARGEST_R=16),
    "mixed_one_launch": dict(BLOCK_N=32, BLOCK_K=16, LARGEST_R=16, SPLIT=2),
    "fourbit": dict(BLOCK_E=256),
    "fourbit_linear": dict(BLOCK_M=16, BLOCK_N=32, BLOCK_K=32),
    "fourbit_mixed": dict(BLOCK_N=32, BLOCK_K=32, LARGEST_R=16, SPLIT=2),
    "int8_quantize": dict(BLOCK_M=16, BLOCK_K=32, LARGEST_R=16),
    "int8_quantize_rows": dict(BLOCK_M=16, BLOCK_K=32, LARGEST_R=16, SPLIT=3),
    "int8_gemm": dict(BLOCK_M=16, BLOCK_N=32, BLOCK_K=32, LARGEST_R=16),
    "prefix_fwd": dict(BLOCK_M=16, BLOCK_N=16),
    "prefix_dq": dict(BLOCK_M=16, BLOCK_N=16),
    "prefix_dkv": dict(BLOCK_M=16, BLOCK_N=16),
    "prefix_dprefix": dict(BLOCK_M=16, BLOCK_N=16, PROGRAMS=16),
    "prefix_decode": dict(BLOCK_M=16, BLOCK_N=16),
}


@pytest.fixture
def small_tiles(force: Callable[[str, dict[str, int]], None]) -> None:
    for kernel, blocks in TILES.items():
        force(kernel, blocks)


def seed() -> Tensor:
    return torch.tensor([7], device=DEVICE)


# --------------------------------------------------------------------------------------------------------- every kernel


def lora_op(implementation: str, M: int, N: int, K: int, R: int, dtype: torch.dtype, p: float, biased: bool) -> None:
    """Forward and backward of lora_linear, to x, a and b."""
    x, w, a, b, bias = make(M, N, K, R, dtype, adapter_dtype=FP32, device=DEVICE)
    leaves = [t.requires_grad_() for t in (x, a, b)]
    options = dict(dropout_p=p, seed=seed() if p else None, implementation=implementation)
    y = functional.lora_linear(x, w, a, b, 2.0, bias if biased else None, **options)
    torch.autograd.grad(y, leaves, torch.ones(M, N, device=DEVICE, dtype=dtype))


def lora_update_op(M: int, N: int, K: int, R: int) -> None:
    """An opaque base: the expand reads it, and writes a new tensor."""
    x, _, a, b, _ = make(M, N, K, R, BF16, adapter_dtype=FP32, device=DEVICE)
    base = torch.randn(M, N, device=DEVICE)
    y = functional.lora_update(
        base, x.requires_grad_(), a, b, 2.0, dropout_p=0.3, seed=seed(), implementation="split"
    )  # fmt: skip
    torch.autograd.grad(y.sum(), x)


LORA = [("split", 0.3, True), ("split", 0.0, False), ("one_launch", 0.3, True), ("addmm", 0.3, False)]


@pytest.mark.parametrize("implementation, p, biased", LORA)
def test_lora_sizes_that_fill_no_tile(implementation, p, biased):
    with counting() as launches:
        lora_op(implementation, 37, 50, 65, 5, BF16, p, biased)
        lora_op(implementation, 3, 1, 7, 1, FP32, p, biased)
    check(launches)


@pytest.mark.parametrize("implementation, p, biased", LORA)
def test_lora_several_tiles(implementation, p, biased, small_tiles):
    with counting() as launches:
        lora_op(implementation, 36, 70, 134, 20, BF16, p, biased)
    check(launches)
    assert "sum_planes" in [launch.kernel for launch in launches]


def test_lora_update_and_groups(small_tiles):
    with counting() as launches:
        lora_update_op(37, 50, 65, 5)
        lora_update_op(20, 70, 134, 20)
        x, w, *_ = make(40, 33, 70, 1, BF16, device=DEVICE)
        as_, bs = zip(*(make(1, 33, 70, R, FP32, device=DEVICE)[2:4] for R in (8, 5)), strict=True)
        lora_linear.lora_linear_group_fwd(x, [w, w], [None, None], list(as_), list(bs), [2.0, 0.7], "split")
    check(launches)


MIXED_RANKS = (1, 4, 0, 64, 7, 16, 33, 8)


def mixed_op(implementation: str, M: int, N: int, K: int, dtype: torch.dtype, biased: bool) -> list[Launch]:
    """A batch with rows that have no adapter, ranks that are no multiple of 8, a slot without an adapter."""
    adapters = Adapters(K, N, FP32, MIXED_RANKS, DEVICE)
    slots = (torch.arange(M, device=DEVICE) * 5 % 9).sort(descending=True).values - int(M > 64)
    x, w, _, _, bias = make(M, N, K, 1, dtype, device=DEVICE)
    plan = functional.mixed_plan(slots, len(MIXED_RANKS), 1)
    with counting(**memory_of(adapters)) as launches:
        functional.lora_linear_mixed(
            x, w, adapters.site, plan, bias if biased else None, implementation=implementation
        )  # fmt: skip
    return launches


def memory_of(adapters: Adapters) -> dict[str, list[Tensor]]:
    """All A and all B that kernels find through the table of addresses, B's rows with what fills them up."""
    a = [a for a, _ in adapters.ab]
    return dict(A=a, B=[b.as_strided((b.shape[0], b.stride(0)), (b.stride(0), 1)) for _, b in adapters.ab if b.numel()])


MIXED = {
    "grouped": ["mixed_shrink", "mixed_expand"], "split": ["mixed_shrink", "mixed_gemm"],
    "one_launch": ["mixed_one_launch"],
}  # fmt: skip


@pytest.mark.parametrize("implementation", MIXED)
@pytest.mark.parametrize("biased", [True, False], ids=["bias", ""])
def test_mixed_sizes_that_fill_no_tile(implementation, biased):
    for M, N, K, dtype in ((37, 50, 72, BF16), (3, 1, 9, FP32)):
        assert check(mixed_op(implementation, M, N, K, dtype, biased)) == MIXED[implementation]


@pytest.mark.parametrize("implementation", MIXED)
def test_mixed_several_tiles(implementation, small_tiles):
    """Of rows beyond 512 a block of the plan has 64, and a kernel with smaller tiles takes it in parts."""
    M, N, K = dict(one_launch=(60, 70, 150), split=(100, 70, 150), grouped=(520, 40, 70))[implementation]
    launches = mixed_op(implementation, M, N, K, BF16, True)
    assert check(launches) == MIXED[implementation]


@pytest.mark.parametrize("M", [1, 37, 65, 600])
def test_mixed_plan(M):
    slots = torch.arange(M, device=DEVICE) * 5 % 9 - 1
    with counting() as launches:
        torch.ops.peft_fast.mixed_plan(slots, 8, 5, 16, "kernel")
    assert check(launches) == ["mixed_plan"]


@pytest.mark.parametrize("M, V, D", [(37, 29, 41), (520, 50, 70)])
def test_mixed_embedding(M, V, D):
    adapters, ids = Adapters(V, D, BF16, MIXED_RANKS, DEVICE), torch.randint(-2, V + 2, (M,), device=DEVICE)
    plan = functional.mixed_plan(torch.arange(M, device=DEVICE) % 9 - 1, len(MIXED_RANKS), 1)
    base = torch.randn(M, D, device=DEVICE)
    with counting(**memory_of(adapters)) as launches:
        functional.lora_embedding_mixed(base, ids, adapters.site, plan, V, implementation="grouped")
    assert check(launches) == ["mixed_embedding", "mixed_expand"]


@pytest.mark.parametrize("nested", [None, 256, 4])
@pytest.mark.parametrize("N, K, blocksize", [(33, 70, 64), (17, 5, 32), (40, 96, 512)])
def test_fourbit(N, K, blocksize, nested, small_tiles):
    weight = Quantized(N, K, blocksize, nested)
    memory = torch.empty(N, K + 24, dtype=BF16, device=DEVICE)
    with counting() as launches:
        fourbit.dequantize(*weight.stored, weight.shape, FP32, weight.nested)
        fourbit.dequantize(*weight.stored, weight.shape, BF16, weight.nested, memory[:, :K])
    assert check(launches) == ["fourbit"] * 2


@pytest.mark.parametrize("nested", [None, 4])
@pytest.mark.parametrize("M, N, K, R, tiles", [(3, 33, 128, 5, {}), (40, 70, 192, 20, TILES)])
def test_fourbit_linear_and_mixed(M, N, K, R, tiles, nested, force):
    for kernel, blocks in tiles.items():
        force(kernel, blocks)
    weight, (x, _, a, b, bias) = Quantized(N, K, 64, nested), make(M, N, K, R, BF16, device=DEVICE)
    stored = x, *weight.stored, N, weight.quant_type, weight.nested
    adapters = Adapters(K, N, BF16, MIXED_RANKS, DEVICE)
    plan, site = functional.mixed_plan(torch.arange(M, device=DEVICE) % 9 - 1, 8, 1), adapters.site
    tables = site.addresses, site.ranks, site.scales, site.dtype, site.max_rank
    with counting(**memory_of(adapters)) as launches:
        fourbit_linear.fourbit_linear(*stored, bias, a, b, 2.0)
        fourbit_linear.fourbit_linear(*stored)
        fourbit_linear.fourbit_mixed(
            *stored, bias, *tables, plan.order, plan.blocks, plan.block_rows, plan.counters[0]
        )  # fmt: skip
    assert check(launches) == ["fourbit_linear", "fourbit_linear", "fourbit_mixed"]


@pytest.mark.parametrize("nested", [None, 4])
@pytest.mark.parametrize("M, N, K, R", [(3, 33, 128, 5), (16, 70, 1344, 20)])
def test_fourbit_decode(M, N, K, R, nested):
    weight, (x, _, a, b, bias) = Quantized(N, K, 64, nested), make(M, N, K, R, BF16, device=DEVICE)
    stored = x, *weight.stored, N, weight.quant_type, weight.nested
    with counting() as launches:
        fourbit_decode.fourbit_decode(*stored, bias, a, b, 2.0)
        fourbit_decode.fourbit_decode(*stored)
    assert check(launches) == ["fourbit_decode", "fourbit_finish"] * 2


@pytest.mark.parametrize("few_rows, quantize", [(512, "int8_quantize_rows"), (0, "int8_quantize")])
@pytest.mark.parametrize("M, N, K, R, tiles", [(5, 33, 70, 5, {}), (40, 70, 150, 40, TILES)])
def test_int8(M, N, K, R, tiles, few_rows, quantize, force, monkeypatch):
    monkeypatch.setattr(int8_quantize, "FEW_ROWS", few_rows)
    for kernel, blocks in tiles.items():
        force(kernel, blocks)
    x, _, a, b, bias = make(M, N, K, R, BF16, adapter_dtype=FP32, device=DEVICE)
    w, w_absmax = torch.randint(-127, 128, (N, K), dtype=torch.int8, device=DEVICE), torch.rand(N, device=DEVICE)
    with counting() as launches:
        q, absmax, planes = int8_quantize.int8_quantize(x, a, 2.0)
        int8_linear.int8_gemm(q, absmax, w, w_absmax, bias, planes, b, BF16)
        int8_linear.int8_gemm(*int8_quantize.int8_quantize(x)[:2], w, w_absmax, None, None, None, BF16)
    assert check(launches) == [quantize, "int8_gemm"] * 2


def rows() -> dict[str, Any]:
    """Rows 0 and 3 share a prefix, row 1 has none, row 2 has another one, and slots lie between them."""
    starts, lengths = torch.tensor([0, 40, 37, 0], **INT), torch.tensor([33, 0, 17, 33], **INT)
    return dict(starts=starts, lengths=lengths, max_length=33, order=starts.argsort(stable=True).int())


ATTENTION: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "causal": (dict(T=52), dict(causal_offset=5)),
    "window-rows": (dict(T=60), dict(causal_offset=5, window=20, past=2)),
    "mask-dropout-bias": (dict(T=20), dict(mask=True, dropout_p=0.3, bias=True)),
    "padding": (dict(T=20), dict(padding=True)),
    "sinks": (dict(T=1), dict(sinks=True)),
}


def attention_op(KV: int, L: int, S: int, D: int, dtype: torch.dtype, name: str) -> list[str]:
    """Forward of one of ATTENTION, and unless it is a decode its backward to all that has a gradient."""
    size, chosen = ATTENTION[name]
    options = {n: chosen[n] for n in ("causal_offset", "window", "dropout_p") if n in chosen}
    if "past" in chosen:
        options |= rows() | dict(past=torch.tensor([chosen["past"]], device=DEVICE))
    if "mask" in chosen:
        options |= dict(mask=torch.ones(4, 1, L, S, dtype=torch.bool, device=DEVICE), seed=seed())
        if L > 16:  # a bias of a decode is not modelled
            options |= dict(prefix_bias=torch.randn(1, 2 * KV, L, size["T"], device=DEVICE))
    if "padding" in chosen:
        options |= dict(mask=torch.ones(4, 1, 1, S, dtype=torch.bool, device=DEVICE))
    if "sinks" in chosen:
        options |= dict(sinks=torch.randn(2 * KV, device=DEVICE))
    tensors = draw_attention(dtype, DEVICE, B=4, Hq=2 * KV, Hkv=KV, L=L, S=S, D=D, **size)
    leaves = [t.requires_grad_() for t in tensors]
    with counting() as launches:
        out, _ = functional.prefix_attention(*leaves, **options, implementation="kernel")
        if L > 16:
            torch.autograd.grad(out, leaves, torch.ones_like(out))
    return check(launches)


BACKWARD = ["prefix_delta", "prefix_dq", "prefix_dkv", "prefix_dprefix", "sum_planes", "sum_planes"]


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_sizes_that_fill_no_tile(name):
    assert attention_op(2, 33, 37, 24, BF16, name) == ["prefix_fwd", *BACKWARD]


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_several_tiles(name, small_tiles):
    assert attention_op(1, 33, 36, 12, FP32, name) == ["prefix_fwd", *BACKWARD]


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("KV, L, D, dtype", [(2, 1, 80, FP32), (1, 11, 20, BF16)])
def test_decode(KV, L, D, dtype, name, small_tiles):
    assert attention_op(KV, L, 70, D, dtype, name) == ["prefix_decode", "prefix_merge"]


# ---------------------------------------------------------------------------------------------------------- the counter


def test_every_kernel_has_a_model():
    found = {
        name.removeprefix("_").removesuffix("_kernel")
        for module in aot.kernel_modules()
        for name, value in vars(module).items()
        if isinstance(value, KernelInterface) and name.endswith("_kernel")
    }
    assert found == set(MODELS)


@triton.jit
def _pattern_kernel(x_ptr, y_ptr, table_ptr, n, BLOCK: tl.constexpr):
    """Load n elements of x in steps of 2, what the table points to, and the first y; add to it, store what follows."""
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs * 2, mask=offs < n, other=0.0)
    far = tl.load(table_ptr).to(tl.pointer_type(tl.float16))
    tl.atomic_add(y_ptr, 1.0)
    tl.store(y_ptr + 1 + offs // 2, x + tl.load(far).to(tl.float32), mask=offs < n)


def test_the_counter_itself():
    """Masks, gaps, repeats within a launch and beyond it, a tensor that is no argument, element sizes."""
    memory, y = torch.ones(16, device=DEVICE), torch.zeros(8, device=DEVICE)
    far = torch.ones(3, dtype=torch.float16, device=DEVICE)
    table = torch.tensor([far.data_ptr()], device=DEVICE)
    with counting() as unknown:
        _pattern_kernel[(3,)](memory[::2], y, table, 5, BLOCK=8)
    with counting(far=[far]) as known:
        _pattern_kernel[(1,)](memory, y, table, 5, BLOCK=8)
    assert (unknown + known)[1].kernel == "pattern" and unknown[0]["n"] == 5
    if COUNTED:
        expected = dict(x=20, table=8)
        assert unknown[0].unique_loaded == expected | {ELSEWHERE: 2}
        assert unknown[0].loaded == {name: 3 * size for name, size in unknown[0].unique_loaded.items()}
        assert (unknown[0].unique_stored, unknown[0].stored) == (dict(y=12), dict(y=60))
        assert (unknown[0].unique_atomic, unknown[0].atomic) == (dict(y=4), dict(y=12))
        assert known[0].unique_loaded == expected | dict(far=2)
        assert (known[0].must_move, unknown[0].must_move) == (42, 42)
    assert y[0] == 4

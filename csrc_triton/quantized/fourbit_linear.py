"""Products with bitsandbytes' 4-bit weights for few rows, in one launch: y = x @ w.T + bias + the low-rank update.

    x (M, K)   packed, absmax of w (N, K), Nested: fourbit.py   a (R, K)   b (N, R)   bias (N,)   y (M, N)

``fourbit_linear`` has one adapter; in ``fourbit_mixed`` every row has its own, as in mixed/one_launch.py, whose
protocol of jobs, counters and waiting is used as it is: read it there.

w never exists: nibbles become codes in registers, and an absmax is multiplied once with the sum over its block,

    y[m, n] = sum over blocks of absmax[n, block] * sum over k of x[m, k] * code[q[n, k]]

so a block must not straddle rows (``fits``). Computed as y.T = w @ x.T: w is then the operand that tensor cores take
from registers. A byte holds neighbours in K; instead of interleaving them, even and odd columns are two products.

How nibbles become codes: fourbit_codes.py. At most 16 rows with one adapter are better served by fourbit_decode.py.
Codes are rounded to the dtype of x, where dequantizing rounds their product with the absmax: as accurate, other bits.
Accumulates in fp32. Traffic: N*K/2 bytes + the absmax + M*K elements, R*K per program from L2.
arXiv:2305.14314, arXiv:2106.09685.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.aot import AotCase, case, ranks as aot_ranks, x_type
from ..common.launch import launch
from ..common.tuning import ALWAYS, ARCHS, CUDA, HOPPER, Candidate, block_r, candidates, cdiv, config_for, power_of_2
from ..mixed.linear import lora_linear_mixed
from ..mixed.one_launch import _shrink_job
from ..mixed.table import DTYPES, adapter, load_b, load_s, padded
from .fourbit import Nested, dequantize, load_absmax, nested_of
from .fourbit_codes import decode, prmt, prmt_for
from .fourbit_decode import decodes, fourbit_decode

MAX_M, MAX_RANK = 64, 128
AMD = ("gfx942",)


def _blocks(m: int, n: int, k: int, **more: int) -> dict[str, int]:
    return dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k) | more


# BLOCK_K: at most; a step lies in one block of w.
CANDIDATES = candidates("fourbit_linear", [
    Candidate(_blocks(16, 32, 64), 4, 4, CUDA, default_to=16),
    Candidate(_blocks(16, 64, 64), 4, 4, HOPPER),
    Candidate(_blocks(32, 64, 64), 4, 4, HOPPER, default_to=32),
    Candidate(_blocks(64, 64, 64), 8, 3, CUDA, default_to=ALWAYS),
    Candidate(_blocks(16, 32, 64), 4, 2, AMD, default_to=16),
    Candidate(_blocks(32, 32, 64), 4, 2, AMD, default_to=ALWAYS),
    Candidate(_blocks(16, 16, 32), 4, 1, ARCHS, 4, default_to=ALWAYS),
])  # fmt: skip
# BLOCK_M holds all rows of x.
MIXED_CANDIDATES = candidates("fourbit_mixed", [
    Candidate(_blocks(16, 32, 64, LARGEST_R=32, SPLIT=4), 4, 4, CUDA, default_to=16),
    Candidate(_blocks(32, 64, 64, LARGEST_R=32, SPLIT=4), 8, 4, ("sm_90",), default_to=32),
    Candidate(_blocks(64, 64, 64, LARGEST_R=32, SPLIT=4), 8, 3, CUDA, default_to=ALWAYS),
    Candidate(_blocks(16, 32, 64, LARGEST_R=32, SPLIT=4), 4, 2, AMD, default_to=16),
    Candidate(_blocks(64, 16, 64, LARGEST_R=16, SPLIT=4), 4, 2, AMD, default_to=ALWAYS),
    Candidate(_blocks(64, 16, 32, LARGEST_R=16, SPLIT=4), 8, 2, ARCHS, 4, default_to=ALWAYS),
])  # fmt: skip


@triton.jit
def fourbit_step(acc, x, byte, absmax, code_ptr, PRMT: tl.constexpr):
    """acc (BLOCK_N, BLOCK_M) + absmax (BLOCK_N,) * (code @ x.T), x (BLOCK_M, BLOCK_K), byte (BLOCK_N, BLOCK_K / 2)."""
    even, odd = decode(byte, code_ptr, x, PRMT)
    x_even, x_odd = tl.split(x.reshape(x.shape[0], x.shape[1] // 2, 2))
    part = tl.dot(even, x_even.T, input_precision="ieee")
    part = tl.dot(odd, x_odd.T, part, input_precision="ieee")
    return acc + part * absmax[:, None]


@triton.jit
def _fourbit_linear_kernel(
    x_ptr, packed_ptr, code_ptr, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, bias_ptr, a_ptr, b_ptr, y_ptr,
    scale, M, N, K, R,
    stride_xm, stride_ar, stride_ak, stride_bn, stride_br, stride_ym,
    BLOCKSIZE: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, PRMT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program writes one (BLOCK_M, BLOCK_N) tile of y; R fits in BLOCK_R. No a: no update."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k, offs_r = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    mask_m, mask_n, mask_r = offs_m < M, offs_n < N, offs_r < R
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :]
    w_ptrs = packed_ptr + offs_n[:, None] * (K // 2) + tl.arange(0, BLOCK_K // 2)[None, :]
    first_block = offs_n * (K // BLOCKSIZE)
    if a_ptr is not None:
        a_ptrs = a_ptr + offs_k.to(tl.int64)[:, None] * stride_ak + offs_r.to(tl.int64)[None, :] * stride_ar

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    acc_s = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, K, BLOCK_K):
        block = first_block + k // BLOCKSIZE
        absmax = load_absmax(absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, block, mask_n, NESTED_BLOCKSIZE)
        x = tl.load(x_ptrs, mask=mask_m[:, None], other=0.0)  # (BLOCK_M, BLOCK_K)
        byte = tl.load(w_ptrs, mask=mask_n[:, None], other=0)  # (BLOCK_N, BLOCK_K / 2)
        acc = fourbit_step(acc, x, byte, absmax, code_ptr, PRMT)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K // 2
        if a_ptr is not None:
            a = tl.load(a_ptrs, mask=mask_r[None, :], other=0.0).to(x.dtype)  # (BLOCK_K, BLOCK_R)
            acc_s = tl.dot(x, a, acc_s, input_precision="ieee")
            a_ptrs += BLOCK_K * stride_ak

    if a_ptr is not None:
        s = (acc_s * tl.cast(scale, tl.float32)).to(x_ptr.dtype.element_ty)
        b_ptrs = b_ptr + offs_n[:, None] * stride_bn + offs_r[None, :] * stride_br
        b = tl.load(b_ptrs, mask=mask_n[:, None] & mask_r[None, :], other=0.0).to(s.dtype)  # (BLOCK_N, BLOCK_R)
        acc = tl.dot(b, s.T, acc, input_precision="ieee")
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    y_ptrs = y_ptr + offs_m[None, :] * stride_ym + offs_n[:, None]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m[None, :] & mask_n[:, None])


@triton.jit
def _fourbit_mixed_kernel(
    x_ptr, packed_ptr, code_ptr, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, bias_ptr, blocks_ptr, order_ptr,
    addresses_ptr, ranks_ptr, scales_ptr, planes_ptr, counters_ptr, y_ptr,
    M, N, K, n_blocks,
    stride_xm, stride_pp, stride_pm, stride_ym,
    DTYPE: tl.constexpr, SPLIT: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCKSIZE: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, PRMT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program draws jobs, then writes BLOCK_N columns of y for all rows; the blocks are at most BLOCK_B."""
    offs_b = tl.arange(0, BLOCK_B)
    slots = tl.load(blocks_ptr + offs_b * 3, mask=offs_b < n_blocks, other=-1)
    live = tl.sum((slots >= 0).to(tl.int32), axis=0)  # they come first
    jobs = live * SPLIT
    ticket = tl.atomic_add(counters_ptr, 1, sem="relaxed")
    while ticket < jobs:
        _shrink_job(
            x_ptr, blocks_ptr, order_ptr, addresses_ptr, ranks_ptr, planes_ptr, ticket, K,
            stride_xm, 1, stride_pp, stride_pm, DTYPE, SPLIT, BLOCK_J, BLOCK_K, BLOCK_R,
        )  # fmt: skip
        tl.debug_barrier()  # all of the program has stored its part of the plane
        tl.atomic_add(counters_ptr + 1, 1, sem="release")
        ticket = tl.atomic_add(counters_ptr, 1, sem="relaxed")

    position = tl.arange(0, BLOCK_M)
    mask_m = position < M
    rows = tl.load(order_ptr + position, mask=mask_m, other=0).to(tl.int64)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k, offs_r = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    mask_n = offs_n < N
    x_ptrs = x_ptr + rows[:, None] * stride_xm + offs_k[None, :]
    w_ptrs = packed_ptr + offs_n[:, None] * (K // 2) + tl.arange(0, BLOCK_K // 2)[None, :]
    first_block = offs_n * (K // BLOCKSIZE)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(0, K, BLOCK_K):
        block = first_block + k // BLOCKSIZE
        absmax = load_absmax(absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, block, mask_n, NESTED_BLOCKSIZE)
        x = tl.load(x_ptrs, mask=mask_m[:, None], other=0.0)  # (BLOCK_M, BLOCK_K)
        byte = tl.load(w_ptrs, mask=mask_n[:, None], other=0)  # (BLOCK_N, BLOCK_K / 2)
        acc = fourbit_step(acc, x, byte, absmax, code_ptr, PRMT)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K // 2

    while tl.atomic_add(counters_ptr + 1, 0, sem="acquire") < jobs:
        pass
    for index in range(0, live):
        entry = blocks_ptr + index * 3
        slot, first, count = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
        rank = tl.load(ranks_ptr + slot)
        mine = (position >= first) & (position < first + count)
        b_ptr, stride_bn = adapter(addresses_ptr, slot, 1, DTYPE), padded(rank)
        scale = tl.load(scales_ptr + slot)
        planes_ptrs = planes_ptr + rows[:, None] * stride_pm + offs_r[None, :]
        b_ptrs = b_ptr + offs_r[:, None] + offs_n[None, :] * stride_bn
        for r in tl.range(0, rank, BLOCK_R, num_stages=1):
            # (BLOCK_M, BLOCK_R) and (BLOCK_R, BLOCK_N)
            s = load_s(
                planes_ptrs + r, mine, r + offs_r, rank, stride_bn, SPLIT, stride_pp, scale, x_ptr.dtype.element_ty
            )
            b = load_b(b_ptrs + r, r + offs_r, rank, stride_bn, mask_n).to(s.dtype)
            acc = tl.where(mine[None, :], tl.dot(b.T, s.T, acc, input_precision="ieee"), acc)

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    y_ptrs = y_ptr + rows[None, :] * stride_ym + offs_n[:, None]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m[None, :] & mask_n[:, None])
    finished = tl.atomic_add(counters_ptr + 2, 1, sem="acq_rel")
    to_reset = tl.where(finished == tl.num_programs(0) - 1, 4, 0)
    tl.store(counters_ptr + tl.arange(0, 4), tl.zeros((4,), tl.int32), mask=tl.arange(0, 4) < to_reset)


def fits(M: int, K: int, max_rank: int, blocksize: int) -> bool:
    """Whether the kernels here are for such a product; elsewhere, dequantize and multiply."""
    return M <= MAX_M and max_rank <= MAX_RANK and K % blocksize == 0


def fourbit_linear(
    x: Tensor, packed: Tensor, code: Tensor, absmax: Tensor, blocksize: int, N: int, quant_type: str,
    nested: Nested | None = None, bias: Tensor | None = None, a: Tensor | None = None, b: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """Return y (M, N) in x.dtype; ``fits`` must hold. Trusts its caller in all else.

    x: (M, K), columns contiguous.    packed, absmax, nested, blocksize: as ``fourbit.dequantize`` takes them.
    code: (16,) of any float dtype, the values of ``quant_type`` ("nf4" or "fp4").
    a: (R, K) and b: (N, R), of x.dtype or fp32; without them there is no update.
    Raises: ValueError where ``fits`` does not hold.
    """
    (M, K), R = x.shape, 0 if a is None else a.shape[0]
    _check(M, K, R, blocksize)
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty((M, N))
    if y.numel() == 0:
        return y
    config = config_for("fourbit_linear", x, M, N, K, R)
    config = config | dict(BLOCK_K=min(config["BLOCK_K"], blocksize))
    code2, absmax2, offset, nested_blocksize = nested or (None, None, None, 1)
    launch(
        _fourbit_linear_kernel, (cdiv(N, config["BLOCK_N"]), cdiv(M, config["BLOCK_M"])), (
            x, packed, code, absmax, code2, absmax2, offset, bias, a, b, y, scale, M, N, K, R,
            x.stride(0), *((0, 0, 0, 0) if a is None else (*a.stride(), *b.stride())), y.stride(0),
        ), config, BLOCKSIZE=blocksize, NESTED_BLOCKSIZE=nested_blocksize, PRMT=prmt_for(x, quant_type),
        BLOCK_R=block_r(R),
    )  # fmt: skip
    return y


def fourbit_mixed(
    x: Tensor, packed: Tensor, code: Tensor, absmax: Tensor, blocksize: int, N: int, quant_type: str,
    nested: Nested | None, bias: Tensor | None, addresses: Tensor, ranks: Tensor, scales: Tensor, dtype: torch.dtype,
    max_rank: int, order: Tensor, blocks: Tensor, rows_per_block: int, counters: Tensor,
) -> Tensor:  # fmt: skip
    """Return y (M, N) in x.dtype: w as ``fourbit_linear`` takes it, all else as ``mixed_one_launch``.

    counters (4,) are zero before and after.    Raises: ValueError where ``fits`` does not hold.
    """
    (M, K), n_blocks = x.shape, blocks.shape[0]
    _check(M, K, max_rank, blocksize)
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty((M, N))
    if y.numel() == 0:
        return y
    config = config_for("fourbit_mixed", x, M, N, K, max_rank)
    config = config | dict(BLOCK_K=min(config["BLOCK_K"], blocksize))
    BLOCK_R = block_r(max_rank, config["LARGEST_R"])
    planes = x.new_empty((config["SPLIT"], M, max_rank), dtype=torch.float32)
    code2, absmax2, offset, nested_blocksize = nested or (None, None, None, 1)
    launch(
        _fourbit_mixed_kernel, (cdiv(N, config["BLOCK_N"]),), (
            x, packed, code, absmax, code2, absmax2, offset, bias, blocks, order, addresses, ranks, scales, planes,
            counters, y, M, N, K, n_blocks, x.stride(0), planes.stride(0), planes.stride(1), y.stride(0),
        ), config, DTYPE=DTYPES[dtype], BLOCK_J=rows_per_block, BLOCK_B=power_of_2(n_blocks),
        BLOCKSIZE=blocksize, NESTED_BLOCKSIZE=nested_blocksize, PRMT=prmt_for(x, quant_type), BLOCK_R=BLOCK_R,
    )  # fmt: skip
    return y


def lora_linear_4bit(
    x: Tensor, packed: Tensor, code: Tensor, absmax: Tensor,
    nested_code: Tensor | None, nested_absmax: Tensor | None, nested_offset: Tensor | None,
    quant_type: str, blocksize: int, nested_blocksize: int, N: int, K: int,
    bias: Tensor | None, a: Tensor, b: Tensor, scaling: float, implementation: str,
) -> Tensor:  # fmt: skip
    """The operator's launcher: y (M, N) in x.dtype. Where no kernel ``fits``, dequantized by one, and multiplied."""
    nested = nested_of(nested_code, nested_absmax, nested_offset, nested_blocksize)
    if fits(x.shape[0], K, a.shape[0], blocksize):
        x = x if x.stride(1) == 1 else x.contiguous()
        product = fourbit_decode if decodes(x, a.shape[0], blocksize) else fourbit_linear
        return product(x, packed, code, absmax, blocksize, N, quant_type, nested, bias, a, b, scaling)
    w = dequantize(packed, code, absmax, blocksize, (N, K), x.dtype, nested)
    s = torch.nn.functional.linear(x, a.to(x.dtype))
    return torch.nn.functional.linear(x, w, bias).addmm_(s, b.to(x.dtype).T, alpha=scaling)


def lora_linear_mixed_4bit(
    x: Tensor, packed: Tensor, code: Tensor, absmax: Tensor,
    nested_code: Tensor | None, nested_absmax: Tensor | None, nested_offset: Tensor | None,
    quant_type: str, blocksize: int, nested_blocksize: int, N: int, K: int, bias: Tensor | None,
    addresses: Tensor, ranks: Tensor, scales: Tensor, dtype: torch.dtype, max_rank: int, index: int,
    slots: Tensor, order: Tensor, blocks: Tensor, counters: Tensor, block_rows: int, implementation: str,
) -> Tensor:  # fmt: skip
    """The same for a batch whose rows have adapters of their own."""
    nested = nested_of(nested_code, nested_absmax, nested_offset, nested_blocksize)
    if fits(x.shape[0], K, max_rank, blocksize):
        x = x if x.stride(1) == 1 else x.contiguous()
        return fourbit_mixed(
            x, packed, code, absmax, blocksize, N, quant_type, nested, bias,
            addresses, ranks, scales, dtype, max_rank, order, blocks, block_rows, counters[index],
        )  # fmt: skip
    w = dequantize(packed, code, absmax, blocksize, (N, K), x.dtype, nested)
    tables = (addresses, ranks, scales, dtype, max_rank, index, slots, order, blocks, counters, block_rows)
    return lora_linear_mixed(x, w, bias, *tables, "grouped")


def _check(M: int, K: int, max_rank: int, blocksize: int) -> None:
    if not fits(M, K, max_rank, blocksize):
        raise ValueError(
            f"fourbit_linear is for M <= {MAX_M}, ranks <= {MAX_RANK} and K a multiple of the block size, "
            f"got M = {M}, rank {max_rank}, K = {K} and blocksize {blocksize}"
        )


def aot_cases() -> Iterator[AotCase]:
    """Every candidate for each rank: plain and nested for one adapter, nested for adapters of either dtype."""
    strides = "xm ar bn pp pm ym".split()
    for candidate in CANDIDATES + MIXED_CANDIDATES:
        x = x_type(candidate)
        types = dict(
            x_ptr=x, packed_ptr="*u8", code_ptr="*fp32", absmax_ptr="*u8", code2_ptr="*fp32", absmax2_ptr="*fp32",
            offset_ptr="*fp32", bias_ptr=x, a_ptr="*fp32", b_ptr="*fp32", blocks_ptr="*i32", order_ptr="*i32",
            addresses_ptr="*i64", ranks_ptr="*i32", scales_ptr="*fp32", planes_ptr="*fp32", counters_ptr="*i32",
            y_ptr=x, scale="fp32", M="i32", N="i32", K="i32", R="i32", n_blocks="i32",
            **{f"stride_{name}": "i32" for name in strides},
        )  # fmt: skip
        nvidia = candidate.itemsize == 2 and candidate.archs != AMD
        weight = dict(BLOCKSIZE=64, NESTED_BLOCKSIZE=256, PRMT=prmt("nf4", torch.bfloat16) if nvidia else None)
        for BLOCK_R in aot_ranks(candidate):
            if candidate in CANDIDATES:
                one = weight | dict(BLOCK_R=BLOCK_R, stride_ak=1, stride_br=1)
                yield case(_fourbit_linear_kernel, "fourbit_linear", f"r{BLOCK_R}-nested", candidate, types, **one)
                one |= dict(code2_ptr=None, absmax2_ptr=None, offset_ptr=None, NESTED_BLOCKSIZE=1)
                types_plain = types | dict(absmax_ptr="*fp32")
                yield case(_fourbit_linear_kernel, "fourbit_linear", f"r{BLOCK_R}", candidate, types_plain, **one)
            else:
                for name in dict.fromkeys((x[1:], "fp32")):
                    mixed = weight | dict(BLOCK_R=BLOCK_R, BLOCK_J=16, BLOCK_B=64, DTYPE=tl.dtype(name))
                    label = f"r{BLOCK_R}-{name}"
                    yield case(_fourbit_mixed_kernel, "fourbit_mixed", label, candidate, types, **mixed)

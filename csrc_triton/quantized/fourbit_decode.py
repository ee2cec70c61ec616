"""Products of at most 16 rows with 4-bit weights, in two launches: y = x @ w.T + bias + the low-rank update.

    x (M, K)   packed, absmax of w (N, K), Nested: fourbit.py   a (R, K)   b (N, R)   bias (N,)   y (M, N)

The first launch sums x @ w.T and s = scale * x @ a.T over parts of K, each into an fp32 plane; the second adds the
planes, s @ b.T and the bias. Codes are multiplied in x's dtype and an absmax with the sum over its block, as in
fourbit_linear.py. What differs is how w streams:

    a step takes GROUP blocks of each row, 256 columns: 16-byte copies, a fourth of the steps, and one warp has one
    block of its own in a product with the blocks as its batch;
    the absmax of a step is loaded one step ahead, so that no product waits for three loads one after another;
    K is split, so that the programs of one token fill a GPU.

Traffic: N*K/2 bytes + the absmax + M*K elements per BLOCK_N columns + the planes twice. arXiv:2305.14314.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.aot import AotCase, case
from ..common.launch import launch
from ..common.tuning import ALWAYS, CUDA, Candidate, arch_of, block_r, candidates, cdiv, config_for
from .fourbit import Nested
from .fourbit_codes import decode, prmt, prmt_for
from .int8_quantize import _sum_part

MAX_M, MAX_RANK, STEP = 16, 128, 256

# PROGRAMS: how many to aim at when K is split. BLOCK_K: of s alone.
CANDIDATES = candidates("fourbit_decode", [
    Candidate(dict(BLOCK_M=16, BLOCK_N=16, BLOCK_K=128, PROGRAMS=1024), 4, 4, CUDA, default_to=ALWAYS),
])  # fmt: skip
_RANKS_PER_PROGRAM, _COLUMNS = 16, 64


@triton.jit
def _stream_part(
    x_ptr, packed_ptr, code_ptr, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, plane_ptr, offs_m, offs_n,
    first, end, M, N, K, stride_xm,
    BLOCKSIZE: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, PRMT: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Write a tile of a plane of x @ w.T: columns first to end of x, GROUP blocks at a time."""
    offs_g, offs_k, offs_byte = tl.arange(0, GROUP), tl.arange(0, BLOCKSIZE), tl.arange(0, BLOCKSIZE // 2)
    mask_m, mask_n = offs_m < M, offs_n < N
    x_ptrs = x_ptr + offs_m[None, :, None] * stride_xm + (offs_g[:, None] * BLOCKSIZE + offs_k[None, :])[:, None, :]
    x_ptrs += first
    w_ptrs = packed_ptr + (offs_n * (K // 2))[None, :, None]
    w_ptrs += first // 2 + (offs_g[:, None] * (BLOCKSIZE // 2) + offs_byte[None, :])[:, None, :]
    block = (offs_n * (K // BLOCKSIZE))[None, :] + (first // BLOCKSIZE + offs_g)[:, None]  # (GROUP, BLOCK_N)

    mask = (first + offs_g * BLOCKSIZE < end)[:, None] & mask_n[None, :]
    absmax = tl.load(absmax_ptr + block, mask=mask, other=0)
    if code2_ptr is not None:
        scale, offset = tl.load(absmax2_ptr + block // NESTED_BLOCKSIZE, mask=mask, other=0.0), tl.load(offset_ptr)
    acc = tl.zeros((GROUP, offs_n.shape[0], offs_m.shape[0]), tl.float32)
    for k in range(first, end, BLOCKSIZE * GROUP):
        inside = k + offs_g * BLOCKSIZE < end
        x = tl.load(x_ptrs, mask=inside[:, None, None] & mask_m[None, :, None], other=0.0)  # (GROUP, BLOCK_M, block)
        byte = tl.load(w_ptrs, mask=inside[:, None, None] & mask_n[None, :, None], other=0)
        factor = absmax
        if code2_ptr is not None:
            factor = tl.load(code2_ptr + absmax.to(tl.int32)) * scale + offset
        block += GROUP
        mask = (k + (offs_g + GROUP) * BLOCKSIZE < end)[:, None] & mask_n[None, :]
        absmax = tl.load(absmax_ptr + block, mask=mask, other=0)
        if code2_ptr is not None:
            scale = tl.load(absmax2_ptr + block // NESTED_BLOCKSIZE, mask=mask, other=0.0)
        even, odd = decode(byte, code_ptr, x, PRMT)
        x_even, x_odd = tl.split(x.reshape(GROUP, x.shape[1], BLOCKSIZE // 2, 2))
        part = tl.dot(even, tl.permute(x_even, (0, 2, 1)))
        part = tl.dot(odd, tl.permute(x_odd, (0, 2, 1)), part)
        acc += part * factor[:, :, None]
        x_ptrs += BLOCKSIZE * GROUP
        w_ptrs += BLOCKSIZE * GROUP // 2
    plane_ptrs = plane_ptr + offs_m[None, :] * N + offs_n[:, None]
    tl.store(plane_ptrs, tl.sum(acc, axis=0), mask=mask_m[None, :] & mask_n[:, None])


@triton.jit(do_not_specialize=["M"])
def _fourbit_decode_kernel(
    x_ptr, packed_ptr, code_ptr, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, a_ptr, planes_ptr, s_ptr,
    scale, M, N, K, R, k_per_plane,
    stride_xm, stride_ar, stride_ak, stride_pp, stride_sp,
    BLOCKSIZE: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, PRMT: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The programs of axis 0 take BLOCK_N columns of y each, those behind them BLOCK_R of s; axis 1 is the plane."""
    pid, plane, tiles_n = tl.program_id(0), tl.program_id(1), tl.cdiv(N, BLOCK_N)
    first = plane * k_per_plane
    end = min(first + k_per_plane, K)
    offs_m = tl.arange(0, BLOCK_M)
    if pid < tiles_n:
        offs_n = pid.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        _stream_part(
            x_ptr, packed_ptr, code_ptr, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr,
            planes_ptr + plane.to(tl.int64) * stride_pp, offs_m, offs_n, first, end, M, N, K, stride_xm,
            BLOCKSIZE, NESTED_BLOCKSIZE, PRMT, GROUP,
        )  # fmt: skip
    elif a_ptr is not None:
        offs_r = (pid - tiles_n).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        _sum_part(
            x_ptr, a_ptr, s_ptr + plane.to(tl.int64) * stride_sp, scale, offs_m, offs_r, first, end, M, R,
            stride_xm, 1, stride_ar, stride_ak, BLOCK_K,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M", "P"])
def _fourbit_finish_kernel(
    planes_ptr, s_ptr, b_ptr, bias_ptr, y_ptr,
    M, N, R, P, stride_pp, stride_sp, stride_bn, stride_br,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program writes BLOCK_N columns of y for all rows; R fits in BLOCK_R."""
    offs_m, offs_r = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_r, mask_n = offs_r < R, offs_n < N
    mask = (offs_m < M)[:, None] & mask_n[None, :]
    ptrs = planes_ptr + offs_m[:, None] * N + offs_n[None, :]
    acc = tl.load(ptrs, mask=mask, other=0.0)
    for _ in range(1, P):
        ptrs += stride_pp
        acc += tl.load(ptrs, mask=mask, other=0.0)
    if s_ptr is not None:
        mask_s = (offs_m < M)[:, None] & mask_r[None, :]
        s_ptrs = s_ptr + offs_m[:, None] * R + offs_r[None, :]
        total = tl.load(s_ptrs, mask=mask_s, other=0.0)
        for _ in range(1, P):
            s_ptrs += stride_sp
            total += tl.load(s_ptrs, mask=mask_s, other=0.0)
        s = total.to(y_ptr.dtype.element_ty)
        b_ptrs = b_ptr + offs_r[:, None] * stride_br + offs_n[None, :] * stride_bn
        b = tl.load(b_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0).to(s.dtype)  # (BLOCK_R, BLOCK_N)
        acc = tl.dot(s, b, acc, input_precision="ieee")
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


def decodes(x: Tensor, max_rank: int, blocksize: int) -> bool:
    """Whether these kernels are for x (M, K) of 16 bits: few rows, NVIDIA, whole blocks of at most 128 columns."""
    M, K = x.shape
    return (
        M <= MAX_M and max_rank <= MAX_RANK and K % blocksize == 0 and blocksize <= STEP // 2
        and x.dtype.itemsize == 2 and arch_of(x.device) in CUDA
    )  # fmt: skip


def fourbit_decode(
    x: Tensor, packed: Tensor, code: Tensor, absmax: Tensor, blocksize: int, N: int, quant_type: str,
    nested: Nested | None = None, bias: Tensor | None = None, a: Tensor | None = None, b: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """Return y (M, N) in x.dtype, of what ``fourbit_linear`` takes; ``decodes`` must hold. Trusts its caller."""
    (M, K), R = x.shape, 0 if a is None else a.shape[0]
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty((M, N))
    if y.numel() == 0:
        return y
    config = config_for("fourbit_decode", x, M, N, K, R)
    tiles_n, steps = cdiv(N, config["BLOCK_N"]), cdiv(K, STEP)
    # at least two steps a plane, whose sum is work too
    steps_per_plane = cdiv(steps, max(1, min(config["PROGRAMS"] // tiles_n, steps // 2)))
    P = cdiv(steps, steps_per_plane)
    planes = x.new_empty((P, M, N), dtype=torch.float32)
    s = None if a is None else x.new_empty((P, M, R), dtype=torch.float32)
    code2, absmax2, offset, nested_blocksize = nested or (None, None, None, 1)
    launch(
        _fourbit_decode_kernel, (tiles_n + cdiv(R, _RANKS_PER_PROGRAM), P), (
            x, packed, code, absmax, code2, absmax2, offset, a, planes, s, scale, M, N, K, R, steps_per_plane * STEP,
            x.stride(0), *((0, 0) if a is None else a.stride()), M * N, M * R,
        ), config, BLOCKSIZE=blocksize, NESTED_BLOCKSIZE=nested_blocksize, PRMT=prmt_for(x, quant_type),
        GROUP=STEP // blocksize, BLOCK_R=_RANKS_PER_PROGRAM,
    )  # fmt: skip
    launch(
        _fourbit_finish_kernel, (cdiv(N, _COLUMNS),), (
            planes, s, b, bias, y, M, N, R, P, M * N, M * R, *((0, 0) if b is None else b.stride()),
        ), dict(num_warps=4, num_stages=3), BLOCK_M=MAX_M, BLOCK_N=_COLUMNS, BLOCK_R=block_r(R),
    )  # fmt: skip
    return y


def aot_cases() -> Iterator[AotCase]:
    """Every candidate, nested and not, for blocks of 64; the second launch for small and large ranks."""
    strides = {f"stride_{name}": "i32" for name in "xm ar pp sp bn".split()}
    types = dict(
        x_ptr="*bf16", packed_ptr="*u8", code_ptr="*fp32", absmax_ptr="*u8", code2_ptr="*fp32", absmax2_ptr="*fp32",
        offset_ptr="*fp32", a_ptr="*fp32", planes_ptr="*fp32", s_ptr="*fp32", b_ptr="*fp32", bias_ptr="*bf16",
        y_ptr="*bf16", scale="fp32", M="i32", N="i32", K="i32", R="i32", P="i32", k_per_plane="i32", **strides,
    )  # fmt: skip
    weight = dict(BLOCKSIZE=64, GROUP=STEP // 64, PRMT=prmt("nf4", torch.bfloat16), BLOCK_R=_RANKS_PER_PROGRAM)
    nested = weight | dict(stride_ak=1, NESTED_BLOCKSIZE=256)
    plain = nested | dict(code2_ptr=None, absmax2_ptr=None, offset_ptr=None, NESTED_BLOCKSIZE=1)
    for candidate in CANDIDATES:
        yield case(_fourbit_decode_kernel, "fourbit_decode", "nested", candidate, types, **nested)
        types_plain = types | dict(absmax_ptr="*fp32")
        yield case(_fourbit_decode_kernel, "fourbit_decode", "plain", candidate, types_plain, **plain)
    finish = Candidate(dict(BLOCK_M=MAX_M, BLOCK_N=_COLUMNS), 4, 3, CUDA)
    for BLOCK_R in (16, MAX_RANK):
        constants = dict(BLOCK_R=BLOCK_R, stride_br=1)
        yield case(_fourbit_finish_kernel, "fourbit_finish", f"r{BLOCK_R}", finish, types, **constants)

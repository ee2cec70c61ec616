"""x to int8 as bitsandbytes does it, row by row, and the low-rank s of the same x, in one launch.

    x (M, K)   q (M, K) int8   absmax (M,) fp32   a (R, K)   planes (P, M, R): s is their sum

    absmax = max |x| of a row     q = round(x * 127 / absmax), halves to even     s = scale * x @ a.T

bitsandbytes quantizes x as fp16, so these kernels do too; s is of x itself. With a threshold, elements of at least
that size count as 0 in absmax and q: their columns, outliers, are left to the caller, who also zeroes them in q.
Accumulates in fp32. a may be fp32 beside a 16-bit x. Two kernels:

    few rows: a program per row, which it keeps in registers; others beside them sum s over a part of K each, one
        plane a part. A tile of rows would be one program that walks along K twice, on an otherwise idle GPU.
    many rows: a program per tile of rows does all of it, and there is one plane, in the dtype of x.

Traffic: x once for q and once for s, with many rows the former twice (once from L2); M*K bytes of q. arXiv:2208.07339.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.aot import AotCase, case, ranks, x_type
from ..common.launch import launch
from ..common.tuning import ALWAYS, ARCHS, CUDA, SMALL, Candidate, block_r, candidates, cdiv, config_for, power_of_2

FEW_ROWS, LONGEST_ROW = 512, 16384  # a row is one block of registers
SPLIT = 8  # planes of s for few rows

# LARGEST_R: beyond it the grid gets a second axis, and x is read once more (from L2) per block of ranks.
CANDIDATES = candidates("int8_quantize", [
    Candidate(dict(BLOCK_M=16, BLOCK_K=128, LARGEST_R=64), 4, 3, CUDA, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=64, BLOCK_K=64, LARGEST_R=64), 4, 3, CUDA),
    Candidate(dict(BLOCK_M=16, BLOCK_K=64, LARGEST_R=64), 4, 2, SMALL, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=16, BLOCK_K=32, LARGEST_R=64), 8, 2, ARCHS, 4, default_to=ALWAYS),
])  # fmt: skip
# BLOCK_M, BLOCK_K: of the tiles of s.
ROWS_CANDIDATES = candidates("int8_quantize_rows", [
    Candidate(dict(BLOCK_M=16, BLOCK_K=128, LARGEST_R=64, SPLIT=SPLIT), 4, 3, CUDA, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=16, BLOCK_K=64, LARGEST_R=64, SPLIT=SPLIT), 4, 2, SMALL, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=16, BLOCK_K=32, LARGEST_R=64, SPLIT=SPLIT), 8, 2, ARCHS, 4, default_to=ALWAYS),
])  # fmt: skip

# Adding and subtracting 1.5 * 2**23 leaves a float of at most 2**22 rounded to an integer, halves to even.
_ROUND = tl.constexpr(12582912.0)


@triton.jit
def _as_fp16(x, threshold):
    """x rounded to fp16, in fp32; 0 in place of outliers."""
    x = x.to(tl.float32).to(tl.float16).to(tl.float32)
    return tl.where(tl.abs(x) < threshold, x, 0.0)


@triton.jit
def _factor(absmax):
    """127 / absmax as torch and bitsandbytes divide a number by a tensor: times the reciprocal, which is another bit
    now and then."""
    return 127.0 * tl.div_rn(tl.full(absmax.shape, 1.0, tl.float32), tl.where(absmax > 0.0, absmax, 1.0))


@triton.jit
def _to_int8(x, factor):
    return (x * factor + _ROUND - _ROUND).to(tl.int8)


@triton.jit
def _quantize_row(
    x_ptr, q_ptr, absmax_ptr, row, threshold, K, stride_xm, stride_xk, BLOCK_ROW: tl.constexpr
):  # fmt: skip
    columns = tl.arange(0, BLOCK_ROW)
    mask = columns < K
    x = tl.load(x_ptr + row * stride_xm + columns.to(tl.int64) * stride_xk, mask=mask, other=0.0)
    x = _as_fp16(x, threshold)
    absmax = tl.max(tl.abs(x), axis=0)
    tl.store(absmax_ptr + row, absmax)
    tl.store(q_ptr + row * K + columns, _to_int8(x, _factor(tl.full((1,), absmax, tl.float32))), mask=mask)


@triton.jit
def _sum_part(
    x_ptr, a_ptr, plane_ptr, scale, offs_m, offs_r, first, end, M, R, stride_xm, stride_xk, stride_ar, stride_ak,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write a tile of a plane of s: columns first to end of x."""
    offs_k = tl.arange(0, BLOCK_K)
    mask_m, mask_r = offs_m[:, None] < M, offs_r[None, :] < R
    columns = (first + offs_k).to(tl.int64)
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + columns[None, :] * stride_xk
    a_ptrs = a_ptr + columns[:, None] * stride_ak + offs_r[None, :] * stride_ar
    acc = tl.zeros((offs_m.shape[0], offs_r.shape[0]), tl.float32)
    for k in range(first, end, BLOCK_K):
        mask_k = k + offs_k < end
        x = tl.load(x_ptrs, mask=mask_m & mask_k[None, :], other=0.0)  # (BLOCK_M, BLOCK_K)
        a = tl.load(a_ptrs, mask=mask_k[:, None] & mask_r, other=0.0).to(x.dtype)  # (BLOCK_K, BLOCK_R)
        acc = tl.dot(x, a, acc, input_precision="ieee")
        x_ptrs += BLOCK_K * stride_xk
        a_ptrs += BLOCK_K * stride_ak
    tl.store(plane_ptr + offs_m[:, None] * R + offs_r[None, :], acc * tl.cast(scale, tl.float32), mask=mask_m & mask_r)


@triton.jit(do_not_specialize=["M"])
def _int8_quantize_rows_kernel(
    x_ptr, a_ptr, q_ptr, absmax_ptr, planes_ptr,
    scale, threshold, M, K, R, k_per_plane,
    stride_xm, stride_xk, stride_ar, stride_ak, stride_pp,
    SPLIT: tl.constexpr, BLOCK_ROW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The first M programs quantize a row each, of at most BLOCK_ROW columns; the others sum a tile of one plane."""
    pid = tl.program_id(0)
    if pid < M:
        _quantize_row(x_ptr, q_ptr, absmax_ptr, pid.to(tl.int64), threshold, K, stride_xm, stride_xk, BLOCK_ROW)
    elif a_ptr is not None:
        tile, plane = (pid - M) // SPLIT, (pid - M) % SPLIT
        tiles_m = tl.cdiv(M, BLOCK_M)
        offs_m = (tile % tiles_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_r = (tile // tiles_m).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        first = plane * k_per_plane
        _sum_part(
            x_ptr, a_ptr, planes_ptr + plane.to(tl.int64) * stride_pp, scale, offs_m, offs_r,
            first, min(first + k_per_plane, K), M, R, stride_xm, stride_xk, stride_ar, stride_ak, BLOCK_K,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def _int8_quantize_kernel(
    x_ptr, a_ptr, q_ptr, absmax_ptr, s_ptr,
    scale, threshold, M, K, R,
    stride_xm, stride_xk, stride_ar, stride_ak,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program takes BLOCK_M rows of x, for a block of ranks; that of the first block writes q. No a: no s."""
    pid_r = tl.program_id(1)
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = pid_r.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    columns = offs_k.to(tl.int64)
    mask_m, mask_r = offs_m[:, None] < M, offs_r[None, :] < R
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + columns[None, :] * stride_xk
    if a_ptr is not None:
        a_ptrs = a_ptr + columns[:, None] * stride_ak + offs_r[None, :] * stride_ar

    absmax = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = k + offs_k < K
        x = tl.load(x_ptrs, mask=mask_m & mask_k[None, :], other=0.0)  # (BLOCK_M, BLOCK_K)
        absmax = tl.maximum(absmax, tl.max(tl.abs(_as_fp16(x, threshold)), axis=1))
        if a_ptr is not None:
            a = tl.load(a_ptrs, mask=mask_k[:, None] & mask_r, other=0.0).to(x.dtype)  # (BLOCK_K, BLOCK_R)
            acc = tl.dot(x, a, acc, input_precision="ieee")
            a_ptrs += BLOCK_K * stride_ak
        x_ptrs += BLOCK_K * stride_xk
    if a_ptr is not None:
        s = (acc * tl.cast(scale, tl.float32)).to(s_ptr.dtype.element_ty)
        tl.store(s_ptr + offs_m[:, None] * R + offs_r[None, :], s, mask=mask_m & mask_r)

    stored = tl.where(pid_r == 0, K, 0)
    tl.store(absmax_ptr + offs_m, absmax, mask=offs_m < tl.where(pid_r == 0, M, 0))
    factor = _factor(absmax)
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + columns[None, :] * stride_xk
    q_ptrs = q_ptr + offs_m[:, None] * K + columns[None, :]
    for k in range(0, stored, BLOCK_K):
        mask = mask_m & (k + offs_k < K)[None, :]
        x = tl.load(x_ptrs, mask=mask, other=0.0)
        tl.store(q_ptrs, _to_int8(_as_fp16(x, threshold), factor[:, None]), mask=mask)
        x_ptrs += BLOCK_K * stride_xk
        q_ptrs += BLOCK_K


def int8_quantize(
    x: Tensor, a: Tensor | None = None, scale: float = 1.0, threshold: float = 0.0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return q (M, K) int8, absmax (M,) fp32 and planes (P, M, R), or None without a. Trusts its caller.

    x: (M, K) fp16, bf16 or fp32, any strides.    a: (R, K) of x.dtype or fp32, any strides.
    planes: their sum is s. One is of x.dtype, several are fp32.
    threshold: elements this large count as 0 in q and absmax; 0: none do.
    """
    (M, K), R = x.shape, 0 if a is None else a.shape[0]
    few = M < FEW_ROWS and 0 < K <= LONGEST_ROW
    config = config_for("int8_quantize_rows" if few else "int8_quantize", x, M, 0, K, R)
    P, dtype = (config["SPLIT"], torch.float32) if few else (1, x.dtype)
    q, absmax = x.new_empty((M, K), dtype=torch.int8), x.new_empty((M,), dtype=torch.float32)
    planes = None if a is None else x.new_empty((P, M, R), dtype=dtype)
    if M == 0:
        return q, absmax, planes
    BLOCK_M, BLOCK_R = config["BLOCK_M"], block_r(R, config["LARGEST_R"])
    tiles_m, blocks_r = cdiv(M, BLOCK_M), cdiv(R, BLOCK_R)
    tensors, numbers = (x, a, q, absmax, planes), (scale, threshold or float("inf"), M, K, R)
    strides = (*x.stride(), *((0, 0) if a is None else a.stride()))
    # products and sums are rounded one by one, or q would not be bitsandbytes' in every bit
    if few:
        k_per_plane = cdiv(cdiv(K, P), config["BLOCK_K"]) * config["BLOCK_K"]
        launch(
            _int8_quantize_rows_kernel, (M + tiles_m * blocks_r * P,), (
                *tensors, *numbers, k_per_plane, *strides, M * R,
            ), config, BLOCK_ROW=power_of_2(K), BLOCK_R=BLOCK_R, enable_fp_fusion=False,
        )  # fmt: skip
    else:
        launch(
            _int8_quantize_kernel, (tiles_m, max(1, blocks_r)), (*tensors, *numbers, *strides),
            config, BLOCK_R=BLOCK_R, enable_fp_fusion=False,
        )  # fmt: skip
    return q, absmax, planes


def aot_cases() -> Iterator[AotCase]:
    """Every candidate for each rank, for the longest row, and x to int8 without an adapter."""
    for candidate in CANDIDATES + ROWS_CANDIDATES:
        x = x_type(candidate)
        types = dict(
            x_ptr=x, a_ptr="*fp32", q_ptr="*i8", absmax_ptr="*fp32", s_ptr=x, planes_ptr="*fp32", scale="fp32",
            threshold="fp32", M="i32", K="i32", R="i32", k_per_plane="i32",
            stride_xm="i32", stride_ar="i32", stride_pp="i32",
        )  # fmt: skip
        for BLOCK_R in ranks(candidate):
            constants: dict[str, Any] = dict(BLOCK_R=BLOCK_R, stride_xk=1, stride_ak=1)
            if candidate in CANDIDATES:
                kernel, name, absent = _int8_quantize_kernel, "int8_quantize", dict(a_ptr=None, s_ptr=None)
                variants = {f"r{BLOCK_R}": constants}
            else:
                kernel, name, absent = (
                    _int8_quantize_rows_kernel,
                    "int8_quantize_rows",
                    dict(a_ptr=None, planes_ptr=None),
                )
                variants = {f"r{BLOCK_R}": constants | dict(BLOCK_ROW=LONGEST_ROW)}
            if BLOCK_R == 16:
                variants["alone"] = variants["r16"] | absent
            for label, values in variants.items():
                made = case(kernel, name, label, candidate, types, **values)
                yield replace(
                    made,
                    matmul=made.matmul and label != "alone",
                    options=made.options | dict(enable_fp_fusion=False),
                )

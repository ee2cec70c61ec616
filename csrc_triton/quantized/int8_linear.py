"""Product with bitsandbytes' int8 weights and the low-rank update: x to int8 and s in one kernel, y in a second one.

    x (M, K)   q (M, K) int8   absmax (M,) fp32   a (R, K)   s (M, R)
    w (N, K) int8   w_absmax (N,) fp32   b (N, R)   bias (N,)   y (M, N)

    absmax = max |x| of a row     q = round(x * 127 / absmax), halves to even     s = scale * x @ a.T
    y = absmax * w_absmax / 127**2 * (q @ w.T) + s @ b.T + bias

bitsandbytes quantizes x as fp16, so these kernels do too; s is of x itself. With a threshold, elements of at least
that size count as 0 in absmax and q: their columns, outliers, are left to the caller, who also zeroes them in q.
q @ w.T is exact, in int32; the rest accumulates in fp32. a and b may be fp32 beside a 16-bit x.
Traffic: x once from memory and once from L2, M*K bytes of q twice, N*K bytes, M*N elements. arXiv:2208.07339.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.aot import AotCase, case, ranks, x_type
from ..common.launch import launch
from ..common.tuning import ALWAYS, ARCHS, CUDA, SMALL, Candidate, block_r, candidates, cdiv, config_for

# LARGEST_R: beyond it the grid gets a second axis, and x is read once more (from L2) per block of ranks.
CANDIDATES = candidates("int8_quantize", [
    Candidate(dict(BLOCK_M=16, BLOCK_K=128, LARGEST_R=64), 4, 3, CUDA, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=64, BLOCK_K=64, LARGEST_R=64), 4, 3, CUDA),
    Candidate(dict(BLOCK_M=16, BLOCK_K=64, LARGEST_R=64), 4, 2, SMALL, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=16, BLOCK_K=32, LARGEST_R=64), 8, 2, ARCHS, 4, default_to=ALWAYS),
])  # fmt: skip


def _blocks(m: int, n: int, k: int, largest_r: int = 64) -> dict[str, int]:
    return dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, GROUP_M=8, LARGEST_R=largest_r)


GEMM_CANDIDATES = candidates("int8_gemm", [
    Candidate(_blocks(16, 64, 128), 4, 4, CUDA, default_to=16),
    Candidate(_blocks(64, 64, 128), 4, 3, CUDA, default_to=256),
    Candidate(_blocks(128, 128, 64), 8, 3, CUDA, default_to=ALWAYS),
    Candidate(_blocks(64, 64, 64), 4, 2, SMALL, default_to=ALWAYS),
    Candidate(_blocks(32, 32, 64, 32), 8, 2, ARCHS, 4, default_to=ALWAYS),
])  # fmt: skip

# Adding and subtracting 1.5 * 2**23 leaves a float of at most 2**22 rounded to an integer, halves to even.
_ROUND = tl.constexpr(12582912.0)


@triton.jit
def _as_fp16(x, threshold):
    """x rounded to fp16, in fp32; 0 in place of outliers."""
    x = x.to(tl.float32).to(tl.float16).to(tl.float32)
    return tl.where(tl.abs(x) < threshold, x, 0.0)


@triton.jit
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
    # as torch and bitsandbytes divide a number by a tensor: times the reciprocal, which is another bit now and then
    factor = 127.0 * tl.div_rn(tl.full((BLOCK_M,), 1.0, tl.float32), tl.where(absmax > 0.0, absmax, 1.0))
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + columns[None, :] * stride_xk
    q_ptrs = q_ptr + offs_m[:, None] * K + columns[None, :]
    for k in range(0, stored, BLOCK_K):
        mask = mask_m & (k + offs_k < K)[None, :]
        x = tl.load(x_ptrs, mask=mask, other=0.0)
        q = _as_fp16(x, threshold) * factor[:, None]
        tl.store(q_ptrs, (q + _ROUND - _ROUND).to(tl.int8), mask=mask)
        x_ptrs += BLOCK_K * stride_xk
        q_ptrs += BLOCK_K


@triton.jit
def _int8_gemm_kernel(
    q_ptr, absmax_ptr, w_ptr, w_absmax_ptr, bias_ptr, s_ptr, b_ptr, y_ptr,
    M, N, K, R,
    stride_qm, stride_wn, stride_sm, stride_bn, stride_br, stride_ym,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One program writes one (BLOCK_M, BLOCK_N) tile of y; GROUP_M rows of tiles share the columns of w in L2."""
    pid, tiles_m, tiles_n = tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = pid // (GROUP_M * tiles_n) * GROUP_M
    rows = min(tiles_m - first, GROUP_M)
    pid_m = first + pid % (GROUP_M * tiles_n) % rows
    pid_n = pid % (GROUP_M * tiles_n) // rows
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k, offs_r = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    mask_m, mask_n = offs_m[:, None] < M, offs_n[None, :] < N

    q_ptrs = q_ptr + offs_m[:, None] * stride_qm + offs_k[None, :]
    w_ptrs = w_ptr + offs_k[:, None] + offs_n[None, :] * stride_wn
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for k in range(0, K, BLOCK_K):
        q = tl.load(q_ptrs, mask=mask_m & (k + offs_k < K)[None, :], other=0)  # (BLOCK_M, BLOCK_K)
        w = tl.load(w_ptrs, mask=(k + offs_k < K)[:, None] & mask_n, other=0)  # (BLOCK_K, BLOCK_N)
        total = tl.dot(q, w, total, out_dtype=tl.int32)
        q_ptrs += BLOCK_K
        w_ptrs += BLOCK_K

    absmax = tl.load(absmax_ptr + offs_m, mask=offs_m < M, other=0.0)
    w_absmax = tl.load(w_absmax_ptr + offs_n, mask=offs_n < N, other=0.0)
    acc = total.to(tl.float32) * (absmax / 127.0)[:, None] * (w_absmax / 127.0)[None, :]
    if s_ptr is not None:
        s_ptrs = s_ptr + offs_m[:, None] * stride_sm + offs_r[None, :]
        b_ptrs = b_ptr + offs_r[:, None] * stride_br + offs_n[None, :] * stride_bn
        for r in tl.range(0, R, BLOCK_R, num_stages=1):
            s = tl.load(s_ptrs, mask=mask_m & (r + offs_r < R)[None, :], other=0.0)  # (BLOCK_M, BLOCK_R)
            b = tl.load(b_ptrs, mask=(r + offs_r < R)[:, None] & mask_n, other=0.0).to(s.dtype)  # (BLOCK_R, BLOCK_N)
            acc = tl.dot(s, b, acc, input_precision="ieee")
            s_ptrs += BLOCK_R
            b_ptrs += BLOCK_R * stride_br
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m & mask_n)


def int8_quantize(
    x: Tensor, a: Tensor | None = None, scale: float = 1.0, threshold: float = 0.0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return q (M, K) int8, absmax (M,) fp32 and s (M, R) in x.dtype, or None without a. Trusts its caller.

    x: (M, K) fp16, bf16 or fp32, any strides.    a: (R, K) of x.dtype or fp32, any strides.
    threshold: elements this large count as 0 in q and absmax; 0: none do.
    """
    (M, K), R = x.shape, 0 if a is None else a.shape[0]
    q, absmax = x.new_empty((M, K), dtype=torch.int8), x.new_empty((M,), dtype=torch.float32)
    s = None if a is None else x.new_empty((M, R))
    if M == 0:
        return q, absmax, s
    config = config_for("int8_quantize", x, M, 0, K, R)
    BLOCK_R = block_r(R, config["LARGEST_R"])
    # products and sums are rounded one by one, or q would not be bitsandbytes' in every bit
    launch(
        _int8_quantize_kernel, (cdiv(M, config["BLOCK_M"]), max(1, cdiv(R, BLOCK_R))), (
            x, a, q, absmax, s, scale, threshold or float("inf"), M, K, R,
            *x.stride(), *((0, 0) if a is None else a.stride()),
        ), config, BLOCK_R=BLOCK_R, enable_fp_fusion=False,
    )  # fmt: skip
    return q, absmax, s


def int8_gemm(
    q: Tensor, absmax: Tensor, w: Tensor, w_absmax: Tensor, bias: Tensor | None, s: Tensor | None, b: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Return y (M, N) in ``dtype``. Trusts its caller.

    q: (M, K) int8, absmax: (M,) fp32, s: (M, R), as ``int8_quantize`` returns them; s of ``dtype``.
    w: (N, K) int8, columns contiguous, w_absmax: (N,) fp32: bitsandbytes' CB and SCB.
    b: (N, R) of ``dtype`` or fp32, any strides.    bias: (N,).
    """
    (M, K), N, R = q.shape, w.shape[0], 0 if s is None else s.shape[1]
    bias = None if bias is None else bias.contiguous()
    y = q.new_empty((M, N), dtype=dtype)
    if y.numel() == 0:
        return y
    config = config_for("int8_gemm", y, M, N, K, R)
    BLOCK_R = block_r(R, config["LARGEST_R"])
    launch(
        _int8_gemm_kernel, (cdiv(M, config["BLOCK_M"]) * cdiv(N, config["BLOCK_N"]),), (
            q, absmax, w, w_absmax, bias, s, b, y, M, N, K, R,
            q.stride(0), w.stride(0), R, *((0, 0) if b is None else b.stride()), y.stride(0),
        ), config, BLOCK_R=BLOCK_R,
    )  # fmt: skip
    return y


def lora_linear_int8(
    x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float,
    threshold: float, implementation: str,
) -> Tensor:  # fmt: skip
    """The operator's launcher: y (M, N) in x.dtype. With a threshold the host waits to know how many outliers are."""
    q, absmax, s = int8_quantize(x, a, scaling, threshold)
    outliers = x[:0].new_empty(0, dtype=torch.int64)
    if threshold > 0:
        outliers = (x.half().abs() >= threshold).any(0).nonzero().view(-1)
        q[:, outliers] = 0
    y = int8_gemm(q, absmax, values, scales, bias, s, b, x.dtype)
    if len(outliers):
        w = values[:, outliers] * (scales * (1.0 / 127.0))[:, None]
        y.addmm_(x[:, outliers], w.to(x.dtype).T)
    return y


def aot_cases() -> Iterator[AotCase]:
    """Every candidate for each rank, and x to int8 without an adapter."""
    strides = "xm ar qm wn sm bn ym".split()
    for candidate in CANDIDATES + GEMM_CANDIDATES:
        x = x_type(candidate)
        types = dict(
            x_ptr=x, a_ptr="*fp32", q_ptr="*i8", absmax_ptr="*fp32", s_ptr=x, w_ptr="*i8", w_absmax_ptr="*fp32",
            bias_ptr=x, b_ptr="*fp32", y_ptr=x, scale="fp32", threshold="fp32", M="i32", N="i32", K="i32", R="i32",
            **{f"stride_{name}": "i32" for name in strides},
        )  # fmt: skip
        for BLOCK_R in ranks(candidate):
            if candidate in GEMM_CANDIDATES:
                constants = dict(BLOCK_R=BLOCK_R, stride_br=1)
                made = case(_int8_gemm_kernel, "int8_gemm", f"r{BLOCK_R}", candidate, types, **constants)
                yield replace(made, matmul=True)  # of int8 if x is fp32
            else:
                constants = dict(BLOCK_R=BLOCK_R, stride_xk=1, stride_ak=1)
                for label, more in ((f"r{BLOCK_R}", {}), ("alone", dict(a_ptr=None, s_ptr=None))):
                    if more and BLOCK_R > 16:
                        continue
                    made = case(_int8_quantize_kernel, "int8_quantize", label, candidate, types, **constants, **more)
                    yield replace(
                        made,
                        matmul=made.matmul and not more,
                        options=made.options | dict(enable_fp_fusion=False),
                    )

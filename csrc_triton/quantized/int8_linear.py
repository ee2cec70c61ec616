"""Product with bitsandbytes' int8 weights and the low-rank update: x to int8 and s in one launch, y in a second one.

    x (M, K)   q, absmax, planes of x: int8_quantize.py   w (N, K) int8   w_absmax (N,) fp32
    b (N, R)   bias (N,)   y (M, N)

    y = absmax * w_absmax / 127**2 * (q @ w.T) + s @ b.T + bias     s = the sum of the planes, rounded as y is

q @ w.T is exact, in int32; the rest accumulates in fp32. b may be fp32 beside a 16-bit x.
Traffic: M*K bytes of q, N*K bytes, M*N elements. arXiv:2208.07339.
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
from .int8_quantize import int8_quantize


def _blocks(m: int, n: int, k: int, largest_r: int = 64) -> dict[str, int]:
    return dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, GROUP_M=8, LARGEST_R=largest_r)


GEMM_CANDIDATES = candidates("int8_gemm", [
    Candidate(_blocks(16, 16, 256), 4, 4, CUDA, default_to=16),  # 256 programs at N = 4096: two a multiprocessor
    Candidate(_blocks(32, 32, 256), 4, 3, CUDA, default_to=32),
    Candidate(_blocks(64, 64, 128, 32), 4, 3, CUDA, default_to=256),  # planes of 64 ranks would spill on sm_100
    Candidate(_blocks(128, 128, 64), 8, 3, CUDA, default_to=ALWAYS),
    Candidate(_blocks(64, 64, 64), 4, 2, SMALL, default_to=ALWAYS),
    Candidate(_blocks(32, 32, 64, 32), 8, 2, ARCHS, 4, default_to=ALWAYS),
])  # fmt: skip


@triton.jit(do_not_specialize=["M", "P", "stride_pp"])
def _int8_gemm_kernel(
    q_ptr, absmax_ptr, w_ptr, w_absmax_ptr, bias_ptr, planes_ptr, b_ptr, y_ptr,
    M, N, K, R, P,
    stride_qm, stride_wn, stride_pp, stride_bn, stride_br, stride_ym,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One program writes one (BLOCK_M, BLOCK_N) tile of y; GROUP_M rows of tiles share the columns of w in L2.

    No planes: no update.
    """
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
    if planes_ptr is not None:
        s_ptrs = planes_ptr + offs_m[:, None] * R + offs_r[None, :]
        b_ptrs = b_ptr + offs_r[:, None] * stride_br + offs_n[None, :] * stride_bn
        for r in tl.range(0, R, BLOCK_R, num_stages=1):
            mask_s = mask_m & (r + offs_r < R)[None, :]
            s = tl.load(s_ptrs, mask=mask_s, other=0.0)  # (BLOCK_M, BLOCK_R)
            plane_ptrs = s_ptrs
            for _ in range(1, P):
                plane_ptrs += stride_pp
                s += tl.load(plane_ptrs, mask=mask_s, other=0.0)
            s = s.to(y_ptr.dtype.element_ty)
            b = tl.load(b_ptrs, mask=(r + offs_r < R)[:, None] & mask_n, other=0.0).to(s.dtype)  # (BLOCK_R, BLOCK_N)
            acc = tl.dot(s, b, acc, input_precision="ieee")
            s_ptrs += BLOCK_R
            b_ptrs += BLOCK_R * stride_br
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m & mask_n)


def int8_gemm(
    q: Tensor, absmax: Tensor, w: Tensor, w_absmax: Tensor, bias: Tensor | None, planes: Tensor | None,
    b: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Return y (M, N) in ``dtype``. Trusts its caller.

    q: (M, K) int8, absmax: (M,) fp32, planes: (P, M, R), as ``int8_quantize`` returns them for an x of ``dtype``.
    w: (N, K) int8, columns contiguous, w_absmax: (N,) fp32: bitsandbytes' CB and SCB.
    b: (N, R) of ``dtype`` or fp32, any strides.    bias: (N,).
    """
    (M, K), N = q.shape, w.shape[0]
    P, R = (1, 0) if planes is None else (planes.shape[0], planes.shape[2])
    bias = None if bias is None else bias.contiguous()
    y = q.new_empty((M, N), dtype=dtype)
    if y.numel() == 0:
        return y
    config = config_for("int8_gemm", y, M, N, K, R)
    BLOCK_R = block_r(R, config["LARGEST_R"])
    launch(
        _int8_gemm_kernel, (cdiv(M, config["BLOCK_M"]) * cdiv(N, config["BLOCK_N"]),), (
            q, absmax, w, w_absmax, bias, planes, b, y, M, N, K, R, P,
            q.stride(0), w.stride(0), M * R, *((0, 0) if b is None else b.stride()), y.stride(0),
        ), config, BLOCK_R=BLOCK_R,
    )  # fmt: skip
    return y


def lora_linear_int8(
    x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float,
    threshold: float, implementation: str,
) -> Tensor:  # fmt: skip
    """The operator's launcher: y (M, N) in x.dtype. With a threshold the host waits to know how many outliers are."""
    q, absmax, planes = int8_quantize(x, a, scaling, threshold)
    outliers = x[:0].new_empty(0, dtype=torch.int64)
    if threshold > 0:
        outliers = (x.half().abs() >= threshold).any(0).nonzero().view(-1)
        q[:, outliers] = 0
    y = int8_gemm(q, absmax, values, scales, bias, planes, b, x.dtype)
    if len(outliers):
        w = values[:, outliers] * (scales * (1.0 / 127.0))[:, None]
        y.addmm_(x[:, outliers], w.to(x.dtype).T)
    return y


def aot_cases() -> Iterator[AotCase]:
    """Every candidate for each rank, s in one plane and in several."""
    for candidate in GEMM_CANDIDATES:
        x = x_type(candidate)
        types = dict(
            q_ptr="*i8", absmax_ptr="*fp32", w_ptr="*i8", w_absmax_ptr="*fp32", bias_ptr=x, b_ptr="*fp32", y_ptr=x,
            M="i32", N="i32", K="i32", R="i32", P="i32",
            **{f"stride_{name}": "i32" for name in "qm wn pp bn ym".split()},
        )  # fmt: skip
        for BLOCK_R in ranks(candidate):
            for label, planes in ((f"r{BLOCK_R}", x), (f"r{BLOCK_R}-planes", "*fp32")):
                if x == planes and label.endswith("planes"):
                    continue
                constants = dict(BLOCK_R=BLOCK_R, stride_br=1)
                made = case(
                    _int8_gemm_kernel, "int8_gemm", label, candidate, types | dict(planes_ptr=planes), **constants
                )
                yield replace(made, matmul=True)  # of int8 if x is fp32

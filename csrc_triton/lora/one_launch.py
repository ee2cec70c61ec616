"""Base product and low-rank update in one launch, for few rows: y = x @ w.T + s @ b.T + bias.

    s = scale * dropout(x) @ a.T

    x (M, K)   w (N, K)   a (R, K)   b (N, R)   bias (N,)   y (M, N)   s (M, R) and bits as shrink.py gives them

Every program computes s for its rows in the K loop that streams its columns of w: x is in registers anyway, a comes
from L2, and the tensor cores idle while w arrives. That holds while R * M is small (the bound: ops/operators.py);
beyond it, lora_shrink and lora_gemm. s is stored by the programs of the first columns, so the backward has it. a and b
may be fp32 beside a 16-bit x. Accumulates in fp32; s is rounded before it meets b.
Traffic: N*K + M*K elements from memory, R*K per program from L2.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.aot import AotCase, case, ranks, x_type
from ..common.dropout import draw_bytes, expand_bits, row_keys, threshold_of
from ..common.launch import launch
from ..common.tuning import ALWAYS, ARCHS, CUDA, HOPPER, SMALL, Candidate, block_r, candidates, cdiv, config_for

CANDIDATES = candidates("lora_one_launch", [
    Candidate(dict(BLOCK_M=16, BLOCK_N=16, BLOCK_K=128), 4, 5, HOPPER, max_rank=16, default_to=16),
    Candidate(dict(BLOCK_M=16, BLOCK_N=32, BLOCK_K=128), 4, 3, CUDA, max_rank=64, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=16, BLOCK_N=64, BLOCK_K=64), 4, 4, CUDA, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64), 4, 3, HOPPER, max_rank=64),
    Candidate(dict(BLOCK_M=16, BLOCK_N=32, BLOCK_K=64), 4, 2, SMALL, max_rank=64, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=16, BLOCK_N=32, BLOCK_K=32), 4, 2, SMALL, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=16, BLOCK_N=32, BLOCK_K=32), 8, 2, ARCHS, 4, max_rank=32, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=16, BLOCK_N=16, BLOCK_K=16), 8, 2, ARCHS, 4, default_to=ALWAYS),
])  # fmt: skip


@triton.jit(do_not_specialize=["threshold", "M"])
def _lora_one_launch_kernel(
    x_ptr, w_ptr, bias_ptr, a_ptr, b_ptr, y_ptr, s_ptr, bits_ptr, seed_ptr,
    scale, threshold, M, N, K, R,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br, stride_ym, stride_bitsm,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program writes one (BLOCK_M, BLOCK_N) tile of y; R fits in BLOCK_R. No seed: no dropout."""
    pid_n = tl.program_id(0)
    offs_m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k, offs_r = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    columns = offs_k.to(tl.int64)
    mask_m, mask_n, mask_r = offs_m[:, None] < M, offs_n[None, :] < N, offs_r[None, :] < R
    # s and the mask are stored by the programs of the first columns
    mask_stored = offs_m[:, None] < tl.where(pid_n == 0, M, 0)
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + columns[None, :] * stride_xk
    w_ptrs = w_ptr + columns[:, None] * stride_wk + offs_n[None, :] * stride_wn
    a_ptrs = a_ptr + columns[:, None] * stride_ak + offs_r[None, :] * stride_ar
    if seed_ptr is not None:
        row_key, low, high = row_keys(seed_ptr, offs_m)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_s = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = k + offs_k < K
        x = tl.load(x_ptrs, mask=mask_m & mask_k[None, :], other=0.0)  # (BLOCK_M, BLOCK_K)
        w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_n, other=0.0)  # (BLOCK_K, BLOCK_N)
        a = tl.load(a_ptrs, mask=mask_k[:, None] & mask_r, other=0.0).to(x.dtype)  # (BLOCK_K, BLOCK_R)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        if seed_ptr is not None:
            offs_byte = k // 8 + tl.arange(0, BLOCK_K // 8)
            byte = draw_bytes(row_key, low, high, threshold, offs_byte, K)
            mask_byte = mask_stored & (offs_byte * 8 < K)[None, :]
            tl.store(bits_ptr + offs_m[:, None] * stride_bitsm + offs_byte[None, :], byte.to(tl.uint8), mask=mask_byte)
            x = tl.where(expand_bits(byte, BLOCK_M, BLOCK_K), x, tl.zeros_like(x))
        acc_s = tl.dot(x, a, acc_s, input_precision="ieee")
        x_ptrs += BLOCK_K * stride_xk
        w_ptrs += BLOCK_K * stride_wk
        a_ptrs += BLOCK_K * stride_ak

    s = (acc_s * tl.cast(scale, tl.float32)).to(x_ptr.dtype.element_ty)
    tl.store(s_ptr + offs_m[:, None] * R + offs_r[None, :], s, mask=mask_stored & mask_r)
    b_ptrs = b_ptr + offs_r[:, None] * stride_br + offs_n[None, :] * stride_bn
    b = tl.load(b_ptrs, mask=(offs_r < R)[:, None] & mask_n, other=0.0).to(s.dtype)  # (BLOCK_R, BLOCK_N)
    acc = tl.dot(s, b, acc, input_precision="ieee")
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m & mask_n)


def lora_one_launch(
    x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y (M, N), s (M, R), both in x.dtype, and bits (M, ceil(K / 8)), or (0, 0) when p is 0. N > 0."""
    (M, K), N, R = x.shape, w.shape[0], a.shape[0]
    bias = None if bias is None else bias.contiguous()
    y, s = x.new_empty((M, N)), x.new_empty((M, R))
    bits = x.new_empty((M, (K + 7) // 8) if p > 0 else (0, 0), dtype=torch.uint8)
    if y.numel() == 0:
        return y, s, bits
    config = config_for("lora_one_launch", x, M, N, K, R)
    launch(
        _lora_one_launch_kernel, (cdiv(N, config["BLOCK_N"]), cdiv(M, config["BLOCK_M"])), (
            x, w, bias, a, b, y, s, bits if p > 0 else None, seed if p > 0 else None,
            scale, threshold_of(p), M, N, K, R,
            *x.stride(), *w.stride(), *a.stride(), *b.stride(), y.stride(0), bits.stride(0),
        ), config, BLOCK_R=block_r(R),
    )  # fmt: skip
    return y, s, bits


def aot_cases() -> Iterator[AotCase]:
    """Every candidate for each rank, with and without dropout."""
    for candidate in CANDIDATES:
        x = x_type(candidate)
        strides = "xm wn ar bn ym bitsm".split()
        types = dict(
            x_ptr=x, w_ptr=x, bias_ptr=x, a_ptr="*fp32", b_ptr="*fp32", y_ptr=x, s_ptr=x, bits_ptr="*u8",
            seed_ptr="*i64", scale="fp32", threshold="i32", M="i32", N="i32", K="i32", R="i32",
            **{f"stride_{name}": "i32" for name in strides},
        )  # fmt: skip
        for BLOCK_R in ranks(candidate):
            constants = dict(BLOCK_R=BLOCK_R, stride_xk=1, stride_wk=1, stride_ak=1, stride_br=1)
            yield case(_lora_one_launch_kernel, "lora_one_launch", f"r{BLOCK_R}-dropout", candidate, types, **constants)
            constants |= dict(bits_ptr=None, seed_ptr=None)
            yield case(_lora_one_launch_kernel, "lora_one_launch", f"r{BLOCK_R}", candidate, types, **constants)

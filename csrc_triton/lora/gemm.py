"""GEMM with the low-rank update in its accumulator: y = keep * (s @ b.T) + x @ w.T + bias, written once, never read.

    forward   x  (M, K)   w   (N, K)   s  (M, R)   b   (N, R)   bias (N,)
    dX        dY (M, N)   w.T (K, N)   ds (M, R)   a.T (K, R)   bits (M, ceil(K / 8)), the forward's keep mask

The low-rank product comes first, not last: it initialises the accumulator, so that dropout's mask is applied in
place. After the main loop it would need a second accumulator of the same size, which spills. w may have any strides.
b may be fp32 beside a 16-bit x. Accumulates in fp32; one rounding, at the store. Traffic: M*K + N*K + M*N elements +
R*(M + N). arXiv:2106.09685.
"""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from ..common.aot import AotCase, case, ranks, x_type
from ..common.dropout import expand_bits
from ..common.launch import launch
from ..common.tuning import ALWAYS, ARCHS, CUDA, HOPPER, SMALL, Candidate, block_r, candidates, cdiv, config_for


def _blocks(m: int, n: int, k: int, largest_r: int = 64) -> dict[str, int]:
    return dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, GROUP_M=8, LARGEST_R=largest_r)


CANDIDATES = candidates("lora_gemm", [
    Candidate(_blocks(32, 64, 128), 4, 3, CUDA, default_to=32),
    Candidate(_blocks(64, 128, 64), 4, 3, CUDA, default_to=256),
    Candidate(_blocks(128, 128, 64), 8, 3, CUDA, default_to=ALWAYS),
    Candidate(_blocks(128, 256, 64, 32), 8, 3, HOPPER),
    Candidate(_blocks(64, 64, 32), 4, 2, SMALL, default_to=256),
    Candidate(_blocks(128, 128, 32), 8, 2, SMALL, default_to=ALWAYS),
    Candidate(_blocks(32, 64, 32, 32), 8, 2, ARCHS, 4, default_to=ALWAYS),
])  # fmt: skip


@triton.jit
def _lora_gemm_kernel(
    x_ptr, w_ptr, bias_ptr, s_ptr, b_ptr, bits_ptr, y_ptr,
    M, N, K, R,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_sm, stride_sr, stride_bn, stride_br, stride_bitsm, stride_ym,
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

    s_ptrs = s_ptr + offs_m[:, None] * stride_sm + offs_r[None, :] * stride_sr
    b_ptrs = b_ptr + offs_r[:, None] * stride_br + offs_n[None, :] * stride_bn
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r in tl.range(0, R, BLOCK_R, num_stages=1):
        s = tl.load(s_ptrs, mask=mask_m & (r + offs_r < R)[None, :], other=0.0)  # (BLOCK_M, BLOCK_R)
        b = tl.load(b_ptrs, mask=(r + offs_r < R)[:, None] & mask_n, other=0.0).to(s.dtype)  # (BLOCK_R, BLOCK_N)
        acc = tl.dot(s, b, acc, input_precision="ieee")
        s_ptrs += BLOCK_R * stride_sr
        b_ptrs += BLOCK_R * stride_br
    if bits_ptr is not None:
        offs_byte = pid_n.to(tl.int64) * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
        bits_ptrs = bits_ptr + offs_m[:, None] * stride_bitsm + offs_byte[None, :]
        byte = tl.load(bits_ptrs, mask=mask_m & (offs_byte * 8 < N)[None, :], other=0)
        acc = tl.where(expand_bits(byte, BLOCK_M, BLOCK_N), acc, 0.0)

    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k.to(tl.int64)[None, :] * stride_xk
    w_ptrs = w_ptr + offs_k.to(tl.int64)[:, None] * stride_wk + offs_n[None, :] * stride_wn
    for k in range(0, K, BLOCK_K):
        x = tl.load(x_ptrs, mask=mask_m & (k + offs_k < K)[None, :], other=0.0)  # (BLOCK_M, BLOCK_K)
        w = tl.load(w_ptrs, mask=(k + offs_k < K)[:, None] & mask_n, other=0.0)  # (BLOCK_K, BLOCK_N)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        x_ptrs += BLOCK_K * stride_xk
        w_ptrs += BLOCK_K * stride_wk

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m & mask_n)


def lora_gemm(x: Tensor, w: Tensor, bias: Tensor | None, s: Tensor, b: Tensor, bits: Tensor | None = None) -> Tensor:
    """Return keep * (s @ b.T) + x @ w.T + bias, (M, N) in x.dtype. Trusts its caller."""
    (M, K), N, R = x.shape, w.shape[0], s.shape[1]
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty((M, N))
    if y.numel() == 0:
        return y
    config = config_for("lora_gemm", x, M, N, K, R)
    BLOCK_R = block_r(R, config["LARGEST_R"])
    launch(
        _lora_gemm_kernel, (cdiv(M, config["BLOCK_M"]) * cdiv(N, config["BLOCK_N"]),), (
            x, w, bias, s, b, bits, y, M, N, K, R,
            *x.stride(), *w.stride(), *s.stride(), *b.stride(), 0 if bits is None else bits.stride(0), y.stride(0),
        ), config, BLOCK_R=BLOCK_R,
    )  # fmt: skip
    return y


def aot_cases() -> Iterator[AotCase]:
    """Every candidate for each rank: forward with a bias, and dX with a mask."""
    for candidate in CANDIDATES:
        x = x_type(candidate)
        strides = "xm wn wk sm bn br bitsm ym".split()
        types = dict(
            x_ptr=x, w_ptr=x, bias_ptr=x, s_ptr=x, b_ptr="*fp32", bits_ptr="*u8", y_ptr=x,
            M="i32", N="i32", K="i32", R="i32", **{f"stride_{name}": "i32" for name in strides},
        )  # fmt: skip
        for BLOCK_R in ranks(candidate):
            constants = dict(BLOCK_R=BLOCK_R, stride_xk=1, stride_sr=1)
            forward = constants | dict(bits_ptr=None, stride_wk=1, stride_br=1)
            yield case(_lora_gemm_kernel, "lora_gemm", f"r{BLOCK_R}", candidate, types, **forward)
            dx = constants | dict(bias_ptr=None, stride_wn=1, stride_bn=1)
            yield case(_lora_gemm_kernel, "lora_gemm", f"r{BLOCK_R}-dx", candidate, types, **dx)

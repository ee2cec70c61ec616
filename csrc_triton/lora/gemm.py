"""GEMM with the low-rank update in its accumulator: y = keep * (s @ b.T) + x @ w.T + bias, written once, never read.

    forward   x  (M, K)   w   (N, K)   s  (M, R)   b   (N, R)   bias (N,)
    dX        dY (M, N)   w.T (K, N)   ds (M, R)   a.T (K, R)   bits (M, ceil(K / 8)), the forward's keep mask

s may come as lora_shrink's planes (P, M, R) fp32, whose sum it is: every program adds those of its rows, in order,
and the programs of the first columns store s. That saves a launch where M is small.

Where there is a mask the low-rank product comes first, so that the mask is applied in place: after the main loop it
would need a second accumulator of the same size, which spills. Where there is none it comes last: ptxas cannot keep
products of two loops in flight that follow each other in one accumulator, and would wait for each of the main loop.
w may have any strides. b may be fp32 beside a 16-bit x. Accumulates in fp32; one rounding, at the store.
Traffic: M*K + N*K + M*N elements + R*(M + N). arXiv:2106.09685.
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
    Candidate(_blocks(16, 16, 256), 4, 4, CUDA, default_to=16),  # 256 programs at N = 4096, 4 of them on one SM
    Candidate(_blocks(16, 32, 128), 4, 4, CUDA),
    Candidate(_blocks(32, 32, 128), 4, 3, CUDA, default_to=32),
    Candidate(_blocks(32, 64, 128), 4, 3, CUDA),
    Candidate(_blocks(64, 128, 64, 32), 4, 3, CUDA, default_to=256),  # planes of 64 ranks would spill on sm_100
    Candidate(_blocks(128, 128, 64), 8, 3, CUDA, default_to=ALWAYS),
    Candidate(_blocks(128, 256, 64, 32), 8, 3, HOPPER),
    Candidate(_blocks(64, 64, 32), 4, 2, SMALL, default_to=256),
    Candidate(_blocks(128, 128, 32), 8, 2, SMALL, default_to=ALWAYS),
    Candidate(_blocks(32, 64, 32, 32), 8, 2, ARCHS, 4, default_to=ALWAYS),
])  # fmt: skip


@triton.jit
def _add_low_rank(
    acc, s_ptrs, s_out_ptrs, b_ptrs, R, P, scale, stride_sp, stride_sr, stride_br, mask_m, mask_n, mask_stored,
    DTYPE: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc + s @ b.T. With s_out_ptrs, s is scale * the sum of P planes, rounded once, and stored there."""
    offs_r = tl.arange(0, BLOCK_R)
    for r in tl.range(0, R, BLOCK_R, num_stages=1):
        mask_s = mask_m & (r + offs_r < R)[None, :]
        s = tl.load(s_ptrs, mask=mask_s, other=0.0)  # (BLOCK_M, BLOCK_R)
        if s_out_ptrs is not None:
            plane_ptrs = s_ptrs
            for _ in range(1, P):
                plane_ptrs += stride_sp
                s += tl.load(plane_ptrs, mask=mask_s, other=0.0)
            s = (s * tl.cast(scale, tl.float32)).to(DTYPE)
            tl.store(s_out_ptrs + r, s, mask=mask_s & mask_stored)
        b = tl.load(b_ptrs, mask=(r + offs_r < R)[:, None] & mask_n, other=0.0).to(s.dtype)  # (BLOCK_R, BLOCK_N)
        acc = tl.dot(s, b, acc, input_precision="ieee")
        s_ptrs += BLOCK_R * stride_sr
        b_ptrs += BLOCK_R * stride_br
    return acc


@triton.jit(do_not_specialize=["M", "P", "stride_sp"])
def _lora_gemm_kernel(
    x_ptr, w_ptr, bias_ptr, s_ptr, s_out_ptr, b_ptr, bits_ptr, y_ptr,
    scale, M, N, K, R, P,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_sp, stride_sm, stride_sr, stride_bn, stride_br, stride_bitsm,
    stride_ym,
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
    s_out_ptrs = None
    if s_out_ptr is not None:
        s_out_ptrs = s_out_ptr + offs_m[:, None] * R + offs_r[None, :]
    b_ptrs = b_ptr + offs_r[:, None] * stride_br + offs_n[None, :] * stride_bn
    mask_stored = offs_m[:, None] < tl.where(pid_n == 0, M, 0)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if bits_ptr is not None:
        acc = _add_low_rank(
            acc, s_ptrs, s_out_ptrs, b_ptrs, R, P, scale, stride_sp, stride_sr, stride_br,
            mask_m, mask_n, mask_stored, DTYPE, BLOCK_R,
        )  # fmt: skip
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

    if bits_ptr is None:
        acc = _add_low_rank(
            acc, s_ptrs, s_out_ptrs, b_ptrs, R, P, scale, stride_sp, stride_sr, stride_br,
            mask_m, mask_n, mask_stored, DTYPE, BLOCK_R,
        )  # fmt: skip
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m & mask_n)


def lora_gemm(x: Tensor, w: Tensor, bias: Tensor | None, s: Tensor, b: Tensor, bits: Tensor | None = None) -> Tensor:
    """Return keep * (s @ b.T) + x @ w.T + bias, (M, N) in x.dtype. Trusts its caller."""
    return _launch(x, w, bias, s, None, 1.0, b, bits)


def lora_gemm_planes(
    x: Tensor, w: Tensor, bias: Tensor | None, planes: Tensor, scale: float, b: Tensor
) -> tuple[Tensor, Tensor]:
    """Return y = s @ b.T + x @ w.T + bias (M, N) and s = scale * planes.sum(0) (M, R), both in x.dtype.

    planes (P, M, R) fp32. N > 0: s comes from the programs of the first columns.
    """
    s = x.new_empty(planes.shape[1:])
    return _launch(x, w, bias, planes, s, scale, b, None), s


def _launch(
    x: Tensor, w: Tensor, bias: Tensor | None, s: Tensor, s_out: Tensor | None, scale: float, b: Tensor,
    bits: Tensor | None,
) -> Tensor:  # fmt: skip
    """s: the product itself, or its planes where s_out takes the sum."""
    (M, K), N, R = x.shape, w.shape[0], s.shape[-1]
    P, stride_sp = (1, 0) if s_out is None else (s.shape[0], s.stride(0))
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty((M, N))
    if y.numel() == 0:
        return y
    config = config_for("lora_gemm", x, M, N, K, R)
    BLOCK_R = block_r(R, config["LARGEST_R"])
    launch(
        _lora_gemm_kernel, (cdiv(M, config["BLOCK_M"]) * cdiv(N, config["BLOCK_N"]),), (
            x, w, bias, s, s_out, b, bits, y, scale, M, N, K, R, P,
            *x.stride(), *w.stride(), stride_sp, s.stride(-2), s.stride(-1), *b.stride(),
            0 if bits is None else bits.stride(0), y.stride(0),
        ), config, BLOCK_R=BLOCK_R,
    )  # fmt: skip
    return y


def aot_cases() -> Iterator[AotCase]:
    """Every candidate for each rank: forward with a bias, with s in planes too, and dX with a mask."""
    for candidate in CANDIDATES:
        x = x_type(candidate)
        strides = "xm wn wk sp sm bn br bitsm ym".split()
        types = dict(
            x_ptr=x, w_ptr=x, bias_ptr=x, s_ptr=x, s_out_ptr=x, b_ptr="*fp32", bits_ptr="*u8", y_ptr=x, scale="fp32",
            M="i32", N="i32", K="i32", R="i32", P="i32", **{f"stride_{name}": "i32" for name in strides},
        )  # fmt: skip
        for BLOCK_R in ranks(candidate):
            constants = dict(BLOCK_R=BLOCK_R, stride_xk=1, stride_sr=1)
            planes = constants | dict(bits_ptr=None, stride_wk=1, stride_br=1)
            types |= dict(s_ptr="*fp32")
            yield case(_lora_gemm_kernel, "lora_gemm", f"r{BLOCK_R}-planes", candidate, types, **planes)
            types |= dict(s_ptr=x)
            forward = planes | dict(s_out_ptr=None)
            yield case(_lora_gemm_kernel, "lora_gemm", f"r{BLOCK_R}", candidate, types, **forward)
            dx = constants | dict(bias_ptr=None, s_out_ptr=None, stride_wn=1, stride_bn=1)
            yield case(_lora_gemm_kernel, "lora_gemm", f"r{BLOCK_R}-dx", candidate, types, **dx)

"""LoRA expand: y = base + keep * (s @ b.T) in one pass, for a base product that something else has computed.

    s (M, R) scale * dropout(x) @ a.T    b (N, R) lora_B.weight    base (M, N) or None    y (M, N) dtype of base
    bits (M, ceil(N / 8)) keep mask or None: the same kernel gives the update's part of dX, with ds for s and a.T for b

Accumulates in fp32; one rounding, at the store. Traffic: M*R + N*R + 2*M*N elements. arXiv:2106.09685, eq. 3.
"""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from ..common.aot import AotCase, case, ranks, x_type
from ..common.dropout import expand_bits
from ..common.launch import launch
from ..common.tuning import ALWAYS, ARCHS, CUDA, SMALL, Candidate, block_r, candidates, cdiv, config_for

CANDIDATES = candidates("lora_expand", [
    Candidate(dict(BLOCK_M=16, BLOCK_N=128, LARGEST_R=64), 4, 2, CUDA, default_to=64),
    Candidate(dict(BLOCK_M=64, BLOCK_N=128, LARGEST_R=64), 4, 2, CUDA, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=64, BLOCK_N=64, LARGEST_R=64), 4, 2, SMALL, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=32, BLOCK_N=64, LARGEST_R=32), 8, 2, ARCHS, 4, default_to=ALWAYS),
])  # fmt: skip


@triton.jit
def _lora_expand_kernel(
    s_ptr, b_ptr, base_ptr, bits_ptr, y_ptr,
    M, N, R,
    stride_sm, stride_sr, stride_bn, stride_br, stride_basem, stride_basen, stride_bitsm, stride_ym,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program writes one (BLOCK_M, BLOCK_N) tile of y."""
    pid_n = tl.program_id(1)
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m, mask_n = offs_m[:, None] < M, offs_n[None, :] < N

    s_ptrs = s_ptr + offs_m[:, None] * stride_sm + offs_r[None, :] * stride_sr
    b_ptrs = b_ptr + offs_r[:, None] * stride_br + offs_n[None, :] * stride_bn
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r in range(0, R, BLOCK_R):
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
    if base_ptr is not None:
        base_ptrs = base_ptr + offs_m[:, None] * stride_basem + offs_n[None, :] * stride_basen
        acc += tl.load(base_ptrs, mask=mask_m & mask_n, other=0.0).to(tl.float32)
    y_ptrs = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m & mask_n)


def lora_expand(s: Tensor, b: Tensor, base: Tensor | None, y: Tensor, bits: Tensor | None = None) -> Tensor:
    """y (M, N) = base + keep * (s @ b.T); returns y, which may be base itself. Trusts its caller."""
    (M, R), N = s.shape, b.shape[0]
    if y.numel() == 0:
        return y
    config = config_for("lora_expand", s, M, N, 0, R)
    BLOCK_R = block_r(R, config["LARGEST_R"])
    launch(
        _lora_expand_kernel, (cdiv(M, config["BLOCK_M"]), cdiv(N, config["BLOCK_N"])), (
            s, b, base, bits, y, M, N, R,
            *s.stride(), *b.stride(), *((0, 0) if base is None else base.stride()),
            0 if bits is None else bits.stride(0), y.stride(0),
        ), config, BLOCK_R=BLOCK_R,
    )  # fmt: skip
    return y


def aot_cases() -> Iterator[AotCase]:
    """Every candidate for each rank: forward, and the update's part of dX with a mask."""
    for candidate in CANDIDATES:
        x = x_type(candidate)
        types = dict(
            s_ptr=x, b_ptr="*fp32", base_ptr=x, bits_ptr="*u8", y_ptr=x, M="i32", N="i32", R="i32",
            stride_sm="i32", stride_bn="i32", stride_br="i32", stride_basem="i32", stride_bitsm="i32", stride_ym="i32",
        )  # fmt: skip
        for BLOCK_R in ranks(candidate):
            constants = dict(BLOCK_R=BLOCK_R, stride_sr=1, stride_basen=1)
            forward = constants | dict(bits_ptr=None, stride_br=1)
            yield case(_lora_expand_kernel, "lora_expand", f"r{BLOCK_R}", candidate, types, **forward)
            yield case(_lora_expand_kernel, "lora_expand", f"r{BLOCK_R}-dx", candidate, types, stride_bn=1, **constants)

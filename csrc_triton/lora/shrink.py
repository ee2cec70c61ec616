"""LoRA shrink: s = scale * dropout(x) @ a.T in one pass over x, drawing the dropout mask on the way.

    x (M, K) activations        a    (R, K) lora_A.weight of one site, or of several that read the same x, stacked
    s (M, R) dtype of x         bits (M, ceil(K / 8)) keep mask, see dropout.py

    s = scale * sum_k keep[m, k] * x[m, k] * a[r, k]

a may be fp32 beside a 16-bit x: it is converted in the load. Accumulates in fp32; one rounding, at the store. Where M
is too small to fill the GPU, K is split: each split writes an fp32 plane and the planes are added in a fixed order
(no atomics).
Traffic: M*K + R*K elements + M*K/8 bytes of mask. Hu et al. 2021, arXiv:2106.09685, eq. 3.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.aot import AotCase, case, ranks, x_type
from ..common.dropout import draw_bytes, expand_bits, row_keys, threshold_of
from ..common.launch import launch
from ..common.planes import sum_planes
from ..common.tuning import ALWAYS, ARCHS, CUDA, SMALL, Candidate, block_r, candidates, cdiv, config_for

# PROGRAMS: how many programs to aim at when K is split. LARGEST_R: beyond it the grid gets a third axis, and x is
# read once more (from L2) per block of ranks.
CANDIDATES = candidates("lora_shrink", [
    Candidate(dict(BLOCK_M=16, BLOCK_K=128, LARGEST_R=64, PROGRAMS=256), 4, 3, CUDA, default_to=512),
    Candidate(dict(BLOCK_M=64, BLOCK_K=64, LARGEST_R=128, PROGRAMS=256), 4, 3, CUDA, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=128, BLOCK_K=64, LARGEST_R=64, PROGRAMS=256), 8, 3, CUDA),  # a mask for 128 ranks spills
    Candidate(dict(BLOCK_M=32, BLOCK_K=64, LARGEST_R=64, PROGRAMS=256), 4, 2, SMALL, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=32, BLOCK_K=32, LARGEST_R=64, PROGRAMS=256), 8, 2, ARCHS, 4, default_to=ALWAYS),
])  # fmt: skip


@triton.jit(do_not_specialize=["threshold", "M", "stride_op"])
def _lora_shrink_kernel(
    x_ptr, a_ptr, out_ptr, bits_ptr, seed_ptr,
    scale, threshold, M, K, R, k_per_program,
    stride_xm, stride_xk, stride_ar, stride_ak, stride_op, stride_om, stride_bm,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program sums one (BLOCK_M, BLOCK_R) tile over k_per_program columns of x. No seed: no dropout."""
    pid_k, pid_r = tl.program_id(1), tl.program_id(2)
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = pid_r.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m, mask_r = offs_m[:, None] < M, offs_r[None, :] < R
    first = pid_k * k_per_program
    columns = (first + offs_k).to(tl.int64)
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + columns[None, :] * stride_xk
    a_ptrs = a_ptr + columns[:, None] * stride_ak + offs_r[None, :] * stride_ar
    if seed_ptr is not None:
        row_key, low, high = row_keys(seed_ptr, offs_m)
        stored = tl.where(pid_r == 0, K, 0)  # one block of ranks stores the mask

    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(first, min(first + k_per_program, K), BLOCK_K):
        x = tl.load(x_ptrs, mask=mask_m & (k + offs_k < K)[None, :], other=0.0)  # (BLOCK_M, BLOCK_K)
        a = tl.load(a_ptrs, mask=(k + offs_k < K)[:, None] & mask_r, other=0.0).to(x.dtype)  # (BLOCK_K, BLOCK_R)
        if seed_ptr is not None:
            offs_byte = k // 8 + tl.arange(0, BLOCK_K // 8)
            byte = draw_bytes(row_key, low, high, threshold, offs_byte, K)
            mask_byte = mask_m & (offs_byte * 8 < stored)[None, :]
            tl.store(bits_ptr + offs_m[:, None] * stride_bm + offs_byte[None, :], byte.to(tl.uint8), mask=mask_byte)
            x = tl.where(expand_bits(byte, BLOCK_M, BLOCK_K), x, tl.zeros_like(x))
        acc = tl.dot(x, a, acc, input_precision="ieee")
        x_ptrs += BLOCK_K * stride_xk
        a_ptrs += BLOCK_K * stride_ak

    out = (acc * tl.cast(scale, tl.float32)).to(out_ptr.dtype.element_ty)
    out_ptrs = out_ptr + pid_k.to(tl.int64) * stride_op + offs_m[:, None] * stride_om + offs_r[None, :]
    tl.store(out_ptrs, out, mask=mask_m & mask_r)


def lora_shrink(
    x: Tensor, a: Tensor, scale: float, p: float = 0.0, seed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return s (M, R) in x.dtype, and bits (M, ceil(K / 8)), or (0, 0) when p is 0. Trusts its caller."""
    planes, bits, scale_left = lora_shrink_planes(x, a, scale, p, seed)
    if planes.shape[0] == 1:
        return planes[0], bits
    return sum_planes(planes, x.new_empty(planes.shape[1:]), scale_left), bits


def lora_shrink_group(x: Tensor, as_: list[Tensor], scales: list[float]) -> Tensor:
    """scale * x @ a.T of each site, side by side, (M, sum of R), in one pass over x."""
    ranks = [a.shape[0] for a in as_]
    a = torch.cat([a.to(x.dtype) for a in as_])
    if len(set(scales)) == 1:
        return lora_shrink(x, a, scales[0])[0]
    planes, _, _ = lora_shrink_planes(x, a, 1.0, 0.0, None, fp32=True)
    s = x.new_empty(planes.shape[1:])
    for part, out, scale in zip(planes.split(ranks, dim=2), s.split(ranks, dim=1), scales, strict=True):
        sum_planes(part, out, scale)
    return s


def lora_shrink_planes(
    x: Tensor, a: Tensor, scale: float, p: float, seed: Tensor | None, fp32: bool = False
) -> tuple[Tensor, Tensor, float]:
    """Return planes (P, M, R), bits, and the factor that their sum still wants.

    Several planes are fp32. A single one is s itself, in x.dtype, unless fp32 is asked for.
    """
    (M, K), R = x.shape, a.shape[0]
    config = config_for("lora_shrink", x, M, 0, K, R)
    BLOCK_M, BLOCK_K, BLOCK_R = config["BLOCK_M"], config["BLOCK_K"], block_r(R, config["LARGEST_R"])
    tiles = cdiv(M, BLOCK_M) * cdiv(R, BLOCK_R)
    steps = cdiv(K, BLOCK_K)
    # at least four steps per split: a plane has to be worth its traffic
    splits = max(1, min(steps // 4, config["PROGRAMS"] // max(tiles, 1)))
    steps_per_program = max(1, cdiv(steps, splits))
    splits = max(1, cdiv(steps, steps_per_program))
    final = splits == 1 and not fp32
    planes = x.new_empty((splits, M, R), dtype=x.dtype if final else torch.float32)
    bits = x.new_empty((M, (K + 7) // 8) if p > 0 else (0, 0), dtype=torch.uint8)
    if planes.numel():
        launch(
            _lora_shrink_kernel, (cdiv(M, BLOCK_M), splits, cdiv(R, BLOCK_R)), (
                x, a, planes, bits if p > 0 else None, seed if p > 0 else None,
                scale if final else 1.0, threshold_of(p), M, K, R, steps_per_program * BLOCK_K,
                *x.stride(), *a.stride(), planes.stride(0), planes.stride(1), bits.stride(0),
            ), config, BLOCK_R=BLOCK_R,
        )  # fmt: skip
    return planes, bits, 1.0 if final else scale


def aot_cases() -> Iterator[AotCase]:
    """Every candidate for each rank, with and without dropout."""
    for candidate in CANDIDATES:
        x = x_type(candidate)
        types = dict(
            x_ptr=x, a_ptr="*fp32", out_ptr=x, bits_ptr="*u8", seed_ptr="*i64", scale="fp32", threshold="i32",
            M="i32", K="i32", R="i32", k_per_program="i32",
            stride_xm="i32", stride_ar="i32", stride_op="i32", stride_om="i32", stride_bm="i32",
        )  # fmt: skip
        for BLOCK_R in ranks(candidate):
            constants = dict(BLOCK_R=BLOCK_R, stride_xk=1, stride_ak=1)
            yield case(_lora_shrink_kernel, "lora_shrink", f"r{BLOCK_R}-dropout", candidate, types, **constants)
            constants |= dict(bits_ptr=None, seed_ptr=None)
            yield case(_lora_shrink_kernel, "lora_shrink", f"r{BLOCK_R}", candidate, types, **constants)

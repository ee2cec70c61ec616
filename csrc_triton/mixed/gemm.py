"""GEMM of a mixed batch with the low-rank update in its accumulator: y = x @ w.T + bias + s @ B_slot.T, in one pass.

    x (M, K)   w (N, K)   bias (N,)   y (M, N)   planes (P, M, max_rank) fp32: shrink.py   others: table.py

    s[m] = scales[slot[m]] * sum_p planes[p, m]      y[m] = w @ x[m] + bias + B[slot[m]] @ s[m]

A tile takes BLOCK_M rows in the order of their slots, so that it mostly has one adapter; with g of them it makes g
products with B, each for its own rows. These are chosen, not added up with zeros in between: an adapter with infinities
does not reach the rows of others, and a row's result does not depend on which rows share its tile. They come after the
main loop: chosen rows as its first accumulator would keep sm_90 from running its products asynchronously (ptxas says).
w may have any strides. Accumulates in fp32; s is rounded to x's dtype before it meets B; one rounding, at the store.
Traffic: M*K + N*K + M*N elements + sum over tiles of the ranks in them * N. arXiv:2106.09685.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.aot import AotCase, case, ranks as aot_ranks, x_type
from ..common.launch import launch
from ..common.tuning import ALWAYS, AMPERE, CUDA, HOPPER, SMALL, Candidate, block_r, candidates, cdiv, config_for
from .table import DTYPES, adapter, load_b, load_s, padded


def _blocks(m: int, n: int, k: int, largest_r: int = 32) -> dict[str, int]:
    return dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, GROUP_M=8, LARGEST_R=largest_r)


CANDIDATES = candidates("mixed_gemm", [
    # few rows: many programs, to stream w; with blocks of 32 ranks they would spill under triton 3.6
    Candidate(_blocks(16, 16, 256, 16), 4, 4, CUDA, default_to=16),  # 256 programs at N = 4096
    Candidate(_blocks(16, 32, 128, 16), 4, 5, CUDA, default_to=32),
    Candidate(_blocks(64, 64, 64), 4, 3, HOPPER),
    Candidate(_blocks(64, 128, 64), 8, 4, HOPPER, default_to=512),
    Candidate(_blocks(64, 128, 64, 16), 8, 3, AMPERE, default_to=512),
    Candidate(_blocks(128, 128, 64), 8, 3, CUDA, default_to=ALWAYS),
    Candidate(_blocks(64, 64, 32, 16), 4, 2, SMALL, default_to=ALWAYS),
    Candidate(_blocks(32, 64, 32, 16), 4, 2, ("sm_80", "sm_90", "gfx942"), 4, default_to=ALWAYS),
    Candidate(_blocks(32, 32, 32, 16), 4, 2, ("sm_100",), 4, default_to=ALWAYS),
])  # fmt: skip


@triton.jit(do_not_specialize=["M", "P", "L"])
def _mixed_gemm_kernel(
    x_ptr, w_ptr, bias_ptr, planes_ptr, slots_ptr, order_ptr, addresses_ptr, ranks_ptr, scales_ptr, y_ptr,
    M, N, K, P, L,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_pp, stride_pm, stride_ym,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One program writes BLOCK_M rows, neighbours in order, of BLOCK_N columns; GROUP_M as in lora/gemm.py."""
    pid, tiles_m, tiles_n = tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = pid // (GROUP_M * tiles_n) * GROUP_M
    group = min(tiles_m - first, GROUP_M)
    pid_m = first + pid % (GROUP_M * tiles_n) % group
    pid_n = pid % (GROUP_M * tiles_n) // group
    position = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = position < M
    rows = tl.load(order_ptr + position, mask=mask_m, other=0).to(tl.int64)
    slots = tl.load(slots_ptr + rows, mask=mask_m, other=-1)  # early: here nothing waits for them
    slots = tl.where(slots < 0, L, slots)  # rows without an adapter come last
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k, offs_r = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    mask_n = offs_n < N

    x_ptrs = x_ptr + rows[:, None] * stride_xm + offs_k.to(tl.int64)[None, :] * stride_xk
    w_ptrs = w_ptr + offs_k.to(tl.int64)[:, None] * stride_wk + offs_n[None, :] * stride_wn
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = k + offs_k < K
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)  # (BLOCK_M, BLOCK_K)
        w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)  # (BLOCK_K, BLOCK_N)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        x_ptrs += BLOCK_K * stride_xk
        w_ptrs += BLOCK_K * stride_wk

    slot = tl.min(slots, axis=0)
    while slot < L:
        mine = slots == slot
        rank = tl.load(ranks_ptr + slot)
        b_ptr, stride_bn = adapter(addresses_ptr, slot, 1, DTYPE), padded(rank)
        scale = tl.load(scales_ptr + slot)
        planes_ptrs = planes_ptr + rows[:, None] * stride_pm + offs_r[None, :]
        b_ptrs = b_ptr + offs_r[:, None] + offs_n[None, :] * stride_bn
        for r in tl.range(0, rank, BLOCK_R, num_stages=1):
            # (BLOCK_M, BLOCK_R) and (BLOCK_R, BLOCK_N)
            s = load_s(planes_ptrs + r, mine, r + offs_r, rank, stride_bn, P, stride_pp, scale, x_ptr.dtype.element_ty)
            b = load_b(b_ptrs + r, r + offs_r, rank, stride_bn, mask_n).to(s.dtype)
            acc = tl.where(mine[:, None], tl.dot(s, b, acc, input_precision="ieee"), acc)
        slot = tl.min(tl.where(slots > slot, slots, L), axis=0)

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + rows[:, None] * stride_ym + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def mixed_gemm(
    x: Tensor, w: Tensor, bias: Tensor | None, planes: Tensor, addresses: Tensor, ranks: Tensor, scales: Tensor,
    dtype: torch.dtype, slots: Tensor, order: Tensor,
) -> Tensor:  # fmt: skip
    """Return y (M, N) in x.dtype. Trusts its caller."""
    (M, K), N, (P, _, max_rank) = x.shape, w.shape[0], planes.shape
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty((M, N))
    if y.numel() == 0:
        return y
    config = config_for("mixed_gemm", x, M, N, K, max_rank)
    BLOCK_R = block_r(max_rank, config["LARGEST_R"])
    launch(
        _mixed_gemm_kernel, (cdiv(M, config["BLOCK_M"]) * cdiv(N, config["BLOCK_N"]),), (
            x, w, bias, planes, slots, order, addresses, ranks, scales, y, M, N, K, P, ranks.shape[0],
            *x.stride(), *w.stride(), planes.stride(0), planes.stride(1), y.stride(0),
        ), config, DTYPE=DTYPES[dtype], BLOCK_R=BLOCK_R,
    )  # fmt: skip
    return y


def aot_cases() -> Iterator[AotCase]:
    """Every candidate for each rank, with adapters of x's dtype and of fp32."""
    for candidate in CANDIDATES:
        x = x_type(candidate)
        strides = "xm wn pp pm ym".split()
        types = dict(
            x_ptr=x, w_ptr=x, bias_ptr=x, planes_ptr="*fp32", slots_ptr="*i32", order_ptr="*i32", addresses_ptr="*i64",
            ranks_ptr="*i32", scales_ptr="*fp32", y_ptr=x, M="i32", N="i32", K="i32", P="i32", L="i32",
            **{f"stride_{name}": "i32" for name in strides},
        )  # fmt: skip
        for BLOCK_R in aot_ranks(candidate):
            for name in dict.fromkeys((x[1:], "fp32")):
                constants = dict(BLOCK_R=BLOCK_R, DTYPE=tl.dtype(name), stride_xk=1, stride_wk=1)
                yield case(_mixed_gemm_kernel, "mixed_gemm", f"r{BLOCK_R}-{name}", candidate, types, **constants)

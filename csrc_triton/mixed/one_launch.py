"""A mixed batch of few rows in one launch: y = x @ w.T + bias + s @ B_slot.T, every row with its own adapter. M <= 64.

    x (M, K)   w (N, K)   bias (N,)   y (M, N)   planes (SPLIT, M, max_rank) fp32   counters (4,) int32
    others: table.py

    s[m] = scales[slot[m]] * sum_p A[slot[m]][:, part p of K] @ x[m, part p]
    y[m] = w @ x[m] + bias + B[slot[m]] @ s[m]

A program draws a ticket, which says what it does, once; there are programs for all of it, and some too many:
1. The first tickets are shrink jobs, one per block of rows and part of K. Each writes its own piece of a plane, counts
   itself done, and exits. They run beside the others: several programs fit on a multiprocessor.
2. The next make a tile of y each: the base product of its columns, which streams w and takes longer than a job.
3. Then a tile waits until all jobs are done, which by then they are, and adds the updates block by block: slots
   ascending, planes in order, each to its own rows alone. No atomics on data: a result depends on no timing, a row's
   on no other.
A program only waits for tickets before its own. Who drew those is running, and jobs wait for nobody: so there is no
deadlock, in whatever order programs start and however few of them fit on the GPU at a time.

counters: tickets drawn, jobs done, programs finished; zero between launches. The last program to finish sets them back,
so that a captured graph replays. Of two launches at the same time each needs its own: a plan has one row per site.

What Triton's interpreter cannot show, because it runs programs one after the other: that jobs are published (a
barrier, then a release) before they are counted, and seen (an acquire) before planes are read. Hence this kernel is
taken only by force or by a row of the table that was measured, and checked, on that GPU.
Traffic: N*K + M*K elements + sum of the live ranks * (K + N) + planes (L2). arXiv:2106.09685.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.aot import AotCase, case, ranks as aot_ranks, x_type
from ..common.launch import launch
from ..common.tuning import ALWAYS, AMPERE, ARCHS, HOPPER, SMALL, Candidate, block_r, candidates, cdiv, config_for
from .table import DTYPES, adapter, block_rows, load_b, load_s, padded

_BLOCKS = 128  # no plan of 64 rows has more


def _blocks(m: int, n: int, k: int, largest_r: int = 32) -> dict[str, int]:
    return dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, LARGEST_R=largest_r, SPLIT=4)


# BLOCK_M holds all rows of x. Stages and K are such that nothing spills under triton 3.6 and 3.9.
CANDIDATES = candidates("mixed_one_launch", [
    Candidate(_blocks(16, 32, 64), 4, 6, HOPPER, default_to=16),
    Candidate(_blocks(16, 64, 64), 4, 4, HOPPER),
    Candidate(_blocks(32, 32, 64), 4, 4, HOPPER, default_to=32),
    Candidate(_blocks(32, 64, 64), 4, 4, HOPPER),
    Candidate(_blocks(64, 64, 64), 8, 3, ("sm_90",), default_to=ALWAYS),
    Candidate(_blocks(64, 32, 64, 16), 4, 3, ("sm_100",), default_to=ALWAYS),
    Candidate(_blocks(16, 32, 128, 16), 4, 4, AMPERE, default_to=16),
    Candidate(_blocks(32, 32, 64), 4, 3, AMPERE, default_to=32),
    Candidate(_blocks(16, 32, 64, 16), 4, 2, SMALL, default_to=16),
    Candidate(_blocks(64, 32, 128, 16), 4, 2, SMALL, default_to=ALWAYS),
    Candidate(_blocks(64, 32, 32, 16), 8, 2, ARCHS, 4, default_to=ALWAYS),
])  # fmt: skip


@triton.jit
def _shrink_job(
    x_ptr, blocks_ptr, order_ptr, addresses_ptr, ranks_ptr, planes_ptr,
    job, K, stride_xm, stride_xk, stride_pp, stride_pm,
    DTYPE: tl.constexpr, SPLIT: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """As a program of shrink.py: up to BLOCK_J rows of one adapter, one of SPLIT parts of K."""
    slot, rank, rows, mask_m = block_rows(blocks_ptr, order_ptr, ranks_ptr, job // SPLIT, 1, BLOCK_J)
    a_ptr = adapter(addresses_ptr, slot, 0, DTYPE)
    offs_k, offs_r = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    part = job % SPLIT
    columns_per_part = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT) * BLOCK_K
    first = part * columns_per_part
    columns = (first + offs_k).to(tl.int64)
    planes_ptrs = planes_ptr + part.to(tl.int64) * stride_pp + rows[:, None] * stride_pm + offs_r[None, :]
    for r in range(0, rank, BLOCK_R):
        mask_r = (r + offs_r < rank)[None, :]
        x_ptrs = x_ptr + rows[:, None] * stride_xm + columns[None, :] * stride_xk
        a_ptrs = a_ptr + columns[:, None] + (r + offs_r).to(tl.int64)[None, :] * K
        acc = tl.zeros((BLOCK_J, BLOCK_R), tl.float32)
        for k in range(first, min(first + columns_per_part, K), BLOCK_K):
            mask_k = k + offs_k < K
            x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)  # (BLOCK_J, BLOCK_K)
            a = tl.load(a_ptrs, mask=mask_k[:, None] & mask_r, other=0.0).to(x.dtype)  # (BLOCK_K, BLOCK_R)
            acc = tl.dot(x, a, acc, input_precision="ieee")
            x_ptrs += BLOCK_K * stride_xk
            a_ptrs += BLOCK_K
        tl.store(planes_ptrs + r, acc, mask=mask_m[:, None] & mask_r)


@triton.jit
def _tile(
    x_ptr, w_ptr, bias_ptr, blocks_ptr, order_ptr, addresses_ptr, ranks_ptr, scales_ptr, planes_ptr, counters_ptr,
    y_ptr,
    tile, jobs, live, M, N, K,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_pp, stride_pm, stride_ym,
    DTYPE: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of y, for all rows."""
    position = tl.arange(0, BLOCK_M)
    mask_m = position < M
    rows = tl.load(order_ptr + position, mask=mask_m, other=0).to(tl.int64)
    offs_n = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
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

    while tl.atomic_add(counters_ptr + 1, 0, sem="acquire") < jobs:
        pass
    for block in range(0, live):
        entry = blocks_ptr + block * 3
        slot, first, count = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
        rank = tl.load(ranks_ptr + slot)
        mine = (position >= first) & (position < first + count)
        b_ptr, stride_bn = adapter(addresses_ptr, slot, 1, DTYPE), padded(rank)
        scale = tl.load(scales_ptr + slot)
        planes_ptrs = planes_ptr + rows[:, None] * stride_pm + offs_r[None, :]
        b_ptrs = b_ptr + offs_r[:, None] + offs_n[None, :] * stride_bn
        for r in tl.range(0, rank, BLOCK_R, num_stages=1):
            # (BLOCK_M, BLOCK_R) and (BLOCK_R, BLOCK_N)
            s = load_s(
                planes_ptrs + r, mine, r + offs_r, rank, stride_bn, SPLIT, stride_pp, scale, x_ptr.dtype.element_ty
            )
            b = load_b(b_ptrs + r, r + offs_r, rank, stride_bn, mask_n).to(s.dtype)
            acc = tl.where(mine[:, None], tl.dot(s, b, acc, input_precision="ieee"), acc)

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + rows[:, None] * stride_ym + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=["M", "n_blocks"])
def _mixed_one_launch_kernel(
    x_ptr, w_ptr, bias_ptr, blocks_ptr, order_ptr, addresses_ptr, ranks_ptr, scales_ptr, planes_ptr, counters_ptr,
    y_ptr,
    M, N, K, n_blocks,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_pp, stride_pm, stride_ym,
    DTYPE: tl.constexpr, SPLIT: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program does a job, or makes a tile, or is one too many; the blocks are at most BLOCK_B."""
    offs_b = tl.arange(0, BLOCK_B)
    slots = tl.load(blocks_ptr + offs_b * 3, mask=offs_b < n_blocks, other=-1)
    live = tl.sum((slots >= 0).to(tl.int32), axis=0)  # they come first
    jobs = live * SPLIT
    ticket = tl.atomic_add(counters_ptr, 1, sem="relaxed")
    tile = ticket - jobs
    if tile < 0:
        _shrink_job(
            x_ptr, blocks_ptr, order_ptr, addresses_ptr, ranks_ptr, planes_ptr, ticket, K,
            stride_xm, stride_xk, stride_pp, stride_pm, DTYPE, SPLIT, BLOCK_J, BLOCK_K, BLOCK_R,
        )  # fmt: skip
        tl.debug_barrier()  # all of the program has stored its part of the plane
        tl.atomic_add(counters_ptr + 1, 1, sem="release")
    elif tile < tl.cdiv(N, BLOCK_N):
        _tile(
            x_ptr, w_ptr, bias_ptr, blocks_ptr, order_ptr, addresses_ptr, ranks_ptr, scales_ptr, planes_ptr,
            counters_ptr, y_ptr, tile, jobs, live, M, N, K,
            stride_xm, stride_xk, stride_wn, stride_wk, stride_pp, stride_pm, stride_ym,
            DTYPE, SPLIT, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R,
        )  # fmt: skip
    finished = tl.atomic_add(counters_ptr + 2, 1, sem="acq_rel")
    to_reset = tl.where(finished == tl.num_programs(0) - 1, 4, 0)
    tl.store(counters_ptr + tl.arange(0, 4), tl.zeros((4,), tl.int32), mask=tl.arange(0, 4) < to_reset)


def mixed_one_launch(
    x: Tensor, w: Tensor, bias: Tensor | None, addresses: Tensor, ranks: Tensor, scales: Tensor, dtype: torch.dtype,
    max_rank: int, order: Tensor, blocks: Tensor, rows_per_block: int, counters: Tensor,
) -> Tensor:  # fmt: skip
    """Return y (M, N) in x.dtype, M <= 64; counters (4,) are zero before and after. Trusts its caller."""
    (M, K), N, n_blocks = x.shape, w.shape[0], blocks.shape[0]
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty((M, N))
    if y.numel() == 0:
        return y
    config = config_for("mixed_one_launch", x, M, N, K, max_rank)
    BLOCK_R = block_r(max_rank, config["LARGEST_R"])
    planes = x.new_empty((config["SPLIT"], M, max_rank), dtype=torch.float32)
    launch(
        _mixed_one_launch_kernel, (cdiv(N, config["BLOCK_N"]) + n_blocks * config["SPLIT"],), (
            x, w, bias, blocks, order, addresses, ranks, scales, planes, counters, y, M, N, K, n_blocks,
            *x.stride(), *w.stride(), planes.stride(0), planes.stride(1), y.stride(0),
        ), config, DTYPE=DTYPES[dtype], BLOCK_J=rows_per_block, BLOCK_B=_BLOCKS, BLOCK_R=BLOCK_R,
    )  # fmt: skip
    return y


def aot_cases() -> Iterator[AotCase]:
    """Every candidate for each rank, with adapters of x's dtype and of fp32."""
    for candidate in CANDIDATES:
        x = x_type(candidate)
        strides = "xm wn pp pm ym".split()
        types = dict(
            x_ptr=x, w_ptr=x, bias_ptr=x, blocks_ptr="*i32", order_ptr="*i32", addresses_ptr="*i64", ranks_ptr="*i32",
            scales_ptr="*fp32", planes_ptr="*fp32", counters_ptr="*i32", y_ptr=x, M="i32", N="i32", K="i32",
            n_blocks="i32", **{f"stride_{name}": "i32" for name in strides},
        )  # fmt: skip
        for BLOCK_R in aot_ranks(candidate):
            for name in dict.fromkeys((x[1:], "fp32")):
                constants = dict(
                    BLOCK_R=BLOCK_R, BLOCK_J=16, BLOCK_B=_BLOCKS, DTYPE=tl.dtype(name), stride_xk=1, stride_wk=1
                )
                label = f"r{BLOCK_R}-{name}"
                yield case(_mixed_one_launch_kernel, "mixed_one_launch", label, candidate, types, **constants)

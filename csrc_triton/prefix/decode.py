"""Attention with a learned prefix for a few queries per row (decode): the keys are split, the prefix is read once.

    q (B, Hq, L, D)    parts (N, B, Hq, L, D) fp32, and the log2 of each part's sum (N, B, Hq, L) fp32
    parts 0 .. prefix_splits: of the prefixes; the others: of the ordinary keys

One launch, two kinds of programs. Ordinary keys: the queries of one row that share a key head are the rows of a tile,
which takes one split of the keys. Prefixes: queries of several rows, in ``order`` (rows of one prefix are neighbours),
are the rows of a tile, which takes one split of every prefix that occurs in it: where that is one, it is read once for
all of them. A second launch merges the parts in a fixed order. Sizes of the grids depend on shapes only; starts,
lengths, past and masks are read on the device: a captured graph may be replayed with others.
Traffic: k, v once, the prefix once per BLOCK_M queries (from L2), parts. Hydragen: Juravsky 2024, arXiv:2402.05099.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.aot import AotCase
from ..common.dropout import row_keys
from ..common.launch import launch, launch_by_name
from ..common.tuning import ALWAYS, AMPERE, ARCHS, CUDA, Candidate, candidates, cdiv, config_for
from .softmax import attend_ordinary, attend_prefix, finished, initial
from .tile import (
    LN2,
    LOG2E,
    attention_cases,
    keys_in_reach,
    load_tile,
    mask_rows_of,
    past_of,
    prefix_of,
    visible_range,
)  # fmt: skip

# PROGRAMS: how many to aim at when keys are split
CANDIDATES = candidates("prefix_decode", [
    Candidate(dict(BLOCK_M=16, BLOCK_N=64, PROGRAMS=512), 8, 2, max_rank=128, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=16, BLOCK_N=32, PROGRAMS=512), 4, 2, ("sm_90",), max_rank=128),
    Candidate(dict(BLOCK_M=16, BLOCK_N=64, PROGRAMS=512), 8, 2, CUDA, max_rank=256, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=16, BLOCK_N=32, PROGRAMS=512), 8, 1, ("gfx942",), max_rank=256, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=16, BLOCK_N=32, PROGRAMS=512), 8, 2, AMPERE, 4, max_rank=128, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=16, BLOCK_N=32, PROGRAMS=512), 8, 1, ARCHS[1:], 4, max_rank=128, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=16, BLOCK_N=16, PROGRAMS=512), 8, 1, itemsize=4, max_rank=256, default_to=ALWAYS),
])  # fmt: skip
_MAX_SPLITS = 32  # of either kind; the merge holds all parts at once
_MERGE_D = 64
_NO_START = tl.constexpr(0x7FFFFFFF)


_BOUNDS = ["causal_offset", "window", "threshold", "B", "L", "S", "max_length", "splits", "keys_per_split"]


@triton.jit(do_not_specialize=[*_BOUNDS, "prefix_splits", "slots_per_split"])
def _prefix_decode_kernel(
    q_ptr, k_ptr, v_ptr, pk_ptr, pv_ptr, order_ptr, parts_ptr, sums_ptr,
    starts_ptr, lengths_ptr, past_ptr, mask_ptr, bias_ptr, seed_ptr,
    inner, outer, causal_offset, window, threshold, keep_scale, B, L, S, max_length, group,
    prefix_splits, slots_per_split, splits, keys_per_split,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_pkt, stride_pkh, stride_pvt, stride_pvh,
    stride_mb, stride_mh, stride_ml, stride_ms, stride_bb, stride_bh, stride_bl, stride_bj,
    D: tl.constexpr, PADDING: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries and one split, of the prefixes of several rows or of the keys of one row."""
    DROPOUT: tl.constexpr = seed_ptr is not None
    job, hk = tl.program_id(0), tl.program_id(1).to(tl.int64)
    H, queries = tl.num_programs(1) * group, group * L  # queries of a row that share a key head
    prefix_jobs = tl.cdiv(B * queries, BLOCK_M) * prefix_splits
    shared = job < prefix_jobs
    job = tl.where(shared, job, job - prefix_jobs)
    part, tile = job % tl.where(shared, prefix_splits, splits), job // tl.where(shared, prefix_splits, splits)
    tiles = tl.cdiv(queries, BLOCK_M)
    one = tile // tiles  # the row whose ordinary keys these are
    begin = tl.where(shared, tile * BLOCK_M, one * queries + tile % tiles * BLOCK_M)
    end = tl.where(shared, B * queries, (one + 1) * queries)
    offs = begin + tl.arange(0, BLOCK_M)
    used, offs = offs < end, tl.minimum(offs, end - 1)  # queries beyond the last repeat it and are not stored
    b = offs // queries
    if order_ptr is not None:
        b = tl.where(shared, tl.load(order_ptr + b), b)
    b, h, i = b.to(tl.int64), hk * group + offs % queries // L, offs % L
    row = (b * H + h) * L + i
    row_key, seed_low, seed_high = 0, 0, 0
    if DROPOUT:
        row_key, seed_low, seed_high = row_keys(seed_ptr, row)
        row_key = row_key[:, None]
    bias_rows = None if bias_ptr is None else (bias_ptr + b * stride_bb + h * stride_bh + i * stride_bl)[:, None]
    q = load_tile(q_ptr, b * stride_qb + h * stride_qh + i * stride_ql, 1, None, D, BLOCK_D)
    acc, m, den = initial(None, 0, BLOCK_M, BLOCK_D)
    if shared:
        start, length = prefix_of(starts_ptr, lengths_ptr, b, max_length)
        start = tl.where(used & (length > 0), start, _NO_START)
        past = past_of(past_ptr)
        first, last = part * slots_per_split, (part + 1) * slots_per_split
        current = tl.min(start, axis=0)
        while current < _NO_START:  # each prefix that occurs in the tile
            mine = tl.where(start == current, length, 0)
            longest = tl.max(mine, axis=0)
            at = current.to(tl.int64)
            updated, m, den = attend_prefix(
                acc, m, den, q, pk_ptr + at * stride_pkt + hk * stride_pkh, pv_ptr + at * stride_pvt + hk * stride_pvh,
                stride_pkt, stride_pvt, first, tl.minimum(last, longest), longest, mine[:, None], i[:, None], past,
                window, bias_rows, stride_bj, row_key, seed_low, seed_high, threshold, inner, outer,
                D, WINDOWED, SOFTCAP, DROPOUT, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            acc = tl.where(mine[:, None] > 0, updated, acc)  # 0 times another prefix's infinity is no zero
            current = tl.min(tl.where(start > current, start, _NO_START), axis=0)
    else:
        first, last = part * keys_per_split, tl.minimum((part + 1) * keys_per_split, S)
        first, last = keys_in_reach(first, last, 0, L - 1, causal_offset, window, CAUSAL, WINDOWED)
        first = first // BLOCK_N * BLOCK_N
        at, mask_rows = one.to(tl.int64), None
        if mask_ptr is not None:  # a static cache is masked from its length on
            head, query = h[:, None], i[:, None]
            mask_rows = mask_rows_of(mask_ptr, at, head, query, stride_mb, stride_mh, stride_ml, PADDING)
            first, last, _ = visible_range(mask_rows, stride_ms, first, last, BLOCK_N, False)
        acc, m, den = attend_ordinary(
            acc, m, den, q, k_ptr + at * stride_kb + hk * stride_kh, v_ptr + at * stride_vb + hk * stride_vh,
            stride_ks, stride_vs, first, last, last, i[:, None], causal_offset, window, mask_rows, stride_ms,
            row_key, seed_low, seed_high, threshold, max_length, inner, outer,
            D, CAUSAL, WINDOWED, SOFTCAP, DROPOUT, False, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    out, lse = finished(acc, m, den, keep_scale)
    part = tl.where(shared, part, prefix_splits + part)
    stored, offs_d = part.to(tl.int64) * (B * H * L) + row, tl.arange(0, BLOCK_D)
    tl.store(parts_ptr + stored[:, None] * D + offs_d[None, :], out, mask=used[:, None] & (offs_d < D)[None, :])
    tl.store(sums_ptr + stored, lse, mask=used)


@triton.jit(do_not_specialize=["L", "PARTS"])
def _prefix_merge_kernel(
    parts_ptr, sums_ptr, sinks_ptr, out_ptr, lse_ptr, H, L, PARTS, D, BLOCK_PARTS: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """One program: BLOCK_D elements of one query's output, from all parts and the sink, which has no value."""
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    b, h, i = row // (H * L), row // L % H, row % L
    at = tl.arange(0, BLOCK_PARTS).to(tl.int64) * rows + row
    mask = tl.arange(0, BLOCK_PARTS) < PARTS
    sums = tl.load(sums_ptr + at, mask=mask, other=float("-inf"))
    highest = tl.max(sums, axis=0)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + h).to(tl.float32) * LOG2E
        highest = tl.maximum(highest, sink)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    weight = tl.exp2(sums - shift)
    total = tl.sum(weight, axis=0)
    if sinks_ptr is not None:
        total += tl.exp2(sink - shift)
    seen = total > 0.0
    total = tl.where(seen, total, 1.0)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    part = tl.load(parts_ptr + at[:, None] * D + offs_d[None, :], mask=mask[:, None] & (offs_d < D)[None, :], other=0.0)
    out = tl.sum(part * weight[:, None], axis=0) / total
    out_ptrs = out_ptr + ((b * L + i) * H + h) * D + offs_d
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=offs_d < D)
    lse = tl.where(seen, (shift + tl.log2(total)) * LN2, float("-inf"))
    tl.store(lse_ptr + row, lse, mask=tl.program_id(1) == 0)


def prefix_decode(
    q: Tensor, shared: dict[str, Any], order: Tensor | None, sinks: Tensor | None, out: Tensor, lse: Tensor
) -> None:
    """Fill out (B, L, Hq, D) and lse (B, Hq, L); shared: of ``shared_arguments``. Trusts its caller."""
    (B, H, L, D), group = q.shape, shared["group"]
    config = config_for("prefix_decode", q, group * L, 0, 0, D)
    BLOCK_N, programs = config["BLOCK_N"], config["PROGRAMS"]
    KV, tiles = H // group, B * cdiv(group * L, config["BLOCK_M"])
    prefix_tiles = cdiv(B * group * L, config["BLOCK_M"]) if shared["max_length"] else 0
    least = 1 if B == 1 else 2  # the tiles of one row are few: more programs are worth more than a longer loop in each
    prefix_splits, slots = _split(shared["max_length"], BLOCK_N, programs // max(KV * prefix_tiles, 1), least)
    splits, keys = _split(shared["S"], BLOCK_N, programs // (KV * tiles), least)
    parts = q.new_empty((prefix_splits + splits, B, H, L, D), dtype=torch.float32)
    sums = q.new_empty(parts.shape[:-1], dtype=torch.float32)
    if parts.shape[0]:
        shared |= dict(
            order_ptr=order, parts_ptr=parts, sums_ptr=sums, B=B, prefix_splits=prefix_splits,
            slots_per_split=slots, splits=splits, keys_per_split=keys,
        )  # fmt: skip
        grid = (prefix_tiles * prefix_splits + tiles * splits, KV)
        launch_by_name(_prefix_decode_kernel, grid, shared, config)
    # BLOCK_PARTS is always the largest: the number of parts grows with the cache, and nothing is compiled anew for that
    launch(
        _prefix_merge_kernel, (B * H * L, cdiv(D, _MERGE_D)), (
            parts, sums, sinks, out, lse, H, L, parts.shape[0], D,
        ), dict(num_warps=4), BLOCK_PARTS=2 * _MAX_SPLITS, BLOCK_D=_MERGE_D,
    )  # fmt: skip


def _split(length: int, block: int, wanted: int, least: int) -> tuple[int, int]:
    """Into how many parts ``length`` keys are split, of at least ``least`` tiles each, and the keys of a part."""
    steps = cdiv(length, block)
    splits = max(1, min(steps // least, wanted, _MAX_SPLITS))
    per_split = cdiv(steps, splits)
    return (cdiv(steps, per_split) if steps else 0), per_split * block


def aot_cases() -> Iterator[AotCase]:
    """Every candidate in every variant, and the merge."""
    more = "B prefix_splits slots_per_split splits keys_per_split".split()
    types = dict(order_ptr="*i32", parts_ptr="*fp32", sums_ptr="*fp32", **dict.fromkeys(more, "i32"))
    yield from attention_cases(_prefix_decode_kernel, "prefix_decode", CANDIDATES, types)
    for out in ("bf16", "fp32"):
        yield AotCase(
            kernel=_prefix_merge_kernel, name="prefix_merge", label=f"to-{out}", archs=ARCHS,
            signature=dict(
                parts_ptr="*fp32", sums_ptr="*fp32", sinks_ptr="*bf16", out_ptr=f"*{out}", lse_ptr="*fp32",
                H="i32", L="i32", PARTS="i32", D="i32", BLOCK_PARTS="constexpr", BLOCK_D="constexpr",
            ),
            constexprs=dict(BLOCK_PARTS=2 * _MAX_SPLITS, BLOCK_D=_MERGE_D),
            options=dict(num_warps=4, num_stages=2), matmul=False,
        )  # fmt: skip

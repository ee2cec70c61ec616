"""Gradients of prefix attention: dq, then those of the ordinary keys, then those of the prefix, summed over the batch.

    delta = dout . out    dP = keep / (1 - p) * dout @ V.T    dS = scale * P * (dP - delta) * (1 - tanh^2 with softcap)
    dq = dS @ [Kp; K]     dk = dS.T @ q                       dv = (keep / (1 - p) * P).T @ dout

P = exp2(s - log2 of the sum) is computed again from the forward's lse (tile.py). A program of dq owns a tile
of queries, one of dk, dv a tile of keys and loops over the queries of all heads that read it. A program of dprefix owns
a tile of the T slots and a share of the work list (rows x heads x tiles of queries); rows whose prefix does not meet
the tile cost two loads. Its sums stay in registers and go to an fp32 plane per share; planes are added in a fixed order
(planes.py): deterministic, no atomics, nothing of the size of the batch times the prefix.
Traffic: dq as the forward; the others read q, dout once per tile of keys; planes. Dao 2023, arXiv:2307.08691.
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
from ..common.planes import sum_planes
from ..common.tuning import ALWAYS, ARCHS, CUDA, SMALL, Candidate, candidates, cdiv, config_for
from .tile import (
    LOG2E,
    attention_cases,
    block_d,
    capped,
    kept,
    keys_in_reach,
    load_mask,
    load_tile,
    mask_rows_of,
    past_of,
    prefix_of,
    product,
    see_ordinary,
    see_prefix,
    shared_arguments,
    shown,
    tile_gradients,
    visible_range,
)  # fmt: skip

DQ_CANDIDATES = candidates("prefix_dq", [
    Candidate(dict(BLOCK_M=128, BLOCK_N=64), 8, 2, ("sm_90",), max_rank=128, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=64, BLOCK_N=32), 4, 1, ("sm_100",), max_rank=128, default_to=ALWAYS),  # 64 x 64 spills
    Candidate(dict(BLOCK_M=64, BLOCK_N=32), 8, 1, SMALL, max_rank=128, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=32, BLOCK_N=32), 8, 1, CUDA, max_rank=256, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=32, BLOCK_N=16), 8, 1, ("gfx942",), max_rank=256, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=16, BLOCK_N=32), 8, 1, itemsize=4, max_rank=128, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=16, BLOCK_N=16), 8, 1, itemsize=4, max_rank=256, default_to=ALWAYS),
])  # fmt: skip
DKV_CANDIDATES = candidates("prefix_dkv", [
    Candidate(dict(BLOCK_M=64, BLOCK_N=128), 8, 1, ("sm_90",), max_rank=64, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=32, BLOCK_N=128), 8, 2, ("sm_90", "sm_100"), max_rank=128, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=32, BLOCK_N=128), 8, 1, ("sm_90",), max_rank=128),
    Candidate(dict(BLOCK_M=32, BLOCK_N=64), 8, 2, ("sm_80", "sm_90"), max_rank=128, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=32, BLOCK_N=32), 4, 1, ("gfx942",), max_rank=128, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=32, BLOCK_N=32), 8, 2, CUDA, max_rank=256, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=16, BLOCK_N=32), 8, 1, ("gfx942",), max_rank=256, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=16, BLOCK_N=32), 8, 1, itemsize=4, max_rank=128, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=16, BLOCK_N=16), 8, 1, itemsize=4, max_rank=256, default_to=ALWAYS),
])  # fmt: skip
# PROGRAMS: how many to aim at when the work list is split
DPREFIX_CANDIDATES = candidates("prefix_dprefix", [
    Candidate(dict(BLOCK_M=64, BLOCK_N=128, PROGRAMS=256), 8, 2, ("sm_90",), max_rank=64, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=32, BLOCK_N=64, PROGRAMS=256), 8, 2, ("sm_90",), max_rank=128, default_to=64),
    Candidate(dict(BLOCK_M=32, BLOCK_N=128, PROGRAMS=256), 8, 2, ("sm_90",), max_rank=128, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=32, BLOCK_N=64, PROGRAMS=256), 8, 2, ("sm_80", "sm_100"), max_rank=128, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=32, BLOCK_N=32, PROGRAMS=256), 4, 1, ("gfx942",), max_rank=128, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=32, BLOCK_N=32, PROGRAMS=256), 8, 1, CUDA, max_rank=256, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=16, BLOCK_N=32, PROGRAMS=256), 8, 1, ("gfx942",), max_rank=256, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=32, BLOCK_N=32, PROGRAMS=256), 8, 1, itemsize=4, max_rank=128, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=16, BLOCK_N=16, PROGRAMS=256), 8, 1, itemsize=4, max_rank=256, default_to=ALWAYS),
])  # fmt: skip
_DELTA_ROWS = 16


@triton.jit
def _prefix_delta_kernel(
    dout_ptr, out_ptr, lse_ptr, sums_ptr, H, L, rows, stride_doutb, stride_doutl, stride_douth, D,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """sums (2, B, H, L) fp32: delta, and log2 of every query's sum, +inf where it saw nothing, so that P is 0."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    real, offs_d = row < rows, tl.arange(0, BLOCK_D)
    b, h, i = row // (H * L), row // L % H, row % L
    mask = real[:, None] & (offs_d < D)[None, :]
    dout_rows = b * stride_doutb + i * stride_doutl + h * stride_douth
    dout = tl.load(dout_ptr + dout_rows[:, None] + offs_d[None, :], mask=mask, other=0.0)
    out = tl.load(out_ptr + ((b * L + i) * H + h)[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
    tl.store(sums_ptr + row, tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1), mask=real)
    lse = tl.load(lse_ptr + row, mask=real, other=0.0)
    tl.store(sums_ptr + rows + row, tl.where(lse == float("-inf"), float("inf"), lse * LOG2E), mask=real)


@triton.jit
def _dq_tile(
    dq, q, dout, k, v, s, before, lse, delta, keep, keep_scale, outer, SOFTCAP: tl.constexpr
):  # fmt: skip
    """Add a tile of keys to dq (BLOCK_M, BLOCK_D) / scale."""
    dp = product(dout, v)
    _, ds = tile_gradients(s, before, lse, dp, delta, keep, keep_scale, outer, SOFTCAP)
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def _prefix_dq_kernel(
    q_ptr, k_ptr, v_ptr, pk_ptr, pv_ptr, dout_ptr, sums_ptr, dq_ptr,
    starts_ptr, lengths_ptr, past_ptr, mask_ptr, bias_ptr, seed_ptr,
    scale, inner, outer, causal_offset, window, threshold, keep_scale, L, S, max_length, group,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_pkt, stride_pkh, stride_pvt, stride_pvh, stride_doutb, stride_doutl, stride_douth,
    stride_mb, stride_mh, stride_ml, stride_ms, stride_bb, stride_bh, stride_bl, stride_bj,
    D: tl.constexpr, PADDING: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: dq of BLOCK_M queries of one head of one row."""
    DROPOUT: tl.constexpr = seed_ptr is not None
    PRECISE: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    begin = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    H, hk = tl.num_programs(1), h // group
    offs_m, offs_n = begin + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    query = tl.minimum(offs_m, L - 1)  # queries beyond the last repeat it and are not stored
    i, end = query[:, None], tl.minimum(begin + BLOCK_M, L)
    row = (b * H + h) * L + query
    mask_rows = None
    if mask_ptr is not None:
        mask_rows = mask_rows_of(mask_ptr, b, h, i, stride_mb, stride_mh, stride_ml, PADDING)
    bias_rows = None if bias_ptr is None else bias_ptr + b * stride_bb + h * stride_bh + i.to(tl.int64) * stride_bl
    row_key, seed_low, seed_high = 0, 0, 0
    if DROPOUT:
        row_key, seed_low, seed_high = row_keys(seed_ptr, row)
        row_key = row_key[:, None]
    q = load_tile(q_ptr + b * stride_qb + h * stride_qh, query.to(tl.int64), stride_ql, None, D, BLOCK_D)
    dout = load_tile(dout_ptr + b * stride_doutb + h * stride_douth, query.to(tl.int64), stride_doutl, None, D, BLOCK_D)
    delta = tl.load(sums_ptr + row)[:, None]
    lse = tl.load(sums_ptr + tl.num_programs(2) * H * L + row)[:, None]
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    start, length = prefix_of(starts_ptr, lengths_ptr, b, max_length)
    past = past_of(past_ptr)
    first = length * 0
    if WINDOWED:
        first = tl.maximum(first, length + past + begin - window + 1) // BLOCK_N * BLOCK_N
    pk_ptr += start.to(tl.int64) * stride_pkt + hk * stride_pkh
    pv_ptr += start.to(tl.int64) * stride_pvt + hk * stride_pvh
    for at in range(first, length, BLOCK_N):
        tile, j, real = tl.cast(at, tl.int64), (at + offs_n)[None, :], (at + offs_n < length)[:, None]
        bias = None if bias_rows is None else load_mask(bias_rows, j, stride_bj, j < length)
        k = load_tile(pk_ptr + tile * stride_pkt, offs_n, stride_pkt, real, D, BLOCK_D)
        v = load_tile(pv_ptr + tile * stride_pvt, offs_n, stride_pvt, real, D, BLOCK_D)
        before = capped(product(q, k), inner, outer, SOFTCAP, PRECISE)
        s = see_prefix(before, i, j, length, past, window, bias, WINDOWED)
        keep = kept(row_key, seed_low, seed_high, threshold, j) if DROPOUT else None
        dq = _dq_tile(dq, q, dout, k, v, s, before, lse, delta, keep, keep_scale, outer, SOFTCAP)

    first, last = keys_in_reach(0, S, begin, end - 1, causal_offset, window, CAUSAL, WINDOWED)
    first = first // BLOCK_N * BLOCK_N
    if mask_ptr is not None:
        first, last, _ = visible_range(mask_rows, stride_ms, first, last, BLOCK_N, False)
    k_ptr += b * stride_kb + hk * stride_kh
    v_ptr += b * stride_vb + hk * stride_vh
    for at in range(first, last, BLOCK_N):
        tile, n, real = tl.cast(at, tl.int64), (at + offs_n)[None, :], (at + offs_n < S)[:, None]
        mask = None if mask_rows is None else load_mask(mask_rows, n, stride_ms, n < S)
        k = load_tile(k_ptr + tile * stride_ks, offs_n, stride_ks, real, D, BLOCK_D)
        v = load_tile(v_ptr + tile * stride_vs, offs_n, stride_vs, real, D, BLOCK_D)
        before = capped(product(q, k), inner, outer, SOFTCAP, PRECISE)
        s = see_ordinary(before, i, n, S, mask, causal_offset, window, CAUSAL, WINDOWED)
        keep = kept(row_key, seed_low, seed_high, threshold, max_length + n) if DROPOUT else None
        dq = _dq_tile(dq, q, dout, k, v, s, before, lse, delta, keep, keep_scale, outer, SOFTCAP)

    dq *= tl.cast(scale, tl.float32)
    offs_d = tl.arange(0, BLOCK_D)
    dq_ptrs = dq_ptr + ((b * L + query) * H + h)[:, None] * D + offs_d[None, :]
    tl.store(dq_ptrs, dq.to(dq_ptr.dtype.element_ty), mask=(offs_m < L)[:, None] & (offs_d < D)[None, :])


@triton.jit
def _queries(
    q_ptr, dout_ptr, sums_ptr, begin, b, h, H, L, rows,
    stride_qb, stride_qh, stride_ql, stride_doutb, stride_doutl, stride_douth,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of queries for the gradients of keys: q, dout, delta, lse (+inf beyond the last query), i and its row."""
    offs = begin + tl.arange(0, BLOCK_M)
    query = tl.minimum(offs, L - 1)
    row = (b * H + h) * L + query
    q = load_tile(q_ptr + b * stride_qb + h * stride_qh, query.to(tl.int64), stride_ql, None, D, BLOCK_D)
    dout = load_tile(dout_ptr + b * stride_doutb + h * stride_douth, query.to(tl.int64), stride_doutl, None, D, BLOCK_D)
    delta = tl.load(sums_ptr + row)
    lse = tl.load(sums_ptr + rows + row, mask=offs < L, other=float("inf"))
    return q, dout, delta[None, :], lse[None, :], query, row


@triton.jit
def _dkv_tile(dk, dv, q, dout, v, s, before, lse, delta, keep, keep_scale, outer, SOFTCAP: tl.constexpr):
    """Add a tile of queries to dk / scale and dv, (BLOCK_N, BLOCK_D); scores are (BLOCK_N, BLOCK_M)."""
    dp = product(v, dout)
    dropped, ds = tile_gradients(s, before, lse, dp, delta, keep, keep_scale, outer, SOFTCAP)
    dv = tl.dot(dropped.to(dout.dtype), dout, dv, input_precision="ieee")
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _prefix_dkv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, sums_ptr, dk_ptr, dv_ptr, mask_ptr, seed_ptr,
    scale, inner, outer, causal_offset, window, threshold, keep_scale, L, S, max_length, group,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_doutb, stride_doutl, stride_douth, stride_mb, stride_mh, stride_ml, stride_ms,
    D: tl.constexpr, PADDING: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: dk and dv of BLOCK_N ordinary keys of one head of one row."""
    DROPOUT: tl.constexpr = seed_ptr is not None
    PRECISE: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    begin, hk, b = tl.program_id(0) * BLOCK_N, tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    KV = tl.num_programs(1)
    H, rows = KV * group, tl.num_programs(2) * KV * group * L
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    n, real = (begin + offs_n)[:, None], (begin + offs_n < S)[:, None]
    tile = tl.cast(begin, tl.int64)
    k_ptr += b * stride_kb + hk * stride_kh + tile * stride_ks
    v_ptr += b * stride_vb + hk * stride_vh + tile * stride_vs
    k = load_tile(k_ptr, offs_n, stride_ks, real, D, BLOCK_D)
    v = load_tile(v_ptr, offs_n, stride_vs, real, D, BLOCK_D)
    dk, dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_D), tl.float32)

    first, last = tl.cast(0, tl.int32), L + 0
    if CAUSAL:  # the queries that see any of the keys
        first = tl.maximum(first, begin - causal_offset) // BLOCK_M * BLOCK_M
        if WINDOWED:
            last = tl.minimum(last, begin + BLOCK_N - 1 + window - causal_offset)
    if mask_ptr is not None:
        mask_ptrs = mask_ptr + b * stride_mb + tl.minimum(n, S - 1).to(tl.int64) * stride_ms
        if PADDING:
            padding = tl.load(mask_ptrs)
            last = tl.where(tl.max(tl.max(shown(padding).to(tl.int32), axis=1), axis=0) > 0, last, first)
        else:  # a scan for one head says what is visible if the mask is the same for all
            scanned = tl.where(stride_mh == 0, last, first)
            low, high, _ = visible_range(mask_ptrs, stride_ml, first, scanned, BLOCK_M, False)
            first, last = tl.where(stride_mh == 0, low, first), tl.where(stride_mh == 0, high, last)
    tiles = tl.cdiv(tl.maximum(last - first, 0), BLOCK_M)
    for job in range(0, group * tiles):
        h = hk * group + job // tiles
        q, dout, delta, lse, query, row = _queries(
            q_ptr, dout_ptr, sums_ptr, first + job % tiles * BLOCK_M, b, h, H, L, rows,
            stride_qb, stride_qh, stride_ql, stride_doutb, stride_doutl, stride_douth, D, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        i, mask, keep = query[None, :], None, None
        if PADDING:
            mask = padding
        elif mask_ptr is not None:
            mask_rows = mask_rows_of(mask_ptr, b, h, i, stride_mb, stride_mh, stride_ml, False)
            mask = load_mask(mask_rows, n, stride_ms, n < S)
        before = capped(product(k, q), inner, outer, SOFTCAP, PRECISE)
        s = see_ordinary(before, i, n, S, mask, causal_offset, window, CAUSAL, WINDOWED)
        if DROPOUT:
            row_key, seed_low, seed_high = row_keys(seed_ptr, row)
            keep = kept(row_key[None, :], seed_low, seed_high, threshold, max_length + n)
        dk, dv = _dkv_tile(dk, dv, q, dout, v, s, before, lse, delta, keep, keep_scale, outer, SOFTCAP)

    at = ((b * S + begin + offs_n) * KV + hk)[:, None] * D + offs_d[None, :]
    stored = real & (offs_d < D)[None, :]
    tl.store(dk_ptr + at, (dk * tl.cast(scale, tl.float32)).to(dk_ptr.dtype.element_ty), mask=stored)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=stored)


@triton.jit
def _prefix_dprefix_kernel(
    q_ptr, pk_ptr, pv_ptr, dout_ptr, sums_ptr, dpk_ptr, dpv_ptr,
    starts_ptr, lengths_ptr, past_ptr, bias_ptr, seed_ptr,
    scale, inner, outer, window, threshold, keep_scale, B, L, T, max_length, group,
    stride_qb, stride_qh, stride_ql, stride_pkt, stride_pkh, stride_pvt, stride_pvh,
    stride_doutb, stride_doutl, stride_douth, stride_bb, stride_bh, stride_bl, stride_bj,
    D: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N slots of one head, summed over a share of all (row, query head, tile of queries)."""
    DROPOUT: tl.constexpr = seed_ptr is not None
    PRECISE: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    begin, hk, share = tl.program_id(0) * BLOCK_N, tl.program_id(1).to(tl.int64), tl.program_id(2)
    KV = tl.num_programs(1)
    H, tiles, past = KV * group, tl.cdiv(L, BLOCK_M), past_of(past_ptr)
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    real, tile = (begin + offs_n < T)[:, None], tl.cast(begin, tl.int64)
    k = load_tile(pk_ptr + tile * stride_pkt + hk * stride_pkh, offs_n, stride_pkt, real, D, BLOCK_D)
    v = load_tile(pv_ptr + tile * stride_pvt + hk * stride_pvh, offs_n, stride_pvt, real, D, BLOCK_D)
    dk, dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_D), tl.float32)

    jobs, shares = group * tiles, tl.num_programs(2)
    for b32 in range(0, B):
        b = tl.cast(b32, tl.int64)
        start, length = prefix_of(starts_ptr, lengths_ptr, b, max_length)
        j = (begin - start + offs_n)[:, None]
        meets = (length > 0) & (start < begin + BLOCK_N) & (start + length > begin)
        # the shares take turns, through all rows: those of one prefix may be neighbours
        turn = (share + shares - b32 * jobs % shares) % shares
        for job in range(turn, tl.where(meets, jobs, 0), shares):
            h = hk * group + job // tiles
            q, dout, delta, lse, query, row = _queries(
                q_ptr, dout_ptr, sums_ptr, job % tiles * BLOCK_M, b, h, H, L, B * H * L,
                stride_qb, stride_qh, stride_ql, stride_doutb, stride_doutl, stride_douth, D, BLOCK_M, BLOCK_D,
            )  # fmt: skip
            i, bias, keep = query[None, :], None, None
            if bias_ptr is not None:
                bias_rows = bias_ptr + b * stride_bb + h * stride_bh + i.to(tl.int64) * stride_bl
                bias = load_mask(bias_rows, j, stride_bj, (j >= 0) & (j < length))
            before = capped(product(k, q), inner, outer, SOFTCAP, PRECISE)
            s = see_prefix(before, i, j, length, past, window, bias, WINDOWED)
            if DROPOUT:
                row_key, seed_low, seed_high = row_keys(seed_ptr, row)
                keep = kept(row_key[None, :], seed_low, seed_high, threshold, j)
            dk, dv = _dkv_tile(dk, dv, q, dout, v, s, before, lse, delta, keep, keep_scale, outer, SOFTCAP)

    at = ((share.to(tl.int64) * T + begin + offs_n) * KV + hk)[:, None] * D + offs_d[None, :]
    stored = real & (offs_d < D)[None, :]
    tl.store(dpk_ptr + at, (dk * tl.cast(scale, tl.float32)).to(dpk_ptr.dtype.element_ty), mask=stored)
    tl.store(dpv_ptr + at, dv.to(dpv_ptr.dtype.element_ty), mask=stored)


def prefix_attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, out: Tensor, lse: Tensor,
    starts: Tensor | None, lengths: Tensor | None, order: Tensor | None, max_length: int, mask: Tensor | None,
    prefix_bias: Tensor | None, sinks: Tensor | None, past: Tensor | None, seed: Tensor | None, scale: float,
    causal_offset: int | None, window: int | None, softcap: float, p: float, needs: list[bool],
    implementation: str = "kernel",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (dq, dk, dv, dprefix_k, dprefix_v); what ``needs`` [q, k, v, prefix] does not ask for is an empty (0,).

    dq, dk and dv are (B, heads, length, D) views of contiguous (B, length, heads, D). Trusts its caller.
    """
    (B, H, L, D), T = q.shape, prefix_k.shape[0]
    need_q, need_k, need_v, need_prefix = needs
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    sums = q.new_empty((2, B, H, L), dtype=torch.float32)
    shared = shared_arguments(
        q, k, v, prefix_k, prefix_v, starts, lengths, max_length, mask, prefix_bias, past, seed,
        scale, causal_offset, window, softcap, p,
    )  # fmt: skip
    strides = dict(zip(("stride_doutb", "stride_doutl", "stride_douth"), dout.stride(), strict=False))
    shared |= dict(dout_ptr=dout, sums_ptr=sums, scale=scale, B=B, T=T, **strides)
    results = [q.new_empty(0) for _ in range(5)]
    if out.numel() and any(needs):
        launch(
            _prefix_delta_kernel, (cdiv(B * H * L, _DELTA_ROWS),), (
                dout, out, lse, sums, H, L, B * H * L, *strides.values(), D,
            ), dict(num_warps=4), BLOCK_M=_DELTA_ROWS, BLOCK_D=block_d(D),
        )  # fmt: skip
    if need_q:
        results[0] = _dq(q, shared)
    if need_k or need_v:
        dk, dv = _dkv(k, shared)
        results[1:3] = dk if need_k else results[1], dv if need_v else results[2]
    if need_prefix:
        results[3:5] = _dprefix(prefix_k, shared)
    return results[0], results[1], results[2], results[3], results[4]


def _dq(q: Tensor, shared: dict[str, Any]) -> Tensor:
    B, H, L, D = q.shape
    dq = q.new_empty((B, L, H, D))
    if dq.numel():
        config = config_for("prefix_dq", q, L, 0, 0, D)
        launch_by_name(_prefix_dq_kernel, (cdiv(L, config["BLOCK_M"]), H, B), shared | dict(dq_ptr=dq), config)
    return dq.transpose(1, 2)


def _dkv(k: Tensor, shared: dict[str, Any]) -> tuple[Tensor, Tensor]:
    B, KV, S, D = k.shape
    dk, dv = k.new_empty((B, S, KV, D)), k.new_empty((B, S, KV, D))
    if dk.numel():
        config = config_for("prefix_dkv", k, S, 0, 0, D)
        shared = shared | dict(dk_ptr=dk, dv_ptr=dv)
        launch_by_name(_prefix_dkv_kernel, (cdiv(S, config["BLOCK_N"]), KV, B), shared, config)
    return dk.transpose(1, 2), dv.transpose(1, 2)


def _dprefix(prefix_k: Tensor, shared: dict[str, Any]) -> tuple[Tensor, Tensor]:
    T, KV, D = prefix_k.shape
    config = config_for("prefix_dprefix", prefix_k, T, 0, 0, D)
    tiles = cdiv(T, config["BLOCK_N"]) * KV
    jobs = shared["B"] * shared["group"] * cdiv(shared["L"], config["BLOCK_M"])
    shares = max(1, min(config["PROGRAMS"] // max(tiles, 1), jobs))
    dtype = prefix_k.dtype if shares == 1 else torch.float32
    planes = [prefix_k.new_empty((shares, T, KV, D), dtype=dtype) for _ in range(2)]
    if planes[0].numel():
        shared = shared | dict(dpk_ptr=planes[0], dpv_ptr=planes[1])
        launch_by_name(_prefix_dprefix_kernel, (cdiv(T, config["BLOCK_N"]), KV, shares), shared, config)
    if shares == 1:
        return planes[0][0], planes[1][0]
    dpk, dpv = (
        sum_planes(plane.flatten(1, 2), prefix_k.new_empty((T * KV, D)), 1.0).view(T, KV, D) for plane in planes
    )
    return dpk, dpv


def aot_cases() -> Iterator[AotCase]:
    """Every candidate in every variant, and delta."""
    strides = dict.fromkeys("stride_doutb stride_doutl stride_douth B T".split(), "i32")
    for kernel, name, rows, outputs in (
        (_prefix_dq_kernel, "prefix_dq", DQ_CANDIDATES, ["dq_ptr"]),
        (_prefix_dkv_kernel, "prefix_dkv", DKV_CANDIDATES, ["dk_ptr", "dv_ptr"]),
        (_prefix_dprefix_kernel, "prefix_dprefix", DPREFIX_CANDIDATES, ["dpk_ptr", "dpv_ptr"]),
    ):
        # fp32 stands for 16-bit outputs too: it takes more registers to store, if anything
        types = dict(sums_ptr="*fp32", **strides, **dict.fromkeys(outputs, "*fp32"))
        yield from attention_cases(kernel, name, rows, types)
    for x in ("bf16", "fp32"):
        names = "H L rows stride_doutb stride_doutl stride_douth D".split()
        yield AotCase(
            kernel=_prefix_delta_kernel, name="prefix_delta", label=x, archs=ARCHS,
            signature=dict(
                dout_ptr=f"*{x}", out_ptr=f"*{x}", lse_ptr="*fp32", sums_ptr="*fp32", **dict.fromkeys(names, "i32"),
                BLOCK_M="constexpr", BLOCK_D="constexpr",
            ),
            constexprs=dict(BLOCK_M=_DELTA_ROWS, BLOCK_D=256),
            options=dict(num_warps=4, num_stages=3), matmul=False,
        )  # fmt: skip

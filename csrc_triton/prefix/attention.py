"""Attention with a learned prefix as a second source of keys and values: out = softmax([q @ Kp.T | q @ k.T]) @ [Vp; v].

    q (B, Hq, L, D)    k, v (B, Hkv, S, D)    prefix_k, prefix_v (T, Hkv, D), row b: starts[b] .. starts[b] + lengths[b]
    out (B, L, Hq, D)    lse (B, Hq, L) fp32, the log of the sum of exp of all scores: prefix, ordinary keys, sink

One online softmax runs over the tiles of the row's prefix and then over the ordinary keys: the prefix is neither
concatenated nor expanded over the batch. A few queries per row do not fill a GPU that way: decode.py. Starts,
lengths, past and masks are read on the device: a captured graph may be replayed with others.
Products are summed in fp32; fp32 products are exact ones (no tf32).
Traffic: q and out, and per tile of BLOCK_M queries the keys in reach and the prefix (from L2).
Dao 2023, arXiv:2307.08691; Li & Liang 2021, arXiv:2101.00190.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.aot import AotCase
from ..common.dropout import row_keys
from ..common.launch import launch_by_name
from ..common.tuning import ALWAYS, CUDA, HOPPER, SMALL, Candidate, candidates, cdiv, config_for
from .decode import prefix_decode
from .softmax import attend_ordinary, attend_prefix, finished, initial
from .tile import (
    LN2,
    attention_cases,
    keys_in_reach,
    load_tile,
    mask_rows_of,
    past_of,
    prefix_of,
    shared_arguments,
    visible_range,
)  # fmt: skip

CANDIDATES = candidates("prefix_fwd", [
    Candidate(dict(BLOCK_M=128, BLOCK_N=64), 8, 3, HOPPER, max_rank=128, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=64, BLOCK_N=32), 8, 2, SMALL, max_rank=128, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=32, BLOCK_N=64), 8, 2, CUDA, max_rank=256, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=32, BLOCK_N=32), 4, 1, ("gfx942",), max_rank=256, default_to=ALWAYS),
    Candidate(dict(BLOCK_M=16, BLOCK_N=32), 8, 1, itemsize=4, max_rank=128, default_to=ALWAYS),
    # 16x32, and 8 warps, spill with masks
    Candidate(dict(BLOCK_M=16, BLOCK_N=16), 4, 1, itemsize=4, max_rank=256, default_to=ALWAYS),
])  # fmt: skip
# Up to this many queries per key head (L times the group) are a decode.
DECODE_QUERIES = 64


@triton.jit
def _prefix_fwd_kernel(
    q_ptr, k_ptr, v_ptr, pk_ptr, pv_ptr, sinks_ptr, out_ptr, lse_ptr,
    starts_ptr, lengths_ptr, past_ptr, mask_ptr, bias_ptr, seed_ptr,
    inner, outer, causal_offset, window, threshold, keep_scale, L, S, max_length, group,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_pkt, stride_pkh, stride_pvt, stride_pvh,
    stride_mb, stride_mh, stride_ml, stride_ms, stride_bb, stride_bh, stride_bl, stride_bj,
    D: tl.constexpr, PADDING: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head of one row. Late queries, which see most keys, come first."""
    DROPOUT: tl.constexpr = seed_ptr is not None
    begin = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    H, hk = tl.num_programs(1), h // group
    offs_m = begin + tl.arange(0, BLOCK_M)
    query = tl.minimum(offs_m, L - 1)  # queries beyond the last repeat it and are not stored
    i, end = query[:, None], tl.minimum(begin + BLOCK_M, L)
    row = (b * H + h) * L + query
    mask_rows = None
    if mask_ptr is not None:
        mask_rows = mask_rows_of(mask_ptr, b, h, i, stride_mb, stride_mh, stride_ml, PADDING)
    bias_rows = None if bias_ptr is None else bias_ptr + b * stride_bb + h * stride_bh + i.to(tl.int64) * stride_bl
    # before any tile is in registers: a scan takes some
    first, last = keys_in_reach(0, S, begin, end - 1, causal_offset, window, CAUSAL, WINDOWED)
    first = first // BLOCK_N * BLOCK_N
    middle = last
    if mask_ptr is not None:
        first, last, middle = visible_range(mask_rows, stride_ms, first, last, BLOCK_N, True)
    # tiles that every query sees whole need no look at indices and mask; with a window on both ends that is not worth
    # a loop
    if CAUSAL:
        middle = tl.minimum(middle, begin + causal_offset + 1)
        if WINDOWED:
            middle = first
    middle = first + tl.maximum(middle - first, 0) // BLOCK_N * BLOCK_N
    row_key, seed_low, seed_high = 0, 0, 0
    if DROPOUT:
        row_key, seed_low, seed_high = row_keys(seed_ptr, row)
        row_key = row_key[:, None]
    q = load_tile(q_ptr + b * stride_qb + h * stride_qh, query.to(tl.int64), stride_ql, None, D, BLOCK_D)
    acc, m, den = initial(sinks_ptr, h, BLOCK_M, BLOCK_D)

    start, length = prefix_of(starts_ptr, lengths_ptr, b, max_length)
    past = past_of(past_ptr)
    first_slot = length * 0
    if WINDOWED:
        first_slot = tl.maximum(first_slot, length + past + begin - window + 1) // BLOCK_N * BLOCK_N
    acc, m, den = attend_prefix(
        acc, m, den, q, pk_ptr + start.to(tl.int64) * stride_pkt + hk * stride_pkh,
        pv_ptr + start.to(tl.int64) * stride_pvt + hk * stride_pvh, stride_pkt, stride_pvt, first_slot, length,
        length, length, i, past, window, bias_rows, stride_bj, row_key, seed_low, seed_high, threshold, inner, outer,
        D, WINDOWED, SOFTCAP, DROPOUT, BLOCK_N, BLOCK_D,
    )  # fmt: skip

    k_ptr += b * stride_kb + hk * stride_kh
    v_ptr += b * stride_vb + hk * stride_vh
    for WHOLE in tl.static_range(2):
        acc, m, den = attend_ordinary(
            acc, m, den, q, k_ptr, v_ptr, stride_ks, stride_vs,
            middle if WHOLE == 1 else first, last if WHOLE == 1 else middle, S, i, causal_offset, window,
            mask_rows, stride_ms, row_key, seed_low, seed_high, threshold, max_length, inner, outer,
            D, CAUSAL, WINDOWED, SOFTCAP, DROPOUT, WHOLE == 0, BLOCK_N, BLOCK_D,
        )  # fmt: skip

    out, lse = finished(acc, m, den, keep_scale)
    stored, offs_d = offs_m < L, tl.arange(0, BLOCK_D)
    out_ptrs = out_ptr + ((b * L + query) * H + h)[:, None] * D + offs_d[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=stored[:, None] & (offs_d < D)[None, :])
    tl.store(lse_ptr + row, lse * LN2, mask=stored)


def prefix_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, starts: Tensor | None, lengths: Tensor | None,
    order: Tensor | None, max_length: int, mask: Tensor | None, prefix_bias: Tensor | None, sinks: Tensor | None,
    past: Tensor | None, seed: Tensor | None, scale: float, causal_offset: int | None, window: int | None,
    softcap: float, p: float, implementation: str = "kernel",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return out (B, L, Hq, D) in q's dtype and lse (B, Hq, L) fp32, both contiguous. Trusts its caller."""
    B, H, L, D = q.shape
    out, lse = q.new_empty((B, L, H, D)), q.new_empty((B, H, L), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    shared = shared_arguments(
        q, k, v, prefix_k, prefix_v, starts, lengths, max_length, mask, prefix_bias, past, seed,
        scale, causal_offset, window, softcap, p,
    )  # fmt: skip
    sinks = None if sinks is None else sinks.contiguous()
    if L * shared["group"] <= DECODE_QUERIES:
        prefix_decode(q, shared, order, sinks, out, lse)
        return out, lse
    config = config_for("prefix_fwd", q, L, 0, 0, D)
    shared |= dict(sinks_ptr=sinks, out_ptr=out, lse_ptr=lse)
    launch_by_name(_prefix_fwd_kernel, (cdiv(L, config["BLOCK_M"]), H, B), shared, config)
    return out, lse


def aot_cases() -> Iterator[AotCase]:
    """Every candidate in every variant."""
    yield from attention_cases(_prefix_fwd_kernel, "prefix_fwd", CANDIDATES, dict(lse_ptr="*fp32"))

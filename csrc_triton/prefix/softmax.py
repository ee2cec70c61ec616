"""The online softmax of prefix attention's forward kernels: loops over tiles of a prefix and of ordinary keys.

Its state is acc (BLOCK_M, BLOCK_D), the sum of probabilities times values, m (BLOCK_M,), the largest score by base 2,
and den (BLOCK_M,), the sum of exp2(score - m). Arguments as in tile.py. Dao 2023, arXiv:2307.08691.
"""

import triton
import triton.language as tl

from .tile import LOG2E, capped, kept, load_mask, load_tile, product, see_ordinary, see_prefix


@triton.jit
def initial(sinks_ptr, h, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """The softmax before any key: acc, m, den. A sink is a first key without a value."""
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    den = tl.zeros((BLOCK_M,), tl.float32)
    if sinks_ptr is not None:
        m = tl.zeros((BLOCK_M,), tl.float32) + tl.load(sinks_ptr + h).to(tl.float32) * LOG2E
        den += 1.0
    return tl.zeros((BLOCK_M, BLOCK_D), tl.float32), m, den


@triton.jit
def finished(acc, m, den, keep_scale):
    """The output and the log2 of the sum: 0 and -inf where nothing was seen."""
    total = tl.where(den > 0.0, den, 1.0)
    lse = tl.where(den > 0.0, m + tl.log2(total), float("-inf"))
    return acc * (tl.cast(keep_scale, tl.float32) / total)[:, None], lse


@triton.jit
def softmax_step(acc, m, den, s, keep, v):
    """Take a tile of scores s (BLOCK_M, BLOCK_N) and values v into acc (BLOCK_M, BLOCK_D), maxima m and sums den."""
    highest = tl.maximum(m, tl.max(s, axis=1))
    shift = tl.where(highest == float("-inf"), 0.0, highest)  # nothing seen yet: exp2(-inf - 0), never -inf + inf
    p = tl.exp2(s - shift[:, None])
    alpha = tl.exp2(m - shift)
    den = den * alpha + tl.sum(p, axis=1)
    if keep is not None:
        p = tl.where(keep, p, 0.0)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return acc, highest, den


@triton.jit
def attend_prefix(
    acc, m, den, q, k_ptr, v_ptr, stride_t, stride_vt, first, last, longest, length, i, past, window,
    bias_rows, stride_bj, row_key, seed_low, seed_high, threshold, inner, outer,
    D: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Take slots first .. last of one prefix of at most ``longest`` slots into a softmax; length per query or one."""
    offs_n = tl.arange(0, BLOCK_N)
    for start in range(first, last, BLOCK_N):
        tile = tl.cast(start, tl.int64)
        j = (start + offs_n)[None, :]
        real = (start + offs_n < longest)[:, None]
        bias = None if bias_rows is None else load_mask(bias_rows, j, stride_bj, j < length)
        k = load_tile(k_ptr + tile * stride_t, offs_n, stride_t, real, D, BLOCK_D)
        s = capped(product(q, k), inner, outer, SOFTCAP, q.dtype == tl.float32)
        s = see_prefix(s, i, j, length, past, window, bias, WINDOWED)
        keep = kept(row_key, seed_low, seed_high, threshold, j) if DROPOUT else None
        v = load_tile(v_ptr + tile * stride_vt, offs_n, stride_vt, real, D, BLOCK_D)
        acc, m, den = softmax_step(acc, m, den, s, keep, v)
    return acc, m, den


@triton.jit
def attend_ordinary(
    acc, m, den, q, k_ptr, v_ptr, stride_ks, stride_vs, first, last, S, i, causal_offset, window,
    mask_rows, stride_ms, row_key, seed_low, seed_high, threshold, column, inner, outer,
    D: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Take keys first .. last into a softmax. WHOLE: all of them exist, and every query sees them as they are."""
    offs_n = tl.arange(0, BLOCK_N)
    for start in range(first, last, BLOCK_N):
        tile = tl.cast(start, tl.int64)
        n = (start + offs_n)[None, :]
        real = None if WHOLE else (start + offs_n < S)[:, None]
        mask = None if WHOLE or mask_rows is None else load_mask(mask_rows, n, stride_ms, n < S)
        k = load_tile(k_ptr + tile * stride_ks, offs_n, stride_ks, real, D, BLOCK_D)
        s = capped(product(q, k), inner, outer, SOFTCAP, q.dtype == tl.float32)
        if not WHOLE:
            s = see_ordinary(s, i, n, S, mask, causal_offset, window, CAUSAL, WINDOWED)
        keep = kept(row_key, seed_low, seed_high, threshold, column + n) if DROPOUT else None
        v = load_tile(v_ptr + tile * stride_vs, offs_n, stride_vs, real, D, BLOCK_D)
        acc, m, den = softmax_step(acc, m, den, s, keep, v)
    return acc, m, den

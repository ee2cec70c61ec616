"""What the kernels of prefix attention share: which scores of a tile count, their softmax and dropout on it.

    s = outer * f(qk * inner) + LOG2E * bias, -inf where a key is not seen;  probabilities are exp2(s - log2 of the sum)

f is tanh with softcap (inner = scale / softcap, outer = LOG2E * softcap), else the identity (inner = LOG2E * scale).
Forward and dq have queries along rows and keys along columns, the gradients of keys the other way round: indices come
expanded, (BLOCK, 1) or (1, BLOCK), and everything here broadcasts. Masks and biases have stride 0 where they repeat.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.aot import AotCase, case, x_type
from ..common.dropout import draw_words, threshold_of
from ..common.tuning import Candidate, power_of_2

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# A number added to a score hides the key from here on: what models use for that is near the lowest of fp32 or bf16.
HIDDEN = tl.constexpr(-1e29)


@triton.jit
def capped(qk, inner, outer, SOFTCAP: tl.constexpr, PRECISE: tl.constexpr):
    """Scores by base 2 before masks. PRECISE for fp32 inputs: tanh keeps its relative error near 0."""
    x = qk * tl.cast(inner, tl.float32)
    if SOFTCAP:
        size = tl.abs(x)
        t = 1.0 - 2.0 / (tl.exp2(size * (2.0 * LOG2E)) + 1.0)
        if PRECISE:
            y = x * x
            series = 21844.0 / 6081075.0
            series = series * y - 1382.0 / 155925.0
            series = series * y + 62.0 / 2835.0
            series = series * y - 17.0 / 315.0
            series = series * y + 2.0 / 15.0
            series = series * y - 1.0 / 3.0
            t = tl.where(size < 0.5, size + size * y * series, t)
        x = tl.where(x < 0.0, -t, t) * tl.cast(outer, tl.float32)
    return x


@triton.jit
def load_mask(rows, column, stride, real):
    """A tile of a mask or bias; ``rows``: where every query's row starts. To be loaded before the product it is for."""
    return tl.load(rows + column.to(tl.int64) * stride, mask=real, other=0)


@triton.jit
def mask_rows_of(mask_ptr, b, h, i, stride_mb, stride_mh, stride_ml, PADDING: tl.constexpr):
    """Where the rows of a mask start for queries i of head h. PADDING: it has one row, (1, 1), for all of them."""
    rows = mask_ptr + b * stride_mb
    return rows + tl.zeros((1, 1), tl.int64) if PADDING else rows + h * stride_mh + i.to(tl.int64) * stride_ml


@triton.jit
def shown(mask):
    """Which keys a mask, bytes (1: keep) or numbers to add, does not hide."""
    return mask != 0 if mask.dtype == tl.uint8 else mask.to(tl.float32) > HIDDEN


@triton.jit
def _hidden(s, seen, mask):
    """s with ``mask``, bytes (1: keep) or numbers to add or None, and -inf where it is not seen."""
    if mask is not None:
        seen = seen & shown(mask)
        if mask.dtype != tl.uint8:
            s += mask.to(tl.float32) * LOG2E
    return tl.where(seen, s, float("-inf"))


@triton.jit
def see_ordinary(s, i, n, S, mask, causal_offset, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """Scores of queries i for ordinary keys n."""
    seen = n < S
    if CAUSAL:
        seen = seen & (n <= i + causal_offset)
        if WINDOWED:
            seen = seen & (i + causal_offset - n < window)
    return _hidden(s, seen, mask)


@triton.jit
def see_prefix(s, i, j, length, past, window, bias, WINDOWED: tl.constexpr):
    """Scores of queries i for slots j of their row's prefix."""
    seen = (j >= 0) & (j < length)
    if WINDOWED:
        seen = seen & (length + past + i - j < window)
    return _hidden(s, seen, bias)


@triton.jit
def kept(row_key, low, high, threshold, column):
    """The keep mask of dropout; row_key and column broadcast against each other."""
    word = draw_words(row_key, low, high, column >> 1)
    # arithmetic shift: the column's half as a signed 16-bit number
    half = tl.where((column & 1) == 0, word << 16, word).to(tl.int32, bitcast=True) >> 16
    return half >= threshold


@triton.jit
def load_tile(ptr, offs_row, stride, mask, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows (BLOCK, BLOCK_D) of contiguous vectors of D elements, 0 beyond; mask (BLOCK, 1), or None for all rows."""
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    ptrs = ptr + offs_row[:, None] * stride + offs_d
    if D < BLOCK_D:
        mask = offs_d < D if mask is None else mask & (offs_d < D)
    return tl.load(ptrs) if mask is None else tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def product(a, b):
    """a (M, D) @ b (N, D).T in fp32."""
    M: tl.constexpr = a.shape[0]
    N: tl.constexpr = b.shape[0]
    D: tl.constexpr = a.shape[1]
    if a.dtype == tl.float32 and D > 16:
        # in parts of D: without tensor cores a thread would load all of its rows at once, and spill
        a = tl.permute(tl.reshape(a, (M, D // 16, 16)), (1, 0, 2))
        b = tl.permute(tl.reshape(b, (N, D // 16, 16)), (1, 2, 0))
        c = tl.sum(tl.dot(a, b, input_precision="ieee"), axis=0)
    else:
        c = tl.dot(a, tl.trans(b), input_precision="ieee")
    return c


@triton.jit
def prefix_of(starts_ptr, lengths_ptr, b, max_length):
    """Where the slots of row b's prefix begin, and how many they are."""
    start, length = b * 0, b * 0 + max_length
    if starts_ptr is not None:
        start, length = tl.load(starts_ptr + b), tl.load(lengths_ptr + b)
    return start.to(tl.int32), length.to(tl.int32)


@triton.jit
def past_of(past_ptr):
    """The number of tokens before the first query, read on the device."""
    past = tl.zeros((), tl.int32)
    if past_ptr is not None:
        past = tl.load(past_ptr).to(tl.int32)
    return past


@triton.jit
def keys_in_reach(first, last, i_low, i_high, causal_offset, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """The part of the keys first .. last that any of the queries i_low .. i_high sees."""
    if CAUSAL:
        last = tl.minimum(last, i_high + causal_offset + 1)
        if WINDOWED:
            first = tl.maximum(first, i_low + causal_offset - window + 1)
    return first, last


@triton.jit
def visible_range(mask_ptrs, stride, first, last, BLOCK: tl.constexpr, CLEAR: tl.constexpr):
    """The part of first .. last, along ``stride``, with all that a mask shows at any of (rows, 1) mask_ptrs.

    Keys for a tile of queries or queries for a tile of keys. The third number, for CLEAR: where the keys end that all
    rows see, from the part's beginning on without a gap and with nothing to add; 0 if there are none.
    """
    ROWS: tl.constexpr = mask_ptrs.shape[0]
    low = tl.full((ROWS, BLOCK), 0x7FFFFFFF, tl.int32)
    high = tl.zeros((ROWS, BLOCK), tl.int32)
    plain = tl.zeros((ROWS, BLOCK), tl.int32)
    for begin in range(first, last, BLOCK):
        at = (begin + tl.arange(0, BLOCK))[None, :]
        mask = tl.load(mask_ptrs + at.to(tl.int64) * stride, mask=at < last, other=0)
        seen = (at < last) & shown(mask)
        low = tl.minimum(low, tl.where(seen, at, 0x7FFFFFFF))
        high = tl.maximum(high, tl.where(seen, at + 1, 0))
        if CLEAR:
            plain += (seen if mask.dtype == tl.uint8 else seen & (mask.to(tl.float32) == 0.0)).to(tl.int32)
    begins, ends = tl.min(low, axis=1), tl.max(high, axis=1)
    first, last = tl.min(begins, axis=0), tl.minimum(last, tl.max(ends, axis=0))
    whole = (tl.sum(plain, axis=1) == ends - begins) & (begins == first)
    return first, last, tl.min(tl.where(whole, ends, 0), axis=0)


@triton.jit
def tile_gradients(s, before, lse, dp, delta, keep, keep_scale, outer, SOFTCAP: tl.constexpr):
    """Return dropped probabilities and d(qk) / scale of a tile, fp32.

    s: scores, before: the same before masks.   lse: log2 of every query's sum, +inf for one that sees nothing.
    dp: dout @ v.T.    delta: dout . out of every query.    keep: dropout's mask or None.
    """
    p = tl.exp2(s - lse)
    dropped = p
    if keep is not None:
        factor = tl.where(keep, tl.cast(keep_scale, tl.float32), 0.0)
        dropped = p * factor
        dp = dp * factor
    ds = p * (dp - delta)
    if SOFTCAP:
        t = before / tl.cast(outer, tl.float32)
        ds = ds * (1.0 - t * t)
    return dropped, ds


def block_d(D: int) -> int:
    """Columns of a tile of vectors of D elements: tl.dot takes powers of two."""
    return max(16, power_of_2(D))


def broadcast_strides(x: Tensor | None) -> tuple[int, ...]:
    """Strides of a (B, H, L, S) tensor, 0 where it repeats."""
    if x is None:
        return 0, 0, 0, 0
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))


STRIDES = "qb qh ql kb kh ks vb vh vs pkt pkh pvt pvh mb mh ml ms bb bh bl bj".split()


def shared_arguments(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, starts: Tensor | None, lengths: Tensor | None,
    max_length: int, mask: Tensor | None, prefix_bias: Tensor | None, past: Tensor | None, seed: Tensor | None,
    scale: float, causal_offset: int | None, window: int | None, softcap: float, p: float,
) -> dict[str, Any]:  # fmt: skip
    """The arguments that all kernels of prefix attention have, by name."""
    strides = (
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *prefix_k.stride()[:2], *prefix_v.stride()[:2],
        *broadcast_strides(mask), *broadcast_strides(prefix_bias),
    )  # fmt: skip
    dropout = p > 0 and seed is not None
    _, mask_head, mask_query, _ = broadcast_strides(mask)
    return dict(
        q_ptr=q, k_ptr=k, v_ptr=v, pk_ptr=prefix_k, pv_ptr=prefix_v, starts_ptr=starts, lengths_ptr=lengths,
        past_ptr=past if window is not None else None,
        mask_ptr=mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask,
        bias_ptr=prefix_bias, seed_ptr=seed if dropout else None,
        inner=scale / softcap if softcap > 0 else scale * LOG2E.value,
        outer=softcap * LOG2E.value if softcap > 0 else 1.0,
        causal_offset=causal_offset or 0, window=window or 0,
        threshold=threshold_of(p), keep_scale=1.0 / (1.0 - p) if dropout else 1.0,
        L=q.shape[2], S=k.shape[2], max_length=max_length, group=q.shape[1] // k.shape[1],
        **{f"stride_{name}": stride for name, stride in zip(STRIDES, strides, strict=True)},
        PADDING=mask is not None and mask_head == mask_query == 0,
        CAUSAL=causal_offset is not None, WINDOWED=window is not None, SOFTCAP=softcap > 0,
        D=q.shape[3], BLOCK_D=block_d(q.shape[3]),
    )  # fmt: skip


# What callers combine: decoder, also with padding; several prefixes and a window; T5; BERT in training; Gemma 2 and
# gpt-oss.
_VARIANTS: dict[str, dict[str, Any]] = {
    "causal": dict(CAUSAL=True),
    "padding": dict(CAUSAL=True, PADDING=True, mask_ptr="*u8"),
    "mask-window-rows": dict(mask_ptr="*u8", starts_ptr="*i32", lengths_ptr="*i32", past_ptr="*i64", WINDOWED=True),
    "bias": dict(mask_ptr="x", bias_ptr="x"),
    "dropout-mask": dict(mask_ptr="*u8", seed_ptr="*i64"),
    "softcap-window-sinks": dict(CAUSAL=True, WINDOWED=True, SOFTCAP=True, sinks_ptr="x"),
}


def attention_cases(
    kernel: Any, name: str, rows: list[Candidate], types: dict[str, str], **constants: Any
) -> Iterator[AotCase]:
    """Every candidate at its largest head size in every variant; the first also at one that is no power of two."""
    integers = "causal_offset window threshold L S max_length group".split()
    for candidate in rows:
        x, D = x_type(candidate), candidate.max_rank
        shared = dict.fromkeys("q_ptr k_ptr v_ptr pk_ptr pv_ptr out_ptr dout_ptr".split(), x)
        shared |= dict.fromkeys((*integers, *(f"stride_{stride}" for stride in STRIDES)), "i32")
        shared |= dict.fromkeys("inner outer keep_scale scale".split(), "fp32")
        for variant, changes in _VARIANTS.items():
            if variant == "padding" and "mask_ptr" not in kernel.arg_names:
                continue
            absent = dict.fromkeys("starts_ptr lengths_ptr past_ptr mask_ptr bias_ptr seed_ptr sinks_ptr".split())
            values = dict(
                PADDING=False, CAUSAL=False, WINDOWED=False, SOFTCAP=False, stride_ms=1, stride_bj=1, BLOCK_D=block_d(D)
            )
            pointers = {n: x if kind == "x" else kind for n, kind in changes.items() if n.endswith("_ptr")}
            values |= absent | {n: value for n, value in changes.items() if n not in pointers} | constants
            values = {n: value for n, value in values.items() if n in kernel.arg_names and n not in pointers}
            for d in (D, D - 16) if variant == "causal" and candidate is rows[0] else (D,):
                typed = shared | pointers | types
                yield case(kernel, name, f"d{d}-{variant}", candidate, typed, **values, D=d)

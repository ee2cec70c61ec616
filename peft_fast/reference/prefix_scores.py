"""Attention with a learned prefix over one matrix of scores: the plain form of ``reference_prefix``, on any device.

    q (B, Hq, L, D)    k, v (B, Hkv, S, D), query head h reads head h // (Hq // Hkv)    prefix_k, prefix_v (T, Hkv, D)

    s = [q @ Kp.T | q @ k.T] * scale, capped, masked    lse = log(sum(exp(s)))    p = exp(s - lse)    out = p @ [Vp; v]
    dP = dout @ [Vp; v].T    dS = p * (dP - sum(p * dP))

Everything is in fp32 (fp64 for fp64); only scores of prefix and keys lie side by side, never keys or values. Rows that
differ in their slots get copies of them. What the arguments mean is in ``ops.functional.prefix_attention``; on a GPU
nothing is read on the host.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .dropout import dropout_bits

# What a masked score is set to where it has to be finite, so that no difference of two logs is NaN. Scores below the
# second count as masked, and a log of a sum below it saw no key.
MASKED = -1e30
NOTHING = -1e29


class Options(NamedTuple):
    """The arguments of forward and backward behind the tensors; ``ops.functional.prefix_attention`` explains them."""

    starts: Tensor | None
    lengths: Tensor | None
    order: Tensor | None
    max_length: int
    mask: Tensor | None
    prefix_bias: Tensor | None
    sinks: Tensor | None
    past: Tensor | None
    seed: Tensor | None
    scale: float
    causal_offset: int | None
    window: int | None
    softcap: float
    p: float


class Group(NamedTuple):
    """The rows of the batch that use the prefix slots start .. start + length."""

    rows: slice | Tensor
    start: int
    length: int


class Visible(NamedTuple):
    """The ordinary keys first .. last that any query sees, and what hides some of them from some queries."""

    first: int
    last: int
    mask: Tensor | None
    is_causal: bool


def score_dtype(q: Tensor) -> torch.dtype:
    """The dtype of scores and of their log-sum-exp."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def groups_of(call: Options, T: int) -> tuple[tuple[Group, ...], bool]:
    """The rows of each prefix, and whether every row has one; read on the host.

    Raises: ValueError where a row's slots are not among the T of the table, or more than max_length.
    """
    if call.lengths is None or call.starts is None:
        return ((Group(slice(None), 0, T),), True) if T > 0 else ((), False)
    return _grouped(tuple(call.starts.tolist()), tuple(call.lengths.tolist()), call.max_length, T)


@functools.lru_cache(maxsize=64)  # every layer of a model asks for the same
def _grouped(
    starts: tuple[int, ...], lengths: tuple[int, ...], max_length: int, T: int
) -> tuple[tuple[Group, ...], bool]:
    rows_of: dict[tuple[int, int], list[int]] = {}
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        if length == 0:
            continue
        if start < 0 or not 0 < length <= max_length or start + length > T:
            raise ValueError(
                f"prefix_attention: row {row} asks for the slots {start} .. {start + length} with max_length = "
                f"{max_length}, and prefix_k has {T}: starts, lengths and max_length must fit together"
            )
        rows_of.setdefault((start, length), []).append(row)
    groups = []
    for (start, length), rows in rows_of.items():
        neighbours = rows[-1] - rows[0] == len(rows) - 1
        where = slice(rows[0], rows[-1] + 1) if neighbours else torch.tensor(rows, device="cpu")
        groups.append(Group(slice(None) if len(rows) == len(starts) else where, start, length))
    return tuple(groups), 0 not in lengths


def visible_keys(q: Tensor, S: int, call: Options) -> Visible:
    """What ``mask`` and ``causal_offset`` with ``window`` let the queries see of S ordinary keys."""
    L, dtype = q.shape[2], score_dtype(q)
    if call.mask is not None:
        seen = visible_keys(q, S, call._replace(mask=None))
        mask = call.mask[..., seen.first : seen.last] if call.mask.shape[-1] > 1 else call.mask
        mask = _additive(mask, dtype)
        other = seen.mask
        if seen.is_causal:
            hidden = torch.ones(L, seen.last - seen.first, dtype=torch.bool, device=q.device).triu_(1)
            other = torch.zeros(hidden.shape, dtype=dtype, device=q.device).masked_fill_(hidden, MASKED)
        mask = mask if other is None else (mask + other).clamp_(min=MASKED)
        return Visible(seen.first, seen.last, mask, False)
    if call.causal_offset is None:
        return Visible(0, S, None, False)
    offset, window = call.causal_offset, call.window
    last = min(S, L + offset)
    first = 0 if window is None else max(0, offset - window + 1)
    if last <= first:
        return Visible(first, first, None, False)
    offset -= first
    leaves = window is not None and offset + L > window  # the first key is too old for the last query
    if not leaves and offset >= last - first - 1:
        return Visible(first, last, None, False)
    if not leaves and offset == 0:
        return Visible(first, last, None, True)
    distance = offset + torch.arange(L, device=q.device)[:, None] - torch.arange(last - first, device=q.device)
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    mask = torch.zeros((1, 1, *hidden.shape), dtype=dtype, device=q.device).masked_fill_(hidden, MASKED)
    return Visible(first, last, mask, False)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """mask as numbers to add, finite, without the dimensions that repeat one value."""
    for dim, stride in enumerate(mask.stride()):
        if stride == 0 and mask.shape[dim] > 1:
            mask = mask.narrow(dim, 0, 1)
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, MASKED)
    return mask.to(dtype).clamp(min=MASKED)


def explicit_fwd(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, call: Options
) -> tuple[Tensor, Tensor]:
    """``reference_prefix.prefix_attention_fwd``."""
    scores, _ = _scores(q, k, prefix_k, call)
    p, lse = _softmax(scores, call.sinks)
    p, C = _dropped(p, call), call.max_length
    out = torch.einsum("bhgls,bhsd->bhgld", p[..., C:], v.to(p.dtype))
    out += torch.einsum("bhglp,bhpd->bhgld", p[..., :C], _slots_of_rows(prefix_v, call, p.dtype))
    return out.flatten(1, 2).transpose(1, 2).to(q.dtype).contiguous(), lse.flatten(1, 2)


def explicit_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, call: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All five gradients. out and lse are not used: they are rounded, and what they say follows from the scores."""
    scores, slope = _scores(q, k, prefix_k, call)
    (keys, values), C = (t.to(scores.dtype) for t in (k, v)), call.max_length
    slot_keys, slot_values = (_slots_of_rows(t, call, scores.dtype) for t in (prefix_k, prefix_v))
    queries, dout5 = (_by_group(t.to(scores.dtype), k) for t in (q, dout.transpose(1, 2)))
    p, _ = _softmax(scores, call.sinks)
    dropped = _dropped(p, call)
    dp = torch.empty_like(p)
    dp[..., :C] = torch.einsum("bhgld,bhpd->bhglp", dout5, slot_values)
    dp[..., C:] = torch.einsum("bhgld,bhsd->bhgls", dout5, values)
    dv = torch.einsum("bhgls,bhgld->bhsd", dropped[..., C:], dout5)
    dpv = _summed_over_rows(dropped[..., :C], dout5, prefix_v, call)
    dp = _dropped(dp, call)
    ds = p.mul_(dp.sub_((p * dp).sum(-1, keepdim=True))).mul_(call.scale)
    if slope is not None:
        ds.mul_(slope)
    dq = torch.einsum("bhgls,bhsd->bhgld", ds[..., C:], keys)
    dq += torch.einsum("bhglp,bhpd->bhgld", ds[..., :C], slot_keys)
    dk = torch.einsum("bhgls,bhgld->bhsd", ds[..., C:], queries)
    dpk = _summed_over_rows(ds[..., :C], queries, prefix_k, call)
    dq, dk, dv = (t.transpose(1, 2).to(q.dtype).contiguous().transpose(1, 2) for t in (dq.flatten(1, 2), dk, dv))
    return dq, dk, dv, dpk, dpv


def _slot_numbers(call: Options, T: int) -> tuple[Tensor, Tensor]:
    """(B, max_length) each: the slots of every row among the T of the table, and which of them are its own."""
    starts, lengths = call.starts, call.lengths
    if starts is None or lengths is None:
        raise ValueError("prefix_attention: starts and lengths go together, one of them is None")
    offsets = torch.arange(call.max_length, device=starts.device)
    return (starts.long()[:, None] + offsets).clamp(max=T - 1), offsets < lengths[:, None]


def _slots_of_rows(prefix: Tensor, call: Options, dtype: torch.dtype) -> Tensor:
    """The slots (T, Hkv, D) by row: (1, Hkv, T, D) if all rows use all, else (B, Hkv, max_length, D), 0 beyond a
    row's own: what stands there is another prefix's, and 0 times its infinity would be no 0."""
    if call.starts is None:
        return prefix.to(dtype).transpose(0, 1)[None]
    numbers, real = _slot_numbers(call, prefix.shape[0])
    return prefix.to(dtype)[numbers].masked_fill(~real[..., None, None], 0.0).transpose(1, 2)


def _summed_over_rows(weights: Tensor, x: Tensor, prefix: Tensor, call: Options) -> Tensor:
    """A gradient of the slots, in their dtype and shape: weights (B, Hkv, g, L, max_length), 0 beyond a row's own,
    times x (B, Hkv, g, L, D)."""
    if call.starts is None:
        return torch.einsum("bhglp,bhgld->phd", weights, x).to(prefix.dtype).contiguous()
    numbers, _ = _slot_numbers(call, prefix.shape[0])
    total = torch.zeros(prefix.shape, dtype=x.dtype, device=x.device)
    by_row = torch.einsum("bhglp,bhgld->bphd", weights, x)
    return total.index_put_((numbers,), by_row, accumulate=True).to(prefix.dtype)


def _by_group(x: Tensor, k: Tensor) -> Tensor:
    """(B, Hq, L, D) as (B, Hkv, g, L, D): the query heads that read one head of k."""
    return x.reshape(x.shape[0], k.shape[1], x.shape[1] // k.shape[1], *x.shape[2:])


def _scores(q: Tensor, k: Tensor, prefix_k: Tensor, call: Options) -> tuple[Tensor, Tensor | None]:
    """Scores (B, Hkv, g, L, max_length + S), -inf where masked, and with softcap their derivative by the product."""
    C, dtype = call.max_length, score_dtype(q)
    if q.is_cpu:
        groups_of(call, prefix_k.shape[0])  # refuses rows whose slots are not there
    queries = _by_group(q.to(dtype), k)
    scores = queries.new_empty((*queries.shape[:-1], C + k.shape[2]))
    scores[..., :C] = torch.einsum("bhgld,bhpd->bhglp", queries, _slots_of_rows(prefix_k, call, dtype))
    scores[..., C:] = torch.einsum("bhgld,bhsd->bhgls", queries, k.to(dtype))
    scores.mul_(call.scale)
    slope = None
    if call.softcap > 0:
        scores.div_(call.softcap).tanh_()
        slope = 1 - scores * scores
        scores.mul_(call.softcap)
    by_head = scores.view(*q.shape[:3], C + k.shape[2])
    prefix_scores, own_scores = by_head[..., :C], by_head[..., C:]
    if call.prefix_bias is not None:
        prefix_scores.add_(call.prefix_bias)
    prefix_scores.masked_fill_(_hidden_slots(q, call), float("-inf"))
    seen = visible_keys(q, k.shape[2], call)
    own_scores[..., : seen.first] = float("-inf")
    own_scores[..., seen.last :] = float("-inf")
    if seen.mask is not None:
        own_scores[..., seen.first : seen.last].add_(seen.mask)
    elif seen.is_causal:
        rows, columns = (torch.arange(n, device=q.device) for n in (q.shape[2], seen.last))
        own_scores[..., : seen.last].masked_fill_(columns > rows[:, None], float("-inf"))
    scores.masked_fill_(scores < NOTHING, float("-inf"))
    return scores, slope


def _softmax(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Probabilities, in the memory of the scores (B, Hkv, g, L, n), and the log of the sum; 0 and -inf for no key."""
    if scores.shape[-1] == 0 and sinks is None:
        return scores, scores.new_full(scores.shape[:-1], float("-inf"))
    sink = scores.new_full((1, *scores.shape[1:3], 1, 1), float("-inf"))
    if sinks is not None:
        sink.copy_(sinks.view(sink.shape))
    highest = sink.expand(*scores.shape[:-1], 1)
    if scores.shape[-1] > 0:
        highest = torch.maximum(scores.amax(-1, keepdim=True), sink)
    highest = highest.masked_fill(highest == float("-inf"), 0.0)
    p = scores.sub_(highest).exp_()
    total = p.sum(-1, keepdim=True) + torch.exp(sink - highest)
    lse = (highest + total.log())[..., 0]
    return p.div_(total.masked_fill_(total == 0, 1.0)), lse


def _hidden_slots(q: Tensor, call: Options) -> Tensor:
    """Which of the max_length slots a query does not see: past its row's prefix, or slid out of the window."""
    slots = torch.arange(call.max_length, device=q.device)
    lengths: Tensor | int = call.max_length if call.lengths is None else call.lengths.view(-1, 1, 1, 1)
    hidden = slots >= lengths
    if call.window is not None:
        past = 0 if call.past is None else call.past
        ages = lengths + past + torch.arange(q.shape[2], device=q.device)[:, None] - slots
        hidden = hidden | (ages >= call.window)
    return hidden


def _dropped(p: Tensor, call: Options) -> Tensor:
    """p (B, Hkv, g, L, max_length + S) with the call's dropout; p itself without."""
    if call.p == 0 or call.seed is None:
        return p
    columns = p.shape[-1]
    bits = dropout_bits(call.seed, p.numel() // columns, columns, call.p).to(p.device)
    keep = (bits[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=p.device)).flatten(1)[:, :columns] & 1
    return p * keep.view(p.shape) / (1 - call.p)

"""Attention with a learned prefix as a second source of keys and values, in plain torch: oracle and CPU implementation.

    q (B, Hq, L, D)    k, v (B, Hkv, S, D), query head h reads head h // (Hq // Hkv)    prefix_k, prefix_v (T, Hkv, D)

    out = softmax([q @ Kp.T | q @ k.T] * scale) @ [Vp; v],    Kp, Vp = the slots starts[b] .. starts[b] + lengths[b]

The prefix is neither concatenated to k and v nor expanded over the batch: rows of one prefix are one long query. Each
source gives a softmax of its own and the log of its sum; the two merge by those logs. The backward of a source needs
nothing from the other but the merged ``out`` and ``lse``: P = exp(scores - lse), dS = P * (dout @ V.T - dout . out).

The sources are torch's flash attention (``reference_prefix_calls``): on a CPU, and as "flash" on a GPU. What that
cannot express (dropout, softcap; on a GPU masks too) is written out in ``reference_prefix_scores``. Li & Liang 2021,
arXiv:2101.00190; Juravsky et al. 2024, arXiv:2402.05099 (shared prefixes).
"""

from typing import Any

import torch
from torch import Tensor

from .prefix_calls import CPU_CALLS, FlashCalls, beyond_flash, calls_for
from .prefix_scores import (
    MASKED,
    NOTHING,
    Group,
    Options,
    Visible,
    explicit_bwd,
    explicit_fwd,
    groups_of,
    score_dtype,
    visible_keys,
)

__all__ = [
    "Options", "beyond_flash", "flash_attention_bwd", "flash_attention_fwd", "prefix_attention_bwd",
    "prefix_attention_fwd", "score_dtype",
]  # fmt: skip

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def prefix_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    """Return out (B, L, Hq, D) in q's dtype and lse (B, Hq, L) fp32 (fp64 for fp64), both contiguous."""
    call = Options(*options)
    if q.is_cpu and not beyond_flash(q, k, call):
        return _flash_fwd(q, k, v, prefix_k, prefix_v, call, CPU_CALLS)
    return explicit_fwd(q, k, v, prefix_k, prefix_v, call)


def prefix_attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, out: Tensor, lse: Tensor,
    *rest: Any,
) -> Gradients:  # fmt: skip
    """Return (dq, dk, dv, dprefix_k, dprefix_v); what ``needs`` [q, k, v, prefix] does not ask for is an empty (0,).

    dq, dk and dv are (B, heads, length, D) views of contiguous (B, length, heads, D), as their projections want them.
    """
    *options, needs = rest
    call = Options(*options)
    if q.is_cpu and not beyond_flash(q, k, call):
        return _flash_bwd(dout, q, k, v, prefix_k, prefix_v, out, lse, call, needs, CPU_CALLS)
    return _needed(explicit_bwd(dout, q, k, v, prefix_k, prefix_v, call), needs)


def flash_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    """The same by the flash attention of q's device. Raises: ValueError on a call beyond it."""
    return _flash_fwd(q, k, v, prefix_k, prefix_v, _within_flash(q, k, Options(*options)), calls_for(q.device))


def flash_attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, out: Tensor, lse: Tensor,
    *rest: Any,
) -> Gradients:  # fmt: skip
    """As ``flash_attention_fwd``; out and lse may come from any implementation."""
    *options, needs = rest
    call = _within_flash(q, k, Options(*options))
    return _flash_bwd(dout, q, k, v, prefix_k, prefix_v, out, lse, call, needs, calls_for(q.device))


def _within_flash(q: Tensor, k: Tensor, call: Options) -> Options:
    if beyond := beyond_flash(q, k, call):
        raise ValueError(
            f"prefix_attention: implementation 'flash' cannot express {beyond} on {q.device}: leave the argument "
            "implementation= (or PEFT_FAST_PREFIX) at 'auto'"
        )
    return call


def _needed(gradients: Gradients, needs: list[bool]) -> Gradients:
    need_q, need_k, need_v, need_prefix = needs
    wanted = (need_q, need_k, need_v, need_prefix, need_prefix)
    dq, dk, dv, dpk, dpv = (
        gradient if need else gradient.new_empty(0) for gradient, need in zip(gradients, wanted, strict=True)
    )
    return dq, dk, dv, dpk, dpv


def _flash_fwd(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, call: Options, flash: FlashCalls
) -> tuple[Tensor, Tensor]:
    groups, complete = groups_of(call, prefix_k.shape[0])
    sources = []
    seen = visible_keys(q, k.shape[2], call)
    if seen.first < seen.last:
        keys, values = k[:, :, seen.first : seen.last], v[:, :, seen.first : seen.last]
        sources.append(_own_fwd(q, keys, values, seen, call.scale, flash))
    if groups:
        sources.append(_prefix_fwd(q, prefix_k, prefix_v, groups, call, flash))
    if not sources:
        sources.append(_no_source(q))
    out, lse = sources[0] if len(sources) == 1 else _merged(*sources[0], *sources[1])
    if call.sinks is not None:
        with_sink = torch.logaddexp(lse, call.sinks.to(lse.dtype).clamp(min=MASKED))
        out, lse = out * torch.exp(lse - with_sink)[..., None], with_sink
    if not _every_query_sees(q, k, complete, call):
        blind = lse < NOTHING
        out, lse = out.masked_fill(blind[..., None], 0.0), lse.masked_fill(blind, float("-inf"))
    return out.to(q.dtype).contiguous(), lse.transpose(1, 2).contiguous()


def _every_query_sees(q: Tensor, k: Tensor, complete: bool, call: Options) -> bool:
    """Whether it is certain, without a look at any value, that each query sees a key."""
    L, S = q.shape[2], k.shape[2]
    if complete and call.window is None and call.prefix_bias is None:
        return True
    if call.mask is not None or S == 0:
        return False
    last = call.causal_offset
    return last is None or (last >= 0 and (call.window is None or L + last - call.window < S))


def _no_source(q: Tensor) -> tuple[Tensor, Tensor]:
    """An output (B, L, Hq, D) and its log of sums (B, L, Hq) over no keys."""
    B, H, L, D = q.shape
    return q.new_zeros((B, L, H, D)), q.new_full((B, L, H), MASKED, dtype=score_dtype(q))


def _merged(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """One softmax over the keys of both sources: outputs (B, L, H, D), logs of sums (B, L, H). May write to out."""
    weight = torch.sigmoid(other_lse - lse)[..., None]
    if out.dtype == weight.dtype:
        out.lerp_(other, weight)
    else:
        out = torch.lerp(out.to(weight.dtype), other.to(weight.dtype), weight).to(out.dtype)
    return out, torch.logaddexp(lse, other_lse)


def _own_fwd(q: Tensor, k: Tensor, v: Tensor, seen: Visible, scale: float, flash: FlashCalls) -> tuple[Tensor, Tensor]:
    """The ordinary keys alone: out (B, L, H, D) and its log of sums (B, L, H)."""
    (B, H, L, D), heads, mask = q.shape, k.shape[1], seen.mask
    if flash.wide and q.dtype == torch.float16:
        q, k, v = (_wide(t) for t in (q, k, v))
    if L == 1 and heads < H:
        # the query heads that share a key head become its queries, and its keys are read once for all of them
        q = q.reshape(B, heads, -1, D)
        if mask is not None and mask.shape[1] > 1:
            mask = mask.reshape(mask.shape[0], heads, -1, mask.shape[-1])
    out, lse = flash.forward(q, k, v, seen.is_causal, mask, scale)
    if L == 1:
        return out.reshape(B, 1, H, D), lse.reshape(B, 1, H)
    return out.transpose(1, 2), lse.transpose(1, 2)


def _prefix_fwd(
    q: Tensor, prefix_k: Tensor, prefix_v: Tensor, groups: tuple[Group, ...], call: Options, flash: FlashCalls
) -> tuple[Tensor, Tensor]:
    """The prefix alone: out (B, L, H, D) and its log of sums (B, L, H); a row without one gets _no_source's."""
    if flash.wide and q.dtype == torch.float16:
        q, prefix_k, prefix_v = _wide(q), _wide(prefix_k), _wide(prefix_v)
    L, H, D = q.shape[2], q.shape[1], q.shape[3]
    queries = q.transpose(1, 2)
    whole = isinstance(groups[0].rows, slice) and groups[0].rows == slice(None)
    result, result_lse = (queries, queries) if whole else _no_source(q)
    for group in groups:
        slots, mask = _visible_slots(q, group, call)
        rows = _folded(queries[group.rows])
        out, lse = flash.forward(
            rows, _source(prefix_k, slots), _source(prefix_v, slots), False, mask, call.scale
        )  # fmt: skip
        out, lse = out.transpose(1, 2).view(-1, L, H, D), lse.transpose(1, 2).view(-1, L, H)
        if whole:
            return out, lse
        result[group.rows], result_lse[group.rows] = out, lse
    return result, result_lse


def _wide(x: Tensor) -> Tensor:
    """x in fp32 if it is fp16 or bf16, and x itself otherwise."""
    return x.float() if x.element_size() == 2 else x


def _folded(x: Tensor, parts: int = 1) -> Tensor:
    """(n, L, H, D) as one sequence, (1, H, n * L, D), or several: a view where x is contiguous or L is 1."""
    return x.reshape(parts, -1, *x.shape[2:]).transpose(1, 2)


def _source(prefix: Tensor, slots: slice, parts: int = 1) -> Tensor:
    """Slots of a prefix (T, H, D) as keys or values (parts, H, length, D), a view."""
    return prefix[slots].transpose(0, 1)[None].expand(parts, -1, -1, -1)


def _visible_slots(q: Tensor, group: Group, call: Options) -> tuple[slice, Tensor | None]:
    """The slots of the table that any query of the group sees; what is added to their scores, or None."""
    _, start, length = group
    L, dtype = q.shape[2], score_dtype(q)
    first, mask = 0, None
    if call.window is not None:
        past = 0 if call.past is None else int(call.past)
        first = min(max(0, length + past - call.window + 1), length - 1)  # slots before it have slid out for good
        newest = length + past + L - 1
        if newest - first >= call.window:
            ages = length + past + torch.arange(L)[:, None] - torch.arange(first, length)
            mask = torch.zeros(ages.shape, dtype=dtype).masked_fill_(ages >= call.window, MASKED)[None, None]
    if call.prefix_bias is not None:
        bias = call.prefix_bias.to(dtype).clamp(min=MASKED)
        bias = bias[..., first:length] if bias.shape[-1] > 1 else bias
        bias = bias[group.rows] if bias.shape[0] > 1 else bias
        mask = bias if mask is None else (mask + bias).clamp_(min=MASKED)
    if mask is not None and (mask.shape[0] > 1 or mask.shape[2] > 1):
        n = q[group.rows].shape[0]
        mask = _folded(mask.expand(n, -1, L, -1).transpose(1, 2))
    return slice(start + first, start + length), mask


def _flash_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, out: Tensor, lse: Tensor,
    call: Options, needs: list[bool], flash: FlashCalls,
) -> Gradients:  # fmt: skip
    need_q, need_k, need_v, need_prefix = needs
    dq = dk = dv = None
    dtype = q.dtype
    lse = lse.masked_fill(lse == float("-inf"), 0.0)  # exp(MASKED - 0) is 0: no gradient from queries that see nothing
    if flash.wide:
        dout, q, k, v, prefix_k, prefix_v, out = (_wide(t) for t in (dout, q, k, v, prefix_k, prefix_v, out))
    seen = visible_keys(q, k.shape[2], call)
    if (need_q or need_k or need_v) and seen.first < seen.last:
        keys, values = k[:, :, seen.first : seen.last], v[:, :, seen.first : seen.last]
        dq, dk, dv = flash.backward(
            dout.transpose(1, 2), q, keys, values, out.transpose(1, 2), lse, seen.is_causal, seen.mask, call.scale
        )  # fmt: skip
    dq, dk, dv = _filled(dq, q, 0), _filled(dk, k, seen.first), _filled(dv, v, seen.first)
    groups, _ = groups_of(call, prefix_k.shape[0])
    if (need_q or need_prefix) and groups:
        dpk, dpv = _prefix_bwd(dq.transpose(1, 2), dout, q, prefix_k, prefix_v, out, lse, groups, call, flash)
    else:
        dpk, dpv = (t.new_zeros(t.shape) for t in (prefix_k, prefix_v))
    return _needed((dq.to(dtype), dk.to(dtype), dv.to(dtype), dpk.to(dtype), dpv.to(dtype)), needs)


def _filled(part: Tensor | None, whole: Tensor, first: int) -> Tensor:
    """The gradient of ``whole`` (B, H, S, D) from that of its positions from ``first`` on; zeros for the others.
    A view of a contiguous (B, S, H, D)."""
    if part is not None and part.shape == whole.shape:
        return part.transpose(1, 2).contiguous().transpose(1, 2)
    full = whole.new_zeros(whole.transpose(1, 2).shape).transpose(1, 2)
    if part is not None:
        full[:, :, first : first + part.shape[2]] = part
    return full


def _prefix_bwd(
    dq: Tensor, dout: Tensor, q: Tensor, prefix_k: Tensor, prefix_v: Tensor, out: Tensor, lse: Tensor,
    groups: tuple[Group, ...], call: Options, flash: FlashCalls,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Add the prefix's part to dq (B, L, H, D); return the gradients of the prefix's keys and values."""
    L = q.shape[2]
    total_k, total_v = (torch.zeros(p.shape, dtype=lse.dtype, device=p.device) for p in (prefix_k, prefix_v))
    queries, lse = q.transpose(1, 2), lse.transpose(1, 2)
    for group in groups:
        slots, mask = _visible_slots(q, group, call)
        rows = group.rows
        n = _parts(q[rows].shape[0], q.shape[1], slots.stop - slots.start, flash) if mask is None else 1
        parts = flash.backward(
            _folded(dout[rows], n), _folded(queries[rows], n), _source(prefix_k, slots, n), _source(prefix_v, slots, n),
            _folded(out[rows], n), _folded(lse[rows][..., None], n)[..., 0], False, mask, call.scale,
        )  # fmt: skip
        dq[rows] += parts[0].transpose(1, 2).reshape(-1, L, *dq.shape[2:])
        total_k[slots] += parts[1].sum(0, dtype=lse.dtype).transpose(0, 1)
        total_v[slots] += parts[2].sum(0, dtype=lse.dtype).transpose(0, 1)
    return total_k, total_v


def _parts(rows: int, heads: int, slots: int, flash: FlashCalls) -> int:
    """Into how many sequences the rows of a prefix are folded: the backward gives a program some 64 keys of one head
    and sequence, and of a single sequence there would be few, each with the queries of all rows to go through."""
    programs = heads * -(-slots // 64)
    return next((n for n in range(1, rows) if rows % n == 0 and n * programs >= flash.programs), rows)

"""Attention with a learned prefix as a second source of keys and values, in plain torch: oracle and CPU implementation.

    q (B, Hq, L, D)    k, v (B, Hkv, S, D), query head h reads head h // (Hq // Hkv)    prefix_k, prefix_v (T, Hkv, D)

    out = softmax([q @ Kp.T | q @ k.T] * scale) @ [Vp; v],    Kp, Vp = the slots starts[b] .. starts[b] + lengths[b]

The prefix is neither concatenated to k and v nor expanded over the batch: rows of one prefix are one long query. Each
source gives a softmax of its own and the log of its sum; the two merge by those logs. The backward of a source needs
nothing from the other but the merged ``out`` and ``lse``: P = exp(scores - lse), dS = P * (dout @ V.T - dout . out).

On a CPU the sources are torch's flash attention; what that cannot express (dropout, softcap, other devices) is written
out in ``reference_prefix_scores``. Li & Liang 2021, arXiv:2101.00190; Juravsky et al. 2024,
arXiv:2402.05099 (shared prefixes).
"""

from typing import Any

import torch
from torch import Tensor

from .reference_prefix_scores import (
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

__all__ = ["prefix_attention_bwd", "prefix_attention_fwd", "score_dtype"]

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_bwd = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def prefix_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    """Return out (B, L, Hq, D) in q's dtype and lse (B, Hq, L) fp32 (fp64 for fp64), both contiguous."""
    call = Options(*options)
    if not _takes_flash(q, call):
        return explicit_fwd(q, k, v, prefix_k, prefix_v, call)
    groups, complete = groups_of(call, prefix_k.shape[0])
    sources = []
    seen = visible_keys(q, k.shape[2], call)
    if seen.first < seen.last:
        keys, values = k[:, :, seen.first : seen.last], v[:, :, seen.first : seen.last]
        sources.append(_own_fwd(q, keys, values, seen, call.scale))
    if groups:
        sources.append(_prefix_fwd(q, prefix_k, prefix_v, groups, call))
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


def prefix_attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, out: Tensor, lse: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (dq, dk, dv, dprefix_k, dprefix_v); what ``needs`` [q, k, v, prefix] does not ask for is an empty (0,).

    dq, dk and dv are (B, heads, length, D) views of contiguous (B, length, heads, D), as their projections want them.
    """
    *options, needs = rest
    call = Options(*options)
    if _takes_flash(q, call):
        dq, dk, dv, dpk, dpv = _flash_path_bwd(dout, q, k, v, prefix_k, prefix_v, out, lse, call, needs)
    else:
        dq, dk, dv, dpk, dpv = explicit_bwd(dout, q, k, v, prefix_k, prefix_v, call)
    need_q, need_k, need_v, need_prefix = needs

    def given(gradient: Tensor, needed: bool) -> Tensor:
        return gradient if needed else q.new_empty(0)

    dprefix = given(dpk, need_prefix), given(dpv, need_prefix)
    return given(dq, need_q), given(dk, need_k), given(dv, need_v), *dprefix


def _takes_flash(q: Tensor, call: Options) -> bool:
    return q.is_cpu and call.p == 0 and call.softcap == 0 and q.numel() > 0


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


def _own_fwd(q: Tensor, k: Tensor, v: Tensor, seen: Visible, scale: float) -> tuple[Tensor, Tensor]:
    """The ordinary keys alone: out (B, L, H, D) and its log of sums (B, L, H)."""
    (B, H, L, D), heads, mask = q.shape, k.shape[1], seen.mask
    q, k, v = (_wide(t) if q.dtype == torch.float16 else t for t in (q, k, v))
    if L == 1 and heads < H:
        # the query heads that share a key head become its queries, and its keys are read once for all of them
        q = q.reshape(B, heads, -1, D)
        if mask is not None and mask.shape[1] > 1:
            mask = mask.reshape(mask.shape[0], heads, -1, mask.shape[-1])
    out, lse = _flash(q, k, v, 0.0, seen.is_causal, attn_mask=mask, scale=scale)
    if L == 1:
        return out.reshape(B, 1, H, D), lse.reshape(B, 1, H)
    return out.transpose(1, 2), lse.transpose(1, 2)


def _prefix_fwd(
    q: Tensor, prefix_k: Tensor, prefix_v: Tensor, groups: tuple[Group, ...], call: Options
) -> tuple[Tensor, Tensor]:
    """The prefix alone: out (B, L, H, D) and its log of sums (B, L, H); a row without one gets _no_source's."""
    if q.dtype == torch.float16:
        q, prefix_k, prefix_v = _wide(q), _wide(prefix_k), _wide(prefix_v)
    L, H, D = q.shape[2], q.shape[1], q.shape[3]
    queries = q.transpose(1, 2)
    whole = isinstance(groups[0].rows, slice) and groups[0].rows == slice(None)
    result, result_lse = (queries, queries) if whole else _no_source(q)
    for group in groups:
        slots, mask = _visible_slots(q, group, call)
        rows = _folded(queries[group.rows])
        out, lse = _flash(rows, _source(prefix_k, slots), _source(prefix_v, slots), attn_mask=mask, scale=call.scale)
        out, lse = out.transpose(1, 2).view(-1, L, H, D), lse.transpose(1, 2).view(-1, L, H)
        if whole:
            return out, lse
        result[group.rows], result_lse[group.rows] = out, lse
    return result, result_lse


def _wide(x: Tensor) -> Tensor:
    """x in fp32 if it is fp16 or bf16, and x itself otherwise.

    torch's flash attention is several times slower in fp16 than in fp32 on a CPU, and its backward slower in both; that
    backward also adds up the gradients of keys and values in their own dtype, block of queries by block of queries.
    """
    return x.float() if x.element_size() == 2 else x


def _folded(x: Tensor) -> Tensor:
    """(n, L, H, D) as one sequence, (1, H, n * L, D): a view where x is contiguous or L is 1."""
    return x.reshape(1, -1, *x.shape[2:]).transpose(1, 2)


def _source(prefix: Tensor, slots: slice) -> Tensor:
    """Slots of a prefix (T, H, D) as keys or values (1, H, length, D), a view."""
    return prefix[slots].transpose(0, 1)[None]


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


def _flash_path_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, out: Tensor, lse: Tensor,
    call: Options, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    need_q, need_k, need_v, need_prefix = needs
    dq = dk = dv = None
    dtype = q.dtype
    lse = lse.masked_fill(lse == float("-inf"), 0.0)  # exp(MASKED - 0) is 0: no gradient from queries that see nothing
    dout, q, k, v, prefix_k, prefix_v, out = (_wide(t) for t in (dout, q, k, v, prefix_k, prefix_v, out))
    seen = visible_keys(q, k.shape[2], call)
    if (need_q or need_k or need_v) and seen.first < seen.last:
        keys, values = k[:, :, seen.first : seen.last], v[:, :, seen.first : seen.last]
        dq, dk, dv = _flash_bwd(
            dout.transpose(1, 2), q, keys, values, out.transpose(1, 2), lse, 0.0, seen.is_causal,
            attn_mask=seen.mask, scale=call.scale,
        )  # fmt: skip
    dq, dk, dv = _filled(dq, q, 0), _filled(dk, k, seen.first), _filled(dv, v, seen.first)
    groups, _ = groups_of(call, prefix_k.shape[0])
    if (need_q or need_prefix) and groups:
        dpk, dpv = _prefix_bwd(dq.transpose(1, 2), dout, q, prefix_k, prefix_v, out, lse, groups, call)
    else:
        dpk, dpv = (t.new_zeros(t.shape) for t in (prefix_k, prefix_v))
    return dq.to(dtype), dk.to(dtype), dv.to(dtype), dpk.to(dtype), dpv.to(dtype)


def _filled(part: Tensor | None, whole: Tensor, first: int) -> Tensor:
    """The gradient of ``whole`` (B, H, S, D) from that of its positions from ``first`` on; zeros for the others."""
    if part is not None and part.shape == whole.shape:
        return part
    full = whole.new_zeros(whole.transpose(1, 2).shape).transpose(1, 2)
    if part is not None:
        full[:, :, first : first + part.shape[2]] = part
    return full


def _prefix_bwd(
    dq: Tensor, dout: Tensor, q: Tensor, prefix_k: Tensor, prefix_v: Tensor, out: Tensor, lse: Tensor,
    groups: tuple[Group, ...], call: Options,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Add the prefix's part to dq (B, L, H, D); return the gradients of the prefix's keys and values."""
    L = q.shape[2]
    total_k, total_v = (torch.zeros(p.shape, dtype=lse.dtype, device=p.device) for p in (prefix_k, prefix_v))
    queries, lse = q.transpose(1, 2), lse.transpose(1, 2)
    for group in groups:
        slots, mask = _visible_slots(q, group, call)
        rows = group.rows
        parts = _flash_bwd(
            _folded(dout[rows]), _folded(queries[rows]), _source(prefix_k, slots), _source(prefix_v, slots),
            _folded(out[rows]), _folded(lse[rows][..., None])[..., 0], 0.0, False, attn_mask=mask, scale=call.scale,
        )  # fmt: skip
        dq[rows] += parts[0].transpose(1, 2).view(-1, L, *dq.shape[2:])
        total_k[slots] += parts[1][0].transpose(0, 1)
        total_v[slots] += parts[2][0].transpose(0, 1)
    return total_k, total_v

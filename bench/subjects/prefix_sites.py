"""Attention of one layer with a prefix: without one, peft's way, two calls that merge, FlexAttention, peft_fast.

peft cannot have several prefixes in a batch; "concatenated" is its way with the prefix of each row in the cache.
What precedes attention is the same for all: projections and rotary embedding are not in it. A decode step appends its
key and value to a dynamic cache first, as transformers does; peft's cache has the prefix of each row in it.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..cases.kinds import PrefixSiteCase
from .lora_sites import DTYPES
from .subject import Compared, Subject, Work

if TYPE_CHECKING:
    from ..session import Session

NAMES = ("base", "peft", "concatenated", "two calls", "flex", "peft_fast")
_aten = torch.ops.aten


@dataclass
class PrefixTensors:
    """What a call gets: tokens (B, heads, L, D) as a projection leaves them, prefix (slots, Hkv, D), views of a table.

    past: keys and values (B, Hkv, tokens - 1, D) of a decode step. filled: the same behind the prefix of each row.
    starts, lengths: the slots of each row where there are several prefixes.
    mask: which keys a query sees where the prefix is among them, as transformers hands it over; None: all.
    blocks: the same for FlexAttention.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    prefix_k: Tensor
    prefix_v: Tensor
    dout: Tensor
    past: tuple[Tensor, Tensor] | None = None
    filled: tuple[Tensor, Tensor] | None = None
    starts: Tensor | None = None
    lengths: Tensor | None = None
    mask: Tensor | None = None
    blocks: Any = None

    def with_leaves(self, dtype: torch.dtype | None = None) -> "PrefixTensors":
        """The same with q, k, v and the prefix as leaves that want a gradient."""
        leaves = {n: getattr(self, n).detach().to(dtype).requires_grad_() for n in _LEAVES}
        past, filled = (p and tuple(t.to(dtype) for t in p) for p in (self.past, self.filled))
        return PrefixTensors(
            **leaves, dout=self.dout.to(dtype), past=past, filled=filled, starts=self.starts, lengths=self.lengths,
            mask=self.mask, blocks=self.blocks,
        )  # fmt: skip


_LEAVES = ("q", "k", "v", "prefix_k", "prefix_v")
Attention = Callable[[PrefixSiteCase, PrefixTensors], Tensor]


@dataclass
class PrefixSite:
    """A case's tensors; ``copies`` that overflow the cache twice in a decode step, as the layers of a model do."""

    case: PrefixSiteCase
    copies: list[PrefixTensors]


def make_site(case: PrefixSiteCase, device: torch.device, cache_bytes: int) -> PrefixSite:
    """Random tensors."""
    count = 1
    if case.queries == 1:
        count = min(16, 1 + int(2 * cache_bytes // case.bytes(prefix=True)))
    return PrefixSite(case, [_tensors(case, device, seed) for seed in range(count)])


def _tensors(case: PrefixSiteCase, device: torch.device, seed: int) -> PrefixTensors:
    generator = torch.Generator(device).manual_seed(seed)
    B, L, S, P, n = case.rows, case.queries, case.tokens, case.prefix, case.prefixes

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(DTYPES[case.dtype])

    q, k, v = (random(B, L, h, case.head_size).transpose(1, 2) for h in (case.heads, case.kv_heads, case.kv_heads))
    table = random(P * n, 2, case.kv_heads, case.head_size)
    t = PrefixTensors(q, k, v, table[:, 0], table[:, 1], random(B, L, case.heads, case.head_size))
    if n > 1:
        t.starts = torch.tensor([i % n * P for i in range(B)], dtype=torch.int32, device=device)
        t.lengths = torch.full_like(t.starts, P)
    if L == 1:
        past_k, past_v = (random(B, case.kv_heads, S - 1, case.head_size) for _ in range(2))
        t.past = past_k, past_v
        t.filled = tuple(  # type: ignore[assignment]
            torch.cat([_spread(case, slots, t.starts), past], dim=2)
            for slots, past in zip((t.prefix_k, t.prefix_v), t.past, strict=True)
        )
        return t
    from transformers.masking_utils import sdpa_mask

    t.mask = sdpa_mask(B, L, P + L, q_offset=P, device=device)
    if device.type == "cuda":
        from torch.nn.attention.flex_attention import create_block_mask

        t.blocks = create_block_mask(lambda b, h, i, j: j <= i + P, None, None, L, P + L, device=device)
    return t


def _spread(case: PrefixSiteCase, slots: Tensor, starts: Tensor | None) -> Tensor:
    """(B, Hkv, P, D): every row's prefix; of a single one without a copy, which is kinder than peft's own."""
    if starts is None:
        return slots.transpose(0, 1)[None].expand(case.rows, -1, -1, -1)
    index = starts.long()[:, None] + torch.arange(case.prefix, device=slots.device)
    return slots[index].transpose(1, 2)


def _own(t: PrefixTensors) -> tuple[Tensor, Tensor]:
    """Keys and values of the text, those of a decode step appended to its cache."""
    if t.past is None:
        return t.k, t.v
    return torch.cat([t.past[0], t.k], dim=2), torch.cat([t.past[1], t.v], dim=2)


def _joined(case: PrefixSiteCase, t: PrefixTensors) -> tuple[Tensor, Tensor]:
    """Keys and values with the prefix of each row before its text, as peft's cache has them."""
    k, v = t.filled or (_spread(case, slots, t.starts) for slots in (t.prefix_k, t.prefix_v))
    return torch.cat([k, t.k], dim=2), torch.cat([v, t.v], dim=2)


def _sdpa(case: PrefixSiteCase, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """transformers' own way to call torch's attention: repeats k and v where there is a mask."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    module: Any = SimpleNamespace(num_key_value_groups=case.heads // case.kv_heads, is_causal=True)
    out: Tensor = sdpa_attention_forward(module, q, k, v, mask, scaling=case.head_size**-0.5)[0]
    return out


def _base(case: PrefixSiteCase, t: PrefixTensors) -> Tensor:
    return _sdpa(case, t.q, *_own(t), None)


def _concatenated(case: PrefixSiteCase, t: PrefixTensors) -> Tensor:
    return _sdpa(case, t.q, *_joined(case, t), t.mask)


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(case: PrefixSiteCase, t: PrefixTensors) -> Tensor:
    out: Tensor = _compiled_flex()(t.q, *_joined(case, t), block_mask=t.blocks, enable_gqa=True)
    return out.transpose(1, 2).contiguous()


def _ours(case: PrefixSiteCase, t: PrefixTensors) -> Tensor:
    from peft_fast.ops.functional import prefix_attention

    offset = None if t.past else 0
    keys = dict(starts=t.starts, lengths=t.lengths, max_length=case.prefix, causal_offset=offset)
    out: Tensor = prefix_attention(t.q, *_own(t), t.prefix_k, t.prefix_v, **keys)[0]  # type: ignore[arg-type]
    return out


def _two_calls(case: PrefixSiteCase, t: PrefixTensors) -> Tensor:
    out: Tensor = TwoCalls.apply(t.q, *_own(t), t.prefix_k, t.prefix_v, case.prefixes, t.past is None)
    return out


class TwoCalls(torch.autograd.Function):
    """torch's flash attention of the text and of the prefix, merged by their logs of sums.

    The rows of a prefix are one long query to it (Juravsky et al. 2024, arXiv:2402.05099), and both backwards start
    from the merged output and log: what one gets from torch's own operators without a kernel. Row i has prefix
    i % prefixes.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, prefixes: int, causal: bool
    ) -> Tensor:
        B, H, L, D = q.shape
        P = prefix_k.shape[0] // prefixes
        packed = q if L > 1 else q.reshape(B, k.shape[1], -1, D)  # a token's query heads of one key head, together
        out, lse, rest = _flash(packed, k, v, causal)
        out, lse = out.view(B, H, L, D), lse.reshape(B, H, L)
        other, other_lse = torch.empty_like(out), torch.empty_like(lse)
        rests = []
        for i in range(prefixes):
            slots = slice(i * P, (i + 1) * P)
            part, part_lse, more = _flash(_folded(q[i::prefixes]), _keys(prefix_k[slots]), _keys(prefix_v[slots]))
            other[i::prefixes] = _unfolded(part, L)
            other_lse[i::prefixes] = _unfolded(part_lse[..., None], L)[..., 0]
            rests.append(more)
        out = torch.lerp(out.float(), other.float(), torch.sigmoid(other_lse - lse)[..., None]).to(q.dtype)
        ctx.save_for_backward(q, k, v, prefix_k, prefix_v, out, torch.logaddexp(lse, other_lse))
        ctx.prefixes, ctx.causal, ctx.rest, ctx.rests = prefixes, causal, rest, rests
        return out.transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, prefix_k, prefix_v, out, lse = ctx.saved_tensors
        dout, n, L = dout.transpose(1, 2), ctx.prefixes, q.shape[2]
        P = prefix_k.shape[0] // n
        dq, dk, dv = _flash_bwd(dout, q, k, v, out, lse, ctx.causal, ctx.rest)
        dpk, dpv = torch.empty_like(prefix_k), torch.empty_like(prefix_v)
        for i in range(n):
            slots = slice(i * P, (i + 1) * P)
            given, queries, merged, logs = (_folded(x[i::n]) for x in (dout, q, out, lse[..., None]))
            keys, values = _keys(prefix_k[slots]), _keys(prefix_v[slots])
            more, part_k, part_v = _flash_bwd(given, queries, keys, values, merged, logs[..., 0], False, ctx.rests[i])
            dq[i::n] += _unfolded(more, L)
            dpk[slots], dpv[slots] = part_k[0].transpose(0, 1), part_v[0].transpose(0, 1)
        return dq, dk, dv, dpk, dpv, None, None


def _keys(slots: Tensor) -> Tensor:
    return slots.transpose(0, 1)[None]


def _folded(x: Tensor) -> Tensor:
    """(n, H, L, D) as one sequence (1, H, n * L, D)."""
    return x.transpose(1, 2).reshape(1, -1, x.shape[1], x.shape[3]).transpose(1, 2)


def _unfolded(x: Tensor, L: int) -> Tensor:
    return x[0].view(x.shape[1], -1, L, x.shape[3]).transpose(0, 1)


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> tuple[Tensor, Tensor, list[Any]]:
    """Output, log of sums, and what else the backward wants."""
    if not q.is_cuda:
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
        return out, lse, []
    out, lse, *rest = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
    return out, lse, rest


def _flash_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, rest: list[Any]
) -> tuple[Tensor, Tensor, Tensor]:
    if not q.is_cuda:
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(dout, q, k, v, out, lse, 0.0, causal)
    *sizes, seed, offset = rest[:6]
    return _aten._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse, *sizes, 0.0, causal, seed, offset
    )


def _by_formula(case: PrefixSiteCase, t: PrefixTensors, prefix: bool = True) -> Tensor:
    """One softmax over the keys of both, with every number written out."""
    k, v = _joined(case, t) if prefix else _own(t)
    k, v = (x.repeat_interleave(case.heads // case.kv_heads, dim=1) for x in (k, v))
    scores = t.q @ k.transpose(2, 3) * case.head_size**-0.5
    hidden = torch.ones(scores.shape[2:], dtype=torch.bool, device=k.device).triu(k.shape[2] - t.q.shape[2] + 1)
    return (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v).transpose(1, 2)


PROVIDERS: dict[str, Attention] = dict(
    zip(NAMES, (_base, _concatenated, _concatenated, _two_calls, _flex, _ours), strict=True)
)


def outputs(attention: Attention, case: PrefixSiteCase, t: PrefixTensors, prefix: bool = True) -> list[Tensor]:
    """out, and in training the gradients of q, k, v and the prefix's keys and values."""
    if case.mode != "train":
        with torch.no_grad():
            return [attention(case, t)]
    t = t.with_leaves(t.q.dtype)
    out = attention(case, t)
    wanted = [getattr(t, name) for name in (_LEAVES if prefix else _LEAVES[:3])]
    return [out.detach(), *torch.autograd.grad(out, wanted, t.dout)]


def exact(site: PrefixSite, prefix: bool) -> list[Tensor]:
    """The same in fp64 by the formula."""
    double = site.copies[0].with_leaves(torch.float64)
    return outputs(functools.partial(_by_formula, prefix=prefix), site.case, double, prefix)


def runner(provider: str, site: PrefixSite) -> Callable[[int], Any]:
    """The function to time: call i uses copy i of the tensors."""
    attention, case, count = PROVIDERS[provider], site.case, len(site.copies)
    if case.mode != "train":

        @torch.no_grad()
        def forward(i: int) -> Tensor:
            return attention(case, site.copies[i % count])

        return forward
    copies = [t.with_leaves(t.q.dtype) for t in site.copies]
    names = _LEAVES[:3] if provider == "base" else _LEAVES
    wanted = [[getattr(t, name) for name in names] for t in copies]

    def step(i: int) -> Any:
        t = copies[i % count]
        return torch.autograd.grad(attention(case, t), wanted[i % count], t.dout)

    return step


class PrefixAttention(Subject):
    """A ``PrefixSiteCase``. peft takes part with one prefix, FlexAttention on a GPU."""

    group = "attention"
    rivals = ("peft", "concatenated", "two calls", "flex")

    def __init__(self, case: PrefixSiteCase, session: "Session") -> None:
        super().__init__(case, session)
        self.memory = case.mode == "train"
        self.site = make_site(case, session.device, session.cache_bytes)
        self._plain = outputs(_concatenated, case, self.site.copies[0])
        self._exact = {prefix: exact(self.site, prefix) for prefix in (False, True)}

    @classmethod
    def providers(cls, case: PrefixSiteCase, device: torch.device) -> Sequence[str]:
        left_out = {"peft" if case.prefixes > 1 else "concatenated", "" if device.type == "cuda" else "flex"}
        return [name for name in NAMES if name not in left_out]

    def compared(self, name: str) -> Compared:
        prefix = name != "base"
        out = outputs(PROVIDERS[name], self.case, self.site.copies[0], prefix)
        return Compared(out, self._plain if prefix else out, self._exact[prefix])

    def checked(self) -> None:
        self._plain, self._exact = [], {}

    def runner(self, name: str) -> Callable[[int], Any]:
        return runner(name, self.site)

    def work(self, name: str) -> Work:
        prefix = name != "base"
        return Work(self.case.flops(prefix), self.case.bytes(prefix), self.case.dtype)

    def capturable(self, name: str) -> int:
        return max(4, len(self.site.copies)) if self.case.mode == "decode" else 0

    def tokens(self) -> int:
        return int(self.case.rows * self.case.queries)

    def close(self) -> None:
        if self.device.type == "cuda":
            torch.compiler.reset()  # FlexAttention's: each case has sizes of its own

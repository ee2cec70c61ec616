"""The prefixes of a call: which rows have which, and what attention modules read of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...routing.batch import wrong_length
from ..call import current_prompt, leading_input
from .cached import cache_target, cached_tokens, through_cache, under_flex
from .families import FAMILIES, first_position, model_type, modules_matching, position_limit

KEYWORD = "peft_prefix"  # carries a `Prefix` through the model to the attention function


class Rows(NamedTuple):
    """Which slots of the call's table each row of a forward uses.

    starts, lengths, order: (rows,) int32 as `ops.functional.prefix_attention` takes them; None: all rows use all.
    shift: by how many positions the text moves: an int, or (rows, 1) int64.
    """

    starts: Tensor | None
    lengths: Tensor | None
    order: Tensor | None
    shift: Any


class Prefix:
    """What the attention modules of one forward read.

    Args:
        layer: layer -> keys and values (slots, heads, head size) of all prefixes of the call, one behind another.
        rows: which of them each row uses. longest: length of the longest.
        past: number of tokens in the cache before this forward; (1,) int64 where a static cache counts them.
        distances: the module with T5's bias by distance, if the model has one.
        first: what is added to the number of a layer.
    """

    def __init__(
        self,
        layer: Callable[[int], tuple[Tensor, Tensor]],
        rows: Rows,
        longest: int,
        past: int | Tensor,
        distances: nn.Module | None = None,
        first: int = 0,
    ) -> None:
        self.layer, self.rows, self.longest, self.past = layer, rows, longest, past
        self.distances, self.first = distances, first
        self.applications = 0  # of ALBERT's shared layers in this forward
        self._bias: Tensor | None = None

    def next_application(self, layers: int) -> Prefix:
        """What the next application of `layers` shared layers reads. Called outside of what checkpointing repeats."""
        first, self.applications = self.applications, self.applications + layers
        return Prefix(self.layer, self.rows, self.longest, self.past, self.distances, first)

    def window(self, window: int | None, tokens: int) -> int | None:
        """The window for `tokens` queries; None where nothing has slid out of it, as far as the host knows."""
        if window is None or (isinstance(self.past, int) and self.longest + self.past + tokens <= window):
            return None
        return window

    def past_on(self, device: torch.device) -> Tensor:
        """`past` on a device; an int is filled in there: a copy from the host would be waited for at every token."""
        if isinstance(self.past, int):
            return torch.full((1,), self.past, dtype=torch.int64, device=device)
        return self.past.to(device)

    def bias(self, tokens: int, device: torch.device) -> Tensor | None:
        """(1 or rows, heads, tokens, longest): T5's bias of the prefix's slots; made once per forward."""
        if self.distances is not None and self._bias is None:
            bias = self.distances.compute_bias(  # type: ignore[operator]
                tokens, self.longest, device=device, past_seen_tokens=self.longest + self.past
            )
            if self.rows.lengths is not None:  # slot j of a shorter prefix is as far away as a later one of the longest
                slot = torch.arange(self.longest, device=device) + (self.longest - self.rows.lengths[:, None])
                index = slot.clamp(max=self.longest - 1)[:, None, None, :].expand(-1, *bias.shape[1:])
                bias = bias.expand(index.shape[0], -1, -1, -1).gather(3, index)
            self._bias = bias
        return self._bias


class PrefixCall:
    """The prefixes of one call of a model.

    Args:
        base: the base model.
        layer: as in `Prefix`.
        num_layers: layers that have a prefix.
        lengths: of each prefix in the table, in order.
        units: number of its prefix for each row of the call, -1 for none; generate may make several rows of one.
            None: every row has the first.
        fused: the base's attention reads prefixes; otherwise they go through its cache.
    """

    def __init__(
        self,
        base: nn.Module,
        layer: Callable[[int], tuple[Tensor, Tensor]],
        num_layers: int,
        lengths: Sequence[int],
        units: Sequence[int] | None,
        fused: bool,
    ) -> None:
        self.base = base if fused else cache_target(base)
        self.layer, self.num_layers, self.fused = layer, num_layers, fused
        self.lengths, self.longest = list(lengths), max(lengths)
        self.units = None if units is None else list(units)
        self.is_encoder_decoder = bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))
        self.running: nn.Module | None = None
        self.shift: Any = None  # of the forward that runs, where its attention reads the prefix
        self._rows: dict[tuple[int, torch.device], Rows] = {}
        family = FAMILIES.get(model_type(base))
        distances = modules_matching(base, family.distances) if family is not None else []
        self._distances = distances[0][1] if distances else None

    def own_positions(self, output: Any) -> Any:
        """As it is: a prefix is in no sequence."""
        return output

    def apply(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The forward's arguments with the prefix: for the attention function, or in the cache.

        Raises: ValueError where the prefix and the text need more positions than there are, or a given argument cannot
            be combined with a prefix.
        """
        inputs = leading_input(kwargs, self.is_encoder_decoder)
        rows, past = self.rows(inputs.shape[0], inputs.device), cached_tokens(kwargs.get("past_key_values"))
        if self.in_cache(kwargs):
            # where an embedding counts by itself, the cache has moved all rows by the longest prefix
            self.shift = None if rows.lengths is None else rows.shift - self.longest
            return through_cache(self, kwargs, inputs, rows, past)
        self.shift = rows.shift
        FAMILIES[model_type(self.base)].positions(self.base, kwargs, rows.shift, past, inputs)
        if isinstance(past, int):
            self._fit_positions(kwargs, rows, past + inputs.shape[1])
        seen = past.reshape(1).clone() if isinstance(past, Tensor) else past  # a static cache counts in place
        kwargs[KEYWORD] = Prefix(self.layer, rows, self.longest, seen, self._distances)
        return kwargs

    def in_cache(self, kwargs: dict[str, Any]) -> bool:
        """Whether the prefix goes through the cache in a forward or generate with these arguments."""
        return (
            not self.fused or under_flex(self.base) or _wants_attentions(self.base, kwargs) or self._learns_distances()
        )

    def _fit_positions(self, kwargs: dict[str, Any], rows: Rows, tokens: int) -> None:
        """Let padding have the last position where it would be beyond it. tokens: cached ones and the forward's.

        Raises: ValueError where a row's prefix and its text need more positions than the base has.
        """
        limit, positions = position_limit(self.base), kwargs.get("position_ids")
        if limit is None or self.longest + tokens <= limit:
            return
        if positions is None:  # the architecture counts by itself, and padding is text to it
            return check_positions(self.base, self.longest, tokens)
        first = first_position(self.base)
        mask = kwargs.get("attention_mask")
        text = positions - first if mask is None or mask.ndim != 2 else _of_text(positions - first, mask)
        needed = text.amax(1).expand(len(text) if rows.lengths is None else len(rows.lengths)) + 1
        row = int(needed.argmax())
        virtual = self.longest if rows.lengths is None else int(rows.lengths[row])
        check_positions(self.base, virtual, int(needed[row]) - virtual)
        kwargs["position_ids"] = positions.clamp(max=limit - 1 + first)

    def _learns_distances(self) -> bool:
        """Whether T5's bias by distance is trained: the attention that reads prefixes has no gradient for it."""
        return (
            self._distances is not None
            and torch.is_grad_enabled()
            and any(
                parameter.requires_grad
                for parameter in self._distances.relative_attention_bias.parameters()  # type: ignore[union-attr]
            )
        )

    def rows(self, count: int, device: torch.device) -> Rows:
        """Which slots each of `count` rows uses. Raises: ValueError where they are no multiple of the units."""
        if self.units is not None and (not self.units or count % len(self.units)):
            raise wrong_length(len(self.units), count)
        if self.units is None or (len(self.lengths) == 1 and -1 not in self.units):
            return Rows(None, None, None, self.longest)
        found = self._rows.get((count, device))
        if found is None:
            ends = [0]
            for length in self.lengths:
                ends.append(ends[-1] + length)
            units = [unit for unit in self.units for _ in range(count // len(self.units))]
            starts = [ends[unit] if unit >= 0 else 0 for unit in units]
            lengths = [self.lengths[unit] if unit >= 0 else 0 for unit in units]
            order = sorted(range(count), key=lambda row: units[row])
            table = torch.tensor([starts, lengths, order], dtype=torch.int32).to(device)
            found = self._rows[count, device] = Rows(table[0], table[1], table[2], table[1].long()[:, None])
        return found


def check_positions(base: nn.Module, virtual: int, tokens: int) -> None:
    """Raises: ValueError where a prefix of `virtual` tokens and the text need more positions than the base has."""
    limit = position_limit(base)
    if limit is not None and virtual + tokens > limit:
        raise ValueError(
            f"A prefix of {virtual} virtual tokens and {tokens} tokens of text need {virtual + tokens} positions, and "
            f"{type(base).__name__} has {limit}. Use fewer virtual tokens, or at most {max(limit - virtual, 0)} tokens "
            "of text"
        )


def _of_text(positions: Tensor, mask: Tensor) -> Tensor:
    """(rows, tokens): the positions, -1 for padding."""
    return positions.where(mask[:, -positions.shape[1] :].bool(), -1)


def _wants_attentions(base: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether the forward returns attention weights, those of the prefix's slots among them."""
    given = kwargs.get("output_attentions")
    return bool(getattr(getattr(base, "config", None), "output_attentions", False) if given is None else given)


def shift_positions(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
    """Hook after BART's embedding of positions, which come to it as (tokens,): those of the text follow the prefix."""
    call = current_prompt()
    if not isinstance(call, PrefixCall) or call.running is not call.base or call.shift is None:
        return None
    names = ("input_ids", "past_key_values_length", "position_ids")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    positions = given.get("position_ids")
    if positions is None:
        past = given.get("past_key_values_length", 0)
        positions = torch.arange(output.shape[-2], device=output.device) + past
    return F.embedding(positions[None] + call.shift + module.offset, module.weight)


def count_application(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hook before ALBERT's shared layers: each application of them is a layer with a prefix of its own."""
    prefix = kwargs.get(KEYWORD)
    if prefix is None:
        return None
    return args, {**kwargs, KEYWORD: prefix.next_application(len(module.albert_layers))}  # type: ignore[arg-type]

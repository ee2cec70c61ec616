"""`AdapterWatch`: whether an adapter is still what the bank's tables say, without a look at all of it."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

__all__ = ["AdapterWatch", "Scalings"]

_SITES = 3  # looked at in turn, beside one that the adapter adapts


class Scalings(dict[str, float]):
    """A layer's scalings by adapter. What is set is counted, in all layers together: scalings are set one by one, and a
    count is all that a call has time to look at."""

    count = 0

    def __setitem__(self, name: str, scaling: float) -> None:
        Scalings.count += 1
        super().__setitem__(name, scaling)


class AdapterWatch:
    """How an adapter looked at every site when the tables were written.

    To look at all sites of 32 adapters takes longer than a model's decode step. So a call takes a glance: at a few
    sites, the next ones each time, and always at one that the adapter adapts. What changes all of an adapter (a step of
    an optimizer, a cast, new weights) shows at the next call, and what was done to a few sites by hand when their turn
    comes, after `turns` calls at most. The bank looks at all sites at once where it is told of a change, and so does a
    glance after hooks were registered or scalings set, on whatever module: these are few, and are for single modules.

    Args:
        entries: what `mixed_entry` gave at each site.
    Attributes: look_at_all: the next look has to be at all sites. trained: whether a part requires grad.
    """

    def __init__(self, entries: Sequence[tuple[Tensor, Tensor, float] | None]) -> None:
        self.look_at_all = False
        self.trained = any(entry is not None and entry[0].requires_grad for entry in entries)
        self.turns = max(1, -(-len(entries) // _SITES))
        self._seen = [_look(entry) for entry in entries]
        self._adapted = [site for site, entry in enumerate(entries) if entry is not None]
        self._edits = _edits()
        self._turn = 0

    def agrees(self, other: "AdapterWatch") -> bool:
        """Whether both saw the same at every site."""
        return self._seen == other._seen

    def glance(self, layers: Sequence[Any], name: str) -> bool:
        """Whether nothing has changed, as far as a few sites can tell."""
        if self.look_at_all or self._edits != _edits():
            return False
        self._turn += 1
        sites = [*range(self._turn % self.turns, len(self._seen), self.turns)]
        if self._adapted:
            sites.append(self._adapted[self._turn % len(self._adapted)])
        return all(_look(layers[site].mixed_entry(name)) == self._seen[site] for site in sites)


def _edits() -> tuple[int, int]:
    return RemovableHandle.next_id, Scalings.count


def _look(entry: tuple[Tensor, Tensor, float] | None) -> tuple[Any, ...] | None:
    if entry is None:
        return None
    a, b, scaling = entry
    return *_state(a), *_state(b), a.requires_grad, scaling


def _state(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, 0 if tensor.is_inference() else tensor._version

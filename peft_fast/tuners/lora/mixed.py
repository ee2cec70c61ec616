"""How LoRA layers run a mixed batch: every row its own adapter, or none.

On a device one operator per site looks the adapters up in the bank's tables; nothing here depends on which they are. On
the host, which is where CPU tensors are and where gradients can flow, the rows of each adapter are neighbours
(`MixedBatch.groups`) and the products are made on views of them. An adapter that is not plain (hooks on its modules,
other modules than linear layers, a bias of its own) runs as the modules it is, and its rows are selected.
"""

from __future__ import annotations

from collections.abc import Collection
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.hooks import RemovableHandle

from ...ops.functional import lora_embedding_mixed, lora_update_mixed
from ...reference.mixed import add_few, as_array, few_rows, lora_mixed
from ...routing.batch import MixedBatch

if TYPE_CHECKING:
    from .layer import Embedding, Linear


def linear(layer: Linear, batch: MixedBatch, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A linear layer's output (..., N) for x (..., K). Raises: ValueError if x's rows are no multiple of the batch."""
    adapters: Any = layer.lora_A
    count = batch.count_rows(x.shape[:-1])
    if batch.on_host(x, lambda name: name in adapters and any(p.requires_grad for p in adapters[name].parameters())):
        base: Any = layer.base_layer
        output = layer._base.run(base, x, *args, **kwargs)
        # only what is known to be new memory is written to
        fresh = layer._base.is_product(base, x) and not args and not kwargs and not torch.is_grad_enabled()
        return _linear_on_host(layer, batch, x, output, fresh, count)
    plan, how = batch.plan(count, x.device), batch.implementation
    site = batch.bank.sites[layer.mixed_site]  # after the plan, which may give adapters slots
    base = layer.base_layer
    result = None if args or kwargs else layer._base.with_rows(base, x, site, plan, how)
    if result is None:
        result = layer._base.run(base, x, *args, **kwargs)
        result = lora_update_mixed(result, x.to(result.dtype), site, plan, implementation=how)
    return _with_odd(layer, batch, x, result, batch.bank.odd_at(layer.mixed_site))


def _linear_on_host(layer: Linear, batch: MixedBatch, x: Tensor, result: Tensor, fresh: bool, rows: int) -> Tensor:
    N = result.shape[-1]
    order, _ = batch.groups(rows)
    plain, odd, few = batch.of_site(layer, rows, lambda groups: _entries(layer, batch, x.reshape(rows, -1), groups))
    if plain:
        y, flat = result.reshape(rows, N), x.reshape(rows, -1)
        y = y if fresh else y.clone()
        if few:
            y = add_few(y, flat, plain, order)
        else:
            y = lora_mixed(y, flat, plain, order)
        result = y.view(result.shape)
    return _with_odd(layer, batch, x, result, odd)


def _entries(layer: Linear, batch: MixedBatch, x: Tensor, groups: list[tuple[str, slice]]) -> Any:
    """The plain adapters of the groups that are in the layer, the names of the odd ones, and whether the plain ones are
    for `add_few`."""
    present: Any = layer.lora_A._modules
    groups = [group for group in groups if group[0] in present]
    if batch.peft_arithmetic or torch.is_autocast_enabled(x.device.type) or _has_any_global_hook():  # type: ignore[no-untyped-call]
        return [], [name for name, _ in groups], False
    few = not torch.is_grad_enabled() and few_rows(x, len(groups))
    keeps = few and batch.bank is not None
    site, plain, odd = layer.mixed_site, [], []
    for name, rows in groups:
        found = batch.kept(name, HostAdapter).arrays.get(site) if keeps else None
        if found is None:
            entry = layer.mixed_entry(name)
            if entry is None:
                odd.append(name)
                continue
            found = (as_array(entry[0]), as_array(entry[1]), entry[2]) if few else entry
        plain.append((rows, *found))
    return plain, odd, few


class HostAdapter:
    """An adapter as `add_few` takes it, kept from call to call: A, B and scaling by site.

    To look at each site whether everything is as it was takes longer than the products of a row, so it is looked at
    once per call, and in as few steps as possible: between two calls the adapter itself went through the cache.
    Matrices are views of the parameters, or, of 16-bit ones, copies in fp32.
    """

    def __init__(self, layers: list[Any], name: str) -> None:
        self.name, self.layers = name, layers
        self.arrays: dict[int, Any] = {}
        self.copied = 0  # bytes
        self._count = len(layers)
        self._homes: list[dict[str, Any]] = []  # the containers' dicts that hold the modules
        self._modules: list[Any] = []
        self._parameters: list[Any] = []
        self._scalings: list[dict[str, float]] = []
        for layer in layers:
            entry = layer.mixed_entry(name) if name in layer.lora_A else None
            if entry is not None:
                a, b = as_array(entry[0]), as_array(entry[1])
                self.arrays[layer.mixed_site] = a, b, entry[2]
                self._homes += layer.lora_A._modules, layer.lora_B._modules
                self._modules += layer.lora_A[name], layer.lora_B[name]
                self._parameters += entry[:2]
                self._scalings.append(layer.scaling)
                narrow = entry[0].dtype.itemsize < 4, entry[1].dtype.itemsize < 4
                self.copied += a.nbytes * narrow[0] + b.nbytes * narrow[1]
        self._hooks = RemovableHandle.next_id
        self._seen = self._state()

    def _state(self) -> Any:
        parameters = self._parameters
        versions = [p._version for p in parameters if not p.is_inference()] if self.copied else None
        scalings = [scaling.get(self.name) for scaling in self._scalings]
        return [*map(Tensor.data_ptr, parameters)], [*map(Tensor.numel, parameters)], versions, scalings

    def is_current(self) -> bool:
        """Whether nothing has changed since."""
        name, modules = self.name, self._modules
        return (
            self._count == len(self.layers)
            and all(map(is_, [home.get(name) for home in self._homes], modules))
            and all(map(is_, [m._parameters.get("weight") for m in modules], self._parameters))
            and not any(["forward" in m.__dict__ for m in modules])
            and self._no_hooks()
            and self._seen == self._state()
        )

    def _no_hooks(self) -> bool:
        if self._hooks != RemovableHandle.next_id:  # hooks were registered, somewhere
            if any(m._forward_hooks or m._forward_pre_hooks for m in self._modules):
                return False
            self._hooks = RemovableHandle.next_id
        return True


def _with_odd(layer: Any, batch: MixedBatch, x: Tensor, result: Tensor, odd: Collection[str]) -> Tensor:
    """`result` with the adapters that have to run as modules: on all rows, of which theirs are taken."""
    names = batch.candidates(odd) if odd else ()
    outputs = {name: result + layer._low_rank(x, name) for name in names}
    return batch.select(outputs, result) if outputs else result


def embedding(layer: Embedding, batch: MixedBatch, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """An embedding's output (..., D) for ids (...). Raises: as `linear`."""
    result: Tensor = layer.base_layer(ids, *args, **kwargs)
    scale, count = layer._embed_scale(), batch.count_rows(ids.shape)
    present: Any = layer.lora_embedding_A
    if not batch.on_host(result, lambda name: name in present and present[name].requires_grad):
        plan = batch.plan(count, ids.device)
        site = batch.bank.sites[layer.mixed_site]
        start = result if scale is None else torch.zeros_like(result)
        update = lora_embedding_mixed(start, ids, site, plan, layer.in_features, implementation=batch.implementation)
        if scale is None:
            return update
        return result + update * scale.to(update.dtype)
    order, groups = batch.groups(count)
    flat, y = ids.reshape(-1), result.reshape(count, -1)
    flat = flat if order is None else flat[order.to(ids.device)]
    parts, places = [], []
    for name, span in groups:
        if name in present:
            a, b = layer._factors(name)
            update = (layer._embed(flat[span], a.T) @ b.T) * layer.scaling[name]
            parts.append(update if scale is None else update * scale.to(update.dtype))
            places.append(torch.arange(span.start, span.stop) if order is None else order[span])
    if not parts:
        return result
    updates = torch.cat(parts).to(y.dtype)
    return y.index_add(0, torch.cat(places).to(y.device), updates).view(result.shape)


def convolution(layer: Any, batch: MixedBatch, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A convolution's output for x (rows, channels, ...). Raises: as `linear`."""
    result: Tensor = layer.base_layer(x, *args, **kwargs)
    return _with_odd(layer, batch, x, result, layer.lora_A._modules)

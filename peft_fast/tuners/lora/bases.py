"""What a LoRA layer does with its base: run it, run it in one operator with an adapter, read and write its weight.

That depends on the base layer's type, and is an object without state, chosen once when the LoRA layer is made. A type
that is not exactly known is ``Opaque``: it is called as the module it is, so hooks, patched forwards and sharding keep
working, and adapters are added to what it returns. ``Plain`` is nn.Linear and transformers' Conv1D. bnb.py has those of
bitsandbytes and torchao.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ...ops.functional import MixedPlan, MixedSite, lora_linear, lora_linear_mixed, new_seed

# What the operators need of one adapter for one call: a, b, bias of lora_B, scaling, probability of dropout.
Adapter = tuple[Tensor, Tensor, Tensor | None, float, float]
# Subclasses (quantized, distributed, traced tensors) bring operators of their own.
TENSORS = (nn.Parameter, Tensor)
_CONVOLUTIONS = nn.Conv1d | nn.Conv2d | nn.Conv3d


class Opaque:
    """Any layer. Merging works if its weight is a tensor of plain numbers."""

    def run(self, layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's own output."""
        y: Tensor = layer(x, *args, **kwargs)
        return y

    def is_product(self, layer: Any, x: Tensor) -> bool:
        """Whether calling the layer is the product with its weight, in new memory, and nothing else."""
        return False

    def with_adapter(self, layer: Any, x: Tensor, adapter: Adapter) -> Tensor | None:
        """Base and one adapter in one operator; None where that cannot be, or would not be the layer's own output."""
        return None

    def with_rows(self, layer: Any, x: Tensor, site: MixedSite, plan: MixedPlan, how: str) -> Tensor | None:
        """Base and an adapter for each row in one operator, without a gradient; None as ``with_adapter``."""
        return None

    def read(self, layer: Any) -> Tensor:
        """The weight as plain numbers: the weight itself, or a copy where it is kept otherwise."""
        weight: Tensor = layer.weight.data
        return weight

    def write(self, layer: Any, weight: Tensor) -> None:
        """Make what ``read`` gave, changed, the weight."""
        layer.weight.data = weight

    def check_mergeable(self, layer: Any, adapter: str, lora_bias: bool) -> None:
        """Raises: ValueError for a weight that cannot be read and written; RuntimeError for a bias without a place."""
        weight = getattr(layer, "weight", None)
        if weight is None or not weight.is_floating_point() or weight.dtype.itemsize == 1:
            raise ValueError(
                f"Cannot merge adapter {adapter!r} into a {type(layer).__name__} whose weight is quantized "
                f"({getattr(weight, 'dtype', 'no weight')}): this format cannot be dequantized and quantized again here"
            )
        check_place_for_bias(layer, lora_bias)
        if "weight" not in layer._parameters and isinstance(layer, nn.Linear | nn.Embedding | _CONVOLUTIONS):
            raise ValueError(
                f"Cannot merge adapter {adapter!r} into a {type(layer).__name__} whose weight is made anew in every "
                "forward (a parametrization, weight_norm): what is added to it would be lost. Remove the "
                "parametrization first (torch.nn.utils.parametrize.remove_parametrizations), or keep the adapter "
                "unmerged"
            )


class Plain(Opaque):
    """nn.Linear, or with ``transposed`` transformers' Conv1D, whose weight is (in, out)."""

    def __init__(self, kind: type[nn.Module], transposed: bool) -> None:
        self.kind, self.transposed = kind, transposed

    def is_product(self, layer: Any, x: Tensor) -> bool:
        if not is_plain(layer, self.kind):
            return False
        w = layer._parameters.get("weight")
        if type(w) not in TENSORS or w.requires_grad or w.device != x.device:
            return False
        # where dtypes differ the base layer says what is wrong
        return w.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)

    def with_adapter(self, layer: Any, x: Tensor, adapter: Adapter) -> Tensor | None:
        a, b, lora_bias, scaling, p = adapter
        if not self.is_product(layer, x) or a.device != x.device:
            return None
        w, bias = layer._parameters["weight"], layer._parameters["bias"]
        if self.transposed:
            w = w.T
        seed = new_seed(x.device) if p > 0 else None
        y = lora_linear(x, w, a, b, scaling, bias, dropout_p=p, seed=seed)
        return y if lora_bias is None else (y + scaling * lora_bias).to(y.dtype)

    def with_rows(self, layer: Any, x: Tensor, site: MixedSite, plan: MixedPlan, how: str) -> Tensor | None:
        if not self.is_product(layer, x) or torch.is_autocast_enabled(x.device.type):
            return None
        weight = layer.weight.T if self.transposed else layer.weight
        return lora_linear_mixed(x, weight, site, plan, layer.bias, implementation=how)


OPAQUE = Opaque()


def is_plain(module: Any, kind: Any) -> bool:
    """Whether calling the module is exactly its class's forward: this very class, no hooks, forward not patched."""
    return not (
        type(module) is not kind
        or module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def check_place_for_bias(layer: Any, lora_bias: bool) -> None:
    """Raises: RuntimeError, PEFT's, for a bias of lora_B that a base without one would have to take."""
    if lora_bias and getattr(layer, "bias", None) is None:
        raise RuntimeError("Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias.")

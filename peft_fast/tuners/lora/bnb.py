"""LoRA on the quantized linear layers of bitsandbytes and torchao.

In training the base weight is dequantized and takes part in one fused operator with the adapter; so it does where
bitsandbytes' own product would be wrong. For inference bitsandbytes' layer runs, with its fast products, as an opaque
base. Merging dequantizes, adds and quantizes again, which rounds: a warning, as in PEFT.
"""

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...ops.functional import MixedPlan, MixedSite, _autocast_dtype, new_seed
from ...ops.operators import QUANT_VARIABLE
from ...ops.quantized_functional import (
    has_kernel,
    linear_quantized,
    lora_linear_int8,
    lora_linear_mixed_4bit,
    lora_linear_quantized,
)
from ...quantized.weights import four_bit_of, int8_of, kind_of, pack_for_cpu, packs_for_cpu, read, weight_of, write
from .._base_layer import BaseTunerLayer
from .layer import _TENSORS, Linear, _Adapter, _is_plain

__all__ = ["Linear4bit", "Linear8bitLt", "TorchaoLoraLinear", "dispatch_quantized"]


class _QuantizedLinear(Linear):
    """What the layers share: merging. `what` is the format's name in PEFT's warning."""

    what = ""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, config, **kwargs)
        self.fan_in_fan_out = False

    def _check_mergeable(self, base_layer: Any, name: str) -> None:
        if self.lora_bias[name] and base_layer.bias is None:
            raise RuntimeError("Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias.")

    def _read_weight(self, base_layer: Any) -> Tensor:
        return read(base_layer)

    def _write_weight(self, base_layer: Any, weight: Tensor) -> None:
        warnings.warn(
            f"Merge lora module to {self.what} linear may get different generations due to rounding errors.",
            stacklevel=5,
        )
        write(base_layer, weight)

    def _product_with(self, w: Any, x: Tensor, adapter: _Adapter, bias: Tensor | None) -> Tensor:
        """Base and adapter in one op, in x's dtype."""
        a, b, lora_bias, scaling, p = adapter
        seed = new_seed(x.device) if p > 0 else None
        bias = None if bias is None else bias.to(x.dtype)
        y = lora_linear_quantized(x, w, a, b, scaling, bias, dropout_p=p, seed=seed)
        return y if lora_bias is None else (y + scaling * lora_bias).to(y.dtype)

    def _is_plain_base(self, x: Tensor) -> bool:
        """Whether calling the base layer is bitsandbytes' forward and nothing else, on x's device."""
        base_layer: Any = self._modules["base_layer"]
        weight = base_layer._parameters.get("weight")
        return (
            _is_plain(base_layer, type(base_layer))
            and _is_of_the_library(base_layer)
            and type(x) in _TENSORS
            and weight is not None
            and weight.device == x.device
            and type(weight).__module__.startswith("bitsandbytes.")
        )


class Linear4bit(_QuantizedLinear):
    """LoRA on bitsandbytes' Linear4bit: NF4 or FP4, with or without double quantization."""

    what = "4-bit"

    def _run_base(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base_layer: Any = self._modules["base_layer"]
        if self._packed(base_layer, x) or not x.is_cpu or args or kwargs or not self._is_plain_base(x):
            return super()._run_base(x, *args, **kwargs)
        w = weight_of(base_layer)
        compute, bias = _compute_dtype(base_layer, x), base_layer.bias
        y = linear_quantized(x.to(compute), w, None if bias is None else bias.to(compute))
        return y.to(x.dtype)

    def _fused(self, base_layer: Any, x: Tensor, adapter: _Adapter) -> Tensor | None:
        if self._packed(base_layer, x):
            return None
        dtype = _autocast_dtype(x) or x.dtype
        if adapter[0].device != x.device or dtype != _compute_dtype(base_layer, x) or not self._is_plain_base(x):
            return None
        w, x2 = four_bit_of(base_layer), x.to(dtype)
        if not x.is_cpu and not torch.is_grad_enabled() and not has_kernel("lora_linear_4bit", x2, w, len(adapter[0])):
            return None  # bitsandbytes' own products for few rows
        return self._product_with(w, x2, adapter, base_layer.bias).to(x.dtype)

    def mixed_product(self, x: Tensor, site: MixedSite, plan: MixedPlan) -> Tensor | None:
        """Base and the rows' adapters in one launch, or None where no kernel is chosen for that."""
        base_layer: Any = self._modules["base_layer"]
        dtype = _compute_dtype(base_layer, x)
        if (_autocast_dtype(x) or x.dtype) != dtype or not self._is_plain_base(x):
            return None
        w, x2, bias = four_bit_of(base_layer), x.to(dtype), base_layer.bias
        if not has_kernel("lora_linear_mixed_4bit", x2, w, site.max_rank):
            return None
        return lora_linear_mixed_4bit(x2, w, site, plan, None if bias is None else bias.to(dtype)).to(x.dtype)

    @staticmethod
    def _packed(base_layer: Any, x: Tensor) -> bool:
        """Whether bitsandbytes' fast product for inference on CPUs takes this call."""
        return packs_for_cpu(base_layer, x) and _is_of_the_library(base_layer) and pack_for_cpu(base_layer)


class Linear8bitLt(_QuantizedLinear):
    """LoRA on bitsandbytes' Linear8bitLt.

    On a CPU its training is a product with the dequantized weight, which is fused; in inference, and on a GPU, it
    quantizes the activations too: bitsandbytes' layer runs, or in inference the kernel where it is chosen.
    """

    what = "8-bit"

    def _fused(self, base_layer: Any, x: Tensor, adapter: _Adapter) -> Tensor | None:
        if x.is_cpu and not base_layer.training and QUANT_VARIABLE not in os.environ:
            return None  # before anything is looked up: this runs once per token and layer
        a, b, lora_bias, scaling, p = adapter
        if a.device != x.device or base_layer.state.has_fp16_weights or not self._is_plain_base(x):
            return None
        w, x, bias = int8_of(base_layer), x.to(_autocast_dtype(x) or x.dtype), base_layer.bias
        if x.is_cpu and base_layer.training:
            return self._product_with(w, x, adapter, bias)
        if torch.is_grad_enabled() or p > 0 or lora_bias is not None:
            return None
        if not has_kernel("lora_linear_int8", x, w, len(a)):
            return None
        return lora_linear_int8(
            x, w, a, b, scaling, None if bias is None else bias.to(x.dtype), base_layer.state.threshold
        )


class TorchaoLoraLinear(_QuantizedLinear):
    """LoRA on a linear layer whose weight is a tensor of torchao: an opaque base that can be merged into.

    Args: get_apply_tensor_subclass: gives the configuration that the weight was quantized with; of the model's
        quantizer in transformers. Without it merging raises.
    """

    what = "torchao"

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: Any,
        get_apply_tensor_subclass: Callable[[], Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(base_layer, adapter_name, config, **kwargs)
        self.get_apply_tensor_subclass = get_apply_tensor_subclass

    def _check_mergeable(self, base_layer: Any, name: str) -> None:
        super()._check_mergeable(base_layer, name)
        if self.get_apply_tensor_subclass is None:
            raise ValueError(
                f"Cannot merge adapter {name!r} into a torchao weight: how it was quantized is not known. Load the "
                "base model with transformers and a TorchAoConfig, which keeps that"
            )

    def _write_weight(self, base_layer: Any, weight: Tensor) -> None:
        subclass: Any = self.get_apply_tensor_subclass  # `_check_mergeable` has seen it
        write(base_layer, weight, subclass())


def _is_of_the_library(base_layer: nn.Module) -> bool:
    """Whether its class is bitsandbytes' own: a subclass may have another forward, and reads the weight as it likes."""
    return type(base_layer).__module__.startswith("bitsandbytes.")


def _compute_dtype(base_layer: Any, x: Tensor) -> torch.dtype:
    """What a Linear4bit computes in: its own dtype, set by whoever made it or by the first input; else the input's."""
    dtype: torch.dtype | None = base_layer.compute_dtype
    if not base_layer.compute_type_is_set and x.dtype in (torch.float32, torch.bfloat16):
        dtype = None
    return dtype or x.dtype


_LAYERS: dict[str, type[_QuantizedLinear]] = {
    "bnb 4bit": Linear4bit,
    "bnb 8bit": Linear8bitLt,
    "torchao": TorchaoLoraLinear,
}


def dispatch_quantized(
    target: nn.Module, adapter_name: str, config: Any, get_apply_tensor_subclass: Any = None, **kwargs: Any
) -> nn.Module | None:
    """The LoRA layer for a linear layer that is quantized in a known format, or None."""
    base: Any = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    kind = kind_of(base)
    if kind is None:
        return None
    if kind == "torchao":
        kwargs["get_apply_tensor_subclass"] = get_apply_tensor_subclass
    return _LAYERS[kind](target, adapter_name, config, **kwargs)

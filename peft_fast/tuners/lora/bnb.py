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
from ...quantized.functional import (
    has_kernel,
    linear_quantized,
    lora_linear_int8,
    lora_linear_mixed_4bit,
    lora_linear_quantized,
)
from ...quantized.weights import four_bit_of, int8_of, kind_of, pack_for_cpu, packs_for_cpu, read, weight_of, write
from .._base_layer import BaseTunerLayer
from .bases import TENSORS, Adapter, Opaque, check_place_for_bias, is_plain
from .layer import Linear

__all__ = ["Linear4bit", "Linear8bitLt", "TorchaoLoraLinear", "dispatch_quantized"]


class _Quantized(Opaque):
    """What the formats share: merging dequantizes, adds and quantizes again. `what`: the format in PEFT's warning."""

    what = ""

    def read(self, layer: Any) -> Tensor:
        return read(layer)

    def write(self, layer: Any, weight: Tensor) -> None:
        warnings.warn(
            f"Merge lora module to {self.what} linear may get different generations due to rounding errors.",
            stacklevel=5,
        )
        write(layer, weight)

    def check_mergeable(self, layer: Any, adapter: str, lora_bias: bool) -> None:
        check_place_for_bias(layer, lora_bias)

    def is_the_librarys(self, layer: Any, x: Tensor) -> bool:
        """Whether calling the layer is bitsandbytes' forward and nothing else, on x's device."""
        weight = layer._parameters.get("weight")
        return (
            is_plain(layer, type(layer))
            and _is_of_the_library(layer)
            and type(x) in TENSORS
            and weight is not None
            and weight.device == x.device
            and type(weight).__module__.startswith("bitsandbytes.")
        )


class FourBit(_Quantized):
    """bitsandbytes' Linear4bit: NF4 or FP4, with or without double quantization."""

    what = "4-bit"

    def run(self, layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if _packed(layer, x) or not x.is_cpu or args or kwargs or not self.is_the_librarys(layer, x):
            return super().run(layer, x, *args, **kwargs)
        compute, bias = _compute_dtype(layer, x), layer.bias
        y = linear_quantized(x.to(compute), weight_of(layer), None if bias is None else bias.to(compute))
        return y.to(x.dtype)

    def with_adapter(self, layer: Any, x: Tensor, adapter: Adapter) -> Tensor | None:
        if _packed(layer, x):
            return None
        dtype = _autocast_dtype(x) or x.dtype
        if adapter[0].device != x.device or dtype != _compute_dtype(layer, x) or not self.is_the_librarys(layer, x):
            return None
        w, x2 = four_bit_of(layer), x.to(dtype)
        if not x.is_cpu and not torch.is_grad_enabled() and not has_kernel("lora_linear_4bit", x2, w, len(adapter[0])):
            return None  # bitsandbytes' own products for few rows
        return _with_adapter(w, x2, adapter, layer.bias).to(x.dtype)

    def with_rows(self, layer: Any, x: Tensor, site: MixedSite, plan: MixedPlan, how: str) -> Tensor | None:
        """In one launch, or None where no kernel is chosen for that."""
        dtype = _compute_dtype(layer, x)
        if (_autocast_dtype(x) or x.dtype) != dtype or not self.is_the_librarys(layer, x):
            return None
        w, x2, bias = four_bit_of(layer), x.to(dtype), layer.bias
        if not has_kernel("lora_linear_mixed_4bit", x2, w, site.max_rank):
            return None
        return lora_linear_mixed_4bit(x2, w, site, plan, None if bias is None else bias.to(dtype)).to(x.dtype)


class EightBit(_Quantized):
    """bitsandbytes' Linear8bitLt.

    On a CPU its training is a product with the dequantized weight, which is fused; in inference, and on a GPU, it
    quantizes the activations too: bitsandbytes' layer runs, or in inference the kernel where it is chosen.
    """

    what = "8-bit"

    def with_adapter(self, layer: Any, x: Tensor, adapter: Adapter) -> Tensor | None:
        if x.is_cpu and not layer.training and QUANT_VARIABLE not in os.environ:
            return None  # before anything is looked up: this runs once per token and layer
        a, b, lora_bias, scaling, p = adapter
        if a.device != x.device or layer.state.has_fp16_weights or not self.is_the_librarys(layer, x):
            return None
        w, x, bias = int8_of(layer), x.to(_autocast_dtype(x) or x.dtype), layer.bias
        if x.is_cpu and layer.training:
            return _with_adapter(w, x, adapter, bias)
        if torch.is_grad_enabled() or p > 0 or lora_bias is not None:
            return None
        if not has_kernel("lora_linear_int8", x, w, len(a)):
            return None
        return lora_linear_int8(x, w, a, b, scaling, None if bias is None else bias.to(x.dtype), layer.state.threshold)


class Torchao(_Quantized):
    """A linear layer whose weight is a tensor of torchao: called as it is, and can be merged into.

    Args: requantize: gives the configuration that the weight was quantized with. Without it merging raises.
    """

    what = "torchao"

    def __init__(self, requantize: Callable[[], Any] | None) -> None:
        self.requantize = requantize

    def check_mergeable(self, layer: Any, adapter: str, lora_bias: bool) -> None:
        super().check_mergeable(layer, adapter, lora_bias)
        if self.requantize is None:
            raise ValueError(
                f"Cannot merge adapter {adapter!r} into a torchao weight: how it was quantized is not known. Load the "
                "base model with transformers and a TorchAoConfig, which keeps that"
            )

    def write(self, layer: Any, weight: Tensor) -> None:
        subclass: Any = self.requantize  # `check_mergeable` has seen it
        write(layer, weight, subclass())


def _with_adapter(w: Any, x: Tensor, adapter: Adapter, bias: Tensor | None) -> Tensor:
    """Base and adapter in one op, in x's dtype."""
    a, b, lora_bias, scaling, p = adapter
    seed = new_seed(x.device) if p > 0 else None
    bias = None if bias is None else bias.to(x.dtype)
    y = lora_linear_quantized(x, w, a, b, scaling, bias, dropout_p=p, seed=seed)
    return y if lora_bias is None else (y + scaling * lora_bias).to(y.dtype)


def _packed(layer: Any, x: Tensor) -> bool:
    """Whether bitsandbytes' fast product for inference on CPUs takes this call."""
    return packs_for_cpu(layer, x) and _is_of_the_library(layer) and pack_for_cpu(layer)


def _is_of_the_library(base_layer: nn.Module) -> bool:
    """Whether its class is bitsandbytes' own: a subclass may have another forward, and reads the weight as it likes."""
    return type(base_layer).__module__.startswith("bitsandbytes.")


def _compute_dtype(base_layer: Any, x: Tensor) -> torch.dtype:
    """What a Linear4bit computes in: its own dtype, set by whoever made it or by the first input; else the input's."""
    dtype: torch.dtype | None = base_layer.compute_dtype
    if not base_layer.compute_type_is_set and x.dtype in (torch.float32, torch.bfloat16):
        dtype = None
    return dtype or x.dtype


class _QuantizedLinear(Linear):
    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, config, **kwargs)
        self.fan_in_fan_out = False


class Linear4bit(_QuantizedLinear):
    """LoRA on bitsandbytes' Linear4bit."""

    def _base_of(self, base_layer: nn.Module) -> Opaque:
        return FourBit()


class Linear8bitLt(_QuantizedLinear):
    """LoRA on bitsandbytes' Linear8bitLt."""

    def _base_of(self, base_layer: nn.Module) -> Opaque:
        return EightBit()


class TorchaoLoraLinear(_QuantizedLinear):
    """LoRA on a linear layer of torchao.

    Args: get_apply_tensor_subclass: gives the configuration that the weight was quantized with; of the model's
        quantizer in transformers. Without it merging raises.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: Any,
        get_apply_tensor_subclass: Callable[[], Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(base_layer, adapter_name, config, **kwargs)
        self._base: Torchao = Torchao(get_apply_tensor_subclass)

    @property
    def get_apply_tensor_subclass(self) -> Callable[[], Any] | None:
        """As it was given; it can be set later."""
        return self._base.requantize

    @get_apply_tensor_subclass.setter
    def get_apply_tensor_subclass(self, value: Callable[[], Any] | None) -> None:
        self._base.requantize = value


_LAYERS: dict[str, type[Linear]] = {"bnb 4bit": Linear4bit, "bnb 8bit": Linear8bitLt, "torchao": TorchaoLoraLinear}


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

"""LoRA on linear layers, embeddings and convolutions.

A linear base that is understood (bases.py) runs in one operator with its first active adapter. Everything else is
called as the module it is, and the adapters are added to what it returns (`lora_update`). Adapters that are not plain
themselves run as the modules they are.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from ...ops.functional import lora_update, new_seed
from ...routing.batch import current
from .._base_layer import BaseTunerLayer
from . import mixed
from .base import LoraLayer, is_transformers_conv1d
from .bases import OPAQUE, TENSORS, Adapter, Opaque, Plain, is_plain

__all__ = ["Conv1d", "Conv2d", "Conv3d", "Embedding", "Linear", "LoraLayer", "dispatch_default"]


class _LoraModule(nn.Module, LoraLayer):
    """A module in the place of `base_layer`, with a first adapter, which becomes active.

    Args:
        base_layer: the layer to adapt, kept as `base_layer`.
        adapter_name: the first adapter.
        config: a LoraConfig; r and lora_alpha are given apart, since they can differ from layer to layer.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: Any, r: int = 0, lora_alpha: float = 1, **kwargs: Any
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config)

    def __repr__(self) -> str:
        return "lora." + super().__repr__()

    def _low_rank(self, x: Tensor, name: str) -> Tensor:
        """What the adapter adds, in its own dtype. Its modules are called one by one: hooks on them run."""
        lora_A: Any = self.lora_A[name]
        lora_B: Any = self.lora_B[name]
        weight = getattr(lora_A, "weight", None)
        if weight is not None:
            x = self._cast_input_dtype(x, weight.dtype)
        y: Tensor = lora_B(lora_A(self.lora_dropout[name](x))) * self.scaling[name]
        return y


class Linear(_LoraModule):
    """LoRA on a linear layer: nn.Linear, transformers' Conv1D, or anything that computes x (..., K) -> y (..., N).

    Args: as all LoRA layers; is_target_conv_1d_layer: the base is a Conv1D.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: Any,
        r: int = 0,
        lora_alpha: float = 1,
        is_target_conv_1d_layer: bool = False,
        **kwargs: Any,
    ) -> None:
        self.fan_in_fan_out = config.fan_in_fan_out
        self.is_target_conv_1d_layer = is_target_conv_1d_layer
        self._base = self._base_of(base_layer)
        super().__init__(base_layer, adapter_name, config, r, lora_alpha, **kwargs)

    def _create_weights(self, adapter_name: str, r: int, config: Any) -> None:
        self.lora_A[adapter_name] = nn.Linear(self.in_features, r, bias=False)
        self.lora_B[adapter_name] = nn.Linear(r, self.out_features, bias=config.lora_bias)

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        return (b @ a).T if self.fan_in_fan_out else b @ a

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: it is LoRA."""
        return True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y (..., N) for x (..., K), in the dtype that the base layer returns, which gets the other arguments.

        Args: adapter_names: one per row of x, "__base__" for none; else what the model's call says, else the active.
        Raises: ValueError if adapter_names has another length, or adapters are merged.
        """
        batch = self._mixed_batch(x, kwargs) if kwargs else current()
        if batch is not None:
            return mixed.linear(self, batch, x, *args, **kwargs)
        # Sub-modules are read from _modules: this runs once per token and layer, and nn.Module's own look-up is slow.
        modules: Any = self._modules
        base_layer, present = modules["base_layer"], modules["lora_A"]._modules
        result: Tensor | None = None
        if not self._disable_adapters:
            merged = self.merged_adapters
            for name in self.active_adapters:
                if name not in present or name in merged:
                    continue
                adapter = self._plain_adapter(x, name)
                if result is None:
                    if adapter is not None and not args and not kwargs:
                        result = self._base.with_adapter(base_layer, x, adapter)
                        if result is not None:
                            continue
                    result = self._base.run(base_layer, x, *args, **kwargs)
                if adapter is None:
                    result = (result + self._low_rank(x, name)).to(result.dtype)
                else:
                    result = _update(result, x, adapter)
        elif self.merged_adapters:
            self.unmerge()
        return self._base.run(base_layer, x, *args, **kwargs) if result is None else result

    def _base_of(self, base_layer: nn.Module) -> Opaque:
        """What this layer does with a base of that kind."""
        kind = type(base_layer)
        if kind is nn.Linear or (kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"):
            return Plain(kind, transposed=self.is_target_conv_1d_layer)
        return OPAQUE

    def _plain_adapter(self, x: Tensor, name: str) -> Adapter | None:
        """The adapter's tensors, or None if it or x is anything but plain: then its modules have to be called."""
        modules: Any = self._modules
        lora_A, lora_B = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
        dropout = modules["lora_dropout"]._modules[name]
        if _has_any_global_hook() or type(x) not in TENSORS:  # type: ignore[no-untyped-call]
            return None
        if not (is_plain(lora_A, nn.Linear) and is_plain(lora_B, nn.Linear)):
            return None
        p = 0.0
        if type(dropout) is not nn.Identity:
            if not is_plain(dropout, nn.Dropout) or dropout.p >= 1:
                return None
            p = dropout.p if dropout.training else 0.0
        elif not is_plain(dropout, nn.Identity):
            return None
        a, b = lora_A._parameters.get("weight"), lora_B._parameters.get("weight")
        if type(a) not in TENSORS or type(b) not in TENSORS or a.dtype.itemsize == 1:
            return None
        return a, b, lora_B._parameters["bias"], self.scaling[name], p

    def mixed_entry(self, name: str) -> tuple[Tensor, Tensor, float] | None:
        """A (R, K), B (N, R) and scaling for the bank; None if the adapter is not here, or has to run as modules.

        As `_plain_adapter`, in the fewest steps: a mixed batch asks for every adapter at every site.
        """
        modules: Any = self._modules
        lora_A, lora_B = modules["lora_A"]._modules.get(name), modules["lora_B"]._modules.get(name)
        if not (is_plain(lora_A, nn.Linear) and is_plain(lora_B, nn.Linear)):
            return None
        a, b = lora_A._parameters["weight"], lora_B._parameters["weight"]
        if lora_B._parameters["bias"] is not None or type(a) not in TENSORS or type(b) not in TENSORS:
            return None
        dropout = modules["lora_dropout"]._modules[name]
        if a.dtype.itemsize == 1 or dropout.training or not is_plain(dropout, type(dropout)):
            return None
        return a, b, self.scaling[name]


def _update(result: Tensor, x: Tensor, adapter: Adapter) -> Tensor:
    """`result` plus a plain adapter, in result's dtype."""
    a, b, lora_bias, scaling, p = adapter
    seed = new_seed(x.device) if p > 0 else None
    y = lora_update(result, x, a, b, scaling, dropout_p=p, seed=seed)
    return y if lora_bias is None else (y + scaling * lora_bias).to(y.dtype)


class Embedding(_LoraModule):
    """LoRA on an embedding table: row i gets scaling * B @ A[:, i]. A (R, V), B (D, R); no dropout, as in PEFT."""

    # as if the table were a linear layer's weight (in, out)
    fan_in_fan_out = True

    def _create_weights(self, adapter_name: str, r: int, config: Any) -> None:
        if config.lora_bias:
            raise ValueError(f"lora_bias={config.lora_bias} is not supported for {type(self).__name__}.")
        weight_A, weight_B = torch.randn(r, self.in_features), torch.randn(self.out_features, r)
        self.lora_embedding_A[adapter_name] = nn.Parameter(weight_A)
        self.lora_embedding_B[adapter_name] = nn.Parameter(weight_B)

    def _factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        return self.lora_embedding_A[adapter], self.lora_embedding_B[adapter]

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        return (b @ a).T

    def mixed_entry(self, name: str) -> tuple[Tensor, Tensor, float] | None:
        """A (R, V), B (D, R) and scaling for the bank; None if the adapter is not here."""
        return (*self._factors(name), self.scaling[name]) if name in self.lora_embedding_A else None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., D) for ids (...). Arguments and errors as in `Linear.forward`."""
        batch = self._mixed_batch(x, kwargs)
        if batch is not None:
            return mixed.embedding(self, batch, x, *args, **kwargs)
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self._disable_adapters:
            return result
        dtype, embed_scale = result.dtype, self._embed_scale()
        for name in self.active_adapters:
            if name in self.lora_embedding_A and name not in self.merged_adapters:
                a, b = self._factors(name)
                update = (self._embed(x, a.T) @ b.T) * self.scaling[name]
                result = result + (update if embed_scale is None else update * embed_scale.to(update.dtype))
        return result.to(dtype)

    def _embed(self, x: Tensor, table: Tensor) -> Tensor:
        """Rows of `table`, with the base layer's own settings."""
        base: Any = self.get_base_layer()
        return F.embedding(
            x, table, base.padding_idx, base.max_norm, base.norm_type, base.scale_grad_by_freq, base.sparse
        )

    def _embed_scale(self) -> Tensor | None:
        """The factor that some embeddings multiply their rows with (Gemma): the update gets it too."""
        base: Any = self.get_base_layer()
        scale = getattr(base, "embed_scale", None)
        if scale is None or isinstance(scale, Tensor):
            if scale is not None and scale.numel() != 1:
                raise ValueError(f"embed_scale must have one element, got shape {tuple(scale.shape)}")
            return scale
        return torch.tensor(scale, device=base.weight.device, dtype=base.weight.dtype)


class _Convolution(Opaque):
    def check_mergeable(self, layer: Any, adapter: str, lora_bias: bool) -> None:
        if layer.groups > 1:
            raise NotImplementedError("Merging is not supported for _ConvNd layers with groups > 1!")
        super().check_mergeable(layer, adapter, lora_bias)


class _ConvNd(_LoraModule):
    """LoRA on a convolution: A is a convolution of the base's geometry to R channels, B one of kernel size 1.

    A pads as the base does (`padding_mode`): only so is it what merging adds. PEFT's A always pads with zeros.

    Raises: ValueError if r is no multiple of the base's groups.
    """

    conv: type[nn.Module]
    _base = _Convolution()

    def _create_weights(self, adapter_name: str, r: int, config: Any) -> None:
        base: Any = self.get_base_layer()
        if base.groups > 1:
            warnings.warn("LoRA adapter added to ConvNd layer with groups > 1. Merging is not supported.", stacklevel=2)
        if r % base.groups != 0:
            raise ValueError(
                f"Targeting a {type(base).__name__} with groups={base.groups} and rank {r}. Currently, support is "
                "limited to conv layers where the rank is divisible by groups. Either choose a different rank or do "
                "not target this specific layer."
            )
        kind: Any = type(self).conv
        self.lora_A[adapter_name] = kind(
            self.in_features, r, base.kernel_size, base.stride, base.padding, base.dilation, bias=False,
            padding_mode=base.padding_mode,
        )  # fmt: skip
        self.lora_B[adapter_name] = kind(r, self.out_features, 1, groups=base.groups, bias=config.lora_bias)

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        return (b.flatten(1) @ a.flatten(1)).view(b.shape[0], *a.shape[1:])

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus the adapters', in its dtype. Arguments and errors as in `Linear.forward`."""
        batch = self._mixed_batch(x, kwargs)
        if batch is not None:
            return mixed.convolution(self, batch, x, *args, **kwargs)
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self._disable_adapters:
            return result
        dtype = result.dtype
        for name in self.active_adapters:
            if name in self.lora_A and name not in self.merged_adapters:
                result = result + self._low_rank(x, name)
        return result.to(dtype)


class Conv1d(_ConvNd):
    """LoRA on nn.Conv1d."""

    conv = nn.Conv1d


class Conv2d(_ConvNd):
    """LoRA on nn.Conv2d."""

    conv = nn.Conv2d


class Conv3d(_ConvNd):
    """LoRA on nn.Conv3d."""

    conv = nn.Conv3d


def dispatch_default(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module | None:
    """The LoRA layer for a target, or None if there is none for its type.

    Linear layers of types that are not known (quantized ones, subclasses) are opaque bases: they only have to tell
    in_features and out_features. `config.fan_in_fan_out` is set right for nn.Linear and Conv1D, with a warning.
    """
    base: Any = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    for kind, layer in ((nn.Embedding, Embedding), (nn.Conv1d, Conv1d), (nn.Conv2d, Conv2d), (nn.Conv3d, Conv3d)):
        if isinstance(base, kind):
            return layer(target, adapter_name, config, **kwargs)
    is_conv1d = is_transformers_conv1d(base)
    if not (is_conv1d or isinstance(base, nn.Linear)):
        # a quantized linear layer stores its weight its own way, and tells its sizes
        sizes = (getattr(base, "in_features", None), getattr(base, "infeatures", None))
        known = any(isinstance(size, int) for size in sizes)
        return Linear(target, adapter_name, config, **kwargs) if known else None
    if config.fan_in_fan_out != is_conv1d:
        name = "`Conv1D`" if is_conv1d else "`torch.nn.Linear`"
        warnings.warn(
            f"fan_in_fan_out is set to {config.fan_in_fan_out} but the target module is {name}. "
            f"Setting fan_in_fan_out to {is_conv1d}.",
            stacklevel=2,
        )
        config.fan_in_fan_out = is_conv1d
    return Linear(target, adapter_name, config, is_target_conv_1d_layer=is_conv1d, **kwargs)

"""`LoraLayer`: the part of a LoRA layer that does not depend on the kind of its base: settings, scaling, merging."""

import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...routing.batch import MixedBatch, current, wrong_length
from ...routing.watch import Scalings
from .._base_layer import BaseTunerLayer, check_adapters_to_merge
from . import init
from .bases import OPAQUE, Opaque


class Merged(NamedTuple):
    """What was added to the base when an adapter was merged: its factors and scaling may have changed since."""

    a: Tensor
    b: Tensor
    scaling: float
    bias: Tensor | None  # what the base's bias got


class LoraLayer(BaseTunerLayer):
    """Mixin of the LoRA layers: y = base(x) + sum over the active adapters of scaling * dropout(x) @ A.T @ B.T.

    Entries by adapter name: weights in `lora_A` and `lora_B` (modules) or `lora_embedding_A` and `lora_embedding_B`
    (parameters); settings in `r`, `lora_alpha`, `scaling`, `lora_dropout`, `use_rslora`, `lora_bias`. A subclass makes
    the weights of one adapter (`_create_weights`) and runs the forward. `lora_magnitude_vector` is DoRA's: empty.
    Source: Hu et al. 2021, arXiv:2106.09685.
    """

    adapter_layer_names: tuple[str, ...] = (
        "lora_A",
        "lora_B",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_magnitude_vector",
    )
    other_param_names: tuple[str, ...] = (
        "r",
        "lora_alpha",
        "scaling",
        "lora_dropout",
        "use_dora",
        "use_rslora",
        "lora_bias",
    )
    # what the layer does with its base
    _base: Opaque = OPAQUE
    # whether the base layer stores its weight as (in, out)
    fan_in_fan_out = False
    # the layer's number in its model's AdapterBank
    mixed_site: int = -1
    # whether another module has the base's weight too (a tied lm_head): a merge gives this one a weight of its own
    shares_weight: bool = False

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = Scalings()
        self.lora_dropout = nn.ModuleDict()
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.lora_embedding_A = nn.ParameterDict()
        self.lora_embedding_B = nn.ParameterDict()
        self.lora_magnitude_vector = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters = []
        self._merged: dict[str, Merged] = {}
        self._tied_weight: list[nn.Parameter] = []  # the weight that is shared, while a merge has taken its place
        self.use_dora: dict[str, bool] = {}
        self.use_rslora: dict[str, bool] = {}
        self.lora_bias: dict[str, bool] = {}
        self.cast_input_dtype_enabled = True
        self.kwargs = kwargs
        self.in_features, self.out_features = in_out_features(self.get_base_layer())

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: Any, **kwargs: Any) -> None:
        """Add an adapter, on the base layer's device and in its dtype; one that is not active starts frozen.

        Args:
            r: rank, at least 1.
            lora_alpha: scaling = lora_alpha / r, or lora_alpha / sqrt(r) with config.use_rslora.
            config: a LoraConfig; its own r and lora_alpha are not read.
        Raises: ValueError for a rank below 1, or an initialisation that this kind of layer does not know.
        """
        if r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {r}")
        base_layer = self.get_base_layer()
        if config.lora_bias and getattr(base_layer, "bias", None) is None:
            warnings.warn(
                f"`lora_bias=True` was passed but the targeted layer of type {type(base_layer).__name__} has no bias. "
                "This means that merging LoRA weights won't be possible.",
                stacklevel=2,
            )
        self._create_weights(adapter_name, r, config)
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()
        self.lora_dropout[adapter_name] = dropout.train(self.lora_dropout.training)
        self.use_rslora[adapter_name] = config.use_rslora
        self.use_dora[adapter_name] = False
        self.lora_bias[adapter_name] = config.lora_bias
        self.set_scale(adapter_name, 1)
        init.init_lora_weights(self, adapter_name, config.init_lora_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        trainable = adapter_name in self.active_adapters and not config.inference_mode
        self.set_requires_grad(adapter_name, trainable)

    def _create_weights(self, adapter_name: str, r: int, config: Any) -> None:
        """Create the adapter's modules or parameters, with torch's own initial values."""
        raise NotImplementedError

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        """Draw the adapter's weights anew, as `LoraConfig.init_lora_weights` says; see `init.init_lora_weights`."""
        with self.taken_out(adapter_name):
            init.init_lora_weights(self, adapter_name, init_lora_weights)

    # --------------------------------------------------------------------------------------------- mixed batches
    def mixed_entry(self, name: str) -> tuple[Tensor, Tensor, float] | None:
        """A, B and scaling of an adapter as the bank's tables have them; None if it is not here or is not plain."""
        return None

    def mixed_has(self, name: str) -> bool:
        """Whether the adapter is here at all."""
        return name in self.lora_A or name in self.lora_embedding_A

    @property
    def mixed_dtype(self) -> torch.dtype:
        """dtype of all adapters in the bank's tables for this layer: the base weight's, or what it computes in."""
        base: Any = self.get_base_layer()
        dtype: torch.dtype = getattr(base, "compute_dtype", None) or self.weight.dtype
        return dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.bfloat16

    @property
    def mixed_device(self) -> torch.device:
        """Where the base layer computes."""
        return self.weight.device

    def _check_forward_args(self, x: Tensor, *args: Any, **kwargs: Any) -> None:
        """Raises: ValueError for adapter_names of another length than x's, or with merged adapters; as PEFT."""
        names = kwargs.get("adapter_names")
        if names is not None and len(x) != len(names):
            raise wrong_length(len(names), len(x))
        if names is not None:
            check_not_merged([self])

    def _mixed_batch(self, x: Tensor, kwargs: dict[str, Any]) -> MixedBatch | None:
        """The mixed batch of this call: from `adapter_names` in `kwargs`, which is taken out, or the model's call.

        Raises: as `_check_forward_args`.
        """
        self._check_forward_args(x, **kwargs)
        names = kwargs.pop("adapter_names", None)
        if names is None:
            return current()
        return None if self._disable_adapters else MixedBatch(names)

    # ---------------------------------------------------------------------------------------------------- scaling
    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's scaling to `scale` times the one from its config; nothing happens if it is not here."""
        if adapter in self.lora_alpha:
            r = self.r[adapter]
            divisor = math.sqrt(r) if self.use_rslora[adapter] else r
            with self.taken_out(adapter):
                self.scaling[adapter] = scale * self.lora_alpha[adapter] / divisor

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of every active adapter by `scale`."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                with self.taken_out(adapter):
                    self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of every active adapter by `scale`; None sets it back to the one from its config."""
        for adapter in self.active_adapters:
            if adapter not in self.scaling:
                continue
            if scale is None:
                self.set_scale(adapter, 1)
            else:
                with self.taken_out(adapter):
                    self.scaling[adapter] /= scale

    # ---------------------------------------------------------------------------------------------------- merging
    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the base weight, in the base weight's layout and the adapter's dtype."""
        return self._delta(*self._factors(adapter), self.scaling[adapter])

    def _delta(self, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        # products of halves are slow on some CPUs, and rounding once is better than twice
        widened = a.device.type == "cpu" and a.dtype in (torch.float16, torch.bfloat16)
        delta = self._product(a.float(), b.float()) if widened else self._product(a, b)
        return (delta * scaling).to(b.dtype)

    def _factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """The adapter's A and B."""
        lora_A: Any = self.lora_A[adapter]
        lora_B: Any = self.lora_B[adapter]
        return lora_A.weight, lora_B.weight

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        """B A in the layout of the base weight."""
        raise NotImplementedError

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the active (or the named) adapters into the base weight and bias; a forward then runs the base alone.

        Args:
            safe_merge: work on a copy, and change nothing unless all values of the result are finite.
        Raises: ValueError if they are not, or the base weight is quantized; RuntimeError for a lora_bias over a base
            without bias. The base layer is unchanged then.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.scaling:
                self._merge_one(name, safe_merge)
                self.merged_adapters.append(name)

    @contextmanager
    def taken_out(self, adapter: str) -> Iterator[None]:
        """Around a change of an adapter's weights or scaling: what is merged is taken out, and merged again after."""
        names = list(self.merged_adapters)
        if adapter not in names:
            yield
            return
        self.unmerge()
        try:
            yield
        finally:
            self.merge(adapter_names=names)

    def _merge_one(self, name: str, safe_merge: bool) -> None:
        base_layer: Any = self.get_base_layer()
        self._base.check_mergeable(base_layer, name, self.lora_bias[name])
        a, b = (factor.detach() for factor in self._factors(name))
        delta_bias = self._delta_bias(name) if self.lora_bias[name] else None
        merged = Merged(a.clone(), b.clone(), self.scaling[name], delta_bias)
        weight, delta = self._base.read(base_layer), self._delta(*merged[:3])
        bias = None if delta_bias is None else base_layer.bias.data
        if not safe_merge and not self.shares_weight:
            weight += delta
            if bias is not None:
                bias += delta_bias
        else:
            weight = weight + delta.to(weight.dtype)
            bias = None if bias is None else (bias + delta_bias).to(bias.dtype)
            if safe_merge and not all(torch.isfinite(t).all() for t in (weight, bias) if t is not None):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        if self.shares_weight and not self._tied_weight:
            self._tied_weight.append(base_layer.weight)
            base_layer.weight = nn.Parameter(weight, requires_grad=base_layer.weight.requires_grad)
        else:
            self._base.write(base_layer, weight)
        if bias is not None:
            base_layer.bias.data = bias
        self._merged[name] = merged

    def _delta_bias(self, name: str) -> Tensor:
        lora_B: Any = self.lora_B[name]
        bias: Tensor = lora_B.bias.detach()
        return bias * self.scaling[name]

    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight and bias again, the last one first."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        base_layer: Any = self.get_base_layer()
        while self.merged_adapters:
            merged = self._merged.pop(self.merged_adapters.pop())
            if not self._tied_weight:
                weight = self._base.read(base_layer)
                a, b = merged.a.to(weight.device), merged.b.to(weight.device)
                weight -= self._delta(a, b, merged.scaling).to(weight.dtype)
                self._base.write(base_layer, weight)
            if merged.bias is not None:
                base_layer.bias.data -= merged.bias.to(base_layer.bias.device)
        if self._tied_weight:
            base_layer.weight = self._tied_weight.pop()


def check_not_merged(layers: Iterable[LoraLayer]) -> None:
    """Raises: ValueError, PEFT's, if an adapter is merged into the base weights, which every row would get."""
    if any(layer.merged_adapters for layer in layers):
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )


def in_out_features(module: nn.Module) -> tuple[int, int]:
    """Sizes of a layer's input and output as LoRA sees them.

    Embeddings read from a table of num_embeddings rows; convolutions count channels; transformers' Conv1D keeps a
    weight (in, out); quantized linears have in_features or infeatures.
    Raises: ValueError for a layer that does not tell its sizes.
    """
    layer: Any = module
    if isinstance(module, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return layer.in_channels, layer.out_channels
    if is_transformers_conv1d(module):
        return layer.weight.shape[0], layer.weight.shape[1]
    for names in (("in_features", "out_features"), ("infeatures", "outfeatures")):
        sizes = [getattr(layer, name, None) for name in names]
        if isinstance(sizes[0], int) and isinstance(sizes[1], int):
            return sizes[0], sizes[1]
    raise ValueError(f"LoRA cannot adapt a {type(module).__name__}: it does not tell its in_features and out_features")


def is_transformers_conv1d(module: nn.Module) -> bool:
    """Whether this is the Conv1D of GPT-2 and its kin: a linear layer with the weight (in, out)."""
    # by name: a model that has one has imported transformers, and this module need not
    return any(kind.__name__ == "Conv1D" and "transformers" in kind.__module__ for kind in type(module).__mro__)

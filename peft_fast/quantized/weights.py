"""Typed views of quantized weights: the only place that knows bitsandbytes' and torchao's layouts.

``weight_of(layer)`` is how a linear layer of bitsandbytes looks from outside; ``read`` and ``write`` are its weight as
plain numbers, for merging. Two faults of bitsandbytes 0.50.2 on CPUs are dealt with:

- it takes the blocks' factors row by row, wrong where rows are no whole blocks (``ops.quantized.library_is_right``);
- in the first forward without gradients it packs the weight anew, in place, and rounds the factors to bf16: what is
  merged or saved afterwards is wrong. ``pack_for_cpu`` does the same and keeps what was there; ``restore`` brings it
  back, and is called before the weight is read, trained with, or saved.
"""

import copy
import sys
import threading
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.quantized import dequantize_4bit
from ..reference.quantized import dequantize_int8

_packing = threading.Lock()  # a weight is packed once, whichever thread comes first


class FourBit(NamedTuple):
    """A weight of ``bitsandbytes.nn.Linear4bit``; shapes and dtypes as in ``reference_quant.dequantize_4bit``."""

    packed: Tensor
    code: Tensor
    absmax: Tensor
    nested_code: Tensor | None
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    quant_type: str
    blocksize: int
    nested_blocksize: int
    N: int
    K: int
    dtype: torch.dtype  # of the weight before it was quantized

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.N, self.K

    def dequantize(self, dtype: torch.dtype | None = None, implementation: str = "auto") -> Tensor:
        """The weight's values, (N, K) in ``dtype``, by default its own; bit for bit those of bitsandbytes."""
        w: Tensor = dequantize_4bit(*self[:-1], dtype or self.dtype, implementation)
        return w


class Int8(NamedTuple):
    """A weight of ``bitsandbytes.nn.Linear8bitLt``: values (N, K) int8, scales (N,) fp32."""

    values: Tensor
    scales: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.values.shape[0], self.values.shape[1]

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight's values, (N, K) in ``dtype``, by default fp32."""
        return dequantize_int8(self.values, self.scales, dtype or torch.float32)


def kind_of(layer: nn.Module) -> str | None:
    """PEFT's name of how a linear layer is quantized ("bnb 4bit", "bnb 8bit", "torchao"), or None if it is not known.

    Nothing is imported: a layer of a library that is not there cannot be asked about.
    """
    library = sys.modules.get("bitsandbytes")
    if library is not None:
        if isinstance(layer, library.nn.Linear4bit):
            return "bnb 4bit"
        if isinstance(layer, library.nn.Linear8bitLt):
            return "bnb 8bit"
    weight = layer._parameters.get("weight")
    return "torchao" if weight is not None and type(weight).__module__.startswith("torchao.") else None


def weight_of(layer: Any) -> FourBit | Int8:
    """The quantized weight of a layer of bitsandbytes, restored if it was packed.

    Raises: ValueError if the layer is of another kind, or was never quantized, which happens when it is moved to its
        device.
    """
    return int8_of(layer) if kind_of(layer) == "bnb 8bit" else four_bit_of(layer)


def four_bit_of(layer: Any) -> FourBit:
    """``weight_of`` a Linear4bit."""
    state = None
    if kind_of(layer) == "bnb 4bit":
        restore(layer)
        state = getattr(layer.weight, "quant_state", None) or layer.quant_state  # FSDP leaves the layer's alone
    if state is None:
        raise _not_quantized(layer)
    nested = state.state2 if state.nested else None
    N, K = state.shape
    return FourBit(
        layer.weight.data.reshape(-1).view(torch.uint8), state.code, state.absmax,
        None if nested is None else nested.code, None if nested is None else nested.absmax,
        None if nested is None else state.offset, state.quant_type, state.blocksize,
        0 if nested is None else nested.blocksize, N, K, state.dtype,
    )  # fmt: skip


def int8_of(layer: Any) -> Int8:
    """``weight_of`` a Linear8bitLt."""
    weight, scales = layer.weight, None
    if kind_of(layer) == "bnb 8bit":
        scales = weight.SCB if weight.SCB is not None else layer.state.SCB
    if scales is None or weight.dtype != torch.int8:
        raise _not_quantized(layer)
    return Int8(weight.data, scales)


def _not_quantized(layer: Any) -> ValueError:
    weight = layer.weight
    return ValueError(f"a {type(layer).__name__} with a {type(weight).__name__} of {weight.dtype} is not quantized")


def read(layer: Any) -> Tensor:
    """The weight as plain numbers, a new tensor (N, K), fp32 for bitsandbytes.

    Raises: TypeError where the format cannot be dequantized.
    """
    if kind_of(layer) != "torchao":
        return weight_of(layer).dequantize(torch.float32)
    try:
        w: Tensor = layer.weight.dequantize()
    except NotImplementedError as error:
        raise TypeError(
            f"a weight of type {type(layer.weight).__name__} cannot be dequantized, which merging needs: keep the "
            "adapter unmerged, or merge it into the base model before it is quantized"
        ) from error
    return w


def write(layer: Any, w: Tensor, requantize: Any = None) -> None:
    """Quantize w (N, K) as the layer's weight was, and put it in its place.

    Args: requantize: for torchao only: the configuration for ``torchao.quantize_``.
    """
    kind, weight = kind_of(layer), layer.weight
    if kind == "torchao":
        del layer.weight
        layer.weight = nn.Parameter(w, requires_grad=False)
        sys.modules["torchao"].quantize_(layer, requantize)
        return
    import bitsandbytes

    if kind == "bnb 8bit":
        new = bitsandbytes.nn.Int8Params(w.cpu(), requires_grad=False, has_fp16_weights=weight.has_fp16_weights)
        layer.weight = new.to(weight.device)
        layer.state.reset_grads()
        return
    settings = ("blocksize", "compress_statistics", "quant_type", "quant_storage", "module")
    kept = {name: getattr(weight, name) for name in settings}
    dtype = weight.quant_state.dtype
    layer.weight = bitsandbytes.nn.Params4bit(w.cpu(), requires_grad=False, **kept).to(weight.device)
    layer.weight.quant_state.dtype = dtype
    layer.quant_state = layer.weight.quant_state


# ------------------------------------------------------------------------- bitsandbytes' second layout, for CPUs
def packs_for_cpu(layer: Any, x: Tensor) -> bool:
    """Whether bitsandbytes' forward for x packs this 4-bit weight for its fast product on CPUs, or has done so."""
    return bool(
        x.is_cpu and getattr(layer, "support_avx512bf16_for_cpu", False) and not layer.training and not x.requires_grad
    )


def pack_for_cpu(layer: Any) -> bool:
    """Pack a 4-bit weight as bitsandbytes does, and keep what it drops. False where its product cannot take the sizes.

    Of the weight's values nothing is lost, and the factors are small: 1/8 of a bit per element, 1/2 if not nested.
    """
    if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        return hasattr(layer.weight.quant_state, "exact")
    with _packing:
        weight, state = layer.weight, layer.weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            return True
        N, K = state.shape
        if N % 32 or K % state.blocksize or K % 2:
            return False
        from bitsandbytes.functional import _convert_weight_packed_for_cpu

        if not hasattr(layer, "_restores_before_saving"):
            layer.register_state_dict_pre_hook(_restore_before_saving)
            layer._restores_before_saving = True
        packed, new = _convert_weight_packed_for_cpu(weight.data, copy.copy(state))
        new.exact = state
        weight.data = packed  # before the state: whoever sees the new state finds the new data
        weight.quant_state = layer.quant_state = new
    return True


def restore(layer: Any) -> None:
    """Bring a 4-bit weight back to the layout and the factors that it was loaded with; nothing happens if it has them.

    One that bitsandbytes packed by itself has lost its factors' lower bits: a warning. (bitsandbytes' own inverse also
    leaves the factors transposed where they are not nested.)
    """
    state = getattr(layer.weight, "quant_state", None)
    if not getattr(state, "packing_format_for_cpu", False):
        return
    with _packing:
        weight, state = layer.weight, layer.weight.quant_state
        if not getattr(state, "packing_format_for_cpu", False):
            return
        exact = getattr(state, "exact", None)
        if exact is None:
            warnings.warn(
                "bitsandbytes packed this 4-bit layer by itself, for inference on a CPU, and rounded its factors to "
                "bf16; they stay so. Load the base model again to have them exact",
                stacklevel=3,
            )
            exact = copy.copy(state)
            exact.absmax = state.absmax.T.float().reshape(-1)
            exact.dtype, exact.packing_format_for_cpu = state.original_dtype, False
        weight.data = _unpacked(weight.data, *exact.shape).view(weight.quant_storage).view(-1, 1)
        weight.quant_state = layer.quant_state = exact


def restore_all(model: nn.Module) -> None:
    """``restore`` every 4-bit layer of a model: there is no gradient through a weight that is packed."""
    if "bitsandbytes" in sys.modules:
        for module in model.modules():
            if kind_of(module) == "bnb 4bit":
                restore(module)


def _unpacked(packed: Tensor, N: int, K: int) -> Tensor:
    """Bytes in the common order from bitsandbytes' CPU order: 64 codes of 32 rows and 2 columns, low halves first."""
    bytes_ = packed.view(-1, 32)
    codes = torch.cat([bytes_ & 15, bytes_ >> 4], dim=1).view(N // 32, K // 2, 32, 2)
    codes = codes.transpose(1, 2).reshape(-1, 2)
    return (codes[:, 0] << 4) | codes[:, 1]


def _restore_before_saving(layer: nn.Module, prefix: str, keep_vars: bool) -> None:
    restore(layer)

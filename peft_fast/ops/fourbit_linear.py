"""lora_linear_4bit, lora_linear_mixed_4bit: a 4-bit weight and adapters in one launch. Inference only, no gradient.

Math in ``reference_quant``, ``reference`` and csrc_triton/quantized/fourbit_linear.py. The weight is the fields of
``quant.FourBit`` without its dtype; the tables are those of ``lora_mixed``.
"""

from typing import Any

from torch import Tensor

from ..reference import lora as reference, mixed as reference_mixed
from ._register import register
from .choice import choose
from .lora_mixed import _TABLES
from .quantized import _dequantize_4bit, quantized_name

WEIGHT = (
    "Tensor packed, Tensor code, Tensor absmax, Tensor? nested_code, Tensor? nested_absmax, Tensor? nested_offset, "
    "str quant_type, int blocksize, int nested_blocksize, SymInt N, SymInt K"
)
_FIELDS = 11  # of WEIGHT


def _linear(x: Tensor, *args: Any) -> Tensor:
    weight: Any = args[:_FIELDS]
    bias, a, b, scaling = args[_FIELDS:]
    return reference.lora_linear(x, _dequantize_4bit(*(*weight, x.dtype)), bias, a, b, scaling)


def _mixed(x: Tensor, *args: Any) -> Tensor:
    weight: Any = args[:_FIELDS]
    bias, *tables = args[_FIELDS:]
    return reference_mixed.lora_linear_mixed(x, _dequantize_4bit(*(*weight, x.dtype)), bias, *tables)


def _resolve(x: Tensor, *args: Any) -> str:
    (N, K), R = args[_FIELDS - 2 : _FIELDS], args[_FIELDS + 1].shape[0]
    return quantized_name("lora_linear_4bit", x, N, K, R, args[-1])


def _resolve_mixed(x: Tensor, *args: Any) -> str:
    (N, K), R = args[_FIELDS - 2 : _FIELDS], args[_FIELDS + 5]
    # raises where only a kernel could run, and cannot
    choose("lora_mixed", x.device, x.dtype, x.shape[0], N, K, R, implementation="auto")
    return quantized_name("lora_linear_mixed_4bit", x, N, K, R, args[-1])


linear_4bit = register(
    f"lora_linear_4bit(Tensor x, {WEIGHT}, Tensor? bias, Tensor a, Tensor b, float scaling, str implementation) "
    "-> Tensor",
    kernel="csrc_triton.quantized.fourbit_linear:lora_linear_4bit",
    reference=_linear,
    fake=lambda x, *args: x.new_empty((x.shape[0], args[_FIELDS - 2])),
    resolve=_resolve,
)
linear_mixed_4bit = register(
    f"lora_linear_mixed_4bit(Tensor x, {WEIGHT}, Tensor? bias, {_TABLES}, str implementation) -> Tensor",
    kernel="csrc_triton.quantized.fourbit_linear:lora_linear_mixed_4bit",
    reference=_mixed,
    fake=lambda x, *args: x.new_empty((x.shape[0], args[_FIELDS - 2])),
    resolve=_resolve_mixed,
)

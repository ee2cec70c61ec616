"""Products with a quantized weight: dequantized for the forward and once more for the backward, never kept.

The weight is any object with ``shape`` (N, K) and ``dequantize(dtype)``: ``quant.FourBit``, ``quant.Int8``.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..reference import lora as reference, quantized as reference_quant
from ._register import register
from .choice import choose
from .lora_linear import linear_bwd, linear_fwd


class QuantizedWeight(Protocol):
    """What the products need of a weight."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """A new (N, K) tensor."""


def _dequantize_4bit(
    packed: Tensor, code: Tensor, absmax: Tensor,
    nested_code: Tensor | None, nested_absmax: Tensor | None, nested_offset: Tensor | None,
    quant_type: str, blocksize: int, nested_blocksize: int, N: int, K: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """``reference_quant.dequantize_4bit``, by bitsandbytes' own library where that gives the same bits."""
    if not library_is_right(packed, blocksize, K, dtype):
        return reference_quant.dequantize_4bit(
            packed, code, absmax, nested_code, nested_absmax, nested_offset,
            quant_type, blocksize, nested_blocksize, N, K, dtype,
        )  # fmt: skip
    library = torch.ops.bitsandbytes
    if nested_code is not None and nested_offset is not None:
        absmax = library.dequantize_blockwise.default(
            absmax, nested_absmax, nested_code, nested_blocksize, torch.float32
        )
        absmax += nested_offset
    w: Tensor = library.dequantize_4bit.default(packed.view(-1, 1), absmax, blocksize, quant_type, (N, K), dtype)
    return w


def library_is_right(packed: Tensor, blocksize: int, K: int, dtype: torch.dtype) -> bool:
    """Whether bitsandbytes' library dequantizes these sizes rightly, and fast.

    On a CPU it takes the factors row by row: rows have to be whole blocks (bitsandbytes 0.50.2, cpu_ops.cpp). For large
    blocks it falls back to a function that is compiled first.
    """
    import bitsandbytes  # noqa: F401  registers the operators

    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return packed.device.type == "cuda" or (packed.is_cpu and K % blocksize == 0 and blocksize < 2048)


def quantized_name(op: str, x: Tensor, N: int, K: int, R: int, implementation: str | None = None) -> str:
    """The implementation of a product of x (M, K) with a quantized w (N, K); "auto": what the environment says."""
    asked = None if implementation == "auto" else implementation
    return choose(op, x.device, x.dtype, x.numel() // max(1, K), N, K, R, implementation=asked).name


def _resolve(packed: Tensor, N: int, K: int, dtype: torch.dtype, implementation: str) -> str:
    asked = None if implementation == "auto" else implementation
    return choose("dequantize_4bit", packed.device, dtype, 1, N, K, 1, implementation=asked).name


dequantize_4bit = register(
    "dequantize_4bit(Tensor packed, Tensor code, Tensor absmax, Tensor? nested_code, Tensor? nested_absmax, "
    "Tensor? nested_offset, str quant_type, int blocksize, int nested_blocksize, SymInt N, SymInt K, "
    "ScalarType dtype, str implementation) -> Tensor",
    kernel="csrc_triton.quantized.fourbit:dequantize_4bit",
    reference=_dequantize_4bit,
    fake=lambda packed, *args: packed.new_empty(args[-4:-2], dtype=args[-2]),
    resolve=lambda packed, *args: _resolve(packed, *args[-4:]),
)


def _linear_int8(
    x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float,
    threshold: float,
) -> Tensor:  # fmt: skip
    y = reference_quant.linear_int8(x, values, scales, bias, threshold)
    return reference.lora_update(y, x, a, b, scaling)


def _resolve_int8(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None, a: Tensor, *rest: Any) -> str:
    N, K = values.shape
    return quantized_name("lora_linear_int8", x, N, K, a.shape[0], rest[-1])


# Inference: activations are quantized too.
linear_int8 = register(
    "lora_linear_int8(Tensor x, Tensor values, Tensor scales, Tensor? bias, Tensor a, Tensor b, float scaling, "
    "float threshold, str implementation) -> Tensor",
    kernel="csrc_triton.quantized.int8_linear:lora_linear_int8",
    reference=_linear_int8,
    fake=lambda x, values, *rest: x.new_empty((x.shape[0], values.shape[0])),
    resolve=_resolve_int8,
)


class LoraLinearQuantized(torch.autograd.Function):
    """y = x @ w.T + bias + s @ b.T as ``LoraLinear``, w quantized."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: QuantizedWeight, bias: Tensor | None, a: Tensor, b: Tensor,
        scaling: float, p: float, seed: Tensor | None, implementation: str,
    ) -> Tensor:  # fmt: skip
        y: Tensor
        y, s, bits = linear_fwd(x, w.dequantize(x.dtype), bias, a, b, scaling, p, seed, implementation)
        ctx.save_for_backward(x, a, b, s, bits)
        ctx.w, ctx.scaling, ctx.p, ctx.implementation = w, scaling, p, implementation
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, s, bits = ctx.saved_tensors
        need_x, _, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
        w = ctx.w.dequantize(x.dtype) if need_x else None
        needs = [need_x, need_a, need_b]
        gradients = linear_bwd(dy, x, w, a, b, s, bits, ctx.scaling, ctx.p, needs, ctx.implementation)
        dx, da, db = (d if need else None for d, need in zip(gradients, needs, strict=True))
        return dx, None, dy.sum(0) if need_bias else None, da, db, None, None, None, None


class LinearQuantized(torch.autograd.Function):
    """y = x @ w.T + bias, w quantized."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: QuantizedWeight, bias: Tensor | None) -> Tensor:
        ctx.w = w
        return F.linear(x, w.dequantize(x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        need_x, _, need_bias = ctx.needs_input_grad
        dx = dy @ ctx.w.dequantize(dy.dtype) if need_x else None
        return dx, None, dy.flatten(0, -2).sum(0) if need_bias else None

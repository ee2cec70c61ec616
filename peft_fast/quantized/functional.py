"""Public functions on quantized weights: checks, then the products of ``quantized``."""

from typing import Any

import torch
from torch import Tensor

from ..ops.choice import requested
from ..ops.fourbit_linear import linear_4bit, linear_mixed_4bit
from ..ops.functional import _check, _check_mixed, _peft_update, _within_range
from ..ops.mixed_plan import MixedPlan, MixedSite
from ..ops.quantized import LinearQuantized, LoraLinearQuantized, linear_int8, quantized_name
from .weights import FourBit, Int8

_lora_linear_quantized: Any = LoraLinearQuantized.apply
_linear_quantized: Any = LinearQuantized.apply


def lora_linear_quantized(
    x: Tensor,
    w: FourBit | Int8,
    a: Tensor,
    b: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """y = x @ w.T + bias + scaling * dropout(x) @ a.T @ b.T, in x's dtype; w is dequantized to it, and not kept.

    Args:
        w: (N, K), see ``quant.weight_of``. Others as in ``lora_linear``; autocast is left to the caller.
    Returns: (..., N) in x.dtype.
    Raises: as ``lora_linear``.
    Source: Dettmers et al. 2023, arXiv:2305.14314 (QLoRA).
    """
    name = _within_range(requested("lora_linear_quantized", implementation, like="lora_linear"), x, a)
    N, K = w.shape
    _check("lora_linear_quantized", x, a, b, N, dropout_p, seed)
    _check_weight("lora_linear_quantized", x, w, bias)
    if name == "peft":
        return _peft_update(linear_quantized(x, w, bias), x, a, b, scaling, dropout_p, seed)
    x2 = x.reshape(-1, K)
    y: Tensor
    if isinstance(w, FourBit) and dropout_p == 0 and not torch.is_grad_enabled():
        y = linear_4bit(x2, *w[:-1], bias, a, b, scaling, "auto")
    else:
        y = _lora_linear_quantized(x2, w, bias, a, b, scaling, dropout_p, seed, name)
    return y.view(*x.shape[:-1], N)


def lora_linear_mixed_4bit(
    x: Tensor, w: FourBit, site: MixedSite, plan: MixedPlan, bias: Tensor | None = None
) -> Tensor:
    """``lora_linear_mixed`` for a 4-bit weight: the rows' own adapters. No gradient, no dropout.

    Args: x, w, bias: as in ``lora_linear_quantized``. site, plan: as in ``lora_linear_mixed``.
    Returns: (..., N) in x.dtype.
    Raises: as these two.
    """
    _check_weight("lora_linear_mixed_4bit", x, w, bias)
    x2 = x.reshape(-1, w.K)
    _check_mixed("lora_linear_mixed_4bit", x2, site, plan)
    y: Tensor = linear_mixed_4bit(x2, *w[:-1], bias, *site, *plan, "auto")
    return y.view(*x.shape[:-1], w.N)


def lora_linear_int8(
    x: Tensor, w: Int8, a: Tensor, b: Tensor, scaling: float, bias: Tensor | None = None, threshold: float = 0.0
) -> Tensor:
    """y = x @ w.T + bias + scaling * x @ a.T @ b.T with x quantized to int8 row by row in the first product.

    Args: threshold: columns of x with an element of at least this size are not quantized; 0: all are. Others as in
        ``lora_linear_quantized``.
    Returns: (..., N) in x.dtype. No gradient, no dropout.
    Raises: as ``lora_linear_quantized``; RuntimeError where a gradient is asked for.
    Source: Dettmers et al. 2022, arXiv:2208.07339 (LLM.int8()).
    """
    N, K = w.shape
    _check("lora_linear_int8", x, a, b, N, 0.0, None)
    _check_weight("lora_linear_int8", x, w, bias)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, a, b)):
        raise RuntimeError("lora_linear_int8 has no gradient: call it under torch.no_grad() or torch.inference_mode()")
    y: Tensor = linear_int8(x.reshape(-1, K), *w, bias, a, b, scaling, threshold, "auto")
    return y.view(*x.shape[:-1], N)


def has_kernel(op: str, x: Tensor, w: FourBit | Int8, R: int) -> bool:
    """Whether a kernel is chosen, or forced, for ``op`` on x (..., K): see ``choice.choose``."""
    N, K = w.shape
    return quantized_name(op, x, N, K, R) == "kernel"


def linear_quantized(x: Tensor, w: FourBit | Int8, bias: Tensor | None = None) -> Tensor:
    """y = x @ w.T + bias, arguments, result and errors as in ``lora_linear_quantized``."""
    _check_weight("linear_quantized", x, w, bias)
    y: Tensor = _linear_quantized(x, w, bias)
    return y


def _check_weight(op: str, x: Tensor, w: FourBit | Int8, bias: Tensor | None) -> None:
    N, K = w.shape
    if x.shape[-1] != K:
        raise ValueError(f"{op}: x (..., K) and w (N, K) must share K, got {tuple(x.shape)} and {(N, K)}")
    if bias is not None and (bias.shape != (N,) or bias.dtype != x.dtype):
        raise ValueError(f"{op}: bias must be ({N},) in {x.dtype}, got {tuple(bias.shape)} in {bias.dtype}")
    if w[0].device != x.device:
        raise ValueError(f"{op}: w must be on x's device {x.device}, got {w[0].device}")

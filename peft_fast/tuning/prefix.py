"""Cases of kernels: attention with a learned prefix, csrc_triton/prefix. Sizes: kernels.py."""

from typing import Any

import torch
from torch import Tensor

from ..reference import prefix as reference_prefix
from .case import Case, Setting, Size

_PREFIX, _DECODED_KEYS, _DECODED_ROWS = 128, 1024, 32
_TOKENS = 8192  # of a step in training or prefill: rows times queries


def _options(T: int, D: int, causal_offset: int) -> tuple[Any, ...]:
    """From starts to p: all rows share all slots, no mask, causal."""
    return None, None, None, T, None, None, None, None, None, D**-0.5, causal_offset, None, 0.0, 0.0


def _draw(on: Setting, B: int, L: int, S: int, T: int, D: int) -> tuple[Tensor, ...]:
    """q, k, v, prefix_k and prefix_v; the first three as projections give them."""
    H, KV = on.heads
    q, k, v = (on.draw(B, n, heads, D).transpose(1, 2) for n, heads in ((L, H), (S, KV), (S, KV)))
    return q, k, v, on.draw(T, KV, D), on.draw(T, KV, D)


def _forward(on: Setting, B: int, L: int, S: int, T: int, D: int) -> Case:
    from csrc_triton.prefix.attention import prefix_attention_fwd

    options = _options(T, D, S - L)
    return Case(
        lambda: _draw(on, B, L, S, T, D),
        lambda *tensors: prefix_attention_fwd(*tensors, *options)[0],
        lambda dtype, *tensors: reference_prefix.prefix_attention_fwd(*(t.to(dtype) for t in tensors), *options)[0],
    )


def prefix_fwd(on: Setting, size: Size) -> Case:
    """M queries of a row, and as many keys."""
    L, _, _, D = size
    return _forward(on, max(1, _TOKENS // L) if not on.dry else 1, L, L, _slots(on), D)


def prefix_decode(on: Setting, size: Size) -> Case:
    """M queries of a row that share a key head."""
    (M, _, _, D), (H, KV) = size, on.heads
    L = M // (H // KV)
    return _forward(on, 2 if on.dry else _DECODED_ROWS, L, 24 if on.dry else _DECODED_KEYS, _slots(on), D)


def prefix_dq(on: Setting, size: Size) -> Case:
    """M queries of a row, and as many keys."""
    return _backward(on, size[0], _slots(on), size[3], "dq")


def prefix_dkv(on: Setting, size: Size) -> Case:
    """M keys of a row, and as many queries."""
    return _backward(on, size[0], _slots(on), size[3], "dkv")


def prefix_dprefix(on: Setting, size: Size) -> Case:
    """M slots."""
    return _backward(on, 16 if on.dry else 1024, size[0], size[3], "dprefix")


def _slots(on: Setting) -> int:
    return 8 if on.dry else _PREFIX


def _backward(on: Setting, L: int, T: int, D: int, which: str) -> Case:
    from csrc_triton.prefix.attention import prefix_attention_fwd
    from csrc_triton.prefix.attention_bwd import prefix_attention_bwd

    options = _options(T, D, 0)
    needs = [which == "dq", which == "dkv", which == "dkv", which == "dprefix"]

    def inputs() -> tuple[Tensor, ...]:
        tensors = _draw(on, 1 if on.dry else _TOKENS // L, L, L, T, D)
        out, lse = prefix_attention_fwd(*tensors, *options)
        return on.draw(*out.shape), *tensors, out, lse

    def formula(dtype: torch.dtype, dout: Tensor, *tensors: Tensor) -> list[Tensor]:
        tensors = tuple(t.to(dtype) for t in tensors[:5])
        out, lse = reference_prefix.prefix_attention_fwd(*tensors, *options)
        return asked(reference_prefix.prefix_attention_bwd(dout.to(dtype), *tensors, out, lse, *options, needs))

    def asked(gradients: Any) -> list[Tensor]:
        return [gradient for gradient in gradients if gradient.numel()]

    return Case(inputs, lambda *tensors: prefix_attention_bwd(*tensors, *options, needs), formula, asked)

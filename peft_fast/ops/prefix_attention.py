"""prefix_attention: registration and gradient. Math in ``reference_prefix`` and csrc_triton/prefix/attention.py."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference import prefix as reference
from ._register import register
from .prefix_choice import choose_prefix

# Behind the tensors that have a gradient; ``functional.prefix_attention`` explains them.
_OPTIONS = (
    "Tensor? starts, Tensor? lengths, Tensor? order, int max_length, Tensor? mask, Tensor? prefix_bias, "
    "Tensor? sinks, Tensor? past, Tensor? seed, float scale, int? causal_offset, int? window, float softcap, float p"
)


def _fwd_fake(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    B, H, L, D = q.shape
    return q.new_empty((B, L, H, D)), q.new_empty((B, H, L), dtype=reference.score_dtype(q))


def _bwd_fake(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    need_q, need_k, need_v, need_prefix = rest[-2]
    own = [
        t.new_empty(t.transpose(1, 2).shape).transpose(1, 2) if need else t.new_empty(0)
        for t, need in ((q, need_q), (k, need_k), (v, need_v))
    ]
    return *own, *(t.new_empty(t.shape if need_prefix else (0,)) for t in (prefix_k, prefix_v))


# What ``implementation`` is where nothing is forced and a gradient is wanted; "" or "auto" where none is.
TRAINING = "training"


def _resolve(q: Tensor, k: Tensor, options: Sequence[Any], implementation: str) -> str:
    training = implementation == TRAINING
    beyond = reference.beyond_flash(q, k, reference.Options(*options))
    asked = None if training else implementation
    return choose_prefix(q.device, q.dtype, q.shape[-1], asked, training=training, beyond_flash=beyond).name


def _fwd_resolve(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, *rest: Any) -> str:
    return _resolve(q, k, rest[:-1], rest[-1])


def _bwd_resolve(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, out: Tensor, lse: Tensor,
    *rest: Any,
) -> str:  # fmt: skip
    return _resolve(q, k, rest[:-2], rest[-1])


prefix_fwd = register(
    "prefix_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, "
    f"{_OPTIONS}, str implementation) -> (Tensor, Tensor)",
    kernel="csrc_triton.prefix.attention:prefix_attention_fwd",
    reference=reference.prefix_attention_fwd,
    fake=_fwd_fake,
    resolve=_fwd_resolve,
    flash=reference.flash_attention_fwd,
)
prefix_bwd = register(
    "prefix_attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor out, "
    f"Tensor lse, {_OPTIONS}, bool[] needs, str implementation) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernel="csrc_triton.prefix.attention_bwd:prefix_attention_bwd",
    reference=reference.prefix_attention_bwd,
    fake=_bwd_fake,
    resolve=_bwd_resolve,
    flash=reference.flash_attention_bwd,
)


class PrefixAttention(torch.autograd.Function):
    """Gradients of q, k, v, prefix_k and prefix_v; saves the inputs, the output and one number per query and head."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor,
        starts: Tensor | None, lengths: Tensor | None, order: Tensor | None, max_length: int, mask: Tensor | None,
        prefix_bias: Tensor | None, sinks: Tensor | None, past: Tensor | None, seed: Tensor | None, *numbers: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        maybe = (starts, lengths, order, mask, prefix_bias, sinks, past, seed)
        out, lse = prefix_fwd(
            q, k, v, prefix_k, prefix_v, starts, lengths, order, max_length, mask, prefix_bias, sinks, past, seed,
            *numbers,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, prefix_k, prefix_v, out, lse, *maybe)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.max_length, ctx.numbers = max_length, numbers
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        options = 14 + 1  # as many as forward's arguments behind the five tensors, with the implementation
        if dout is None:
            return (None,) * (5 + options)
        *tensors, starts, lengths, order, mask, prefix_bias, sinks, past, seed = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:5])
        *numbers, implementation = ctx.numbers
        gradients = prefix_bwd(
            dout, *tensors, starts, lengths, order, ctx.max_length, mask, prefix_bias, sinks, past, seed, *numbers,
            [*needs[:3], needs[3] or needs[4]], implementation,
        )  # fmt: skip
        given = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
        return *given, *(None,) * options

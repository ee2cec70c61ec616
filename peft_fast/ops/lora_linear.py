"""lora_linear and lora_update: registration and gradient. Math in ``reference`` and csrc_triton/lora/linear.py."""

from typing import Any

import torch
from torch import Tensor

from ..reference import lora as reference
from ._register import register
from .choice import choose


def _fwd_fake(
    x: Tensor, a: Tensor, N: int, p: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    (M, K), R = x.shape, a.shape[0]
    bits = x.new_empty((M, (K + 7) // 8) if p > 0 else (0, 0), dtype=torch.uint8)
    return x.new_empty((M, N), dtype=dtype), x.new_empty((M, R)), bits


def _bwd_fake(
    dy: Tensor, x: Tensor, w: Tensor | None, a: Tensor, b: Tensor, s: Tensor, bits: Tensor,
    scaling: float, p: float, needs: list[bool], implementation: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(t.new_empty(t.shape if need else (0,)) for t, need in zip((x, a, b), needs, strict=True))


def _resolve(x: Tensor, N: int, a: Tensor, p: float, implementation: str, base: Tensor | None = None) -> str:
    (M, K), R = x.shape, a.shape[0]
    # kernels add to the base in fp32
    dtype = torch.float64 if base is not None and base.dtype == torch.float64 else x.dtype
    return choose("lora_linear", x.device, dtype, M, N, K, R, p=p, implementation=implementation).name


linear_fwd = register(
    "lora_linear_fwd(Tensor x, Tensor w, Tensor? bias, Tensor a, Tensor b, float scaling, float p, Tensor? seed, "
    "str implementation) -> (Tensor, Tensor, Tensor)",
    kernel="csrc_triton.lora.linear:lora_linear_fwd",
    reference=reference.lora_linear_fwd,
    fake=lambda x, w, bias, a, b, scaling, p, seed, implementation: _fwd_fake(x, a, w.shape[0], p),
    resolve=lambda x, w, bias, a, b, scaling, p, seed, implementation: _resolve(x, w.shape[0], a, p, implementation),
)
update_fwd = register(
    "lora_update_fwd(Tensor base, Tensor x, Tensor a, Tensor b, float scaling, float p, Tensor? seed, "
    "str implementation) -> (Tensor, Tensor, Tensor)",
    kernel="csrc_triton.lora.linear:lora_update_fwd",
    reference=reference.lora_update_fwd,
    fake=lambda base, x, a, b, scaling, p, seed, implementation: _fwd_fake(x, a, b.shape[0], p, base.dtype),
    resolve=lambda base, x, a, b, scaling, p, seed, implementation: _resolve(x, b.shape[0], a, p, implementation, base),
)
linear_bwd = register(
    "lora_linear_bwd(Tensor dy, Tensor x, Tensor? w, Tensor a, Tensor b, Tensor s, Tensor bits, float scaling, "
    "float p, bool[] needs, str implementation) -> (Tensor, Tensor, Tensor)",
    kernel="csrc_triton.lora.linear_bwd:lora_linear_bwd",
    reference=reference.lora_linear_bwd,
    fake=_bwd_fake,
    resolve=lambda dy, x, w, a, b, s, bits, scaling, p, needs, implementation: _resolve(
        x, dy.shape[1], a, p, implementation
    ),
)


class LoraLinear(torch.autograd.Function):
    """y = x @ w.T + bias + s @ b.T; saves x, s and one bit per element of x where dropout is on."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor,
        scaling: float, p: float, seed: Tensor | None, implementation: str,
    ) -> Tensor:  # fmt: skip
        y: Tensor
        y, s, bits = linear_fwd(x, w, bias, a, b, scaling, p, seed, implementation)
        ctx.save_for_backward(x, w, a, b, s, bits)
        ctx.scaling, ctx.p, ctx.implementation = scaling, p, implementation
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w, a, b, s, bits = ctx.saved_tensors
        need_x, _, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
        dx, da, db = linear_bwd(
            dy, x, w, a, b, s, bits, ctx.scaling, ctx.p, [need_x, need_a, need_b], ctx.implementation
        )
        dbias = dy.sum(0) if need_bias else None
        return _given(dx, need_x), None, dbias, _given(da, need_a), _given(db, need_b), None, None, None, None


class LoraUpdate(torch.autograd.Function):
    """y = base + s @ b.T; the base's gradient is dy itself."""

    @staticmethod
    def forward(
        ctx: Any, base: Tensor, x: Tensor, a: Tensor, b: Tensor,
        scaling: float, p: float, seed: Tensor | None, implementation: str,
    ) -> Tensor:  # fmt: skip
        y: Tensor
        y, s, bits = update_fwd(base, x, a, b, scaling, p, seed, implementation)
        ctx.save_for_backward(x, a, b, s, bits)
        ctx.scaling, ctx.p, ctx.implementation = scaling, p, implementation
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, s, bits = ctx.saved_tensors
        need_base, *needs = ctx.needs_input_grad[:4]
        dx, da, db = linear_bwd(dy.to(x.dtype), x, None, a, b, s, bits, ctx.scaling, ctx.p, needs, ctx.implementation)
        gradients = [_given(d, need) for d, need in zip((dx, da, db), needs, strict=True)]
        return _given(dy, need_base), *gradients, None, None, None, None


def _given(gradient: Tensor, needed: bool) -> Tensor | None:
    return gradient if needed else None

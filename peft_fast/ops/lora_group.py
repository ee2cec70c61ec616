"""lora_linear_group: several LoRA sites that read the same x (q, k, v; gate, up), with one pass over x for all s."""

from typing import Any

import torch
from torch import Tensor

from ..reference import lora as reference
from ._register import register
from .choice import choose
from .lora_linear import linear_bwd


def _resolve(
    x: Tensor, ws: list[Tensor], biases: list[Tensor | None], as_: list[Tensor], bs: list[Tensor],
    scalings: list[float], implementation: str,
) -> str:  # fmt: skip
    (M, K), N, R = x.shape, max(w.shape[0] for w in ws), max(a.shape[0] for a in as_)
    return choose("lora_linear", x.device, x.dtype, M, N, K, R, implementation=implementation).name


def _fake(
    x: Tensor, ws: list[Tensor], biases: list[Tensor | None], as_: list[Tensor], bs: list[Tensor],
    scalings: list[float], implementation: str,
) -> list[Tensor]:  # fmt: skip
    widths = [*(w.shape[0] for w in ws), sum(a.shape[0] for a in as_)]
    return [x.new_empty((x.shape[0], width)) for width in widths]


group_fwd = register(
    "lora_linear_group_fwd(Tensor x, Tensor[] ws, Tensor?[] biases, Tensor[] as_, Tensor[] bs, float[] scalings, "
    "str implementation) -> Tensor[]",
    kernel="csrc_triton.lora.linear:lora_linear_group_fwd",
    reference=reference.lora_linear_group_fwd,
    fake=_fake,
    resolve=_resolve,
)


class LoraLinearGroup(torch.autograd.Function):
    """Arguments (scalings, implementation, x, *ws, *biases, *as_, *bs), outputs one y per site; saves x once, and s."""

    @staticmethod
    def forward(ctx: Any, scalings: list[float], implementation: str, x: Tensor, *tensors: Tensor) -> Any:
        n = len(scalings)
        ws, biases, as_, bs = (list(tensors[i * n : (i + 1) * n]) for i in range(4))
        *ys, s = group_fwd(x, ws, biases, as_, bs, scalings, implementation)
        ctx.save_for_backward(x, s, *ws, *as_, *bs)
        ctx.scalings, ctx.implementation = scalings, implementation
        return tuple(ys)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> Any:
        n = len(ctx.scalings)
        x, s, *tensors = ctx.saved_tensors
        ws, as_, bs = (tensors[i * n : (i + 1) * n] for i in range(3))
        need_x, needs = ctx.needs_input_grad[2], ctx.needs_input_grad[3:]
        bits = x.new_empty((0, 0), dtype=torch.uint8)
        dx, das, dbs = None, [], []
        for i, part in enumerate(s.split([a.shape[0] for a in as_], dim=1)):
            need_a, need_b = needs[2 * n + i], needs[3 * n + i]
            wanted = [need_x, need_a, need_b]
            scaling, how = ctx.scalings[i], ctx.implementation
            dx_i, da, db = linear_bwd(dys[i], x, ws[i], as_[i], bs[i], part, bits, scaling, 0.0, wanted, how)
            if need_x:
                dx = dx_i if dx is None else dx.add_(dx_i)
            das.append(da if need_a else None)
            dbs.append(db if need_b else None)
        dbiases = [dy.sum(0) if need else None for dy, need in zip(dys, needs[n : 2 * n], strict=True)]
        return (None, None, dx, *[None] * n, *dbiases, *das, *dbs)

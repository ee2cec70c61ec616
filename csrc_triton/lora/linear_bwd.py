"""Backward of a linear layer with LoRA and a frozen base weight.

    dS = scale * dY @ b     dB = dY.T @ s     dA = dS.T @ (keep * x)     dX = dY @ w + keep * (dS @ a)

dS and dB share one pass over dY, dA is one pass over x, dX is the forward's GEMM with the roles swapped. What is not
needed is not computed. Deterministic: partial sums are added in a fixed order. dS is rounded to x.dtype; dA and dB
are accumulated in fp32 and rounded once, to the dtype of a and b.
"""

import torch
from torch import Tensor

from .expand import lora_expand
from .gemm import lora_gemm
from .grad import lora_da, lora_db, lora_db_ds
from .shrink import lora_shrink


def lora_linear_bwd(
    dy: Tensor, x: Tensor, w: Tensor | None, a: Tensor, b: Tensor, s: Tensor, bits: Tensor,
    scaling: float, p: float, needs: list[bool], implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (dx, da, db); what ``needs`` does not ask for is empty, (0,). w None: dx is the update's part alone."""
    need_dx, need_da, need_db = needs
    dx, da, db = (t.new_empty(0) for t in (x, a, b))
    keep = bits if p > 0 else None
    if dy.numel() == 0 or x.numel() == 0:
        return tuple(torch.zeros_like(t) if need else t.new_empty(0) for t, need in zip((x, a, b), needs, strict=True))
    scale = scaling / (1.0 - p)
    if need_dx or need_da:
        if need_db:
            db, ds = lora_db_ds(dy, s, b, scale, b.dtype)
        else:
            ds, _ = lora_shrink(dy, b.T, scale)
        if need_da:
            da = lora_da(x, ds, keep, a.dtype)
        if need_dx:
            dx = _dx(dy, x, w, a, ds, keep, implementation)
    elif need_db:
        db = lora_db(dy, s, b.dtype)
    return dx, da, db


def _dx(
    dy: Tensor, x: Tensor, w: Tensor | None, a: Tensor, ds: Tensor, keep: Tensor | None, implementation: str
) -> Tensor:
    if w is None:
        return lora_expand(ds, a.T, None, x.new_empty(x.shape), keep)
    if implementation == "addmm":
        dx = dy @ w
        return lora_expand(ds, a.T, dx, dx, keep)
    return lora_gemm(dy, w.T, None, ds, a.T, keep)

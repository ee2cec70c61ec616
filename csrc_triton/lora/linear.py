"""Forward of a linear layer with LoRA, as kernels: y = x @ w.T + bias + s @ b.T with s = scale * dropout(x) @ a.T.

    one_launch  lora_one_launch                    few rows: one pass over w, no second launch
    split       lora_shrink, lora_gemm             one pass over x for s, then y written once and never read
    addmm       lora_shrink, the vendor's GEMMs    the safe path with dropout: only s and the mask from a kernel

scale = scaling / (1 - p). Argument lists are those of the ops (peft_fast/ops/lora_linear.py), which checked everything.
"""

import torch
from torch import Tensor

from .expand import lora_expand
from .gemm import lora_gemm, lora_gemm_planes
from .one_launch import lora_one_launch
from .shrink import lora_shrink, lora_shrink_group, lora_shrink_planes


def lora_linear_fwd(
    x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor,
    scaling: float, p: float, seed: Tensor | None, implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return y (M, N), s (M, R), both in x.dtype, and bits (M, ceil(K / 8)), or (0, 0) when p is 0."""
    scale = scaling / (1.0 - p)
    if implementation == "one_launch" and w.shape[0] > 0:
        return lora_one_launch(x, w, bias, a, b, scale, p, seed)
    if implementation == "addmm":
        s, bits = lora_shrink(x, a, scale, p, seed)
        return torch.nn.functional.linear(x, w, bias).addmm_(s, b.to(s.dtype).T), s, bits
    planes, bits, scale_left = lora_shrink_planes(x, a, scale, p, seed)
    if planes.shape[0] == 1:
        return lora_gemm(x, w, bias, planes[0], b), planes[0], bits
    y, s = lora_gemm_planes(x, w, bias, planes, scale_left, b)
    return y, s, bits


def lora_update_fwd(
    base: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, p: float, seed: Tensor | None, implementation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y = base + s @ b.T (M, N) in base.dtype, s and bits: two launches, whatever the implementation."""
    s, bits = lora_shrink(x, a, scaling / (1.0 - p), p, seed)
    y = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    return lora_expand(s, b, base, y), s, bits


def lora_linear_group_fwd(
    x: Tensor, ws: list[Tensor], biases: list[Tensor | None], as_: list[Tensor], bs: list[Tensor],
    scalings: list[float], implementation: str,
) -> list[Tensor]:  # fmt: skip
    """y (M, N_i) of several sites that read the same x (q, k, v; gate, up), then all s, (M, sum of R_i). No dropout.

    "split": one pass over x for all s, then one GEMM per site; "one_launch": one launch per site.
    """
    if implementation == "one_launch":
        sites = zip(ws, biases, as_, bs, scalings, strict=True)
        ys, ss, _ = zip(*(lora_one_launch(x, w, bias, a, b, c, 0.0, None) for w, bias, a, b, c in sites), strict=True)
        return [*ys, torch.cat(ss, dim=1)]
    s = lora_shrink_group(x, as_, scalings)
    parts = s.split([a.shape[0] for a in as_], dim=1)
    return [*(lora_gemm(x, w, bias, part, b) for w, bias, b, part in zip(ws, biases, bs, parts, strict=True)), s]

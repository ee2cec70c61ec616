"""The specification of every op in plain torch: the tests' oracle (in fp64), the CPU implementation, a GPU's safe path.

    x (M, K) activations      w (N, K) frozen weight, any strides      bias (N,)
    a (R, K) lora_A.weight    b (N, R) lora_B.weight, any float dtype  scale = scaling / (1 - p)

    s  = scale * (keep * x) @ a.T          dS = scale * dY @ b         dA = dS.T @ (keep * x)
    y  = x @ w.T + bias + s @ b.T          dB = dY.T @ s               dX = dY @ w + keep * (dS @ a)

``s`` carries the scale, so that it appears in one place of the forward and one of the backward. ``keep`` is the dropout
mask, kept as one bit per element (``bits``), a pure function of (seed, M, K, p): the kernels draw the very same bits.
Hu et al. 2021, arXiv:2106.09685.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .cpu import slow_on_cpu
from .dropout import dropout_bits, masked, unpack_bits

# Up to this many rows the update is computed in fp32 on every CPU: widening a few rows of x is cheaper than narrowing
# both adapters, and fp32 products have less overhead than bf16 ones (4 times less at one row, equal near 100).
_FEW_ROWS = 64


def lora_linear(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return y (..., N) alone for x (..., K): no dropout, nothing kept for a backward."""
    return _add_low_rank(F.linear(x, w, bias), x, a, b, scaling)


def lora_update(base: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return base + scaling * x @ a.T @ b.T as a new tensor, nothing kept for a backward."""
    return _add_low_rank(base.clone(memory_format=torch.contiguous_format), x, a, b, scaling)


def lora_linear_fwd(
    x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y (M, N), s (M, R), both in x.dtype, and bits (M, ceil(K / 8)) uint8, or (0, 0) when p is 0."""
    return _add_update(F.linear(x, w, bias), x, a, b, scaling, p, seed)


def lora_update_fwd(
    base: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return base + s @ b.T as a new tensor, s and bits."""
    return _add_update(base.clone(memory_format=torch.contiguous_format), x, a, b, scaling, p, seed)


def dropout_mask(seed: Tensor, x: Tensor, p: float) -> Tensor:
    """What x (..., K) is multiplied with: 0, or 1 / (1 - p) where an element is kept, in x's dtype."""
    K = x.shape[-1]
    rows = x.numel() // max(K, 1)
    keep = unpack_bits(dropout_bits(seed, rows, K, p), K, x.dtype)
    return masked(torch.full((rows, K), 1 / (1 - p), dtype=x.dtype, device=x.device), keep).view(x.shape)


def lora_linear_bwd(
    dy: Tensor,
    x: Tensor,
    w: Tensor | None,
    a: Tensor,
    b: Tensor,
    s: Tensor,
    bits: Tensor,
    scaling: float,
    p: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dx, da, db), da and db in the dtype of a and b; one that is not needed is an empty (0,) tensor."""
    need_dx, need_da, need_db = needs
    dx, da, db = (t.new_empty(0) for t in (x, a, b))
    scale = scaling / (1.0 - p)
    products = torch.float32 if x.is_cpu and slow_on_cpu(x.dtype) else x.dtype
    wide = dy.to(products)
    if need_db:
        db = (s.to(products).T @ wide).T.to(b.dtype).contiguous()
    if not (need_dx or need_da):
        return dx, da, db
    ds = _scaled_matmul(wide, b.to(products), scale)
    keep = unpack_bits(bits, x.shape[1], x.dtype) if p > 0 else None
    if need_da:
        da = (ds.T @ (x if keep is None else masked(x, keep)).to(products)).to(a.dtype)
    if need_dx and keep is None and products == x.dtype:
        dx = ds @ a.to(x.dtype) if w is None else (dy @ w).addmm_(ds, a.to(x.dtype))
    elif need_dx:
        low_rank = (ds @ a.to(products)).to(x.dtype)
        if keep is not None:
            low_rank.view(keep.dtype).bitwise_and_(keep)
        dx = low_rank if w is None else (dy @ w).add_(low_rank)
    return dx, da, db


def lora_linear_group_fwd(
    x: Tensor,
    ws: list[Tensor],
    biases: list[Tensor | None],
    as_: list[Tensor],
    bs: list[Tensor],
    scalings: list[float],
) -> list[Tensor]:
    """Return y (M, N_i) of each site that reads x, then all their s side by side, (M, sum of R_i). No dropout."""
    s = F.linear(x, torch.cat([a.to(x.dtype) for a in as_]))
    parts = s.split_with_sizes([a.shape[0] for a in as_], dim=1)
    for part, scaling in zip(parts, scalings, strict=True):
        part.mul_(scaling)
    sites = zip(ws, biases, bs, parts, strict=True)
    return [*(F.linear(x, w, bias).addmm_(part, b.to(x.dtype).T) for w, bias, b, part in sites), s]


def _add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    # One token's time is the number of calls, and a conversion to the dtype that a tensor has is a call too.
    if _in_fp32(x):
        return y.add_(F.linear(F.linear(x.float(), a.float()), b.float()), alpha=scaling)
    s = F.linear(x, a if a.dtype == x.dtype else a.to(x.dtype))
    if y.dtype != s.dtype:
        s = s.to(y.dtype)
    if b.dtype != y.dtype:
        b = b.to(y.dtype)
    if y.ndim == 2:
        return y.addmm_(s, b.t(), alpha=scaling)
    y.view(-1, y.shape[-1]).addmm_(s.view(-1, s.shape[-1]), b.t(), alpha=scaling)
    return y


def _add_update(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    scale = scaling / (1.0 - p)
    bits = x.new_empty((0, 0), dtype=torch.uint8)
    if p > 0 and seed is not None:
        bits = dropout_bits(seed, x.shape[0], x.shape[1], p)
        x = masked(x, unpack_bits(bits, x.shape[1], x.dtype))
    if _in_fp32(x):
        s = F.linear(x.float(), a.float()).mul_(scale)
        return y.add_(F.linear(s, b.float())), s.to(x.dtype), bits
    s = _scaled_matmul(x, a.to(x.dtype).T, scale)
    return y.addmm_(s.to(y.dtype), b.to(y.dtype).T), s, bits


def _in_fp32(x: Tensor) -> bool:
    """Whether the products with x's adapter are made in fp32."""
    if not x.is_cpu or x.element_size() > 4:
        return False
    return x.numel() <= _FEW_ROWS * x.shape[-1] or slow_on_cpu(x.dtype)


def _scaled_matmul(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """scale * x @ y, rounded once."""
    return torch.addmm(x.new_empty(()), x, y, beta=0, alpha=scale)

"""The specification of every op in plain torch: the tests' oracle (in fp64), the CPU implementation, a GPU's safe path.

    x (M, K) activations      w (N, K) frozen weight, any strides      bias (N,)
    a (R, K) lora_A.weight    b (N, R) lora_B.weight, any float dtype  scale = scaling / (1 - p)

    s  = scale * (keep * x) @ a.T          dS = scale * dY @ b         dA = dS.T @ (keep * x)
    y  = x @ w.T + bias + s @ b.T          dB = dY.T @ s               dX = dY @ w + keep * (dS @ a)

``s`` carries the scale, so that it appears in one place of the forward and one of the backward. ``keep`` is the dropout
mask, kept as one bit per element (``bits``), a pure function of (seed, M, K, p): the kernels draw the very same bits.
Hu et al. 2021, arXiv:2106.09685.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

# Up to this many rows the update is computed in fp32: widening a few rows of x is cheaper than narrowing both adapters,
# and plain fp32 products have less overhead than bf16 ones (measured on CPU: 4 times less at one row, equal near 100).
_FEW_ROWS = 64
# The mask is drawn by numpy, in pieces of this many words, which stay in cache: torch has no logical shifts on a CPU
# and compares 16-bit integers 6 times slower.
_MASK_PIECE = 1 << 15
_GOLDEN, _MUL_1, _MUL_2 = (np.uint32(constant) for constant in (0x9E3779B9, 0x7FEB352D, 0x846CA68B))


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
    if need_db:
        db = (s.T @ dy).T.to(b.dtype).contiguous()
    if not (need_dx or need_da):
        return dx, da, db
    ds = _scaled_matmul(dy, b.to(dy.dtype), scale)
    keep = unpack_bits(bits, x.shape[1], x.dtype) if p > 0 else None
    if need_da:
        da = (ds.T @ (x if keep is None else _masked(x, keep))).to(a.dtype)
    if need_dx:
        a = a.to(x.dtype)
        if keep is not None:
            low_rank = ds @ a
            low_rank.view(keep.dtype).bitwise_and_(keep)
            dx = low_rank if w is None else (dy @ w).add_(low_rank)
        else:
            dx = ds @ a if w is None else (dy @ w).addmm_(ds, a)
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


def dropout_bits(seed: Tensor, M: int, K: int, p: float) -> Tensor:
    """Draw the keep mask of an (M, K) activation: bit k & 7 of byte k >> 3 of row m says whether x[m, k] is kept.

    A counter-based hash of (seed, m, k) with 16 random bits per element, so the drop rate is p rounded to 1 / 65536.
    Two strong one-dimensional hashes are combined by xor and mixed once more (github.com/skeeto/hash-prospector).

    Args:
        seed: (1,) int64.
    Returns: (M, ceil(K / 8)) uint8, unused bits 0.
    """
    low, high = (np.uint32((int(seed) >> shift) & 0xFFFFFFFF) for shift in (0, 32))
    pairs = (K + 1) // 2
    with np.errstate(over="ignore"):  # 32-bit arithmetic wraps, which is meant
        row_key = _mix(_mix(np.arange(M, dtype=np.uint32) + low) ^ high)
        col_key = _mix(_mix(np.arange(pairs, dtype=np.uint32) + _GOLDEN + high) ^ low)
    threshold = round(p * 65536) - 32768
    bits = np.empty((M, (K + 7) // 8), dtype=np.uint8)
    step = max(1, _MASK_PIECE // max(1, pairs))
    word, shifted = (np.empty((min(step, M), pairs), dtype=np.uint32) for _ in range(2))
    for start in range(0, M, step):
        rows = row_key[start : start + step, None]
        word, shifted = word[: len(rows)], shifted[: len(rows)]
        np.bitwise_xor(rows, col_key, out=word)
        np.multiply(word, _MUL_1, out=word)
        np.bitwise_xor(word, np.right_shift(word, 15, out=shifted), out=word)
        np.multiply(word, _MUL_2, out=word)
        np.bitwise_xor(word, np.right_shift(word, 16, out=shifted), out=word)
        keep = word.view(np.int16)[:, :K] >= threshold
        bits[start : start + step] = np.packbits(keep, axis=1, bitorder="little")
    return torch.from_numpy(bits)


def unpack_bits(bits: Tensor, K: int, dtype: torch.dtype) -> Tensor:
    """Return the mask (M, K) as all-ones or all-zeros integers of dtype's width: ``x.view(int) & mask`` drops elements.

    One vectorized pass over x, where a boolean mask would take three times as long on a CPU.
    """
    wide = _INT_OF_SIZE[dtype.itemsize]
    if bits.device.type == "cpu":
        keep = torch.from_numpy(np.unpackbits(bits.numpy(), axis=1, count=K, bitorder="little"))
    else:
        keep = (bits[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device)).flatten(1)[:, :K] & 1
    return keep.to(wide).neg_()


_INT_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    if _in_fp32(x):  # one token's time is the number of calls
        return y.add_(F.linear(F.linear(x.float(), a.float()), b.float()), alpha=scaling)
    s = F.linear(x, a.to(x.dtype)).to(y.dtype)
    y.view(-1, y.shape[-1]).addmm_(s.view(-1, s.shape[-1]), b.to(y.dtype).T, alpha=scaling)
    return y


def _add_update(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    scale = scaling / (1.0 - p)
    bits = x.new_empty((0, 0), dtype=torch.uint8)
    if p > 0 and seed is not None:
        bits = dropout_bits(seed, x.shape[0], x.shape[1], p).to(x.device)
        x = _masked(x, unpack_bits(bits, x.shape[1], x.dtype))
    if _in_fp32(x):
        s = F.linear(x.float(), a.float()).mul_(scale)
        return y.add_(F.linear(s, b.float())), s.to(x.dtype), bits
    s = _scaled_matmul(x, a.to(x.dtype).T, scale)
    return y.addmm_(s.to(y.dtype), b.to(y.dtype).T), s, bits


def _in_fp32(x: Tensor) -> bool:
    return x.is_cpu and x.numel() <= _FEW_ROWS * x.shape[-1] and x.element_size() <= 4


def _scaled_matmul(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """scale * x @ y, rounded once."""
    return torch.addmm(x.new_empty(()), x, y, beta=0, alpha=scale)


def _masked(x: Tensor, keep: Tensor) -> Tensor:
    return (x.view(keep.dtype) & keep).view(x.dtype)


def _mix(h: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """A strong 32-bit hash of each element."""
    h = (h ^ (h >> np.uint32(16))) * _MUL_1
    h = (h ^ (h >> np.uint32(15))) * _MUL_2
    return h ^ (h >> np.uint32(16))

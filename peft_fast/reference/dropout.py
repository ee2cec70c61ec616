"""Dropout's keep mask in plain torch and numpy: one bit per element, a pure function of (seed, M, K, p).

The kernels (csrc_triton/common/dropout.py) draw the very same bits.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

# The mask is drawn by numpy, in pieces of this many words, which stay in cache: torch has no logical shifts on a CPU
# and compares 16-bit integers 6 times slower.
_MASK_PIECE = 1 << 15
_GOLDEN, _MUL_1, _MUL_2 = (np.uint32(constant) for constant in (0x9E3779B9, 0x7FEB352D, 0x846CA68B))
# Words that ``by_torch`` holds at a time: some hundred megabytes of a GPU's memory.
_WIDE_PIECE = 1 << 22
_LOW_HALF = 0xFFFFFFFF
_INT_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def dropout_bits(seed: Tensor, M: int, K: int, p: float) -> Tensor:
    """Draw the keep mask of an (M, K) activation: bit k & 7 of byte k >> 3 of row m says whether x[m, k] is kept.

    A counter-based hash of (seed, m, k) with 16 random bits per element, so the drop rate is p rounded to 1 / 65536.
    Two strong one-dimensional hashes are combined by xor and mixed once more (github.com/skeeto/hash-prospector).

    Args:
        seed: (1,) int64. The mask is drawn where it is: on a GPU nothing waits for the host.
    Returns: (M, ceil(K / 8)) uint8 on seed's device, unused bits 0.
    """
    return _by_numpy(seed, M, K, p) if seed.is_cpu else by_torch(seed, M, K, p)


def _by_numpy(seed: Tensor, M: int, K: int, p: float) -> Tensor:
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


def by_torch(seed: Tensor, M: int, K: int, p: float) -> Tensor:
    """The same bits by torch's integers on seed's device, without reading the seed: what a GPU takes where Triton
    cannot work. int64 products wrap, so that their low half is that of 32-bit ones."""
    device, pairs = seed.device, (K + 1) // 2
    low, high = seed & _LOW_HALF, (seed >> 32) & _LOW_HALF
    row_key = _mix_wide(_mix_wide((torch.arange(M, device=device) + low) & _LOW_HALF) ^ high)
    col_key = _mix_wide(_mix_wide((torch.arange(pairs, device=device) + int(_GOLDEN) + high) & _LOW_HALF) ^ low)
    threshold = round(p * 65536) - 32768
    weights = 1 << torch.arange(8, device=device)
    bits = torch.empty((M, (K + 7) // 8), dtype=torch.uint8, device=device)
    step = max(1, _WIDE_PIECE // max(1, pairs))
    for start in range(0, M, step):
        word = ((row_key[start : start + step, None] ^ col_key) * int(_MUL_1)) & _LOW_HALF
        word = ((word ^ (word >> 15)) * int(_MUL_2)) & _LOW_HALF
        word = word ^ (word >> 16)
        # each half as a signed 16-bit number
        halves = torch.stack((word & 0xFFFF, word >> 16), dim=-1).flatten(1)[:, :K]
        keep = ((halves ^ 0x8000) - 0x8000) >= threshold
        keep = F.pad(keep, (0, bits.shape[1] * 8 - K)).view(len(keep), bits.shape[1], 8)
        bits[start : start + step] = (keep * weights).sum(-1).to(torch.uint8)
    return bits


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


def masked(x: Tensor, keep: Tensor) -> Tensor:
    """x with zeros where the mask of ``unpack_bits`` has them."""
    return (x.view(keep.dtype) & keep).view(x.dtype)


def _mix(h: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """A strong 32-bit hash of each element."""
    h = (h ^ (h >> np.uint32(16))) * _MUL_1
    h = (h ^ (h >> np.uint32(15))) * _MUL_2
    return h ^ (h >> np.uint32(16))


def _mix_wide(h: Tensor) -> Tensor:
    """``_mix`` of numbers below 2^32 that are kept in int64."""
    h = ((h ^ (h >> 16)) * int(_MUL_1)) & _LOW_HALF
    h = ((h ^ (h >> 15)) * int(_MUL_2)) & _LOW_HALF
    return h ^ (h >> 16)

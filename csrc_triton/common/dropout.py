"""Dropout's keep mask, one bit per element: bit k & 7 of byte k >> 3 of row m.

The definition is peft_fast/reference/dropout.py: dropout_bits. The kernels draw the very same bits.

A word serves two neighbouring columns, so a byte is drawn from four words: everything stays elementwise on
(BLOCK_M, BLOCK_K / 8) tiles, and only the finished bytes change their layout.
"""

import triton
import triton.language as tl


def threshold_of(p: float) -> int:
    """Keep where a signed 16-bit draw is at least this."""
    return round(p * 65536) - 32768


@triton.jit
def _mix(h):
    """A strong 32-bit hash (github.com/skeeto/hash-prospector)."""
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def row_keys(seed_ptr, offs_m):
    """The keys of rows offs_m, and the seed's halves: read here, on the device, so a replayed graph sees new ones."""
    seed = tl.load(seed_ptr)
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return _mix(_mix(offs_m.to(tl.uint32) + low) ^ high), low, high


@triton.jit
def draw_bytes(row_key, low, high, threshold, offs_byte, K):
    """The mask's bytes offs_byte of every row, as int32 (BLOCK_M, len(offs_byte)); bits beyond K are 0."""
    byte = tl.zeros((row_key.shape[0], offs_byte.shape[0]), tl.int32)
    for i in tl.static_range(4):
        pair = (offs_byte * 4 + i).to(tl.uint32)
        col_key = _mix(_mix(pair + 0x9E3779B9 + high) ^ low)
        word = (row_key[:, None] ^ col_key[None, :]) * 0x7FEB352D
        word = (word ^ (word >> 15)) * 0x846CA68B
        word = word ^ (word >> 16)
        # arithmetic shifts: each half as a signed 16-bit number
        even = (word << 16).to(tl.int32, bitcast=True) >> 16
        odd = word.to(tl.int32, bitcast=True) >> 16
        k = (offs_byte * 8 + 2 * i)[None, :]
        byte |= ((even >= threshold) & (k < K)).to(tl.int32) << (2 * i)
        byte |= ((odd >= threshold) & (k + 1 < K)).to(tl.int32) << (2 * i + 1)
    return byte


@triton.jit
def draw_words(row_key, low, high, pairs):
    """Two 16-bit draws for each row and pair of columns, those of draw_bytes; row_key and pairs broadcast."""
    col_key = _mix(_mix(pairs.to(tl.uint32) + 0x9E3779B9 + high) ^ low)
    word = (row_key ^ col_key) * 0x7FEB352D
    word = (word ^ (word >> 15)) * 0x846CA68B
    return word ^ (word >> 16)


@triton.jit
def expand_bits(byte, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """(BLOCK_M, BLOCK_K / 8) bytes as a (BLOCK_M, BLOCK_K) mask."""
    bit = (byte.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bit, (BLOCK_M, BLOCK_K)) != 0

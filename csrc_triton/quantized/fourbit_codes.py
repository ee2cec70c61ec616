"""How 4-bit nibbles become numbers in a kernel: their codes, in x's dtype, in registers.

What the integer units can do while the bytes arrive is about 3 operations per weight. NVIDIA's prmt looks four nibbles
up at once in a table of 8 bytes (``prmt_decoder``); elsewhere, and for fp32, the table is read from L1.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = (0.0, 0.0052083333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
CODES = {"nf4": NF4, "fp4": (*FP4, *(-code for code in FP4))}


def prmt_decoder(codes: tuple[float, ...], dtype: torch.dtype) -> str:
    """PTX from 4 bytes to 8 codes of a 16-bit dtype: $0 and $1 of the high nibbles, $2 and $3 of the low ones.

    A code's two bytes are looked up one by one. prmt chooses among 8 bytes by the lower three bits of a nibble: once
    in the table's first half, once in its second; another prmt takes for each nibble the one its top bit says.
    """
    table = torch.tensor(codes).to(dtype).view(torch.uint8).view(16, 2).T.contiguous().view(torch.int32)
    low, high = ([f"0x{word & 0xFFFFFFFF:08x}" for word in words] for words in table.tolist())

    def four_nibbles(even: str, odd: str) -> list[str]:
        lines = []
        for name, words in (("low", low), ("high", high)):
            lines += [
                f"prmt.b32 first, {words[0]}, {words[1]}, index;",
                f"prmt.b32 second, {words[2]}, {words[3]}, index;",
                f"prmt.b32 {name}, first, second, half;",
            ]
        return [*lines, f"prmt.b32 {even}, low, high, 0x7351;", f"prmt.b32 {odd}, low, high, 0x6240;"]

    lines = [
        ".reg .b32 index, half, first, second, low, high, even, odd;",
        "and.b32 index, $4, 0x77777777;",
        "shr.b32 half, $4, 1;",
        "lop3.b32 half, half, 0x44444444, 0x32103210, 0xea;",  # (half & 4s) | 3210: byte i of the first or second
        *four_nibbles("even", "odd"),  # not yet $0 and $2, which may be the register of $4
        "shr.b32 index, index, 16;",
        "shr.b32 half, half, 16;",
        *four_nibbles("$1", "$3"),
        "mov.b32 $0, even;",
        "mov.b32 $2, odd;",
    ]
    return "{ " + "\n".join(lines) + " }"


@triton.jit
def decode(byte, code_ptr, x, PRMT: tl.constexpr):
    """The codes, in x's dtype, of the high nibbles, those of even columns, and of the low ones."""
    if PRMT is None:
        byte = byte.to(tl.int32)
        even, odd = tl.load(code_ptr + (byte >> 4)).to(x.dtype), tl.load(code_ptr + (byte & 15)).to(x.dtype)
    else:
        even, odd = tl.inline_asm_elementwise(
            PRMT, "=r,=r,=r,=r,r", [byte], dtype=(x.dtype, x.dtype), is_pure=True, pack=4
        )
    return even, odd


def prmt_for(x: Tensor, quant_type: str) -> str | None:
    """How to decode on x's device: prmt is NVIDIA's, and for codes of 16 bits."""
    nvidia = x.is_cuda and torch.version.hip is None
    return prmt(quant_type, x.dtype) if nvidia and x.dtype.itemsize == 2 else None


@functools.cache
def prmt(quant_type: str, dtype: torch.dtype) -> str:
    return prmt_decoder(CODES[quant_type], dtype)

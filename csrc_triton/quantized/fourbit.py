"""Dequantization of bitsandbytes' 4-bit weights, NF4 or FP4, in one launch: w = code[q] * absmax, rounded once.

    packed (ceil(N * K / 2),) uint8   the high nibble is the even element of the flattened weight
    code   (16,) fp32                 what a nibble stands for
    absmax (blocks,) fp32             one per blocksize elements of the flattened weight; the last block may be partial
    w      (N, K)                     rows may be further apart than K elements: a workspace with room for more

Nested ("double quantization"): absmax is uint8 itself, absmax = code2[byte] * absmax2[i // blocksize2] + offset.

Bit for bit what bitsandbytes' formula gives in fp32. That takes a product and a sum that are rounded one by one, hence
the launch with enable_fp_fusion=False. Traffic: N*K/2 bytes + the absmax + N*K elements. arXiv:2305.14314.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.aot import AotCase, case
from ..common.launch import launch
from ..common.tuning import ALWAYS, Candidate, candidates, cdiv, config_for

# Elements per program. At 32 elements a thread loads 16 bytes and stores four times 16 (of 16-bit elements); at 8, a
# load is of 4 bytes, and a large weight takes so many programs that starting them takes as long as copying.
CANDIDATES = candidates("fourbit", [
    Candidate(dict(BLOCK_E=4096), 4, 1, default_to=ALWAYS),
    Candidate(dict(BLOCK_E=8192), 8, 1),
    Candidate(dict(BLOCK_E=4096), 8, 1),
    Candidate(dict(BLOCK_E=1024), 4, 1),
    Candidate(dict(BLOCK_E=1024), 4, 1, itemsize=4, default_to=ALWAYS),
    Candidate(dict(BLOCK_E=1024), 8, 1, itemsize=4),
])  # fmt: skip


class Nested(NamedTuple):
    """What a uint8 absmax stands for: code (256,) fp32, absmax (ceil(blocks / blocksize),) fp32, offset () or (1,)."""

    code: Tensor
    absmax: Tensor
    offset: Tensor
    blocksize: int


def nested_of(code: Tensor | None, absmax: Tensor | None, offset: Tensor | None, blocksize: int) -> Nested | None:
    """The operators pass its fields one by one."""
    return None if code is None or absmax is None or offset is None else Nested(code, absmax, offset, blocksize)


@triton.jit
def load_absmax(absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, block, mask, NESTED_BLOCKSIZE: tl.constexpr):
    """The fp32 absmax of blocks (int64); not nested without a code2."""
    absmax = tl.load(absmax_ptr + block, mask=mask, other=0)
    if code2_ptr is not None:
        scale = tl.load(absmax2_ptr + block // NESTED_BLOCKSIZE, mask=mask, other=0.0)
        absmax = tl.load(code2_ptr + absmax.to(tl.int32)) * scale + tl.load(offset_ptr)
    return absmax


@triton.jit
def _fourbit_kernel(
    packed_ptr, code_ptr, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, w_ptr,
    n_elements, n_bytes, K, stride_wn,
    BLOCKSIZE: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program writes BLOCK_E elements, in spans that share an absmax.

    ROWS, how spans lie in w: "dense", there are no gaps; "whole", each is in one row; "any".
    """
    SPAN: tl.constexpr = min(BLOCKSIZE, BLOCK_E)
    first = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E // SPAN) * SPAN
    mask = first < n_elements
    block = first // BLOCKSIZE
    absmax = load_absmax(absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, block, mask, NESTED_BLOCKSIZE)

    offs_byte = (first // 2)[:, None] + tl.arange(0, SPAN // 2)[None, :]
    byte = tl.load(packed_ptr + offs_byte, mask=offs_byte < n_bytes, other=0).to(tl.int32)
    q = tl.join(byte >> 4, byte & 15).reshape(BLOCK_E // SPAN, SPAN)
    w = tl.load(code_ptr + q) * absmax[:, None]

    offs = tl.arange(0, SPAN)[None, :]
    mask_w = first[:, None] + offs < n_elements
    if ROWS == "dense":
        w_ptrs = w_ptr + first[:, None] + offs
    elif ROWS == "whole":
        w_ptrs = w_ptr + (first // K * stride_wn + first % K)[:, None] + offs
    else:
        element = first[:, None] + offs
        w_ptrs = w_ptr + element // K * stride_wn + element % K
    tl.store(w_ptrs, w.to(w_ptr.dtype.element_ty), mask=mask_w)


def dequantize(
    packed: Tensor, code: Tensor, absmax: Tensor, blocksize: int, shape: tuple[int, int], dtype: torch.dtype,
    nested: Nested | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the weight (N, K) = ``shape`` in ``dtype``, written into ``out`` if given. Trusts its caller.

    packed: (ceil(N * K / 2),) uint8.    code: (16,) fp32.    blocksize: a power of two, 32 to 4096.
    absmax: (ceil(N * K / blocksize),) fp32, or uint8 with ``nested``.    All contiguous.
    out: (N, K) of ``dtype``, columns contiguous, rows at any distance; what lies between them is left alone.
    """
    N, K = shape
    w = torch.empty(shape, dtype=dtype, device=packed.device) if out is None else out
    if w.numel() == 0:
        return w
    config = config_for("fourbit", w, 1, N, K, 1)
    span = min(blocksize, config["BLOCK_E"])
    rows = "dense" if w.is_contiguous() else "whole" if K % span == 0 else "any"
    code2, absmax2, offset, nested_blocksize = nested or (None, None, None, 1)
    launch(
        _fourbit_kernel, (cdiv(N * K, config["BLOCK_E"]),), (
            packed, code, absmax, code2, absmax2, offset, w, N * K, (N * K + 1) // 2, K, w.stride(0),
        ), config, BLOCKSIZE=blocksize, NESTED_BLOCKSIZE=nested_blocksize, ROWS=rows, enable_fp_fusion=False,
    )  # fmt: skip
    return w


def dequantize_4bit(
    packed: Tensor, code: Tensor, absmax: Tensor,
    nested_code: Tensor | None, nested_absmax: Tensor | None, nested_offset: Tensor | None,
    quant_type: str, blocksize: int, nested_blocksize: int, N: int, K: int, dtype: torch.dtype, implementation: str,
) -> Tensor:  # fmt: skip
    """The operator's launcher: ``dequantize`` with the operator's flat arguments."""
    nested = nested_of(nested_code, nested_absmax, nested_offset, nested_blocksize)
    return dequantize(packed, code, absmax, blocksize, (N, K), dtype, nested)


def aot_cases() -> Iterator[AotCase]:
    """Every candidate, nested and not, for each way rows may lie and for blocks smaller and larger than a program."""
    types = dict(
        packed_ptr="*u8", code_ptr="*fp32", code2_ptr="*fp32", absmax2_ptr="*fp32", offset_ptr="*fp32",
        n_elements="i32", n_bytes="i32", K="i32", stride_wn="i32",
    )  # fmt: skip
    plain = dict(code2_ptr=None, absmax2_ptr=None, offset_ptr=None, NESTED_BLOCKSIZE=1)
    for candidate in CANDIDATES:
        for BLOCKSIZE, ROWS in ((64, "dense"), (64, "whole"), (64, "any"), (4096, "dense")):
            constants = dict(BLOCKSIZE=BLOCKSIZE, ROWS=ROWS)
            for label, absmax, more in (("plain", "*fp32", plain), ("nested", "*u8", dict(NESTED_BLOCKSIZE=256))):
                made = case(
                    _fourbit_kernel, "fourbit", f"{label}-{BLOCKSIZE}-{ROWS}", candidate,
                    types | dict(absmax_ptr=absmax, w_ptr="*bf16" if candidate.itemsize == 2 else "*fp32"),
                    **constants, **more,
                )  # fmt: skip
                yield replace(made, matmul=False, options=made.options | dict(enable_fp_fusion=False))

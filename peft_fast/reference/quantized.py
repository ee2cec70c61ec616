"""Values of quantized weights in plain torch: the tests' oracle, and what runs where nothing faster is right.

4 bits (NF4 and FP4 of bitsandbytes; Dettmers et al. 2023, arXiv:2305.14314): codes of the matrix read row by row, two
in a byte, the first in its high half. ``blocksize`` codes share a factor, ``absmax``; blocks run on from row to row.

    w = code[q] * absmax[block],  in fp32, rounded once to the result's dtype

The factors may be quantized themselves ("double", "nested"): absmax = nested_code[u] * nested_absmax[block] + offset.

8 bits (LLM.int8(); Dettmers et al. 2022, arXiv:2208.07339): w = q * (scale of the row / 127).
"""

import torch
from torch import Tensor


def dequantize_4bit(
    packed: Tensor, code: Tensor, absmax: Tensor,
    nested_code: Tensor | None, nested_absmax: Tensor | None, nested_offset: Tensor | None,
    quant_type: str, blocksize: int, nested_blocksize: int, N: int, K: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Return w (N, K) in ``dtype``.

    Args:
        packed: (ceil(N * K / 2),) uint8. code: (16,) fp32. quant_type: code's name, not read here.
        absmax: (ceil(N * K / blocksize),) fp32, or uint8 with the other three: nested_code (256,), nested_absmax
            (ceil(blocks / nested_blocksize),) and nested_offset, one element, all fp32.
    """
    factors = dequantize_absmax(absmax, nested_code, nested_absmax, nested_offset, nested_blocksize)
    pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)], dim=1)  # of each byte
    values = torch.nn.functional.embedding(packed.view(-1).int(), pairs).view(-1)[: N * K]
    whole = values.numel() // blocksize * blocksize
    values[:whole].view(-1, blocksize).mul_(factors[: whole // blocksize, None])
    if whole < values.numel():
        values[whole:].mul_(factors[-1])
    return values.to(dtype).view(N, K)


def dequantize_absmax(
    absmax: Tensor, nested_code: Tensor | None, nested_absmax: Tensor | None, nested_offset: Tensor | None,
    nested_blocksize: int,
) -> Tensor:  # fmt: skip
    """Return the blocks' factors in fp32, whether or not they are quantized."""
    if nested_code is None or nested_absmax is None or nested_offset is None:
        return absmax.view(-1).float()
    absmax = absmax.view(-1)
    return nested_code[absmax.int()] * nested_absmax.repeat_interleave(nested_blocksize)[: len(absmax)] + nested_offset


def dequantize_int8(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return w (N, K) in ``dtype`` from values (N, K) int8 and scales (N,) fp32: the product in fp32, rounded once."""
    return values.to(dtype, copy=True).mul_((scales * (1.0 / 127.0))[:, None])


def linear_int8(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    """Return x @ w.T + bias with x quantized as well, row by row, in x's dtype.

    x is rounded to fp16 first, as in bitsandbytes. Columns of x with an element of at least ``threshold`` (0: none)
    are outliers, and are multiplied as they are.
    """
    half = x.half().float()
    large = half.abs() >= (threshold or float("inf"))
    outliers = large.any(0)
    half = half.masked_fill(large, 0.0)
    absmax = half.abs().amax(1)
    q = (half * (127.0 / absmax)[:, None]).round().nan_to_num().masked_fill(outliers, 0.0)
    y = (q.double() @ values.T.double()).float()  # exact: what int32 gives
    y = y * (absmax / 127.0)[:, None] * (scales / 127.0)
    y = y + x[:, outliers].float() @ dequantize_int8(values[:, outliers], scales, torch.float32).T
    return (y if bias is None else y + bias.float()).to(x.dtype)

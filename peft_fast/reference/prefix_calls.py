"""torch's flash attention with the log of its sums: the one of CPUs, the one of NVIDIA's GPUs, and what each can do.

    q (B, Hq, L, D)    k, v (B, Hkv, S, D)    out (B, Hq, L, D)    lse (B, Hq, L) fp32, contiguous

``reference_prefix`` makes one call for the prefix and one for the ordinary keys. The backward of each takes the out and
lse of both together, so nothing of the forward but these two is kept. Dao 2023, arXiv:2307.08691.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .prefix_scores import Options

_aten = torch.ops.aten
_MAX_HEAD_DIM = 256


class FlashCalls(NamedTuple):
    """Forward and backward of one kind of device.

    forward: (q, k, v, is_causal, mask, scale) -> out, lse.    mask: added to the scores, or None.
    backward: (dout, q, k, v, out, lse, is_causal, mask, scale) -> dq, dk, dv.
    wide: 16-bit tensors are to be given as fp32.
    programs: how many programs the backward's keys should give work to; rows that share a prefix are split for that.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    wide: bool
    programs: int


def calls_for(device: torch.device) -> FlashCalls:
    """The calls of a device, which has to be a CPU or an NVIDIA GPU."""
    return _gpu_calls(device) if device.type == "cuda" else CPU_CALLS


def beyond_flash(q: Tensor, k: Tensor, call: Options) -> str:
    """What a call has that the flash attention of q's device cannot express, or "". Looks at no value on a device."""
    if call.p > 0:
        return "dropout"
    if call.softcap > 0:
        return "a softcap"
    if q.numel() == 0:
        return "no query"
    return "" if q.is_cpu else beyond_gpu_flash(q.shape[2], k.shape[2], call)


def beyond_gpu_flash(L: int, S: int, call: Options) -> str:
    """The same for L queries and S keys without dropout and softcap, of the flash attention of GPUs."""
    if call.mask is not None:
        return "a mask"
    if call.prefix_bias is not None:
        return "a bias of the prefix"
    if call.window is not None:
        return "a window"
    if call.lengths is not None:
        return "prefixes that differ by row"  # which rows have which would be read on the host
    offset = call.causal_offset
    if offset is None or offset >= max(S - 1, 0) or (offset == 0 and L <= S):
        return ""
    return "queries that do not begin with the keys"  # its causal mask is a square's


@functools.cache
def flash_fails(device: torch.device, dtype: torch.dtype, D: int) -> str:
    """Why a GPU's flash attention does not run on a device for heads of D elements in training, or ""."""
    if torch.version.hip or not torch.backends.cuda.is_flash_attention_available():
        return "this torch has no flash attention for NVIDIA's GPUs"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"flash attention is for fp16 and bf16, not {str(dtype).removeprefix('torch.')}"
    if D > _MAX_HEAD_DIM or D % 8:
        return f"flash attention is for heads of a multiple of 8 up to {_MAX_HEAD_DIM}, not of {D}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"flash attention needs compute capability 8.0, not {capability[0]}.{capability[1]}"
    if 192 < D <= 224 and capability not in ((8, 0), (9, 0), (10, 0), (10, 3)):
        return f"flash attention does not train heads of {D} at compute capability {capability[0]}.{capability[1]}"
    return ""


def _cpu_fwd(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale
    )  # fmt: skip
    return out, lse


def _cpu_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, is_causal: bool, mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, is_causal, attn_mask=mask, scale=scale
    )
    return dq, dk, dv


# fp16 is several times slower than fp32 there, and the backward slower in fp16 and bf16; that backward also adds up the
# gradients of keys and values in their own dtype, block of queries by block of queries
CPU_CALLS = FlashCalls(_cpu_fwd, _cpu_bwd, wide=True, programs=1)


def gpu_fwd(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """mask has to be None, and as many queries as keys have to be there where is_causal."""
    out, lse, *_ = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False, scale=scale)
    return out, lse


def gpu_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, is_causal: bool, mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As ``gpu_fwd``."""
    dq, dk, dv = _aten._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2],  # None: where rows differ in length
        0.0, is_causal, None, None, scale=scale,  # None: the seed of dropout
    )  # fmt: skip
    return dq, dk, dv


@functools.cache
def _gpu_calls(device: torch.device) -> FlashCalls:
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return FlashCalls(gpu_fwd, gpu_bwd, wide=False, programs=2 * processors)

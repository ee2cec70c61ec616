"""The public ``prefix_attention`` of ``functional``: checks, autocast."""

from typing import Any

import torch
from torch import Tensor

from ..reference import prefix as reference
from .choice import requested
from .prefix_attention import TRAINING, PrefixAttention, prefix_fwd
from .prefix_choice import choose_prefix

_prefix_attention: Any = PrefixAttention.apply
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_OP = "prefix_attention"


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    order: Tensor | None = None,
    max_length: int | None = None,
    mask: Tensor | None = None,
    prefix_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    past: Tensor | None = None,
    scale: float | None = None,
    causal_offset: int | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax([q @ Kp.T | q @ k.T]) @ [Vp; v] with a prefix Kp, Vp that is shared by rows and never copied for them.

    Args:
        q: (B, Hq, L, D) fp16, bf16, fp32 or fp64, any strides. k, v: (B, Hkv, S, D) likewise; Hkv divides Hq.
        prefix_k, prefix_v: (T, Hkv, D), dtype of q: all prefixes of the call, one behind another.
        starts, lengths: (B,) int32; row b uses the slots starts[b] .. starts[b] + lengths[b]. None: all use all T.
        order: (B,) int32, the rows sorted by starts: only speed depends on it.
        max_length: at least every length; needed with lengths.
        mask: bool (True: visible) or float (added to scores; -1e30 and less hides) that broadcasts to (B, Hq, L, S);
            it is about the ordinary keys alone.
        prefix_bias: float that broadcasts to (B, Hq, L, max_length), added to the scores of the prefix's slots.
        sinks: (Hq,) float, one more logit per head, which has no value.
        past: (1,) int64, the number of tokens before the first query; only ``window`` asks for it. None: 0.
        scale: of the scores; None: D ** -0.5.
        causal_offset: query i sees the ordinary keys j <= i + causal_offset (and of those, with window, the last
            ``window``). None: all of them. With mask: those that both show; a mask of one row for all queries
            and heads, as padding is, then costs next to nothing.
        window: query i sees slot j of its prefix if lengths[b] + past + i - j < window. None: it sees them all.
        softcap: scores become softcap * tanh(scores / softcap) before mask and bias; 0: they stay.
        dropout_p: probability in [0, 1) that a weight of the softmax is dropped. seed: as in ``lora_linear``.
        implementation: "auto", "torch", "kernel" or "flash"; None means the environment variable PEFT_FAST_PREFIX.
    Returns: out (B, L, Hq, D) contiguous in q.dtype (the autocast dtype under autocast) and lse (B, Hq, L) fp32 (fp64
        for fp64), the log of the sum of the exponentials of a query's scores, without a gradient. A query that sees
        nothing: 0 and -inf.
    Raises: ValueError on shapes, devices or options that disagree, and where mask, prefix_bias or sinks ask for a
        gradient, which they do not get; TypeError on dtypes; RuntimeError when a forced kernel cannot run.
    Source: Li & Liang 2021, arXiv:2101.00190. Gradients: of q, k, v, prefix_k and prefix_v.
    """
    if q.dtype != torch.float64 and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v, prefix_k, prefix_v = (t.to(dtype) for t in (q, k, v, prefix_k, prefix_v))
    _check_tensors(q, k, v, prefix_k, prefix_v)
    max_length = _check_rows(q, prefix_k, starts, lengths, order, max_length)
    _check_added(q, k, mask, prefix_bias, sinks, max_length)
    _check_options(q, past, window, softcap, dropout_p, seed)
    requested(_OP, implementation)  # raises on an unknown name
    q, k, v, prefix_k, prefix_v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v, prefix_k, prefix_v))
    args = (
        q, k, v, prefix_k, prefix_v, starts, lengths, order, max_length, mask, prefix_bias, sinks, past, seed,
        q.shape[-1] ** -0.5 if scale is None else scale, causal_offset, window, softcap, dropout_p,
    )  # fmt: skip
    out: Tensor
    lse: Tensor
    if _plain_inference(q, implementation):
        out, lse = reference.prefix_attention_fwd(*args)
    else:
        training = torch.is_grad_enabled() and any(t.requires_grad for t in args[:5])
        run = _prefix_attention if training else prefix_fwd
        out, lse = run(*args, implementation or (TRAINING if training else ""))
    return out, lse


def _plain_inference(q: Tensor, implementation: str | None) -> bool:
    """Whether plain torch can be called with no operator around it: what is on a CPU, without gradients."""
    return (
        q.is_cpu
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and choose_prefix(q.device, q.dtype, q.shape[-1], implementation).name == "torch"
    )


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or q.shape[2] < 1:
        raise ValueError(
            f"{_OP}: q (B, Hq, L, D) with L >= 1 and k (B, Hkv, S, D) must share B and D, "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if v.shape != k.shape:
        raise ValueError(f"{_OP}: v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    if k.shape[1] < 1 or q.shape[1] % k.shape[1] != 0:
        raise ValueError(f"{_OP}: the heads of k must divide those of q, got {k.shape[1]} and {q.shape[1]}")
    if prefix_k.ndim != 3 or prefix_k.shape[1] != k.shape[1] or prefix_k.shape[2] != k.shape[3]:
        expected = f"(T, Hkv, D) = (T, {k.shape[1]}, {k.shape[3]})"
        raise ValueError(f"{_OP}: prefix_k must be {expected} as k has it, got {tuple(prefix_k.shape)}")
    if prefix_v.shape != prefix_k.shape:
        raise ValueError(
            f"{_OP}: prefix_v must have prefix_k's shape {tuple(prefix_k.shape)}, got {tuple(prefix_v.shape)}"
        )
    if q.dtype not in _FLOATS:
        raise TypeError(f"{_OP}: q must be fp16, bf16, fp32 or fp64, got {q.dtype}")
    for name, tensor in (("k", k), ("v", v), ("prefix_k", prefix_k), ("prefix_v", prefix_v)):
        if tensor.dtype != q.dtype:
            raise TypeError(f"{_OP}: {name} must have q's dtype {q.dtype}, got {tensor.dtype}: convert it first")
        if tensor.device != q.device:
            raise ValueError(f"{_OP}: {name} must be on q's device {q.device}, got {tensor.device}")


def _check_rows(
    q: Tensor, prefix_k: Tensor, starts: Tensor | None, lengths: Tensor | None, order: Tensor | None,
    max_length: int | None,
) -> int:  # fmt: skip
    """Return max_length."""
    B, T = q.shape[0], prefix_k.shape[0]
    if (starts is None) != (lengths is None):
        raise ValueError(f"{_OP}: starts and lengths go together: give both or neither")
    for name, tensor in (("starts", starts), ("lengths", lengths), ("order", order)):
        if tensor is not None:
            _check_vector(q, name, tensor, B, torch.int32)
    if lengths is None:
        if max_length is not None and max_length != T:
            raise ValueError(f"{_OP}: without lengths max_length is the number of slots {T}, got {max_length}")
        return T
    if max_length is None or not 0 <= max_length <= T:
        raise ValueError(f"{_OP}: lengths need max_length, their largest, from 0 to {T} slots, got {max_length}")
    return max_length


def _check_added(
    q: Tensor, k: Tensor, mask: Tensor | None, prefix_bias: Tensor | None, sinks: Tensor | None, max_length: int
) -> None:
    B, H, L, _ = q.shape
    for name, tensor, columns in (("mask", mask, k.shape[2]), ("prefix_bias", prefix_bias, max_length)):
        if tensor is None:
            continue
        expected = (B, H, L, columns)
        if tensor.ndim != 4 or any(n != 1 and n != m for n, m in zip(tensor.shape, expected, strict=True)):
            raise ValueError(f"{_OP}: {name} must broadcast to {expected}, got {tuple(tensor.shape)}")
    if mask is not None and mask.dtype not in (torch.bool, torch.float32, q.dtype):
        raise TypeError(f"{_OP}: mask must be bool, fp32 or q's dtype {q.dtype}, got {mask.dtype}")
    if sinks is not None and sinks.shape != (H,):
        raise ValueError(f"{_OP}: sinks must be (Hq,) = ({H},), got {tuple(sinks.shape)}")
    for name, tensor in (("prefix_bias", prefix_bias), ("sinks", sinks)):
        if tensor is not None and tensor.dtype not in _FLOATS:
            raise TypeError(f"{_OP}: {name} must be fp16, bf16, fp32 or fp64, got {tensor.dtype}")
    for name, tensor in (("mask", mask), ("prefix_bias", prefix_bias), ("sinks", sinks)):
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"{_OP}: {name} must be on q's device {q.device}, got {tensor.device}")
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{_OP}: {name} gets no gradient and asks for one: give {name}.detach()")


def _check_options(
    q: Tensor, past: Tensor | None, window: int | None, softcap: float, p: float, seed: Tensor | None
) -> None:
    if past is not None:
        _check_vector(q, "past", past, 1, torch.int64)
    if window is not None and window < 1:
        raise ValueError(f"{_OP}: window must be at least 1, got {window}")
    if softcap < 0:
        raise ValueError(f"{_OP}: softcap must be 0 (off) or positive, got {softcap}")
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{_OP}: dropout_p must be in [0, 1), got {p}")
    if p > 0:
        if seed is None:
            raise ValueError(
                f"{_OP}: dropout_p = {p} needs seed, a (1,) int64 tensor on {q.device}: new_seed(q.device)"
            )
        _check_vector(q, "seed", seed, 1, torch.int64)


def _check_vector(q: Tensor, name: str, tensor: Tensor, size: int, dtype: torch.dtype) -> None:
    if tensor.shape != (size,):
        raise ValueError(f"{_OP}: {name} must be ({size},), got {tuple(tensor.shape)}")
    if tensor.dtype != dtype:
        raise TypeError(f"{_OP}: {name} must be {dtype}, got {tensor.dtype}")
    if tensor.device != q.device:
        raise ValueError(f"{_OP}: {name} must be on q's device {q.device}, got {tensor.device}")

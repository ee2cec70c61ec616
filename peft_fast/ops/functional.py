"""Public functions on tensors: check, cast under autocast, choose an implementation, run.

``y = x @ w.T + bias + scaling * dropout(x) @ a.T @ b.T`` for a base that is understood (``lora_linear``) or for the
output of one that is not (``lora_update``). The same for a batch in which every row has its own adapter
(``lora_linear_mixed``, ``lora_update_mixed``, ``lora_embedding_mixed``). Attention with a learned prefix
(``prefix_attention``, whose body is in prefix_functional.py).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..reference import lora as reference
from .choice import choose, requested
from .lora_group import LoraLinearGroup, group_fwd
from .lora_linear import LoraLinear, LoraUpdate, linear_fwd, update_fwd
from .lora_mixed import embedding_mixed, linear_mixed, update_mixed
from .mixed_plan import MixedPlan, MixedSite, mixed_plan
from .prefix_functional import prefix_attention

__all__ = [
    "LoraSite", "MixedPlan", "MixedSite", "lora_embedding_mixed", "lora_linear", "lora_linear_group",
    "lora_linear_mixed", "lora_update", "lora_update_mixed", "mixed_plan", "new_seed", "prefix_attention",
]  # fmt: skip

_lora_linear: Any = LoraLinear.apply
_lora_update: Any = LoraUpdate.apply
_lora_linear_group: Any = LoraLinearGroup.apply
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def lora_linear(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """y = x @ w.T + bias + scaling * dropout(x) @ a.T @ b.T, in x's dtype with fp32 accumulation.

    Args:
        x: (..., K) fp16, bf16, fp32 or fp64.
        w: (N, K), dtype of x, any strides; frozen, gets no gradient.
        a: (R, K). b: (N, R). Any float dtype: they take part in x's dtype and their gradients come back in their own.
        scaling: dimensionless, alpha / r (alpha / sqrt(r) for rsLoRA).
        bias: (N,) or None; gets a gradient if it asks for one.
        dropout_p: probability in [0, 1) that an element of x is dropped on the low-rank path.
        seed: (1,) int64 on x's device, see ``new_seed``; the mask is a pure function of it. Needed if dropout_p > 0.
        implementation: one of "lora_linear"'s (operators.py); None means the environment variable PEFT_FAST_LORA, else
            "auto".
    Returns: (..., N) in x.dtype (the autocast dtype under autocast, as ``torch.nn.functional.linear``).
    Raises: ValueError on shapes that disagree, a weight that requires grad, a bad dropout_p or an unknown
        implementation; TypeError on dtypes that disagree; RuntimeError when a forced kernel cannot run on x's device.
    Source: Hu et al. 2021, arXiv:2106.09685; PEFT's LoRA layer. No double backward, no torch.func transforms.
    """
    asked = requested("lora_linear", implementation)
    name = _within_range(asked, x, a)
    plain = dropout_p == 0 and _plain_inference(x, a, w.shape[0], name)
    if plain and b.shape[0] == w.shape[0] and not torch.compiler.is_compiling():
        # The checks below cost as much as one token's update: they are made only when torch refuses.
        try:
            return reference.lora_linear(x, w, bias, a, b, scaling)
        except RuntimeError:
            pass
    if w.requires_grad:
        raise ValueError("lora_linear: w requires grad, but gets none here; freeze it or use lora_update(base, ...)")
    N = w.shape[0]
    _check("lora_linear", x, a, b, N, dropout_p, seed)
    if w.shape != (N, x.shape[-1]):
        raise ValueError(f"lora_linear: x (..., K) and w (N, K) must share K, got {_sizes(x, w)}")
    if name == "peft":
        return _peft_update(F.linear(x, w, bias), x, a, b, scaling, dropout_p, None if asked == name else seed)
    dtype = _autocast_dtype(x)
    if dtype is not None:
        x, w, bias = x.to(dtype), w.to(dtype), None if bias is None else bias.to(dtype)
    if w.dtype != x.dtype:
        raise TypeError(f"lora_linear: x and w must have one dtype, got {x.dtype} and {w.dtype}")
    _check_base("lora_linear", x, w, bias)
    if plain:
        return reference.lora_linear(x, w, bias, a, b, scaling)  # a compiler fuses it, an operator it would only call
    args = (x.reshape(-1, x.shape[-1]), w, bias, a, b, scaling, dropout_p, seed, name)
    y: Tensor = _lora_linear(*args) if torch.is_grad_enabled() else linear_fwd(*args)[0]
    return y.view(*x.shape[:-1], N)


def lora_update(
    base: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """base + scaling * dropout(x) @ a.T @ b.T, for the output of any base layer.

    Args:
        base: (..., N), never written to. Its dtype is the result's.
        Others as in ``lora_linear``.
    Returns: (..., N), a new tensor.
    Raises: as ``lora_linear``.
    """
    asked = requested("lora_update", implementation, like="lora_linear")
    name = _within_range(asked, x, a)
    N = base.shape[-1]
    _check("lora_update", x, a, b, N, dropout_p, seed)
    if base.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"lora_update: base (..., N) and x (..., K) must share their leading sizes, got {_sizes(base, x)}"
        )
    if name == "peft":
        return _peft_update(base, x, a, b, scaling, dropout_p, None if asked == name else seed)
    if dropout_p == 0 and _plain_inference(x, a, N, name):
        return reference.lora_update(base, x, a, b, scaling)
    x = x.to(_autocast_dtype(x) or x.dtype)
    args = (base.reshape(-1, N), x.reshape(-1, x.shape[-1]), a, b, scaling, dropout_p, seed, name)
    y: Tensor = _lora_update(*args) if torch.is_grad_enabled() else update_fwd(*args)[0]
    return y.view(base.shape)


class LoraSite(NamedTuple):
    """One linear layer with LoRA, for ``lora_linear_group``; shapes and dtypes as in ``lora_linear``."""

    w: Tensor
    a: Tensor
    b: Tensor
    scaling: float
    bias: Tensor | None = None


def lora_linear_group(x: Tensor, sites: Sequence[LoraSite], *, implementation: str | None = None) -> list[Tensor]:
    """``lora_linear`` of several sites that read the same x (q, k, v; gate, up): one pass over x for all their x @ a.T.

    Args:
        x: (..., K). sites: at least one; each is checked as in ``lora_linear``. No dropout: its masks differ by site.
    Returns: one (..., N_i) per site, in x.dtype.
    Raises: as ``lora_linear``; ValueError without sites.
    """
    if not sites:
        raise ValueError("lora_linear_group: sites must hold at least one LoraSite, got none")
    name = _within_range(requested("lora_linear_group", implementation, like="lora_linear"), x, sites[0].a)
    dtype = None if name == "peft" else _autocast_dtype(x)
    if name == "peft" or dtype is not None:  # site by site: casts are made in one place
        return [lora_linear(x, w, a, b, scaling, bias, implementation=name) for w, a, b, scaling, bias in sites]
    for w, a, b, _, bias in sites:
        _check("lora_linear_group", x, a, b, w.shape[0], 0.0, None)
        if w.shape[1] != x.shape[-1] or w.dtype != x.dtype or w.requires_grad:
            raise ValueError(
                "lora_linear_group: w must be (N, K) in x's dtype and frozen; x and w are "
                f"{_sizes(x, w)}, {x.dtype} and {w.dtype}, w.requires_grad={w.requires_grad}"
            )
        _check_base("lora_linear_group", x, w, bias)
    ws, as_, bs, scalings, biases = (list(column) for column in zip(*sites, strict=True))
    x2 = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled():
        ys = _lora_linear_group(scalings, name, x2, *ws, *biases, *as_, *bs)
    else:
        ys = group_fwd(x2, ws, biases, as_, bs, scalings, name)[:-1]
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in ys]


def lora_linear_mixed(
    x: Tensor,
    w: Tensor,
    site: MixedSite,
    plan: MixedPlan,
    bias: Tensor | None = None,
    *,
    implementation: str | None = None,
) -> Tensor:
    """y[m] = w @ x[m] + bias + scale * B_slot @ (A_slot @ x[m]) with slot = plan.slots[m], any mix of them in a batch.

    A row's update does not depend on the other rows. No gradient, no dropout.

    Args:
        x: (..., K) fp16, bf16 or fp32 (on a CPU also fp64). w: (N, K) and bias: (N,), dtype of x.
        site: the adapters; those of the live slots have K columns in A and N rows in B.
        plan: of ``mixed_plan``, for as many rows as x has.
        implementation: one of "lora_mixed"'s; None as in ``lora_linear``.
    Returns: (..., N) in x.dtype (the autocast dtype under autocast).
    Raises: ValueError on shapes that disagree or an unknown implementation; TypeError on dtypes that disagree or have
        no kernel; RuntimeError when x asks for a gradient, or the implementation cannot run on x's device.
    """
    name = requested("lora_linear_mixed", implementation, like="lora_mixed")
    dtype = _autocast_dtype(x)
    if dtype is not None:
        x, w, bias = x.to(dtype), w.to(dtype), None if bias is None else bias.to(dtype)
    if x.shape[-1] != w.shape[1]:
        raise ValueError(f"lora_linear_mixed: x (..., K) and w (N, K) must share K, got {_sizes(x, w)}")
    if w.dtype != x.dtype:
        raise TypeError(f"lora_linear_mixed: x and w must have one dtype, got {x.dtype} and {w.dtype}")
    _check_base("lora_linear_mixed", x, w, bias)
    x2 = x.reshape(-1, x.shape[-1])
    _check_mixed("lora_linear_mixed", x2, site, plan)
    y: Tensor = linear_mixed(x2, w, bias, *site, *plan, name)
    return y.view(*x.shape[:-1], w.shape[0])


def lora_update_mixed(
    base: Tensor, x: Tensor, site: MixedSite, plan: MixedPlan, *, implementation: str | None = None
) -> Tensor:
    """The same for the output of any base layer: base[m] + scale * B_slot @ (A_slot @ x[m]).

    Args:
        base: (..., N), never written to. Its dtype is the result's. Others as in ``lora_linear_mixed``.
    Returns: (..., N), a new tensor.
    Raises: as ``lora_linear_mixed``.
    """
    name = requested("lora_update_mixed", implementation, like="lora_mixed")
    if base.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"lora_update_mixed: base and x must share their leading sizes, got {_sizes(base, x)}")
    x = x.to(_autocast_dtype(x) or x.dtype).reshape(-1, x.shape[-1])
    _check_mixed("lora_update_mixed", x, site, plan)
    y: Tensor = update_mixed(base.reshape(-1, base.shape[-1]), x, *site, *plan, name)
    return y.view(base.shape)


def lora_embedding_mixed(
    base: Tensor,
    ids: Tensor,
    site: MixedSite,
    plan: MixedPlan,
    num_embeddings: int,
    *,
    implementation: str | None = None,
) -> Tensor:
    """base[m] + scale * B_slot @ A_slot[:, ids[m]], for the output of an embedding.

    Args:
        base: (..., D), never written to. ids: (...) integers; one outside [0, num_embeddings) adds nothing.
        site: A_slot (rank, num_embeddings), B_slot (D, rank). Others as in ``lora_linear_mixed``.
    Returns: (..., D) in base.dtype, a new tensor.
    Raises: as ``lora_linear_mixed``.
    """
    name = requested("lora_embedding_mixed", implementation, like="lora_mixed")
    if base.shape[:-1] != ids.shape:
        raise ValueError(f"lora_embedding_mixed: base (..., D) and ids (...) disagree, got {_sizes(base, ids)}")
    base2 = base.reshape(-1, base.shape[-1])
    _check_mixed("lora_embedding_mixed", base2, site, plan)
    y: Tensor = embedding_mixed(base2, ids.reshape(-1), *site, *plan, num_embeddings, name)
    return y.view(base.shape)


def new_seed(device: torch.device | str) -> Tensor:
    """Draw a (1,) int64 seed on ``device`` from torch's generator: repeatable after ``torch.manual_seed``, restored by
    activation checkpointing, and drawn anew at each replay of a CUDA graph."""
    return torch.randint(0, 2**63 - 1, (1,), device=device)


def _check(op: str, x: Tensor, a: Tensor, b: Tensor, N: int, p: float, seed: Tensor | None) -> None:
    K, R = x.shape[-1], a.shape[0]
    if a.ndim != 2 or a.shape[1] != K:
        raise ValueError(f"{op}: x (..., K) and a (R, K) must share K, got {_sizes(x, a)}")
    if b.shape != (N, R):
        raise ValueError(f"{op}: b must be (N, R) = ({N}, {R}), got {tuple(b.shape)}")
    if x.dtype not in _FLOATS or a.dtype not in _FLOATS or b.dtype not in _FLOATS:
        raise TypeError(f"{op}: x, a and b must be fp16, bf16, fp32 or fp64, got {x.dtype}, {a.dtype} and {b.dtype}")
    if a.device != x.device or b.device != x.device or (seed is not None and seed.device != x.device):
        where = f"{a.device}, {b.device}" + (f" and {seed.device}" if seed is not None else "")
        raise ValueError(f"{op}: a, b and seed must be on x's device {x.device}, got {where}")
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{op}: dropout_p must be in [0, 1), got {p}")
    if p > 0 and (seed is None or seed.dtype != torch.int64 or seed.numel() != 1):
        raise ValueError(f"{op}: dropout_p = {p} needs seed, a (1,) int64 tensor on {x.device}: new_seed(x.device)")


def _check_base(op: str, x: Tensor, w: Tensor, bias: Tensor | None) -> None:
    N = w.shape[0]
    if bias is not None and (bias.shape != (N,) or bias.dtype != x.dtype):
        raise ValueError(f"{op}: bias must be ({N},) in {x.dtype}, got {tuple(bias.shape)} in {bias.dtype}")
    if w.device != x.device or (bias is not None and bias.device != x.device):
        raise ValueError(f"{op}: w and bias must be on x's device {x.device}, got w on {w.device}")


def _check_mixed(op: str, rows: Tensor, site: MixedSite, plan: MixedPlan) -> None:
    if plan.slots.shape[0] != rows.shape[0]:
        raise ValueError(f"{op}: the plan is for {plan.slots.shape[0]} rows, got {rows.shape[0]}")
    if rows.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{op} has no gradient: call it under torch.no_grad() or torch.inference_mode()")
    if plan.slots.device != rows.device or site.addresses.device != rows.device:
        where = f"{site.addresses.device} and {plan.slots.device}"
        raise ValueError(f"{op}: site and plan must be on the device of the rows, {rows.device}, got {where}")


def _sizes(first: Tensor, second: Tensor) -> str:
    return f"{tuple(first.shape)} and {tuple(second.shape)}"


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast wants for a matrix product on x, or None; it leaves fp64 alone."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def _plain_inference(x: Tensor, a: Tensor, N: int, name: str) -> bool:
    """Whether plain torch can be called with no operator around it: without gradients, where that is what would run.

    In a graph for a GPU it stays an operator, which chooses by the sizes of each call.
    """
    if torch.is_grad_enabled() or not (name == "auto" or name == "torch"):
        return False
    if _on_cpu(x):
        return not torch.is_autocast_enabled("cpu")
    if torch.is_autocast_enabled(x.device.type):
        return False
    if name == "torch":
        return True
    if torch.compiler.is_compiling():
        return False
    *rows, K = x.shape
    choice = choose("lora_linear", x.device, x.dtype, math.prod(rows), N, K, a.shape[0], implementation=name)
    return choice.name == "torch"


def _on_cpu(x: Tensor) -> bool:
    """In a place of its own, so that a benchmark without a GPU can measure a GPU's path."""
    return x.is_cpu


def _within_range(name: str, x: Tensor, a: Tensor) -> str:
    """ "peft" for an fp16 x with fp32 adapters and no autocast, where nothing else is asked for.

    In fp16 x @ a.T and dy @ b leave the range: with large activations they overflow, with a small B they vanish, and A
    gets no gradient. PEFT makes these products in fp32. Under autocast it makes them in fp16 as well.
    """
    if name == "auto" and x.dtype is torch.float16 and a.dtype is torch.float32 and _autocast_dtype(x) is None:
        return "peft"
    return name


def _peft_update(
    base: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, p: float, seed: Tensor | None = None
) -> Tensor:
    """PEFT's own arithmetic: x in the adapter's dtype, each product rounded there, the sum in the promoted dtype.

    seed: draw dropout's mask from it, as every operator does; None: from torch's generator, as PEFT.
    """
    x = x.to(a.dtype)
    if seed is None or p == 0:
        x = F.dropout(x, p, p > 0)
    else:
        x = x * reference.dropout_mask(seed, x, p)
    low_rank = F.linear(F.linear(x, a), b)
    return (base + low_rank * scaling).to(base.dtype)

"""lora_linear_mixed, lora_update_mixed, lora_embedding_mixed: registration. Inference only, no gradient.

Math in ``reference_mixed`` and csrc_triton/mixed/linear.py. The arguments from ``addresses`` on are the fields of
``MixedSite`` and ``MixedPlan``. A kernel counts in ``counters`` and leaves zeros there: the ops write to no argument.
"""

from typing import Any

import torch
from torch import Tensor

from ..reference import mixed as reference
from ._register import register
from .choice import choose

_TABLES = (
    "Tensor addresses, Tensor ranks, Tensor scales, ScalarType dtype, int max_rank, int index, "
    "Tensor slots, Tensor order, Tensor blocks, Tensor counters, int block_rows"
)


def _name(device: torch.device, dtype: torch.dtype, M: int, N: int, K: int, *rest: Any) -> str:
    """rest: the tables, and what is asked for."""
    return choose("lora_mixed", device, dtype, M, N, K, rest[4], implementation=rest[-1]).name


def _linear_resolve(x: Tensor, w: Tensor, bias: Tensor | None, *rest: Any) -> str:
    return _name(x.device, x.dtype, x.shape[0], w.shape[0], x.shape[1], *rest)


def _update_resolve(base: Tensor, x: Tensor, *rest: Any) -> str:
    # kernels add to the base in fp32
    dtype = base.dtype if base.dtype == torch.float64 else x.dtype
    name = _name(x.device, dtype, x.shape[0], base.shape[1], x.shape[1], *rest)
    return name if name == "torch" else "grouped"


def _embedding_resolve(base: Tensor, ids: Tensor, *rest: Any) -> str:
    M, N = base.shape
    name = _name(base.device, base.dtype, M, N, 0, *rest)
    return name if name == "torch" else "grouped"


linear_mixed = register(
    f"lora_linear_mixed(Tensor x, Tensor w, Tensor? bias, {_TABLES}, str implementation) -> Tensor",
    kernel="csrc_triton.mixed.linear:lora_linear_mixed",
    reference=reference.lora_linear_mixed,
    fake=lambda x, w, *rest: x.new_empty((x.shape[0], w.shape[0])),
    resolve=_linear_resolve,
)
update_mixed = register(
    f"lora_update_mixed(Tensor base, Tensor x, {_TABLES}, str implementation) -> Tensor",
    kernel="csrc_triton.mixed.linear:lora_update_mixed",
    reference=reference.lora_update_mixed,
    fake=lambda base, *rest: base.new_empty(base.shape),
    resolve=_update_resolve,
)
embedding_mixed = register(
    f"lora_embedding_mixed(Tensor base, Tensor ids, {_TABLES}, int V, str implementation) -> Tensor",
    kernel="csrc_triton.mixed.linear:lora_embedding_mixed",
    reference=reference.lora_embedding_mixed,
    fake=lambda base, *rest: base.new_empty(base.shape),
    resolve=_embedding_resolve,
)

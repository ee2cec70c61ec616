"""A batch that mixes adapters, as kernels: y[m] = w @ x[m] + bias + scales[slot[m]] * B_slot @ (A_slot @ x[m]).

    grouped     the vendor's base GEMM, mixed_shrink, mixed_expand    the safe path; what an opaque base takes
    split       mixed_shrink, mixed_gemm                              y written once, never read
    one_launch  mixed_one_launch                                      few rows: nothing but one launch
    embedding   mixed_embedding, mixed_expand

Argument lists are those of the ops (peft_fast/ops/lora_mixed.py), which checked everything.
"""

import torch
from torch import Tensor

from .embedding import mixed_embedding
from .expand import mixed_expand
from .gemm import mixed_gemm
from .one_launch import mixed_one_launch
from .shrink import mixed_shrink


def lora_linear_mixed(
    x: Tensor, w: Tensor, bias: Tensor | None, addresses: Tensor, ranks: Tensor, scales: Tensor, dtype: torch.dtype,
    max_rank: int, index: int, slots: Tensor, order: Tensor, blocks: Tensor, counters: Tensor, block_rows: int,
    implementation: str,
) -> Tensor:  # fmt: skip
    """Return y (M, N) in x.dtype."""
    if implementation == "one_launch":
        return mixed_one_launch(
            x, w, bias, addresses, ranks, scales, dtype, max_rank, order, blocks, block_rows, counters[index]
        )
    planes = mixed_shrink(x, addresses, ranks, dtype, max_rank, order, blocks, block_rows)
    if implementation == "split":
        return mixed_gemm(x, w, bias, planes, addresses, ranks, scales, dtype, slots, order)
    y = torch.nn.functional.linear(x, w, bias)
    return mixed_expand(planes, addresses, ranks, scales, dtype, x.dtype, order, blocks, block_rows, y)


def lora_update_mixed(
    base: Tensor, x: Tensor, addresses: Tensor, ranks: Tensor, scales: Tensor, dtype: torch.dtype,
    max_rank: int, index: int, slots: Tensor, order: Tensor, blocks: Tensor, counters: Tensor, block_rows: int,
    implementation: str,
) -> Tensor:  # fmt: skip
    """Return base + the update (M, N) in base.dtype, a new tensor: two launches and a copy."""
    planes = mixed_shrink(x, addresses, ranks, dtype, max_rank, order, blocks, block_rows)
    y = base.clone(memory_format=torch.contiguous_format)
    return mixed_expand(planes, addresses, ranks, scales, dtype, x.dtype, order, blocks, block_rows, y)


def lora_embedding_mixed(
    base: Tensor, ids: Tensor, addresses: Tensor, ranks: Tensor, scales: Tensor, dtype: torch.dtype,
    max_rank: int, index: int, slots: Tensor, order: Tensor, blocks: Tensor, counters: Tensor, block_rows: int,
    V: int, implementation: str,
) -> Tensor:  # fmt: skip
    """Return base + scale * A_slot[:, ids].T @ B_slot.T (M, D) in base.dtype, a new tensor."""
    planes = mixed_embedding(ids, addresses, ranks, dtype, max_rank, order, blocks, block_rows, V)
    y = base.clone(memory_format=torch.contiguous_format)
    return mixed_expand(planes, addresses, ranks, scales, dtype, base.dtype, order, blocks, block_rows, y)

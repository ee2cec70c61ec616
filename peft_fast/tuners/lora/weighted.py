"""One LoRA adapter out of several: the arithmetic of `LoraModel.add_weighted_adapter`.

A layer's adapters i have factors A_i (R_i, K), B_i (N, R_i), scaling s_i and a weight w_i. "cat" stacks the factors,
which is exact. "svd" types combine the products s_i B_i A_i and factor the result; the others combine A_i and B_i
apart, each with sqrt(|w_i s_i|), the sign on A. Combining is a weighted sum after a preparation by the type's name:

    magnitude_prune   keep the largest values of each tensor            arXiv:2306.01708
    ties              the same, then keep what agrees with the majority's sign, and average    arXiv:2306.01708
    dare_linear       keep random values, scaled by 1 / density         arXiv:2311.03099
    dare_ties         the same, then as ties
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PLAIN_TYPES = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
SVD_TYPES = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
COMBINATION_TYPES = (*SVD_TYPES, *PLAIN_TYPES, "cat")


@dataclass(frozen=True)
class Recipe:
    """How to combine; the arguments of `LoraModel.add_weighted_adapter`.

    Raises: ValueError for an unknown type or sign method, or a density that is missing or negative.
    """

    combination_type: str
    density: float | None = None
    majority_sign_method: str = "total"
    svd_clamp: float | None = None
    svd_full_matrices: bool = True
    svd_driver: str | None = None

    def __post_init__(self) -> None:
        if self.combination_type not in COMBINATION_TYPES:
            raise ValueError(f"Invalid combination_type: {self.combination_type}, expected one of {COMBINATION_TYPES}")
        if self.majority_sign_method not in ("total", "frequency"):
            raise ValueError(f"majority_sign_method must be 'total' or 'frequency', got {self.majority_sign_method!r}")
        if self.combination_type in ("svd", "linear", "cat"):
            return
        if self.density is None or self.density < 0:
            raise ValueError(f"combination_type={self.combination_type!r} needs a density >= 0, got {self.density}")
        if self.density >= 1:
            warnings.warn(
                f"The density {self.density} is greater than or equal to 1, no pruning will be performed.", stacklevel=4
            )


@torch.no_grad()
def combine_layer(layer: Any, sources: Sequence[tuple[str, float]], target: str, recipe: Recipe) -> None:
    """Write the combination of a layer's adapters into its adapter `target`, whose rank is large enough.

    Args:
        sources: (adapter, weight); those that the layer does not have are left out.
    Raises: ValueError if it has none of them, or (types without svd and cat) their ranks differ.
    """
    present = [(name, weight) for name, weight in sources if name in layer.scaling]
    if not present:
        raise ValueError(f"None of the adapters {[name for name, _ in sources]} adapts this {type(layer).__name__}")
    if recipe.combination_type == "cat":
        a, b = _concatenated(layer, present)
    elif recipe.combination_type in SVD_TYPES:
        a, b = _factored(layer, present, layer.r[target], recipe)
    else:
        a, b = _combined_apart(layer, present, recipe)
    target_a, target_b = layer._factors(target)
    _fill(target_a, a, 0)
    _fill(target_b, b, 1)
    if layer.lora_bias[target]:
        biases = [(layer.lora_B[name].bias, weight * layer.scaling[name]) for name, weight in present]
        layer.lora_B[target].bias.copy_(sum(bias * factor for bias, factor in biases if bias is not None))


def _concatenated(layer: Any, present: Sequence[tuple[str, float]]) -> tuple[Tensor, Tensor]:
    factors = [(*layer._factors(name), weight * layer.scaling[name]) for name, weight in present]
    return torch.cat([a * factor for a, _, factor in factors]), torch.cat([b for _, b, _ in factors], dim=1)


def _factored(layer: Any, present: Sequence[tuple[str, float]], rank: int, recipe: Recipe) -> tuple[Tensor, Tensor]:
    deltas = [layer.get_delta_weight(name) for name, _ in present]
    delta = combine(deltas, [weight for _, weight in present], recipe)
    a, b = layer._factors(present[0][0])
    matrix = delta.T if layer.fan_in_fan_out else delta.flatten(1)
    dtype = matrix.dtype
    if dtype in (torch.float16, torch.bfloat16):  # no decomposition in halves
        matrix = matrix.float()
    u, s, vh = torch.linalg.svd(matrix, full_matrices=recipe.svd_full_matrices, driver=recipe.svd_driver)
    rank = min(rank, s.shape[0])
    u, vh = u[:, :rank] * s[:rank], vh[:rank]
    if recipe.svd_clamp is not None:
        limit = torch.quantile(torch.cat([u.flatten(), vh.flatten()]), recipe.svd_clamp)
        u, vh = u.clamp(-limit, limit), vh.clamp(-limit, limit)
    return vh.view(rank, *a.shape[1:]).to(dtype), u.view(b.shape[0], rank, *b.shape[2:]).to(dtype)


def _combined_apart(layer: Any, present: Sequence[tuple[str, float]], recipe: Recipe) -> tuple[Tensor, Tensor]:
    factors = [layer._factors(name) for name, _ in present]
    if len({a.shape for a, _ in factors}) > 1:
        shapes = [tuple(a.shape) for a, _ in factors]
        raise ValueError(f"combination_type={recipe.combination_type!r} needs equal ranks, got lora_A {shapes}")
    scales = [weight * layer.scaling[name] for name, weight in present]
    roots = [math.sqrt(abs(scale)) for scale in scales]
    signed = [math.copysign(root, scale) for root, scale in zip(roots, scales, strict=True)]
    # all of A first, then all of B: the order of random numbers is PEFT's
    a = combine([a for a, _ in factors], signed, recipe)
    return a, combine([b for _, b in factors], roots, recipe)


def combine(tensors: Sequence[Tensor], weights: Sequence[float], recipe: Recipe) -> Tensor:
    """The weighted sum of tensors of one shape, prepared as the type's name says (see above)."""
    kind = recipe.combination_type.removesuffix("_svd")
    if kind not in ("svd", "linear") and recipe.density is not None and recipe.density < 1:
        keep = _keep_random if kind.startswith("dare") else _keep_largest
        tensors = [keep(tensor, recipe.density) for tensor in tensors]
    stacked = torch.stack(list(tensors))
    factors = torch.tensor(weights, device=stacked.device).view(-1, *[1] * (stacked.ndim - 1))
    weighted = stacked * factors
    if not kind.endswith("ties"):
        return weighted.sum(0).to(stacked.dtype)
    votes = stacked if recipe.majority_sign_method == "total" else stacked.sign()
    majority = torch.where(votes.sum(0) >= 0, 1, -1)
    agreeing = stacked.sign() == majority
    return ((weighted * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)).to(stacked.dtype)


def _keep_largest(tensor: Tensor, density: float) -> Tensor:
    """The density * numel values of largest magnitude, the others 0."""
    flat = tensor.flatten()
    chosen = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy_(0, chosen, flat[chosen]).view(tensor.shape)


def _keep_random(tensor: Tensor, density: float) -> Tensor:
    """Each value with probability `density`, divided by it, the others 0."""
    if density == 0:
        return torch.zeros_like(tensor)
    return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density


def _fill(parameter: nn.Parameter, value: Tensor, dim: int) -> None:
    """Write `value`, whose rank (dimension `dim`) may be smaller; the rest becomes 0."""
    parameter.data.zero_()
    parameter.data.narrow(dim, 0, value.shape[dim]).copy_(value)

"""Checks of an adapter's config and weights. Everything but `check_finite` needs the header only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .read import TensorInfo, WeightsFile

_SHOWN = 5  # tensors listed in one error
# Parts of LoRA that have the rank as a dimension: suffix of the name -> which dimension.
_RANK_DIM = {".lora_A.weight": 0, ".lora_B.weight": 1, ".lora_embedding_A": 0, ".lora_embedding_B": 1}

_HARMLESS_RANK = 4096  # even without a layer that large
_NO_TARGETS = "dummy-target-modules"  # PEFT's word for an adapter without layers


@dataclass
class CheckedNames:
    """What `check_tensors` found: names to load, own names not in the file, and names skipped for their size."""

    accepted: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)  # found, expected


def config_fields(config: Any) -> Mapping[str, Any]:
    """The fields of a config, given as a dictionary or as a PeftConfig."""
    return config if isinstance(config, Mapping) else vars(config)


def check_config(config: Any, where: str) -> None:
    """Check the numbers that scale or size a LoRA adapter.

    Args: config: a dictionary or a PeftConfig; other methods than LORA pass. where: named in errors.
    Raises: ValueError unless r and the values of rank_pattern are positive integers, lora_alpha and the values of
        alpha_pattern finite numbers, lora_dropout a number in [0, 1].
    """
    fields = config_fields(config)
    if not _is_lora(fields):
        return
    ranks = {"r": fields.get("r", 8), **_entries(fields, "rank_pattern", where)}
    for name, value in ranks.items():
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ValueError(f"{where}: expected {name} to be a positive integer, got {value!r}")
    scales = {"lora_alpha": fields.get("lora_alpha", 8), **_entries(fields, "alpha_pattern", where)}
    for name, value in {**scales, "lora_dropout": fields.get("lora_dropout", 0.0)}.items():
        if not _is_finite(value):
            raise ValueError(f"{where}: expected {name} to be a finite number, got {value!r}")
    if not 0 <= float(fields.get("lora_dropout", 0.0)) <= 1:
        raise ValueError(f"{where}: expected lora_dropout between 0 and 1, got {fields['lora_dropout']!r}")


def _entries(fields: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """The values of a pattern field, by how errors call them."""
    pattern = fields.get(name) or {}
    if not isinstance(pattern, Mapping):
        raise ValueError(f"{where}: expected {name} to map patterns to numbers, got {pattern!r}")
    return {f"{name}[{key!r}]": value for key, value in pattern.items()}


def _is_finite(value: Any) -> bool:
    """Whether a value is a number that a float can hold; an integer of 400 digits is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _is_lora(fields: Mapping[str, Any]) -> bool:
    return str(getattr(fields.get("peft_type"), "value", fields.get("peft_type"))) == "LORA"


def check_ranks(weights: WeightsFile, config: Any, *, ignore_mismatched_sizes: bool = False) -> None:
    """Compare the ranks in a LoRA file with those its config allows, before any module is made from the config.

    A rank must be r or a value of rank_pattern; which module has which of them is checked with the shapes, after
    injection. A rank above every other dimension in the file could only serve to allocate memory: it is refused in any
    case (up to 4096 it does no harm).
    Raises: RuntimeError, saying "size mismatch" and both sizes; ValueError if the file has none of LoRA's weights.
    """
    fields = config_fields(config)
    if not _is_lora(fields):
        return
    rank_dims = _rank_dims(weights)
    if not rank_dims:
        if fields.get("target_modules", None) in ([], (), set(), _NO_TARGETS):
            return
        raise ValueError(
            f"{weights.where}: none of the adapter's LoRA weights is in the file. Expected names ending in "
            f"{', '.join(_RANK_DIM)}, got {listed(weights.tensors) or 'no tensor at all'}"
        )
    rank = fields.get("r", 8)
    allowed = {rank, *(fields.get("rank_pattern") or {}).values()}
    others = (size for name, dim in rank_dims.items() for i, size in enumerate(weights.tensors[name].shape) if i != dim)
    absurd = max(allowed) > max(_HARMLESS_RANK, *others)
    for name, dim in rank_dims.items():
        shape = weights.tensors[name].shape
        if absurd or not (ignore_mismatched_sizes or _is_rank(shape, dim, allowed)):
            expected = (*shape[:dim], max(allowed) if absurd else rank, *shape[dim + 1 :])
            raise RuntimeError(
                f"{weights.where}: {mismatch(name, shape, expected)} The config allows the ranks {sorted(allowed)}."
            )


def _is_rank(shape: tuple[int, ...], dim: int, allowed: set[int]) -> bool:
    """Whether that dimension can be one of the ranks; B of a convolution in groups has a part of it."""
    in_groups = len(shape) > 2 and dim == 1
    return shape[dim] in allowed or (in_groups and any(rank % shape[dim] == 0 for rank in allowed))


def _rank_dims(weights: WeightsFile) -> dict[str, int]:
    """Which dimension is the rank, for every tensor of LoRA that has data; the shapes of others are refused later."""
    dims = {}
    for name, info in weights.tensors.items():
        suffix = next((s for s in _RANK_DIM if name.endswith(s)), None)
        if suffix is not None and len(info.shape) >= 2 and 0 not in info.shape:
            dims[name] = _RANK_DIM[suffix]
    return dims


def check_tensors(
    weights: WeightsFile,
    own: Mapping[str, TensorInfo],
    optional: Mapping[str, TensorInfo],
    *,
    is_base_weight: Callable[[str], bool] = lambda name: False,
    ignore_mismatched_sizes: bool = False,
) -> CheckedNames:
    """Compare the header of a file with what the adapter consists of; nothing is loaded or allocated.

    Args:
        own: the adapter's tensors by their names in a file. optional: base weights that the file may bring.
        is_base_weight: whether a name that is in neither is a weight of the base (for the error).
        ignore_mismatched_sizes: skip tensors of another shape (they are reported) instead of refusing the file.
    Raises: ValueError for a name in neither, a dtype of another class than expected, or a file without any own tensor;
        RuntimeError, saying "size mismatch" and both sizes, for another shape.
    """
    expected = {**optional, **own}
    _refuse_leftover(weights, expected, is_base_weight)
    if own and not any(name in weights.tensors for name in own):
        raise ValueError(
            f"{weights.where}: none of the adapter's {len(own)} weights is in the file. Expected e.g. "
            f"{next(iter(own))!r}, got {listed(weights.tensors) or 'no tensor at all'}"
        )
    checked = CheckedNames(missing=[name for name in own if name not in weights.tensors])
    for name, found in weights.tensors.items():
        if found.kind != expected[name].kind:
            raise ValueError(
                f"{weights.where}: tensor {name!r}: expected a {expected[name].kind} dtype, got {found.dtype}"
            )
        if found.shape == expected[name].shape:
            checked.accepted.append(name)
        else:
            checked.mismatched.append((name, found.shape, expected[name].shape))
    if checked.mismatched and not ignore_mismatched_sizes:
        lines = [mismatch(*entry) for entry in checked.mismatched[:_SHOWN]]
        more = len(checked.mismatched) - len(lines)
        raise RuntimeError(f"{weights.where}: " + "\n\t".join(lines) + (f"\n\tand {more} more" if more else ""))
    return checked


def _refuse_leftover(
    weights: WeightsFile, expected: Mapping[str, TensorInfo], is_base_weight: Callable[[str], bool]
) -> None:
    """Every tensor of the file must have a place: a leftover is a wrong file, a wrong base or an attack on the base."""
    leftover = [name for name in weights.tensors if name not in expected]
    overwriting = [name for name in leftover if is_base_weight(name)]
    if overwriting:
        raise ValueError(
            f"{weights.where}: {listed(overwriting)} would overwrite weights of the base model, which other adapters "
            "share. Expected only the adapter's own weights (and biases if its config trains them, and the embeddings)."
        )
    if leftover:
        raise ValueError(
            f"{weights.where}: {listed(leftover)} does not belong to the adapter that the config describes on this "
            f"base model. Expected names like {next(iter(expected), 'none')!r}; check the base model and "
            "target_modules / modules_to_save."
        )


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse NaN and infinity in loaded weights, in one pass over them.

    A sum is finite only if every element is, unless it overflows: only then the elements are looked at one by one.
    Raises: ValueError naming the first tensor that has one.
    """
    names = [name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()]
    sums = [tensors[name].sum(dtype=_wide(tensors[name])).cpu() for name in names]
    for name, total in zip(names, sums, strict=True):
        if not total.isfinite() and not tensors[name].to(_wide(tensors[name])).isfinite().all():
            raise ValueError(f"{where}: tensor {name!r}: expected finite values, got NaN or infinity")


def _wide(tensor: Tensor) -> torch.dtype:
    """The dtype to add the elements in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def mismatch(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """The words that torch uses, which the Trainer and users look for. A size may be larger than torch can count."""
    return (
        f"size mismatch for {name}: copying a param with shape torch.Size({list(found)}) from checkpoint, the shape in "
        f"current model is torch.Size({list(expected)})."
    )


def listed(names: Iterable[Any]) -> str:
    """The first names of many, for an error."""
    names = list(names)
    more = len(names) - _SHOWN
    return ", ".join(repr(name) for name in names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def short(value: Any, limit: int = 2000) -> str:
    """A value as a message shows it, with an end."""
    text = str(value)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"

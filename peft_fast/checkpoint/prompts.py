"""Checks of prompt learning: the sizes in a configuration, and the shapes in a file that follow from them."""

from __future__ import annotations

from typing import Any

from .read import WeightsFile
from .validate import config_fields, mismatch

_SIZES = (
    "num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers",
    "encoder_hidden_size", "encoder_num_layers", "num_ranks", "num_tasks",
)  # fmt: skip
_METHODS = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING")


def check_prompt_config(config: Any, where: str) -> None:
    """Check the numbers of a prompt learning configuration; None is left to be filled in.

    Args: config: a dictionary or a PeftConfig. where: named in errors.
    Raises: ValueError unless sizes are positive integers, encoder_dropout is a number in [0, 1] and modules_to_save a
        list of strings.
    """
    fields = config_fields(config)
    for name in _SIZES:
        value = fields.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value <= 0):
            raise ValueError(f"{where}: expected {name} to be a positive integer, got {value!r}")
    dropout = fields.get("encoder_dropout", 0.0)
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout <= 1:
        raise ValueError(f"{where}: expected encoder_dropout between 0 and 1, got {dropout!r}")
    names = fields.get("modules_to_save")
    if names is not None and not (
        isinstance(names, (list, tuple, set)) and all(isinstance(name, str) for name in names)
    ):
        raise ValueError(f"{where}: expected modules_to_save to be a list of names, got {names!r}")


def check_prompt_shapes(weights: WeightsFile, config: Any) -> None:
    """Compare the shapes in a prompt learning file with those of its config, before any module is made from the config.

    Nothing is allocated that is larger than what the file has. Other methods pass.
    Raises: ValueError if the config lacks a size or the file a tensor, or a prefix cannot be divided among its heads;
        RuntimeError, saying "size mismatch" and both shapes, if they disagree.
    """
    fields = config_fields(config)
    if _method(fields) not in _METHODS:
        return
    check_prompt_config(config, weights.where)
    for name, expected in _shapes(fields, weights.where).items():
        if name not in weights.tensors:
            raise ValueError(f"{weights.where}: the adapter's {name!r} is not in the file")
        if weights.tensors[name].shape != expected:
            raise RuntimeError(f"{weights.where}: {mismatch(name, weights.tensors[name].shape, expected)}")
    width, heads = fields.get("token_dim"), fields.get("num_attention_heads")
    if _method(fields) == "PREFIX_TUNING" and width and heads and width % heads:
        raise ValueError(
            f"{weights.where}: token_dim={width} is no multiple of num_attention_heads={heads}: keys and values cannot "
            "be divided among the heads"
        )


def _method(fields: Any) -> str:
    return str(getattr(fields.get("peft_type"), "value", fields.get("peft_type")))


def _shapes(fields: Any, where: str) -> dict[str, tuple[int, ...]]:
    """Name in the file -> shape, for the embeddings themselves."""

    def size(name: str) -> int:
        if fields.get(name) is None:
            raise ValueError(f"{where}: the configuration has no {name}")
        return int(fields[name])

    tokens, width = size("num_virtual_tokens"), size("token_dim")
    if _method(fields) == "PREFIX_TUNING":
        return {"prompt_embeddings": (tokens, 2 * size("num_layers") * width)}
    task = getattr(fields.get("task_type"), "value", fields.get("task_type"))
    tokens *= fields.get("num_transformer_submodules") or (2 if task == "SEQ_2_SEQ_LM" else 1)
    shapes: dict[str, tuple[int, ...]] = {"prompt_embeddings": (tokens, width)}
    if _method(fields) == "MULTITASK_PROMPT_TUNING":
        tasks, ranks = size("num_tasks"), size("num_ranks")
        shapes |= {"prefix_task_cols": (tasks, tokens, ranks), "prefix_task_rows": (tasks, ranks, width)}
    return shapes

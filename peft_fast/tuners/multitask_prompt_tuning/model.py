"""MultitaskPromptEmbedding: a prompt for each row's task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint import open_bin, open_safetensors
from .._prompt_encoder import count_tokens
from ..prompt_tuning import PromptEmbedding, PromptTuningInit
from .config import MultitaskPromptTuningConfig, MultitaskPromptTuningInit

__all__ = ["MultitaskPromptEmbedding"]

_FROM_SOURCE = (
    MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS,
    MultitaskPromptTuningInit.EXACT_SOURCE_TASK,
    MultitaskPromptTuningInit.ONLY_SOURCE_SHARED,
)


class MultitaskPromptEmbedding(PromptEmbedding):
    """prompt * (cols[task] @ rows[task]), (B, T, token_dim), for indices (B, T) and task_ids (B,), both int64.

    Args: as `PromptEmbedding`. In `inference_mode` the weights are about to be loaded: nothing of earlier training is
        looked for.
    Attributes: embedding (T, token_dim); prefix_task_cols (num_tasks, T, num_ranks); prefix_task_rows (num_tasks,
        num_ranks, token_dim).
    Raises: as `PromptEmbedding`; ValueError if earlier training is asked for and its file is not given, malformed or
        without one of the tensors; RuntimeError ("size mismatch") if they do not fit.
    """

    inits = (*MultitaskPromptTuningInit, PromptTuningInit.SAMPLE_VOCAB)

    def __init__(self, config: MultitaskPromptTuningConfig, word_embeddings: Any) -> None:
        super().__init__(config, word_embeddings)
        self.num_tasks, self.num_ranks = config.num_tasks, config.num_ranks
        self.num_virtual_tokens, self.token_dim = config.num_virtual_tokens, config.token_dim
        tokens = count_tokens(config)
        self.num_transformer_submodules = tokens // config.num_virtual_tokens if config.num_virtual_tokens else None
        cols = torch.normal(mean=0, std=0.02, size=(config.num_tasks, tokens, config.num_ranks))  # type: ignore[arg-type]
        self.prefix_task_cols = nn.Parameter(cols)
        rows = torch.normal(mean=0, std=0.02, size=(config.num_tasks, config.num_ranks, config.token_dim))  # type: ignore[arg-type]
        self.prefix_task_rows = nn.Parameter(rows)
        if config.prompt_tuning_init in _FROM_SOURCE and not config.inference_mode:
            source = _source(config)
            self.load_state_dict(source, strict="prefix_task_cols" in source)

    def file_tensors(self) -> dict[str, str]:
        return {name: name for name in ("prefix_task_cols", "prefix_task_rows")} | super().file_tensors()

    def forward(self, indices: Tensor, task_ids: Tensor | None = None) -> Tensor:
        if task_ids is None:
            raise ValueError("task_ids cannot be None")
        cols, rows = self.prefix_task_cols[task_ids], self.prefix_task_rows[task_ids]
        return super().forward(indices) * (cols @ rows)


def _source(config: MultitaskPromptTuningConfig) -> dict[str, Tensor]:
    """The part of a state dict of the encoder that earlier training gives."""
    init, path = config.prompt_tuning_init, config.prompt_tuning_init_state_dict_path
    if path is None:
        raise ValueError(f"prompt_tuning_init_state_dict_path needs to be specified with {init} init method")
    weights = (open_safetensors if path.endswith(".safetensors") else open_bin)(Path(path))
    names = ["prompt_embeddings"]
    if init != MultitaskPromptTuningInit.ONLY_SOURCE_SHARED:
        names += ["prefix_task_cols", "prefix_task_rows"]
    if missing := [name for name in names if name not in weights.tensors]:
        raise ValueError(f"{weights.where}: expected {', '.join(names)}, found no {', '.join(missing)}")
    found = weights.load("cpu", names)
    shared = found.pop("prompt_embeddings")
    if init == MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS:
        found = {name: tensor.mean(0, keepdim=True) for name, tensor in found.items()}
    else:
        task = config.prompt_tuning_init_task
        for name, tensor in found.items():
            if not isinstance(task, int) or not -len(tensor) <= task < len(tensor):
                raise ValueError(f"{weights.where}: {name} has {len(tensor)} tasks, there is no task {task!r}")
        found = {name: tensor[task].unsqueeze(0) for name, tensor in found.items()}
    return {"embedding.weight": shared, **found}

"""MultitaskPromptTuningConfig: PEFT 0.21.2's fields and defaults."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ...utils.peft_types import PeftType
from ..prompt_tuning import PromptTuningConfig

__all__ = ["MultitaskPromptTuningConfig", "MultitaskPromptTuningInit"]


class MultitaskPromptTuningInit(str, Enum):  # noqa: UP042 (str() must be PEFT's)
    """What the prompt starts as: the embeddings of a text, random numbers, or something of earlier training: its
    prompt with the mean of the tasks' factors, with those of one task, or its prompt alone."""

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


@dataclass
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """Configuration of multitask prompt tuning: one learned prompt, and a factor of low rank for each task.

    Args: those of `PromptTuningConfig`, and
        prompt_tuning_init: see `MultitaskPromptTuningInit`; SAMPLE_VOCAB of prompt tuning as well.
        prompt_tuning_init_state_dict_path: the weights file of earlier training, safetensors or a pickle of tensors.
        prompt_tuning_init_task: for EXACT_SOURCE_TASK: which of its tasks.
        num_ranks: rank of the factors. num_tasks: how many tasks.
    Raises: as `PromptTuningConfig`.
    Source: Wang et al. 2023, arXiv:2303.02861.
    """

    prompt_tuning_init: MultitaskPromptTuningInit | str = MultitaskPromptTuningInit.RANDOM
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int | None = 0
    num_ranks: int | None = 1
    num_tasks: int | None = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.MULTITASK_PROMPT_TUNING

"""`peft-fast check`: everything about an adapter directory that can be wrong, found before it is used."""

from pathlib import Path
from typing import Any

from ..checkpoint import (
    CONFIG_NAME,
    WeightsFile,
    check_finite,
    check_prompt_shapes,
    check_ranks,
    open_weights,
    read_config,
)
from .errors import JobError


def report(adapter: Path, base: str | None = None) -> str:
    """Validate the directory and say in a few lines what is in it.

    Args:
        base: directory or hub name of the base model. Its config is enough: the model is laid out without memory, and
            every weight of the adapter has to find its place in it, with none missing.
    Raises: ValueError or RuntimeError of the checkpoint functions, naming file, tensor, expected and got.
    """
    if not adapter.is_dir():
        raise JobError(f"{adapter}: expected a directory with {CONFIG_NAME}, found {_what(adapter)}")
    fields = read_config(adapter)
    from peft_fast import PeftConfig

    config = PeftConfig.from_pretrained(adapter)
    weights = open_weights(adapter)
    check_ranks(weights, config)
    check_prompt_shapes(weights, config)
    check_finite(weights.load(), weights.where)
    task = getattr(config.task_type, "value", config.task_type)
    lines = [
        f"{adapter}: {fields['peft_type']}, task {task}, PEFT {fields.get('peft_version', '(unknown)')}",
        f"base model: {config.base_model_name_or_path}",
        _weights(weights),
    ]
    if config.is_prompt_learning:
        lines.insert(2, _prompt(weights, config))
    if base is None:
        lines.append(
            "good as far as a directory can be checked alone; --base MODEL compares it with the base model's shapes"
        )
    else:
        lines.append(_fits(adapter, base, config))
    return "\n".join(lines)


def _what(path: Path) -> str:
    return "a file" if path.exists() else "nothing"


def _prompt(weights: WeightsFile, config: Any) -> str:
    """What a prompt learning adapter has learned."""
    name = "prompt_embeddings"
    shape = " x ".join(map(str, weights.tensors[name].shape))
    tasks = f", {config.num_tasks} tasks" if config.peft_type == "MULTITASK_PROMPT_TUNING" else ""
    meaning = "tokens x width of the embeddings"
    if config.peft_type == "PREFIX_TUNING":
        width, heads = config.token_dim, config.num_attention_heads
        each = f"{heads} heads of {width // heads}" if heads and width % heads == 0 else f"{width} wide"
        meaning = f"tokens x (keys and values of {config.num_layers} layers, {each})"
    return f"{config.num_virtual_tokens} virtual tokens{tasks}; {name}: {shape}, {meaning}"


def _weights(weights: WeightsFile) -> str:
    numbers = sum(_product(info.shape) for info in weights.tensors.values())
    dtypes = ", ".join(sorted({info.dtype for info in weights.tensors.values()}))
    return f"{weights.path.name}: {len(weights.tensors)} tensors, {numbers:,} numbers in {dtypes}, all finite"


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _fits(adapter: Path, base: str, config: Any) -> str:
    """Load the adapter, strictly, into a base model of that shape on the meta device, which has no memory."""
    import torch

    from peft_fast import PeftModel

    with torch.device("meta"):
        model = _skeleton(base, config.task_type)
    PeftModel.from_pretrained(model, adapter, config=config, low_cpu_mem_usage=True, torch_device="cpu", strict=True)
    return f"fits {base}: every weight has its place, none is missing"


def _skeleton(base: str, task_type: Any) -> Any:
    """The base model's class for this task, made from its config alone."""
    import transformers

    classes = {
        "CAUSAL_LM": transformers.AutoModelForCausalLM,
        "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
        "SEQ_CLS": transformers.AutoModelForSequenceClassification,
        "TOKEN_CLS": transformers.AutoModelForTokenClassification,
        "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    }
    task_type = str(getattr(task_type, "value", task_type))
    auto = classes.get(task_type, transformers.AutoModel)
    config = transformers.AutoConfig.from_pretrained(base)
    try:
        return auto.from_config(config)
    except ValueError as error:  # names every architecture that there is
        kind = getattr(config, "model_type", "")
        raise JobError(
            f"--base {base}: transformers has no {auto.__name__} for {kind!r}, and the adapter's task is {task_type}"
        ) from error

"""Whether the options of `peft-fast train` fit the model, asked before its weights are read."""

import json
from collections.abc import Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from torch import nn

from ..generation.settings import short
from ..jobs.errors import UsageError
from .options import Options
from .report import BASE_CONFIG

if TYPE_CHECKING:
    from peft_fast import PeftConfig

DEFAULT_LENGTH = 512


def sees_what_follows(config: Any) -> bool:
    """Whether tokens see those behind them, so that a loss on the next token says nothing."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    text = config.get_text_config()
    if getattr(text, "use_bidirectional_attention", None) in (True, "all") or getattr(text, "is_causal", True) is False:
        return True
    decoder = getattr(text, "causal" if text.model_type in ("xlm", "flaubert") else "is_decoder", False)
    return text.model_type == "xlnet" or (text.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not decoder)


def _positions(shape: Any) -> int | None:
    """How many tokens the model has positions for; None: as many as wanted.

    As in RoBERTa, numbers of positions begin behind that of padding where there is one.
    """
    counts = [
        module.weight.shape[0] - module.padding_idx - 1
        for name, module in shape.named_modules()
        if name.rpartition(".")[2] == "position_embeddings" and getattr(module, "padding_idx", None) is not None
    ]
    stated = getattr(shape.config.get_text_config(), "max_position_embeddings", None)
    return min([*counts, *([stated] if isinstance(stated, int) else [])], default=None)


def max_length(options: Options, shape: Any) -> int:
    """Tokens of a row: --max-length, or what there are positions for."""
    learned = options.num_virtual_tokens or 0
    positions = _positions(shape)
    room = positions - learned if positions is not None else None
    if room is not None and room < 2:
        raise UsageError(
            f"--num-virtual-tokens {learned}: the model has {positions} positions, none is left for a text"
        )
    if options.max_length is None:
        return min(DEFAULT_LENGTH, room or DEFAULT_LENGTH)
    if room is not None and options.max_length > room:
        taken = f", {learned} of them for the learned tokens" if learned else ""
        raise UsageError(f"--max-length {options.max_length}: the model has {positions} positions{taken}")
    return options.max_length


def check_targets(options: Options, shape: Any, config: "PeftConfig") -> None:
    """Every name of --target-modules is that of layers that LoRA can adapt, or the end of one.

    Args:
        shape: the model on the meta device, which gets the adapter of `config`.
    """
    if options.method != "lora":
        return
    from transformers.pytorch_utils import Conv1D

    from peft_fast import get_peft_model

    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)
    modules = dict(shape.named_modules())
    layers = sorted({name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, kinds)})
    for target in options.target_modules or [] if options.target_modules != ["all-linear"] else []:
        found = [module for name, module in modules.items() if name == target or name.endswith(f".{target}")]
        if not any(isinstance(module, kinds) for module in found):
            what = f"is {type(found[0]).__name__}, which LoRA cannot adapt" if found else "the model has no such module"
            near = get_close_matches(target, layers, n=1)
            raise UsageError(
                f"--target-modules {target}: {what}; it has {', '.join(layers[:30])} (all-linear takes all linear ones)"
                + (f"; did you mean {near[0]}?" if near else "")
            )
    what = (
        f"--adapter {options.adapter}"
        if options.adapter
        else f"--target-modules {' '.join(options.target_modules or [])}"
    )
    try:
        get_peft_model(shape, config)
    except (ValueError, TypeError, NotImplementedError) as error:  # what the library refuses, before weights are read
        raise UsageError(f"{what}: {error}") from None


def check_same_classes(options: Options, classes: Sequence[str | int]) -> None:
    """A classifier that is trained on has the labels that it had, in their order."""
    saved = options.adapter / BASE_CONFIG if options.adapter else None
    if saved is None or not classes or not saved.is_file():
        return
    before = list(json.loads(saved.read_text(encoding="utf-8")).get("id2label", {}).values())
    now = [str(label) for label in classes]
    if before != now:
        raise UsageError(
            f"--adapter {options.adapter}: its labels are {short(before, 150)}, those of --data {short(now, 150)}"
        )

"""The README.md of a saved adapter: PEFT's model card, with what the user wrote into it kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..config import FORMAT_VERSION

__all__ = ["CARD_NAME", "model_card"]

CARD_NAME = "README.md"
_QUANTIZATION = "The following `bitsandbytes` quantization config was used during training:"
_TRAINING = "## Training procedure"
_VERSIONS = "### Framework versions"


def model_card(model: Any, directory: str | os.PathLike[str]) -> str:
    """The text of the model card for a PeftModel, made from the one in `directory` if there is one.

    Metadata: `base_model`, `library_name: peft`, `pipeline_tag: text-generation` for a causal language model, and tags:
    those of the card, of the base model and the adapter's own. Text: the quantization of the base, and the versions.
    """
    from huggingface_hub import ModelCard, ModelCardData

    path = Path(directory) / CARD_NAME
    card = ModelCard.load(path) if path.exists() else ModelCard.from_template(ModelCardData())
    base = model.get_base_model()
    config: Any = getattr(base, "config", None)
    card.data["library_name"] = "peft"
    given = [*_as_list(card.data.get("tags")), *_as_list(getattr(base, "model_tags", None))]
    card.data["tags"] = sorted({*given, *_tags(model)})
    if not card.data.get("pipeline_tag") and model._pipeline_tag is not None:
        card.data["pipeline_tag"] = model._pipeline_tag
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config or {})
    if "_name_or_path" in values:
        card.data["base_model"] = values["_name_or_path"]
    card.text = _body(card.text, values.get("quantization_config"))
    return str(card)


def _tags(model: Any) -> list[str]:
    """Tags that say what the adapter is and what it belongs to: how the Hub finds and serves it."""
    from transformers import PreTrainedModel

    tags = ["transformers"] if isinstance(model.get_base_model(), PreTrainedModel) else []
    if getattr(model.peft_type, "value", model.peft_type) == "LORA":
        tags.append("lora")
    if hasattr(model.base_model, "name_or_path"):
        tags.append(f"base_model:adapter:{model.base_model.name_or_path}")
    return tags


def _as_list(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _body(text: str, quantization: Any) -> str:
    """The card's text with the quantization, once, and the versions that it was saved with."""
    from .. import __version__

    lines = text.splitlines()
    if quantization is not None and _QUANTIZATION not in lines:
        values = quantization if isinstance(quantization, dict) else quantization.to_dict()
        block = ["", _QUANTIZATION, *(f"- {name}: {value}" for name, value in values.items()), ""]
        if _TRAINING in lines:
            lines[lines.index(_TRAINING) + 1 : lines.index(_TRAINING) + 1] = block
        else:
            lines += [_TRAINING, *block]
    lines = [line for line in lines if not line.startswith("- peft_fast ")]
    peft, ours = f"- PEFT {FORMAT_VERSION}", f"- peft_fast {__version__}"
    if _VERSIONS not in lines:
        lines += [_VERSIONS, ""]
    if peft not in lines:
        lines.insert(min(lines.index(_VERSIONS) + 2, len(lines)), peft)
    lines.insert(lines.index(peft) + 1, ours)
    return "\n".join(lines)

"""The model card of a saved adapter: what peft 0.21.2 writes, what it forgets, and what the user wrote."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import make_base, make_config
from huggingface_hub import ModelCard
from torch import nn

import peft_fast


def models(task: str | None = "CAUSAL_LM", **changes: Any) -> list[Any]:
    pair = []
    for library in (peft, peft_fast):
        base = make_base("llama", task or "CAUSAL_LM")
        base.name_or_path = "org/base"
        base.config._name_or_path = "org/base"
        for key, value in changes.items():
            setattr(base, key, value)
        pair.append(library.get_peft_model(base, make_config(library, "llama", task)))
    return pair


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS", None])
@pytest.mark.parametrize("model_tags", [None, ["unit-test"]])
def test_the_card_is_pefts_and_names_peft_fast(task: str | None, model_tags: list[str] | None, tmp_path: Path) -> None:
    theirs, ours = models(task, model_tags=model_tags)
    theirs.create_or_update_model_card(str(tmp_path))
    expected = (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").unlink()
    ours.create_or_update_model_card(tmp_path)
    assert (tmp_path / "README.md").read_text() == f"{expected}\n- peft_fast {peft_fast.__version__}"
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert data["base_model"] == "org/base" and data["library_name"] == "peft"
    assert set(data["tags"]) == {"lora", "transformers", "base_model:adapter:org/base", *(model_tags or [])}
    assert data.get("pipeline_tag") == ("text-generation" if task == "CAUSAL_LM" else None)


def test_an_update_keeps_what_the_user_wrote(tmp_path: Path) -> None:
    _, ours = models()
    ours.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    card.data["tags"] = [*card.data["tags"], "my-own"]
    card.data["license"] = "mit"
    card.data["pipeline_tag"] = "summarization"
    card.text += "\n\nTrained on my data."
    card.save(tmp_path / "README.md")
    ours.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert "my-own" in card.data["tags"] and "lora" in card.data["tags"]
    assert card.data["license"] == "mit" and card.data["pipeline_tag"] == "summarization"
    assert "Trained on my data." in card.text
    assert card.text.count("### Framework versions") == card.text.count("- PEFT 0.21.2") == 1
    assert card.text.count("- peft_fast") == 1


def test_a_card_of_peft_is_updated(tmp_path: Path) -> None:
    theirs, ours = models()
    theirs.save_pretrained(str(tmp_path))
    ours.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.endswith(f"### Framework versions\n\n- PEFT 0.21.2\n- peft_fast {peft_fast.__version__}")


def test_updates_change_nothing_more(tmp_path: Path) -> None:
    _, ours = models()
    ours.create_or_update_model_card(tmp_path)
    first = (tmp_path / "README.md").read_bytes()
    ours.create_or_update_model_card(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == first


def test_a_card_of_an_older_version(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\n---\n# Mine\n### Framework versions\n\n- PEFT 0.4.0\n- peft_fast 0.0.1")
    models()[1].create_or_update_model_card(tmp_path)
    text = (tmp_path / "README.md").read_text()
    expected = f"### Framework versions\n\n- PEFT 0.21.2\n- peft_fast {peft_fast.__version__}\n- PEFT 0.4.0"
    assert expected in text and "0.0.1" not in text


@pytest.mark.parametrize("as_object", [True, False])
def test_the_quantization_of_the_base_is_written_once(as_object: bool, tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    _, ours = models()
    ours.config.quantization_config = config if as_object else config.to_dict()
    for _ in range(2):
        ours.create_or_update_model_card(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.count("`bitsandbytes` quantization config was used during training:") == 1
    assert "- load_in_4bit: True" in text and "- bnb_4bit_quant_type: nf4" in text
    assert text.count("## Training procedure") == 1 and text.index("load_in_4bit") < text.index("- PEFT 0.21.2")


def test_a_model_without_a_config(tmp_path: Path) -> None:
    cards = []
    for library in (peft, peft_fast):
        model = library.get_peft_model(nn.Sequential(nn.Linear(3, 4)), library.LoraConfig(target_modules=["0"]))
        model.create_or_update_model_card(tmp_path / library.__name__)
        cards.append(ModelCard.load(tmp_path / library.__name__ / "README.md").data.to_dict())
    assert cards[0] == cards[1]

"""Configurations of prompt learning against the installed peft: fields, defaults, files, refusals, sizes of a model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import prompt_models
import pytest
import transformers
from peft.utils.other import _prepare_prompt_learning_config as prepared_by_peft

import peft_fast
from peft_fast import tuners
from peft_fast.config import PeftConfig
from peft_fast.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
    get_peft_config,
)
from peft_fast.utils.other import _prepare_prompt_learning_config

CLASSES = ["PrefixTuningConfig", "PromptTuningConfig", "PromptEncoderConfig", "MultitaskPromptTuningConfig"]
TEXT = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a b", "tokenizer_name_or_path": "somewhere"}
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *((cls, {}) for cls in CLASSES),
    *((cls, {"num_virtual_tokens": 3, "task_type": "SEQ_CLS", "modules_to_save": ["score"]}) for cls in CLASSES),
    ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 7, "init_weights": "zero"}),
    ("PromptTuningConfig", {**TEXT, "tokenizer_kwargs": {"use_fast": True}}),
    ("PromptTuningConfig", {"prompt_tuning_init": "SAMPLE_VOCAB", "inference_mode": True}),
    ("PromptEncoderConfig", {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 3}),
    ("MultitaskPromptTuningConfig", {**TEXT, "num_tasks": 3, "num_ranks": 2}),
    ("MultitaskPromptTuningConfig", {"prompt_tuning_init": "EXACT_SOURCE_TASK", "prompt_tuning_init_task": 2}),
]


@pytest.mark.parametrize("name", CLASSES)
def test_fields_and_defaults_are_pefts(name: str) -> None:
    ours, theirs = getattr(peft_fast, name), getattr(peft, name)
    assert [field.name for field in dataclasses.fields(ours)] == [field.name for field in dataclasses.fields(theirs)]
    assert ours().to_dict() == theirs().to_dict()
    assert str(ours().peft_type) == str(theirs().peft_type) and ours().is_prompt_learning


@pytest.mark.parametrize(
    "name", ["PromptTuningInit", "PromptEncoderReparameterizationType", "MultitaskPromptTuningInit"]
)
def test_choices_are_pefts(name: str) -> None:
    ours, theirs = getattr(peft_fast, name), getattr(peft, name)
    assert [(str(choice), choice.value) for choice in ours] == [(str(choice), choice.value) for choice in theirs]


@pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=range(len(SETTINGS)))
def test_files_are_pefts_both_ways(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    for library in (peft, peft_fast):
        getattr(library, name)(**settings).save_pretrained(tmp_path / library.__name__)
    texts = [(tmp_path / d / "adapter_config.json").read_text() for d in ("peft", "peft_fast")]
    assert texts[0] == texts[1]
    for library in (peft, peft_fast):
        loaded = library.PeftConfig.from_pretrained(tmp_path / "peft")
        assert type(loaded) is getattr(library, name)
        assert loaded.to_dict() == getattr(library, name)(**settings).to_dict()
    assert get_peft_config({"peft_type": loaded.peft_type, **settings}).to_dict() == loaded.to_dict()


def test_mappings_and_places_are_pefts() -> None:
    for kind in ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING"):
        for ours, theirs in (
            (PEFT_TYPE_TO_CONFIG_MAPPING, peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING),
            (PEFT_TYPE_TO_TUNER_MAPPING, peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING),
        ):
            assert ours[peft_fast.PeftType(kind)].__name__ == theirs[kind].__name__
            assert getattr(tuners, theirs[kind].__name__) is ours[peft_fast.PeftType(kind)]
            assert ours[peft_fast.PeftType(kind)].__module__.replace("peft_fast", "peft") == theirs[kind].__module__
        assert PEFT_TYPE_TO_PREFIX_MAPPING[peft_fast.PeftType(kind)] == peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[kind]


@pytest.mark.parametrize(
    "settings",
    [
        {"prompt_tuning_init": "TEXT"},
        {"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": "somewhere"},
        {"tokenizer_kwargs": {"use_fast": True}},
        {"task_type": "FOO"},
    ],
)
@pytest.mark.parametrize("name", ["PromptTuningConfig", "MultitaskPromptTuningConfig"])
def test_refusals_are_pefts(name: str, settings: dict[str, Any]) -> None:
    messages = []
    for library in (peft, peft_fast):
        with pytest.raises(ValueError) as error:
            getattr(library, name)(**settings)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "8", [3]])
@pytest.mark.parametrize(
    ("name", "field"),
    [
        *(("PrefixTuningConfig", f) for f in ("num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads")),
        ("PrefixTuningConfig", "encoder_hidden_size"),
        ("PromptTuningConfig", "num_transformer_submodules"),
        ("PromptEncoderConfig", "encoder_num_layers"),
        ("MultitaskPromptTuningConfig", "num_tasks"),
        ("MultitaskPromptTuningConfig", "num_ranks"),
    ],
)
def test_sizes_are_positive_integers(name: str, field: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected {field} to be a positive integer"):
        getattr(peft_fast, name)(**{field: value})
    getattr(peft, name)().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**content, field: value}))
    with pytest.raises(ValueError, match=f"expected {field} to be a positive integer"):
        PeftConfig.from_pretrained(tmp_path)


def test_other_values_that_cannot_be_meant() -> None:
    for dropout in (-0.1, 1.5, float("nan"), "0.1", True):
        with pytest.raises(ValueError, match="expected encoder_dropout between 0 and 1"):
            peft_fast.PromptEncoderConfig(encoder_dropout=dropout)
    for names in ("classifier", [3]):
        with pytest.raises(ValueError, match="expected modules_to_save to be a list of names"):
            peft_fast.PrefixTuningConfig(modules_to_save=names)


def test_prompt_learning_needs_a_task() -> None:
    base = prompt_models.make_base("llama", "CAUSAL_LM")
    for library in (peft, peft_fast):
        with pytest.raises(KeyError):
            library.get_peft_model(base, library.PromptTuningConfig(num_virtual_tokens=3))
    with pytest.raises(
        ValueError, match=r"^PromptTuningConfig needs a task_type, it is None: set it to one of CAUSAL_LM"
    ):
        peft_fast.get_peft_model(base, peft_fast.PromptTuningConfig(num_virtual_tokens=3))


# ---------------------------------------------------------------------------------------------- sizes of the base model
MORE_MODELS = [
    "Falcon", "Bloom", "GPTNeo", "GPTJ", "CodeGen", "Whisper", "Llava", "DeepseekV3", "Gemma3", "Gemma4Text",
    "Qwen2VL", "Phi", "MBart",
]  # fmt: skip
BETTER_HERE = {"mpt", "distilbert"}  # peft asks for num_attention_heads or token_dim


@pytest.mark.parametrize("family", [*prompt_models.FAMILIES, *MORE_MODELS])
def test_sizes_of_a_model_are_those_that_peft_finds(family: str) -> None:
    prefix, settings = prompt_models.FAMILIES.get(family, (family, {}))
    model_config = getattr(transformers, f"{prefix}Config")(**settings)
    for name in CLASSES:
        ours = _prepare_prompt_learning_config(getattr(peft_fast, name)(num_virtual_tokens=4), model_config)
        again = _prepare_prompt_learning_config(getattr(peft_fast, name)(**ours.to_dict()), model_config)
        assert again == ours
        if family not in BETTER_HERE:
            theirs = prepared_by_peft(getattr(peft, name)(num_virtual_tokens=4), model_config)
            assert ours.to_dict() == theirs.to_dict()


def test_models_whose_sizes_peft_does_not_find() -> None:
    for family, expected in (("DistilBert", (768, 12, 6)), ("Mpt", (2048, 16, 24))):
        model_config = getattr(transformers, f"{family}Config")()
        with pytest.raises(ValueError, match="Please specify"):
            prepared_by_peft(peft.PrefixTuningConfig(num_virtual_tokens=4), model_config)
        config = _prepare_prompt_learning_config(peft_fast.PrefixTuningConfig(num_virtual_tokens=4), model_config)
        assert (config.token_dim, config.num_attention_heads, config.num_layers) == expected


@pytest.mark.parametrize(
    "model_config",
    [
        {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24},
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "num_key_value_heads": 1},
        {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "global_head_dim": 16, "num_global_key_value_heads": 1,
        },
        {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
            "per_layer_config": {"0": {"head_dim": 8}, "1": {"head_dim": 64, "num_key_value_heads": 2}, "2": {}},
        },
        {"text_config": {"d_model": 32, "num_layers": 2, "encoder_attention_heads": 4}},
    ],
)  # fmt: skip
def test_grouped_and_mixed_heads(model_config: dict[str, Any]) -> None:
    for name in ("PrefixTuningConfig", "PromptTuningConfig"):
        ours = _prepare_prompt_learning_config(getattr(peft_fast, name)(num_virtual_tokens=4), model_config)
        theirs = prepared_by_peft(getattr(peft, name)(num_virtual_tokens=4), model_config)
        assert ours.to_dict() == theirs.to_dict()


def test_what_cannot_be_prepared() -> None:
    sizes = {"hidden_size": 30, "num_layers": 2, "num_attention_heads": 4}
    config = peft_fast.PrefixTuningConfig(num_virtual_tokens=4)
    with pytest.raises(ValueError, match=r"token_dim=30 is no multiple of num_attention_heads=4"):
        _prepare_prompt_learning_config(config, sizes)
    assert _prepare_prompt_learning_config(peft_fast.PromptTuningConfig(num_virtual_tokens=4), sizes).token_dim == 30
    with pytest.raises(ValueError, match="PrefixTuningConfig: num_virtual_tokens must be given"):
        _prepare_prompt_learning_config(peft_fast.PrefixTuningConfig(), sizes)
    for field in ("num_layers", "token_dim", "num_attention_heads"):
        lacking = {key: value for key, value in sizes.items() if key.replace("hidden_size", "token_dim") != field}
        with pytest.raises(ValueError, match=f"Please specify `{field}` in `peft_config`"):
            _prepare_prompt_learning_config(peft_fast.PromptTuningConfig(num_virtual_tokens=4), lacking)

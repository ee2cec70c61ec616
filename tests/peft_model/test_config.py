"""Configurations against the installed peft: fields, defaults, files, refusals."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest

from peft_fast.config import PeftConfig, PromptLearningConfig
from peft_fast.tuners.lora.config import NOT_SUPPORTED_YET, LoraConfig
from peft_fast.utils.peft_types import PeftType, TaskType

SETTINGS: list[dict[str, Any]] = [
    {},
    {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 32, "lora_dropout": 0.1},
    {"target_modules": r".*\.q_proj", "exclude_modules": ["lm_head"], "bias": "lora_only", "use_rslora": True},
    {
        "target_modules": "all-linear",
        "modules_to_save": ["score"],
        "task_type": TaskType.SEQ_CLS.value,
        "revision": "abc",
    },
    {
        "target_modules": ["q"],
        "layers_to_transform": [0, 1],
        "layers_pattern": "layers",
        "init_lora_weights": "pissa_niter_4",
    },
    {"target_modules": ("q", "v"), "rank_pattern": {"q": 2}, "alpha_pattern": {"v": 3.5}, "inference_mode": True},
    {"init_lora_weights": False, "lora_bias": True, "fan_in_fan_out": True, "base_model_name_or_path": "org/base"},
]


def as_json(path: Path) -> dict[str, Any]:
    content = json.loads((path / "adapter_config.json").read_text())
    return {
        key: sorted(value) if key in ("target_modules", "exclude_modules") and isinstance(value, list) else value
        for key, value in content.items()
    }


def test_types_are_pefts() -> None:
    assert [(t.name, t.value) for t in PeftType] == [(t.name, t.value) for t in peft.PeftType]
    assert [(t.name, t.value) for t in TaskType] == [(t.name, t.value) for t in peft.TaskType]
    assert str(PeftType.LORA) == str(peft.PeftType.LORA)


def test_fields_and_defaults_are_pefts() -> None:
    ours, theirs = dataclasses.fields(LoraConfig), dataclasses.fields(peft.LoraConfig)
    assert [field.name for field in ours] == [field.name for field in theirs]
    for field in ours:
        if field.name not in ("peft_type", "task_type", "runtime_config"):
            assert getattr(LoraConfig(), field.name) == getattr(peft.LoraConfig(), field.name), field.name
    assert LoraConfig().to_dict() == peft.LoraConfig().to_dict()


@pytest.mark.parametrize("settings", SETTINGS, ids=range(len(SETTINGS)))
def test_files_are_pefts_both_ways(settings: dict[str, Any], tmp_path: Path) -> None:
    LoraConfig(**settings).save_pretrained(tmp_path / "ours")
    peft.LoraConfig(**settings).save_pretrained(str(tmp_path / "theirs"))
    assert as_json(tmp_path / "ours") == as_json(tmp_path / "theirs")
    ours = PeftConfig.from_pretrained(tmp_path / "theirs")
    theirs = peft.PeftConfig.from_pretrained(str(tmp_path / "ours"))
    assert isinstance(ours, LoraConfig) and ours.to_dict() == theirs.to_dict()


def test_the_text_of_the_file_is_pefts(tmp_path: Path) -> None:
    LoraConfig(target_modules=["q"]).save_pretrained(tmp_path / "ours", auto_mapping_dict={"base_model_class": "A"})
    peft.LoraConfig(target_modules=["q"]).save_pretrained(
        str(tmp_path / "theirs"), auto_mapping_dict={"base_model_class": "A"}
    )
    name = "adapter_config.json"
    assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


def test_files_do_not_depend_on_the_order_of_sets(tmp_path: Path) -> None:
    LoraConfig(target_modules=["c", "a", "b"]).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["a", "b", "c"]


def test_subfolder(tmp_path: Path) -> None:
    LoraConfig(r=3).save_pretrained(tmp_path / "inside")
    loaded = LoraConfig.from_pretrained(tmp_path, subfolder="inside")
    assert isinstance(loaded, LoraConfig) and loaded.r == 3


def test_unknown_keys_of_a_file_are_dropped_with_a_warning(tmp_path: Path) -> None:
    LoraConfig(r=3).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "from_the_future": 1, "runtime_config": {}}))
    with pytest.warns(UserWarning) as seen:
        ours = PeftConfig.from_pretrained(tmp_path)
    with pytest.warns(UserWarning) as theirs:
        peft.PeftConfig.from_pretrained(str(tmp_path))
    assert len(seen) == len(theirs) == 2
    assert "runtime_config" in str(seen[0].message) and "['from_the_future'] for class LoraConfig" in str(
        seen[1].message
    )
    assert isinstance(ours, LoraConfig) and ours.r == 3
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        LoraConfig(from_the_future=1)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", NOT_SUPPORTED_YET)
def test_missing_features_are_refused_not_ignored(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"LoraConfig\({name}=.*is not supported by peft_fast yet"):
        LoraConfig(**{name: [1]})
    with pytest.raises(ValueError, match=name):
        LoraConfig.from_peft_type(peft_type="LORA", **{name: True})
    LoraConfig().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: {"a": 1}}))
    with pytest.raises(ValueError, match=name):
        PeftConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("init", ["eva", "corda", "loftq", "orthogonal", "mica", "lora_ga"])
def test_missing_initialisations_are_refused(init: str) -> None:
    with pytest.raises(ValueError, match="not supported by peft_fast yet"):
        LoraConfig(init_lora_weights=init)


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"r": 0}, ValueError, "r to be a positive integer"),
        ({"r": 2.5}, ValueError, "r to be a positive integer"),
        ({"r": True}, ValueError, "r to be a positive integer"),
        ({"lora_alpha": float("nan")}, ValueError, "lora_alpha to be a finite number"),
        ({"lora_alpha": 10**400}, ValueError, "lora_alpha to be a finite number"),
        ({"lora_dropout": 1.5}, ValueError, "lora_dropout"),
        ({"lora_dropout": -0.1}, ValueError, "lora_dropout"),
        ({"rank_pattern": {"q": -1}}, ValueError, "rank_pattern"),
        ({"alpha_pattern": {"q": float("inf")}}, ValueError, "alpha_pattern"),
        ({"bias": "some"}, NotImplementedError, "bias='some'"),
        ({"init_lora_weights": "zeros"}, ValueError, "Unknown initialization"),
        ({"init_lora_weights": "pissa_niter_x"}, ValueError, "Unknown initialization"),
        ({"init_lora_weights": None}, ValueError, "Unknown initialization"),
        ({"target_modules": "q", "layers_to_transform": 0}, ValueError, "`layers_to_transform` cannot be used"),
        ({"target_modules": "q", "layers_pattern": "h"}, ValueError, "`layers_pattern` cannot be used"),
        ({"layers_pattern": "h"}, ValueError, "`layers_to_transform` must also be specified"),
        ({"lora_bias": True, "init_lora_weights": "gaussian"}, ValueError, "lora_bias=True is only supported"),
        ({"target_parameters": "experts"}, TypeError, "`target_parameters` must be a list"),
        ({"target_modules": [1]}, TypeError, "target_modules"),
        ({"target_modules": 5}, TypeError, "target_modules"),
        (
            {"task_type": "FOO"},
            ValueError,
            "Invalid task type: 'FOO'. Must be one of the following task types: SEQ_CLS, ",
        ),
    ],
    ids=str,
)
def test_refusals(settings: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        LoraConfig(**settings)


def test_rslora_with_patterns_warns_as_peft() -> None:
    settings: dict[str, Any] = {"use_rslora": True, "rank_pattern": {"q": 2}, "init_lora_weights": "olora"}
    with pytest.warns(UserWarning):
        peft.LoraConfig(**settings)
    with pytest.warns(UserWarning, match="cannot be converted to plain LoRA"):
        LoraConfig(**settings)


def test_choice_of_the_class() -> None:
    assert isinstance(PeftConfig.from_peft_type(peft_type="LORA", r=2), LoraConfig)
    assert type(PeftConfig.from_peft_type(inference_mode=True)) is PeftConfig
    with pytest.raises(ValueError, match="CARTRIDGE is not supported by peft_fast yet"):
        PeftConfig.from_peft_type(peft_type="CARTRIDGE")
    for cls in (PeftConfig, peft.PeftConfig):
        with pytest.raises(KeyError, match="FOO"):
            cls.from_peft_type(peft_type="FOO")
        with pytest.raises(TypeError, match="missing required keys"):
            cls.from_peft_type(nonsense=1)
    assert PromptLearningConfig(num_virtual_tokens=3).is_prompt_learning and not LoraConfig().is_prompt_learning


def test_missing_and_broken_files(tmp_path: Path) -> None:
    for cls in (PeftConfig, peft.PeftConfig):
        with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json' at '"):
            cls.from_pretrained(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="expected a JSON object, got list"):
        PeftConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="JSON object"):
        PeftConfig.from_json_file(tmp_path / "adapter_config.json")
    with pytest.raises(AssertionError, match="should be a directory"):
        LoraConfig().save_pretrained(tmp_path / "adapter_config.json")


def test_a_hub_id_that_cannot_be_reached_is_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json' at 'nobody/nothing'"):
        PeftConfig.from_pretrained("nobody/nothing")


def test_a_default_configuration_says_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LoraConfig(**SETTINGS[1])


def test_names_of_utils_are_pefts() -> None:
    from peft_fast import utils

    for name in [*utils.__all__, "_freeze_adapter", "_get_submodules", "_set_adapter", "_set_trainable"]:
        assert hasattr(utils, name) and hasattr(peft.utils, name), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = utils.nothing

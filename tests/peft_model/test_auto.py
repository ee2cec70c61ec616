"""AutoPeftModel and its classes: the base model of an adapter, checked before it is imported; tokenizers; revisions."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import CASES, make_base, make_config, make_inputs, output_tensors

import peft_fast
from peft_fast import auto

CLASSES = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}
FIRST_OF_TASK = {task: family for family, task in reversed(CASES)}


def saved(directory: Path, family: str, task: str, adapter_task: str | None = "same", **changes: Any) -> Path:
    """Save a base and an adapter of it; returns the adapter's directory."""
    make_base(family, task).save_pretrained(directory / "base")
    base = type(make_base(family, task)).from_pretrained(directory / "base")
    adapter_task = task if adapter_task == "same" else adapter_task
    config = make_config(peft_fast, family, adapter_task, init_lora_weights=False, **changes)
    peft_fast.get_peft_model(base, config).save_pretrained(directory / "adapter")
    return directory / "adapter"


def edit(adapter: Path, **values: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize("task", CLASSES)
def test_each_class_loads_what_pefts_does(task: str, tmp_path: Path) -> None:
    family = FIRST_OF_TASK[task]
    adapter = saved(tmp_path, family, task)
    inputs = make_inputs(task)
    models = [getattr(library, CLASSES[task]).from_pretrained(str(adapter)) for library in (peft, peft_fast)]
    assert type(models[1]).__name__ == type(models[0]).__name__ and isinstance(models[1], peft_fast.PeftModel)
    outputs = [output_tensors(model(**inputs)) for model in models]
    for key, value in outputs[0].items():
        torch.testing.assert_close(outputs[1][key], value)


def test_other_arguments_arrive(tmp_path: Path) -> None:
    adapter = saved(tmp_path, "llama", "CAUSAL_LM")
    model = peft_fast.AutoPeftModelForCausalLM.from_pretrained(
        adapter, adapter_name="mine", is_trainable=True, dtype=torch.bfloat16
    )
    assert list(model.peft_config) == ["mine"] and model.get_nb_trainable_parameters()[0] > 0
    assert model.base_model_torch_dtype == torch.bfloat16


def test_a_subfolder_is_the_adapters_not_the_bases(tmp_path: Path) -> None:
    adapter = saved(tmp_path, "llama", "CAUSAL_LM")
    adapter.rename(tmp_path / "inside")
    model = peft_fast.AutoPeftModelForCausalLM.from_pretrained(tmp_path, subfolder="inside")
    assert model.active_adapters == ["default"]


def test_classes_are_not_made_directly() -> None:
    for library in (peft, peft_fast):
        with pytest.raises(OSError, match="from_pretrained"):
            library.AutoPeftModelForCausalLM()


def test_wrong_class_for_the_task(tmp_path: Path) -> None:
    adapter = saved(tmp_path, "llama", "CAUSAL_LM")
    for library in (peft, peft_fast):
        with pytest.raises(
            ValueError, match="Expected target PEFT class: PeftModelForCausalLM, but you have asked for"
        ):
            library.AutoPeftModelForSeq2SeqLM.from_pretrained(str(adapter))
        with pytest.raises(ValueError, match="Cannot use `AutoPeftModel` with a task type"):
            library.AutoPeftModel.from_pretrained(str(adapter))


def test_without_a_task_the_file_names_the_class(tmp_path: Path) -> None:
    adapter = saved(tmp_path, "llama", "CAUSAL_LM", adapter_task=None)
    models = [library.AutoPeftModel.from_pretrained(str(adapter)) for library in (peft, peft_fast)]
    assert type(models[1]) is peft_fast.PeftModel
    ids = make_inputs("CAUSAL_LM")["input_ids"]
    torch.testing.assert_close(models[1](ids).logits, models[0](ids).logits)
    edit(adapter, auto_mapping=None)
    for library in (peft, peft_fast):
        with pytest.raises(ValueError, match="Cannot infer the auto class from the config"):
            library.AutoPeftModel.from_pretrained(str(adapter))


def test_no_base_named(tmp_path: Path) -> None:
    adapter = saved(tmp_path, "llama", "CAUSAL_LM")
    edit(adapter, base_model_name_or_path=None)
    with pytest.raises(ValueError, match="does not name its base model"):
        peft_fast.AutoPeftModelForCausalLM.from_pretrained(adapter)


@pytest.mark.parametrize(
    "mapping",
    [
        {"parent_library": "evil", "base_model_class": "Model"},
        {"parent_library": "transformersevil", "base_model_class": "Model"},
        {"parent_library": "os", "base_model_class": "system"},
        {"parent_library": "transformers", "base_model_class": "nothing_of_the_kind"},
        {"parent_library": "transformers", "base_model_class": "AutoTokenizer"},
        {"parent_library": "transformers", "base_model_class": "pipeline"},
        {"parent_library": ["transformers"], "base_model_class": "LlamaForCausalLM"},
        {"parent_library": "transformers"},
    ],
    ids=str,
)
def test_nothing_else_is_imported(mapping: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = saved(tmp_path, "llama", "CAUSAL_LM", adapter_task=None)
    edit(adapter, auto_mapping=mapping)
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"import allowlist|is no model class|should name parent_library"):
        peft_fast.AutoPeftModel.from_pretrained(adapter)


def test_the_allowlist_can_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = saved(tmp_path, "llama", "CAUSAL_LM", adapter_task=None)
    (tmp_path / "my_models.py").write_text("from transformers import LlamaForCausalLM as Mine")
    monkeypatch.syspath_prepend(str(tmp_path))
    edit(adapter, auto_mapping={"parent_library": "my_models", "base_model_class": "Mine"})
    with pytest.raises(ValueError, match=r"import_allowlist=\['my_models'\]"):
        peft_fast.AutoPeftModel.from_pretrained(adapter)
    model = peft_fast.AutoPeftModel.from_pretrained(adapter, import_allowlist=["my_models"])
    assert type(model.get_base_model()).__name__ == "LlamaForCausalLM"
    assert auto.check_import_allowlist(["a"], "a.b") and not auto.check_import_allowlist(["a"], "ab")


def test_revisions_of_adapter_and_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`revision` is the adapter's; the base's stands in the adapter's configuration."""
    import transformers

    adapter = saved(tmp_path, "llama", "CAUSAL_LM", revision="of-the-base")
    seen: list[Any] = []
    load = transformers.AutoModelForCausalLM.from_pretrained.__func__

    def spy(cls: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["revision"])
        return load(cls, *args, **kwargs)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", classmethod(spy))
    model = peft_fast.AutoPeftModelForCausalLM.from_pretrained(adapter, revision="of-the-adapter")
    assert seen == ["of-the-base"] and model.peft_config["default"].revision == "of-the-base"


@pytest.mark.parametrize(("tokens", "expected"), [(70, 70), (20, 60)])
def test_embeddings_grow_for_the_adapters_tokenizer_and_never_shrink(
    tokens: int, expected: int, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    adapter = saved(tmp_path, "llama", "CAUSAL_LM")
    vocabulary = Tokenizer(models.WordLevel({f"w{i}": i for i in range(tokens)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=vocabulary, unk_token="w0").save_pretrained(adapter)
    sizes = []
    for library in (peft, peft_fast):
        model = library.AutoPeftModelForCausalLM.from_pretrained(str(adapter))
        sizes.append(model.get_input_embeddings().weight.shape[0])
    assert sizes == [expected, expected]

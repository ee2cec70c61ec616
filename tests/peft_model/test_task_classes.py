"""Each task class on each architecture against the installed peft: names, values, gradients, files, tokens."""

import copy
import inspect
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import CASES, gradients, make_base, make_inputs, make_pair, output_tensors, trainable
from torch import Tensor

import peft_fast
from numerics import assert_as_accurate

NAMES = [
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
]
each_case = pytest.mark.parametrize(("family", "task"), CASES, ids=[f"{family}-{task}" for family, task in CASES])


def together(sets: list[dict[str, Tensor]], exact: dict[str, Tensor]) -> list[Tensor]:
    """Each set as one vector, every tensor in it in units of its largest exact value: one error for a model, since
    the error of a single small tensor is a matter of luck."""
    scale = {key: value.abs().max().clamp(min=torch.finfo(torch.float32).tiny) for key, value in exact.items()}
    return [
        torch.cat([(values[key].double() / scale[key]).flatten().to(values[key].dtype) for key in exact])
        for values in sets
    ]


@each_case
def test_same_seed_same_model(family: str, task: str) -> None:
    theirs, ours = make_pair(family, task)
    assert type(ours).__name__ == type(theirs).__name__
    expected, got = theirs.state_dict(), ours.state_dict()
    assert list(got) == list(expected)
    assert all(torch.equal(got[key], expected[key]) for key in expected)
    assert trainable(ours) == trainable(theirs)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert ours.modules_to_save == theirs.modules_to_save


@each_case
def test_outputs_and_gradients(family: str, task: str) -> None:
    theirs, ours = make_pair(family, task)
    exact = copy.deepcopy(theirs).double()
    inputs = make_inputs(task)
    outputs = [output_tensors(model(**inputs)) for model in (ours, theirs, exact)]
    assert outputs[0].keys() == outputs[1].keys()
    assert_as_accurate("outputs", *together(outputs, outputs[2]))
    for output in outputs:
        sum(value.square().mean() for value in output.values()).backward()
    grads = [gradients(model) for model in (ours, theirs, exact)]
    assert list(grads[0]) == list(grads[1]) and len(grads[0]) >= 4
    assert any(grad.abs().max() > 0 for key, grad in grads[0].items() if "lora_A" in key)
    assert_as_accurate("gradients", *together(grads, grads[2]))


@each_case
def test_files_both_ways(family: str, task: str, tmp_path: Path) -> None:
    theirs, ours = make_pair(family, task)
    inputs = make_inputs(task)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    name = "adapter_model.safetensors"
    assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    here = peft_fast.PeftModel.from_pretrained(make_base(family, task), tmp_path / "theirs")
    there = peft.PeftModel.from_pretrained(make_base(family, task), str(tmp_path / "ours"))
    with torch.no_grad():
        base = output_tensors(make_base(family, task)(**inputs))
        expected = output_tensors(theirs(**inputs))
        outputs = output_tensors(here(**inputs)), output_tensors(there(**inputs))
    assert type(here) is type(ours) and trainable(here) == trainable(there) == []
    for key, value in expected.items():
        assert not torch.allclose(value, base[key])
        # sums of other orders, by which logits near 1 differ in the fifth digit on some CPUs
        torch.testing.assert_close(outputs[0][key], value, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(outputs[1][key], value, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt", "t5", "bart"])
@pytest.mark.parametrize("search", [{}, {"num_beams": 3}, {"do_sample": True}], ids=["greedy", "beam", "sample"])
def test_generate(family: str, search: dict[str, Any]) -> None:
    task = "SEQ_2_SEQ_LM" if family in ("t5", "bart") else "CAUSAL_LM"
    theirs, ours = make_pair(family, task, lora_alpha=100)
    inputs = {key: value[:1] for key, value in make_inputs(task).items() if key != "labels"}
    tokens = []
    for model in (theirs, ours, make_base(family, task)):
        torch.manual_seed(5)
        tokens.append(model.generate(**inputs, **{"max_new_tokens": 6, "do_sample": False, **search}))
    assert torch.equal(tokens[0], tokens[1])
    assert tokens[0].shape != tokens[2].shape or not torch.equal(tokens[0], tokens[2])  # the adapter does something


def test_generate_uses_a_generation_config_set_on_the_model() -> None:
    _, ours = make_pair("llama", "CAUSAL_LM")
    ids = make_inputs("CAUSAL_LM")["input_ids"][:1]
    ours.generation_config = copy.deepcopy(ours.generation_config)
    ours.generation_config.max_new_tokens = 2
    assert ours.generate(ids).shape == (1, ids.shape[1] + 2)


@pytest.mark.parametrize("name", NAMES)
def test_signatures_of_forward_are_pefts(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(library, name).forward).parameters for library in (peft_fast, peft))
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


@pytest.mark.parametrize("name", NAMES)
def test_pefts_import_path(name: str) -> None:
    from peft_fast import peft_model

    assert getattr(peft_model, name) is getattr(peft_fast, name)
    assert issubclass(getattr(peft_model, name), peft_fast.PeftModel)


@pytest.mark.parametrize(
    ("family", "task", "head"),
    [
        ("bert", "SEQ_CLS", "classifier"),
        ("llama", "SEQ_CLS", "score"),
        ("bert", "TOKEN_CLS", "classifier"),
        ("llama", "TOKEN_CLS", "score"),
        ("bert", "QUESTION_ANS", "qa_outputs"),
    ],
)
def test_heads_are_trained_and_saved(family: str, task: str, head: str, tmp_path: Path) -> None:
    _, model = make_pair(family, task, modules_to_save=["pooler"])
    assert model.cls_layer_name == head
    assert any(f"{head}.modules_to_save.default" in name for name in trainable(model))
    assert model.peft_config["default"].modules_to_save[0] == "pooler"
    model.add_adapter("b", peft_fast.LoraConfig(target_modules="all-linear", task_type=task))
    assert head in model.peft_config["b"].modules_to_save
    # loading and saving again does not write the head twice, as PEFT does
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    loaded = peft_fast.PeftModel.from_pretrained(make_base(family, task), tmp_path)
    names = loaded.peft_config["default"].modules_to_save
    assert head in names and len(names) == len(set(names))


def test_question_answering_passes_token_types_on() -> None:
    """peft 0.21.2 takes token_type_ids and drops them; its tuner, called directly, shows what is right."""
    theirs, ours = make_pair("bert", "QUESTION_ANS")
    inputs = make_inputs("QUESTION_ANS")
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    inputs["token_type_ids"][:, 3:] = 1
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs).start_logits, theirs.base_model(**inputs).start_logits)
        assert not torch.allclose(ours(**inputs).start_logits, theirs(**inputs).start_logits)


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS", "QUESTION_ANS"])
def test_offsets_of_activated_lora_are_refused(task: str) -> None:
    _, model = make_pair("llama", task)
    name = "alora_offsets"
    inputs = {**make_inputs(task), name: [1, 1]}
    with pytest.raises(ValueError, match=f"{name} is not supported by peft_fast yet"):
        model(**inputs)
    model(**{**inputs, name: None})
    if task == "CAUSAL_LM":
        with pytest.raises(ValueError, match=f"{name} is not supported by peft_fast yet"):
            model.generate(**inputs)


def test_return_dict_comes_from_the_config() -> None:
    _, model = make_pair("bert", "SEQ_CLS")
    inputs = make_inputs("SEQ_CLS")
    assert isinstance(model(**inputs, return_dict=False), tuple)
    model.config.return_dict = False
    assert isinstance(model(**inputs), tuple)

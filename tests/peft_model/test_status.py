"""Status of layers and models against the installed peft."""

import copy
import dataclasses
from typing import Any

import peft
import pytest
import torch
from families import make_base, make_config, make_pair
from torch import nn

import peft_fast
from peft_fast.peft_model import TunerLayerStatus, TunerModelStatus

CHANGES = {
    "nothing": lambda m, lib: None,
    "another adapter": lambda m, lib: m.add_adapter("b", make_config(lib, "llama", None, target_modules=["k_proj"])),
    "merged": lambda m, lib: m.merge_adapter(),
    "disabled": lambda m, lib: m.base_model.disable_adapter_layers(),
    "some disabled": lambda m, lib: m.base_model.model.model.layers[0].self_attn.q_proj.enable_adapters(False),
    "some merged": lambda m, lib: m.base_model.model.model.layers[0].self_attn.q_proj.merge(),
    "some active": lambda m, lib: m.base_model.model.model.layers[0].self_attn.q_proj.set_adapter([]),
    "some frozen": lambda m, lib: m.base_model.model.model.layers[0].self_attn.q_proj.lora_A.requires_grad_(False),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_status_is_pefts(name: str, task: str) -> None:
    results = []
    for library, model in zip((peft, peft_fast), make_pair("llama", task), strict=True):
        CHANGES[name](model, library)
        layers = [dataclasses.asdict(layer) for layer in library.get_layer_status(model)]
        results.append((layers, dataclasses.asdict(library.get_model_status(model))))
        assert [dataclasses.asdict(layer) for layer in model.get_layer_status()] == layers
    assert results[1] == results[0]


@pytest.mark.parametrize("known", [True, False])
def test_injected_models(known: bool) -> None:
    results = []
    for library in (peft, peft_fast):
        if known:
            base: Any = make_base("bert", "SEQ_CLS")
            config = make_config(library, "bert", None)
        else:
            base, config = nn.Sequential(nn.Linear(3, 4)), library.LoraConfig(target_modules=["0"], r=2)
        library.inject_adapter_in_model(config, base)
        results.append(dataclasses.asdict(library.get_model_status(base)))
    assert results[1] == results[0]
    assert results[1]["base_model_type"] == ("BertForSequenceClassification" if known else "other")


def test_no_adapters() -> None:
    for library in (peft, peft_fast):
        for function in (library.get_layer_status, library.get_model_status):
            with pytest.raises(ValueError, match="No adapter layers found in the model"):
                function(make_base("llama", "CAUSAL_LM"))


def test_fields_are_pefts() -> None:
    for ours, theirs in (
        (TunerLayerStatus, peft.peft_model.TunerLayerStatus),
        (TunerModelStatus, peft.peft_model.TunerModelStatus),
    ):
        assert [field.name for field in dataclasses.fields(ours)] == [f.name for f in dataclasses.fields(theirs)]


def test_four_bit_weights_count_with_both_values_of_a_byte() -> None:
    class Params4bit(nn.Parameter):
        pass

    counts = []
    for model in make_pair("llama", "CAUSAL_LM"):
        layer = copy.deepcopy(model).base_model.model.lm_head
        packed = Params4bit(torch.zeros(10, 1, dtype=torch.uint8), requires_grad=False)
        packed.__class__ = Params4bit
        before = model.get_nb_trainable_parameters()[1] - layer.weight.numel()
        model.base_model.model.lm_head.weight = packed
        counts.append(model.get_nb_trainable_parameters()[1] - before)
    assert counts == [20, 20]

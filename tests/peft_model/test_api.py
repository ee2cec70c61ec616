"""The surface: methods and functions are there and take PEFT's arguments, by PEFT's names and in PEFT's order."""

import inspect
from importlib import import_module
from typing import Any

import peft
import pytest
import torch

import peft_fast

MODULES = {
    "peft_model": [n for n in peft_fast.__all__ if n.startswith("PeftModel")],
    "tuners.lora.model": ["LoraModel"],
    "tuners.lora.layer": ["Linear", "Embedding", "Conv2d", "LoraLayer"],
    "tuners.tuners_utils": ["BaseTuner", "BaseTunerLayer"],
}
# of features that are refused by name (docs: "What is not supported"), or private to PEFT's implementation
ABSENT = set(
    "arrow_init corda_init frozen_peft_weight_names get_base_weight loftq_init lora_ga_init lora_variants mica_init "
    "olora_init orthogonal_init pissa_init quantization_backend resolve_lora_variant set_base_weight "
    "uses_shared_state".split()
)


def parameters(function: Any) -> list[str]:
    """Names of those that have one; *args and **kwargs take anything."""
    anything = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [name for name, p in inspect.signature(function).parameters.items() if p.kind not in anything]


def begins_like(ours: list[str], theirs: list[str]) -> bool:
    """PEFT's parameters, in order; more may follow."""
    return ours[: len(theirs)] == theirs


@pytest.mark.parametrize("module, name", [(module, name) for module, names in MODULES.items() for name in names])
def test_methods_take_pefts_arguments(module: str, name: str) -> None:
    theirs = getattr(import_module(f"peft.{module}"), name)
    ours = getattr(import_module(f"peft_fast.{module}"), name)
    of_torch = set(dir(torch.nn.Module))
    own = [base for base in theirs.__mro__ if base.__module__.startswith("peft")]
    for attribute in {attribute for base in own for attribute in vars(base)}:
        expected = getattr(theirs, attribute)
        if attribute.startswith("_") or attribute in of_torch | ABSENT or not inspect.isfunction(expected):
            continue
        # what is the base model's own is reached through __getattr__
        if not hasattr(ours, attribute):
            assert attribute == "prepare_inputs_for_generation", f"{name}.{attribute} is missing"
            continue
        assert begins_like(parameters(getattr(ours, attribute)), parameters(expected)), f"{name}.{attribute}"


@pytest.mark.parametrize("name", [n for n in peft_fast.__all__ if inspect.isfunction(getattr(peft, n, None))])
def test_functions_take_pefts_arguments(name: str) -> None:
    assert begins_like(parameters(getattr(peft_fast, name)), parameters(getattr(peft, name)))

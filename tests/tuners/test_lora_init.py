"""Initial LoRA weights: bit for bit peft's after the same torch.manual_seed."""

import copy
from typing import Any

import peft
import pytest
import torch
from lora_pairs import BASES, base_and_targets, logits, ours, theirs
from torch import nn

from peft_fast.tuners.lora import LoraConfig, LoraModel
from peft_fast.tuners.lora.layer import Conv2d, Linear


def _both(name: str, **config: Any) -> tuple[Any, Any, nn.Module]:
    """(ours, peft's, base); both drew the same number of random numbers."""
    base, targets = base_and_targets(name)
    models, states = [], []
    for make in (ours, theirs):
        torch.manual_seed(11)
        models.append(make(base, **dict(r=4, lora_alpha=6, target_modules=targets) | config))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    return models[0], models[1], base


@pytest.mark.parametrize("method", [True, False, "gaussian"])
@pytest.mark.parametrize("name", BASES)
def test_same_random_numbers_as_peft(name: str, method: bool | str) -> None:
    mine, their, _ = _both(name, init_lora_weights=method)
    expected = their.state_dict()
    for key, value in mine.state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_lora_bias_and_a_second_adapter_draw_as_peft() -> None:
    mine, their, _ = _both("bert", lora_bias=True, init_lora_weights=False)
    for model, config_cls in ((mine, LoraConfig), (their, peft.LoraConfig)):
        torch.manual_seed(12)
        model.peft_config["b"] = config_cls(r=3, target_modules=["dense"], lora_bias=True)
        model.inject_adapter(model.model, "b")
    for key, value in their.state_dict().items():
        assert torch.equal(mine.state_dict()[key], value), key


@pytest.mark.parametrize("method", [True, "gaussian"])
@pytest.mark.parametrize("name", BASES)
def test_an_untrained_adapter_changes_nothing(name: str, method: bool | str) -> None:
    mine, _, base = _both(name, init_lora_weights=method)
    torch.testing.assert_close(logits(mine), logits(base))


@pytest.mark.parametrize("method", ["olora", "pissa", "pissa_niter_4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_factors_of_the_base(name: str, dtype: torch.dtype, method: str) -> None:
    """A, B and the rest of the base are peft's; together they are the old base."""
    base, targets = base_and_targets(name)
    base, models = base.to(dtype), []
    for make in (ours, theirs):
        torch.manual_seed(11)
        if make is theirs and (name, method) == ("gpt2", "olora"):
            continue  # peft forgets that Conv1D stores its weight transposed: RuntimeError
        models.append(make(base, r=4, lora_alpha=6, target_modules=targets, init_lora_weights=method))
    mine = models[0]
    for key, value in models[-1].state_dict().items():
        torch.testing.assert_close(mine.state_dict()[key], value, rtol=1e-4, atol=1e-5, msg=key)
    changed = 0
    for key, module in mine.model.named_modules():
        if isinstance(module, Linear):
            old = base.get_submodule(key).weight
            changed += not torch.equal(module.weight, old)
            whole = module.weight.float() + module.get_delta_weight("default").float()
            # the rest is rounded to the base's dtype, A and B are too, before they are multiplied
            size = module.lora_B["default"].weight.norm() * module.lora_A["default"].weight.norm()
            atol = max(8 * torch.finfo(dtype).eps * size.item(), 1e-5)
            torch.testing.assert_close(whole, old.float(), rtol=0, atol=atol, msg=key)
    assert changed == len(mine.targeted_module_names)


def test_pissa_keeps_the_largest_singular_values() -> None:
    weight = torch.randn(20, 24)
    layer = nn.Linear(24, 20)
    layer.weight.data = weight.clone()
    mine = Linear(layer, "default", LoraConfig(init_lora_weights="pissa"), r=5, lora_alpha=10)
    rest = torch.linalg.svdvals(layer.weight)
    torch.testing.assert_close(rest[:15], torch.linalg.svdvals(weight)[5:], rtol=1e-4, atol=1e-5)
    assert mine.lora_A["default"].weight.is_contiguous() and layer.weight.is_contiguous()


def test_embeddings_start_as_usual_beside_pissa() -> None:
    base = base_and_targets("llama-embeddings")[0]
    mine = ours(base, r=4, target_modules=["embed_tokens"], init_lora_weights="pissa")
    layer = mine.model.model.embed_tokens
    assert torch.equal(layer.lora_embedding_A["default"], torch.zeros(4, 51))
    assert layer.lora_embedding_B["default"].abs().min() > 0


def test_low_cpu_mem_usage_still_changes_the_base() -> None:
    """A saved pissa adapter stands on what is left of the base, so loading one has to compute it again."""
    base, targets = base_and_targets("llama")
    config = dict(r=4, target_modules=targets, init_lora_weights="pissa")
    expected = LoraModel(copy.deepcopy(base), LoraConfig(**config), "default")
    model = LoraModel(copy.deepcopy(base), LoraConfig(**config), "default", low_cpu_mem_usage=True)
    for key, value in expected.state_dict().items():
        if "lora_" not in key:
            assert torch.equal(model.state_dict()[key], value), key
    model.load_state_dict(expected.state_dict(), assign=True)
    assert torch.equal(logits(model), logits(expected))


def test_a_rank_above_the_number_of_singular_values() -> None:
    """The factors have the rank that the config, and a file, says."""
    for method in ("pissa", "olora", "pissa_niter_2"):
        weight = torch.randn(5, 12)
        layer = nn.Linear(12, 5)
        layer.weight.data = weight.clone()
        mine = Linear(layer, "default", LoraConfig(init_lora_weights=method), r=7, lora_alpha=3)
        assert mine.lora_A["default"].weight.shape == (7, 12) and mine.lora_B["default"].weight.shape == (5, 7)
        whole = layer.weight + mine.get_delta_weight("default")
        torch.testing.assert_close(whole, weight, rtol=1e-4, atol=1e-5)


def test_a_refused_initialisation_changes_no_base_weight() -> None:
    for last in (nn.Conv2d(2, 2, 1), nn.Linear(8, 8).double()):
        base = nn.Sequential(nn.Linear(8, 8), last)
        before = {key: value.clone() for key, value in base.state_dict().items()}
        with pytest.raises((ValueError, TypeError), match="init_lora_weights='pissa'"):
            LoraModel(base, LoraConfig(target_modules=["0", "1"], init_lora_weights="pissa"), "default")
        assert all(torch.equal(base.state_dict()[key], value) for key, value in before.items())


def test_errors() -> None:
    with pytest.raises(TypeError, match="needs a base weight in fp32, fp16 or bf16"):
        Linear(nn.Linear(8, 8).double(), "default", LoraConfig(init_lora_weights="pissa"), r=2, lora_alpha=1)
    with pytest.raises(ValueError, match="Unknown initialization init_lora_weights='olora' for Conv2d"):
        Conv2d(nn.Conv2d(4, 4, 1), "default", LoraConfig(init_lora_weights="olora"), r=2, lora_alpha=1)
    layer = Linear(nn.Linear(8, 8), "default", LoraConfig(), r=2, lora_alpha=1)
    for method in ("eva", "pissa_niter_x"):
        with pytest.raises(ValueError, match="Unknown initialization"):
            layer.reset_lora_parameters("default", method)

"""What an adapter is when nobody says so: mode, gradients, hooks on its parts; and whose the base's weights are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lora_pairs import llama as random_llama
from safetensors.torch import load_file, save_file
from torch import nn

from peft_fast import (
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)  # fmt: skip


def llama() -> nn.Module:
    torch.manual_seed(7)
    return random_llama()


def linear(**options: Any) -> Any:
    return get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(**dict(r=2, target_modules=["0"]) | options))


# ---------------------------------------------------------------------------------------------------------------- mode
PROMPT = dict(task_type="CAUSAL_LM", num_virtual_tokens=3)
CONFIGS: dict[str, Any] = {
    "lora": lambda: LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "p-tuning": lambda: PromptEncoderConfig(**PROMPT, encoder_reparameterization_type="LSTM", encoder_dropout=0.5),
    "prefix": lambda: PrefixTuningConfig(**PROMPT, prefix_projection=True, encoder_hidden_size=8),
    "prompt": lambda: PromptTuningConfig(**PROMPT),
    "multitask": lambda: MultitaskPromptTuningConfig(**PROMPT, num_tasks=2),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("method", CONFIGS)
def test_new_modules_take_the_mode_of_what_they_adapt(method: str, training: bool) -> None:
    model = get_peft_model(llama().train(training), CONFIGS[method]())
    assert [name for name, module in model.named_modules() if module.training is not training] == []


def test_dropout_is_off_on_a_base_in_evaluation() -> None:
    model = get_peft_model(
        nn.Sequential(nn.Linear(8, 8)).eval(), LoraConfig(r=2, lora_dropout=0.9, target_modules=["0"])
    )
    nn.init.normal_(model.base_model.model[0].lora_B["default"].weight)
    x = torch.randn(4, 8)
    assert torch.equal(model(x), model(x))


# ----------------------------------------------------------------------------------------------------------- gradients
def trainable(model: Any) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_frozen_adapters_stay_frozen_when_they_are_disabled_and_enabled() -> None:
    model = linear(inference_mode=True)
    model.base_model.enable_adapter_layers()
    assert trainable(model) == []
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()
    assert trainable(model) == []


def test_what_was_trainable_is_so_again_tensor_by_tensor() -> None:
    model = linear()
    model.base_model.model[0].lora_A["default"].weight.requires_grad = False  # as LoRA-FA does
    before = trainable(model)
    assert len(before) == 1
    for _ in range(2):
        model.base_model.disable_adapter_layers()
        assert trainable(model) == []
    model.base_model.enable_adapter_layers()
    assert trainable(model) == before


def test_what_is_said_while_they_are_disabled_counts() -> None:
    model = linear()
    model.base_model.disable_adapter_layers()
    model.base_model.set_requires_grad("default", False)
    model.base_model.enable_adapter_layers()
    assert trainable(model) == []


# --------------------------------------------------------------------------------------------------------------- hooks
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("part", ["lora_dropout", "lora_A", "lora_B"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_hooks_on_the_parts_of_an_adapter_run(part: str, kind: str, p: float) -> None:
    model, seen = linear(lora_dropout=p), []
    nn.init.normal_(model.base_model.model[0].lora_B["default"].weight)
    module = getattr(model.base_model.model[0], part)["default"]
    getattr(module, f"register_{kind}_hook")(lambda *args: seen.append(1))
    for _ in range(2):
        model(torch.randn(4, 8, requires_grad=True)).sum().backward()
        model.eval()
    assert len(seen) == 2


def test_a_hook_that_changes_something_changes_it_in_mixed_batches_too() -> None:
    model = linear().eval()
    layer = model.base_model.model[0]
    nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(4, 8)
    layer.lora_dropout["default"].register_forward_hook(lambda module, args, out: out * 3)
    torch.testing.assert_close(model(x, adapter_names=["default"] * 4), model(x), rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- isolation
@pytest.fixture
def adapters(tmp_path: Path) -> Any:
    """Directories: "plain", and "head", whose file has an lm_head and embeddings of its own; "same", the base's."""
    for name in ("plain", "head", "same"):
        model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        model.save_pretrained(tmp_path / name, save_embedding_layers=name != "plain")
    file = tmp_path / "head" / "adapter_model.safetensors"
    tensors = load_file(file)
    changed = [name for name in tensors if "lora" not in name]
    assert changed
    save_file({name: value + (name in changed) for name, value in tensors.items()}, file)
    return tmp_path


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(8)[None]).logits


def test_a_second_adapter_does_not_change_the_base_that_the_first_one_uses(adapters: Path) -> None:
    model = PeftModel.from_pretrained(llama(), adapters / "plain", "plain")
    before = logits(model)
    with pytest.raises(ValueError, match=r"differs from the base model's weight, which other adapters use .*'plain'"):
        model.load_adapter(adapters / "head", "head")
    assert torch.equal(logits(model), before) and list(model.peft_config) == ["plain"]
    model.load_adapter(adapters / "same", "same")
    assert torch.equal(logits(model), before)


def test_alone_it_may_bring_them_and_who_comes_later_is_told(adapters: Path) -> None:
    model = PeftModel.from_pretrained(llama(), adapters / "head", "head")
    with pytest.warns(UserWarning, match=r"'plain' runs on a base model that adapter 'head' has changed: its file"):
        model.load_adapter(adapters / "plain", "plain")
    model.load_adapter(adapters / "head", "head")  # reloading it changes nothing for the others


@pytest.mark.parametrize("method", ["pissa", "olora", "pissa_niter_2"])
def test_an_initialisation_that_changes_the_base_needs_it_for_itself(adapters: Path, method: str) -> None:
    model = PeftModel.from_pretrained(llama(), adapters / "plain", "plain")
    before = logits(model)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=method)
    with pytest.raises(
        ValueError, match=f"init_lora_weights='{method}' changes the base weights, which the adapters plain"
    ):
        model.add_adapter("second", config)
    assert torch.equal(logits(model), before)
    first = get_peft_model(llama(), config, "first")
    with pytest.warns(UserWarning, match="'plain' runs on a base model that adapter 'first' has changed: init_lora"):
        first.load_adapter(adapters / "plain", "plain")

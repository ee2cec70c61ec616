"""Merged adapters: what changes while they are merged takes part, and what is taken out again is what was put in."""

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_fast import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict


def model_with(base: nn.Module, *names: str, **options: Any) -> Any:
    """Adapters of these names on the layer "0", all active, with random weights."""
    torch.manual_seed(0)
    config = LoraConfig(**dict(r=2, target_modules=["0"]) | options)
    model = get_peft_model(nn.Sequential(base), config, names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    model.base_model.set_adapter(list(names))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.5)
    return model.eval()


BASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(6, 5), lambda: torch.randn(3, 6)),
    "embedding": (lambda: nn.Embedding(9, 5), lambda: torch.randint(9, (3, 4))),
    "conv": (lambda: nn.Conv2d(3, 5, 3, padding=1), lambda: torch.randn(2, 3, 6, 6)),
}


def layer_of(model: Any) -> Any:
    return model.base_model.model[0]


@pytest.mark.parametrize("base", BASES)
def test_one_of_two_active_adapters_is_merged(base: str) -> None:
    make, inputs = BASES[base]
    model, x = model_with(make(), "a", "b"), inputs()
    before = model(x)
    model.merge_adapter(["a"])
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="additionally merging"):
        model.merge_adapter(["a", "b"])
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "set_scale": lambda model: layer_of(model).set_scale("a", 3.0),
    "scale_layer": lambda model: layer_of(model).scale_layer(2.0),
    "unscale_layer": lambda model: layer_of(model).unscale_layer(0.25),
    "reset": lambda model: layer_of(model).reset_lora_parameters("a", "gaussian" if layer_of(model).lora_A else True),
    "state dict": lambda model: set_peft_model_state_dict(
        model, {k: v * 2 + 0.1 for k, v in get_peft_model_state_dict(model, adapter_name="a").items()}, "a"
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("base", BASES)
def test_a_change_of_a_merged_adapter_takes_effect_and_leaves_the_base_alone(base: str, change: str) -> None:
    make, inputs = BASES[base]
    model, x = model_with(make(), "a", "b"), inputs()
    original = layer_of(model).base_layer.weight.detach().clone()
    unmerged = copy.deepcopy(model)
    model.merge_adapter(["a", "b"])
    for changed in (unmerged, model):
        torch.manual_seed(1)
        CHANGES[change](changed)
    assert layer_of(model).merged_adapters == ["a", "b"]
    torch.testing.assert_close(model(x), unmerged(x), rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(layer_of(model).base_layer.weight, original, rtol=1e-5, atol=1e-5)


def test_weights_loaded_from_a_directory_over_a_merged_adapter() -> None:
    model, x = model_with(nn.Linear(6, 5), "a"), torch.randn(3, 6)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        expected = model(x)
        with torch.no_grad():
            layer_of(model).lora_A["a"].weight.mul_(5.0)
        model.merge_adapter()
        model.load_adapter(f"{folder}/a", "a")
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    "options", [dict(lora_alpha=40), dict(use_rslora=True), dict(alpha_pattern={"0": 3.0})], ids=str
)
def test_an_adapter_that_is_loaded_again_has_the_scaling_of_its_file(options: dict[str, Any], merged: bool) -> None:
    saved, x = model_with(nn.Linear(6, 5), "a", **options), torch.randn(3, 6)
    model = model_with(nn.Linear(6, 5), "a")
    model.base_model.model.load_state_dict({k: v for k, v in saved.base_model.model.state_dict().items()})
    if merged:
        model.merge_adapter()
    with tempfile.TemporaryDirectory() as folder:
        saved.save_pretrained(folder)
        model.load_adapter(f"{folder}/a", "a")
    assert layer_of(model).scaling == layer_of(saved).scaling
    torch.testing.assert_close(model(x), saved(x), rtol=1e-4, atol=1e-5)


def test_what_was_changed_behind_its_back_is_still_taken_out_whole() -> None:
    model = model_with(nn.Linear(6, 5), "a")
    original = layer_of(model).base_layer.weight.detach().clone()
    model.merge_adapter()
    layer_of(model).lora_B["a"].weight.data.fill_(7.0)
    layer_of(model).scaling["a"] = 50.0
    model.unmerge_adapter()
    torch.testing.assert_close(layer_of(model).base_layer.weight, original, rtol=1e-5, atol=1e-6)


def test_a_merged_adapter_is_not_deleted() -> None:
    model = model_with(nn.Linear(6, 5), "a", "b")
    model.merge_adapter(["a"])
    with pytest.raises(ValueError, match="Cannot delete adapter"):
        model.delete_adapter("a")
    with pytest.raises(ValueError, match="Cannot delete adapter"):
        layer_of(model).delete_adapter("a")
    assert layer_of(model).merged_adapters == ["a"] and "a" in model.peft_config


def test_a_merge_that_fails_gives_back_what_was_merged_before() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    config = LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False)
    model = get_peft_model(base, config, "a")
    model.add_adapter("b", config)
    model.merge_adapter(["a"])
    weights = [layer.base_layer.weight.clone() for layer in model.base_model.model]
    model.base_model.model[1].lora_A["b"].weight.data.fill_(float("nan"))
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="NaNs"):
        model.merge_adapter(["b"], safe_merge=True)
    for layer, weight in zip(model.base_model.model, weights, strict=True):
        assert layer.merged_adapters == ["a"]
        torch.testing.assert_close(layer.base_layer.weight, weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["parametrizations", "hook"])
def test_a_weight_that_is_made_anew_in_every_forward_cannot_be_merged_into(kind: str) -> None:
    if kind == "hook":
        with pytest.warns(FutureWarning):
            base: Any = torch.nn.utils.weight_norm(nn.Linear(6, 5))
    else:
        base = torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 5))
    model, x = model_with(base, "a"), torch.randn(3, 6)
    before = model(x)
    for safe in (False, True):
        with pytest.raises(ValueError, match="is made anew in every forward"):
            model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_convolution_pads_as_its_base_does(dims: int, mode: str) -> None:
    kind: Any = getattr(nn, f"Conv{dims}d")
    model = model_with(kind(3, 5, 3, padding=1, padding_mode=mode), "a")
    x = torch.randn(2, 3, *[6] * dims)
    before = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")
def test_an_adapter_of_a_convolution_in_groups_is_loaded_again() -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Conv2d(4, 6, 3, groups=2)

    model, x = model_with(base(), "default", r=4), torch.randn(2, 4, 5, 5)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(nn.Sequential(base()), folder)
    torch.testing.assert_close(loaded(x), model(x))

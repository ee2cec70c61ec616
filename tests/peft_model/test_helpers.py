"""Temporary settings restore what they changed, exactly and in every case; the rest of PEFT's helpers."""

import inspect
from pathlib import Path
from typing import Any

import peft
import peft.functional
import peft.helpers
import pytest
import torch
from torch import nn

from peft_fast import functional, helpers
from peft_fast.tuners.lora import LoraConfig, LoraModel
from peft_fast.tuners.tuners_utils import tuner_layers


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The network."""
        return self.b(self.a(x))


FIELDS = dict(r=3, lora_alpha=5, target_modules=["a", "b"], init_lora_weights=False, use_rslora=True)


def pair() -> tuple[Any, Any]:
    """peft's tuner and ours with equal weights and two adapters."""
    tuners = []
    for tuner_class, config_class in ((peft.LoraModel, peft.LoraConfig), (LoraModel, LoraConfig)):
        torch.manual_seed(0)
        tuner = tuner_class(Net(), {"default": config_class(**FIELDS)}, "default")
        tuner.peft_config["second"] = config_class(**{**FIELDS, "lora_alpha": 0.3})
        tuner.inject_adapter(tuner.model, "second")
        tuner.set_adapter(["default", "second"])
        tuners.append(tuner)
    tuners[0].load_state_dict(tuners[1].state_dict())
    return tuners[0], tuners[1]


def scalings(tuner: nn.Module) -> list[dict[str, float]]:
    return [dict(layer.scaling) for layer in tuner_layers(tuner)]


@pytest.mark.parametrize("multiplier", [0, 0.3, 1 / 3, 2])
def test_rescale_as_peft(multiplier: float) -> None:
    theirs, ours = pair()
    x = torch.randn(3, 4)
    before, y = scalings(ours), ours(x)
    with peft.helpers.rescale_adapter_scale(theirs, multiplier), helpers.rescale_adapter_scale(ours, multiplier):
        assert scalings(ours) == [{name: s * multiplier for name, s in layer.items()} for layer in before]
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
        assert torch.equal(ours(x), y) is False
    assert scalings(ours) == before  # exactly: 1/3 * 3 would not do
    assert torch.equal(ours(x), y)


def test_rescale_restores_after_an_exception() -> None:
    _, ours = pair()
    before = scalings(ours)
    with pytest.raises(KeyboardInterrupt), helpers.rescale_adapter_scale(ours, 0.7):
        assert scalings(ours) != before
        raise KeyboardInterrupt
    assert scalings(ours) == before


def test_rescale_nests_and_leaves_new_and_deleted_adapters_alone() -> None:
    _, ours = pair()
    before = scalings(ours)
    with helpers.rescale_adapter_scale(ours, 0.7):
        with helpers.rescale_adapter_scale(ours.model, 0.1):
            pass
        ours.peft_config["third"] = LoraConfig(**FIELDS)
        ours.inject_adapter(ours.model, "third")
        ours.delete_adapter("second")
    expected = [{"default": layer["default"], "third": layer["default"]} for layer in before]
    assert scalings(ours) == expected


def test_rescale_refusals() -> None:
    _, ours = pair()
    before = scalings(ours)
    with pytest.raises(TypeError, match="multiplier should be of type float"), helpers.rescale_adapter_scale(ours, "2"):
        pass
    with pytest.raises(ValueError, match="only supported for models with `LoraLayer`s"):
        with helpers.rescale_adapter_scale(Net(), 2.0):
            pass
    assert scalings(ours) == before


@pytest.mark.parametrize("active", [True, False])
def test_disable_input_dtype_casting(active: bool) -> None:
    _, ours = pair()
    layers = tuner_layers(ours)
    layers[0].cast_input_dtype_enabled = False
    x = torch.zeros(1, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="on purpose"), helpers.disable_input_dtype_casting(ours, active=active):
        assert [layer.cast_input_dtype_enabled for layer in layers] == [False, not active]
        assert (layers[1]._cast_input_dtype(x, torch.float32).dtype == torch.bfloat16) == active
        raise RuntimeError("on purpose")
    assert [layer.cast_input_dtype_enabled for layer in layers] == [False, True]
    assert layers[1]._cast_input_dtype(x, torch.float32).dtype == torch.float32
    assert layers[1]._cast_input_dtype(None, torch.float32) is None


def test_check_if_peft_model(tmp_path: Path) -> None:
    peft.LoraConfig(target_modules=["a"]).save_pretrained(tmp_path / "adapter")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text("{")
    (tmp_path / "other").mkdir()
    for name, expected in (("adapter", True), ("broken", False), ("other", False), ("missing", False)):
        assert helpers.check_if_peft_model(str(tmp_path / name)) is expected


def test_signatures() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def get_base_model(self) -> nn.Module:
            return self.net

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.net(*args, **kwargs)

    model, x = Wrapped(), torch.randn(2, 4)
    expected = model(x)
    helpers.update_signature(model, "forward")
    assert (
        inspect.getdoc(model.forward) == "The network." and model.forward.__annotations__ == Net.forward.__annotations__
    )
    assert torch.equal(model.forward(x), expected)
    helpers.update_signature(model)  # it has no generate
    with pytest.raises(ValueError, match="method train is not supported"):
        helpers.update_signature(model, "train")


def test_functional_has_pefts_names() -> None:
    assert set(functional.__all__) == set(peft.functional.__all__)
    for name in functional.__all__:
        ours = list(inspect.signature(getattr(functional, name)).parameters)
        theirs = list(inspect.signature(getattr(peft.functional, name)).parameters)
        assert ours[: len(theirs)] == theirs, name

"""add_weighted_adapter: every type beside the installed peft, after the same torch.manual_seed."""

from typing import Any

import peft
import pytest
import torch
from lora_pairs import base_and_targets, logits, ours, randomize, same_weights, theirs
from torch import nn

from peft_fast.tuners.lora import LoraConfig
from peft_fast.tuners.lora.layer import LoraLayer
from peft_fast.tuners.lora.weighted import COMBINATION_TYPES

PRUNING = [kind for kind in COMBINATION_TYPES if kind not in ("svd", "linear", "cat")]


def _pair(name: str = "llama", ranks: tuple[int, ...] = (4, 4, 4), **config: Any) -> tuple[Any, Any]:
    """Two models, ours and peft's, with the adapters a, b, c; b adapts less than the others."""
    base, targets = base_and_targets(name)
    models = []
    for make, config_cls in ((ours, LoraConfig), (theirs, peft.LoraConfig)):
        model = make(base, "a", r=ranks[0], lora_alpha=6, target_modules=targets, **config)
        model.peft_config["b"] = config_cls(r=ranks[1], lora_alpha=9, target_modules=targets[:1], **config)
        model.inject_adapter(model.model, "b")
        model.peft_config["c"] = config_cls(r=ranks[2], lora_alpha=4, target_modules=targets[:2], **config)
        model.inject_adapter(model.model, "c")
        models.append(model)
    randomize(models[0])
    same_weights(*models)
    return models[0], models[1]


def _combine(models: tuple[Any, Any], *args: Any, **kwargs: Any) -> None:
    for model in models:
        torch.manual_seed(21)
        model.add_weighted_adapter(*args, adapter_name="new", **kwargs)


def _assert_same(mine: Any, their: Any) -> None:
    """Equal products B A and shapes, in every layer: singular vectors are free in their signs."""
    layers = {n: m for n, m in mine.named_modules() if isinstance(m, LoraLayer) and "new" in m.scaling}
    others = dict(their.named_modules())
    assert layers
    for name, layer in layers.items():
        other = others[name]
        delta, expected = layer.get_delta_weight("new"), other.get_delta_weight("new")
        assert expected.abs().max() > 1e-3 or not expected.any()
        torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-5, msg=name)
        assert {n: p.shape for n, p in layer.named_parameters()} == {n: p.shape for n, p in other.named_parameters()}
        assert layer.scaling["new"] == other.scaling["new"] == 1
    assert mine.peft_config["new"].target_modules == their.peft_config["new"].target_modules
    assert mine.peft_config["new"].r == their.peft_config["new"].r


@pytest.mark.parametrize("kind", COMBINATION_TYPES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "llama-embeddings"])
def test_all_types(name: str, kind: str) -> None:
    models = _pair(name)
    kwargs = {"density": 0.4} if kind in PRUNING else {}
    _combine(models, ["a", "b", "c"], [0.7, -1.3, 2.0], combination_type=kind, **kwargs)
    _assert_same(*models)


@pytest.mark.parametrize("kind", ["ties", "dare_ties", "ties_svd", "dare_ties_svd"])
def test_frequency(kind: str) -> None:
    models = _pair()
    _combine(models, ["a", "c"], [1.0, 0.5], combination_type=kind, density=0.6, majority_sign_method="frequency")
    _assert_same(*models)


@pytest.mark.parametrize("options", [{"svd_rank": 2}, {"svd_rank": 9, "svd_full_matrices": False}, {"svd_clamp": 0.9}])
def test_svd_options(options: dict[str, Any]) -> None:
    models = _pair(ranks=(4, 2, 6))
    _combine(models, ["a", "b", "c"], [0.7, 1.3, 2.0], combination_type="svd", **options)
    _assert_same(*models)


def test_cat_and_svd_of_enough_rank_are_exact() -> None:
    for kind, options in (("cat", {}), ("svd", {"svd_rank": 12})):
        mine, their = _pair(ranks=(4, 2, 6))
        _combine((mine, their), ["a", "b", "c"], [0.7, -1.3, 2.0], combination_type=kind, **options)
        _assert_same(mine, their)
        for layer in mine.modules():
            if isinstance(layer, LoraLayer):
                parts = {"a": 0.7, "b": -1.3, "c": 2.0}
                expected = sum(w * layer.get_delta_weight(n) for n, w in parts.items() if n in layer.scaling)
                torch.testing.assert_close(layer.get_delta_weight("new"), expected, rtol=1e-4, atol=1e-5)


def test_one_adapter_is_always_linear() -> None:
    models = _pair()
    _combine(models, ["a"], [1.7], combination_type="svd")
    _assert_same(*models)


@pytest.mark.filterwarnings("ignore:The density")
def test_density_one_prunes_nothing() -> None:
    models = _pair()
    _combine(models, ["a", "c"], [1.7, 0.2], combination_type="magnitude_prune", density=1.0)
    _assert_same(*models)
    with pytest.warns(UserWarning, match="no pruning will be performed"):
        models[0].add_weighted_adapter(["a", "c"], [1, 1], "again", "ties", density=1.0)


@pytest.mark.parametrize("kind", ["svd", "cat", "linear"])
def test_convolutions(kind: str) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(6, 8, 3), nn.Conv2d(8, 5, 1))
    models = []
    for make, config_cls in ((ours, LoraConfig), (theirs, peft.LoraConfig)):
        model = make(base, "a", r=3, target_modules=["0", "1"])
        model.peft_config["b"] = config_cls(r=3, target_modules=["0", "1"])
        model.inject_adapter(model.model, "b")
        models.append(model)
    randomize(models[0])
    same_weights(*models)
    _combine((models[0], models[1]), ["a", "b"], [0.5, 1.5], combination_type=kind)
    _assert_same(*models)


def test_what_peft_gets_wrong() -> None:
    """rsLoRA's scaling, ranks that differ by layer, biases: the combination is what its definition says."""
    mine, _ = _pair(use_rslora=True)
    mine.add_weighted_adapter(["a", "c"], [1.0, 2.0], "new", "cat")
    layer = mine.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["new"] == 1 and not mine.peft_config["new"].use_rslora
    expected = layer.get_delta_weight("a") + 2 * layer.get_delta_weight("c")
    torch.testing.assert_close(layer.get_delta_weight("new"), expected, rtol=1e-4, atol=1e-5)

    mine, _ = _pair(rank_pattern={"q_proj": 2})
    mine.add_weighted_adapter(["a", "c"], [1.0, 2.0], "new", "linear")
    layer = mine.model.model.layers[0].self_attn.q_proj
    assert layer.lora_A["new"].weight.shape[0] == layer.r["new"] == 4  # what the config says, filled up with zeros
    assert not layer.lora_A["new"].weight[2:].any() and layer.lora_A["new"].weight[:2].all()

    mine, _ = _pair("bert", lora_bias=True)
    mine.add_weighted_adapter(["a", "c"], [1.0, 2.0], "new", "svd")
    layer = mine.model.bert.encoder.layer[0].attention.self.query
    expected = layer.lora_B["a"].bias * layer.scaling["a"] + 2 * layer.lora_B["c"].bias * layer.scaling["c"]
    torch.testing.assert_close(layer.lora_B["new"].bias, expected)


def test_pissa_adapters_leave_the_base_alone() -> None:
    base, targets = base_and_targets("llama")
    mine = ours(base, "a", r=4, lora_alpha=6, target_modules=targets, init_lora_weights="pissa")
    mine.peft_config["c"] = LoraConfig(r=4, lora_alpha=4, target_modules=targets[:2])
    mine.inject_adapter(mine.model, "c")
    before = {k: v.clone() for k, v in mine.state_dict().items() if "base_layer" in k}
    mine.add_weighted_adapter(["a", "c"], [1.0, 2.0], "new", "cat")
    assert all(torch.equal(mine.state_dict()[k], v) for k, v in before.items())


def test_the_new_adapter_is_frozen_and_can_be_used() -> None:
    mine, _ = _pair()
    trained = {n for n, p in mine.named_parameters() if p.requires_grad}
    before = logits(mine)
    mine.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new", "cat")
    assert {n for n, p in mine.named_parameters() if p.requires_grad} == trained
    assert torch.equal(logits(mine), before) and mine.active_adapters == ["a"]
    mine.set_adapter(["a", "b"])
    both = logits(mine)
    mine.set_adapter("new")
    torch.testing.assert_close(logits(mine), both, rtol=1e-4, atol=1e-5)
    mine.add_weighted_adapter(["a"], [5.0], "new")  # exists: nothing happens
    torch.testing.assert_close(logits(mine), both, rtol=1e-4, atol=1e-5)


def test_half_precision_adapters() -> None:
    mine, _ = _pair()
    mine.to(torch.bfloat16)
    for kind in COMBINATION_TYPES:
        mine.add_weighted_adapter(["a", "c"], [1.0, 2.0], kind, kind, density=0.5)
        layer = mine.model.model.layers[0].self_attn.q_proj
        assert layer.lora_A[kind].weight.dtype == torch.bfloat16 and layer.lora_A[kind].weight.isfinite().all()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(adapters=["a", "x"], weights=[1, 1]), "Adapter x does not exist"),
        (dict(adapters=["a"], weights=[1, 1]), "must have one length"),
        (dict(adapters=[], weights=[]), "at least one adapter"),
        (dict(adapters=["a", "b"], weights=[1, 1], combination_type="sum"), "Invalid combination_type: sum"),
        (dict(adapters=["a", "b"], weights=[1, 1], combination_type="linear"), "must have the same r value"),
        (dict(adapters=["a", "c"], weights=[1, 1], combination_type="ties"), "needs a density"),
        (dict(adapters=["a", "c"], weights=[1, 1], combination_type="ties", density=-1.0), "needs a density"),
        (
            dict(adapters=["a", "c"], weights=[1, 1], combination_type="ties", density=0.5, majority_sign_method="x"),
            "'total' or 'frequency'",
        ),
    ],
)
def test_errors_change_nothing(kwargs: dict[str, Any], message: str) -> None:
    mine = _pair(ranks=(4, 2, 4))[0]
    before = list(mine.state_dict()), list(mine.peft_config)
    with pytest.raises(ValueError, match=message):
        mine.add_weighted_adapter(adapter_name="new", **kwargs)
    assert (list(mine.state_dict()), list(mine.peft_config)) == before


def test_ranks_that_differ_in_a_layer_only_are_refused_and_rolled_back() -> None:
    base, _ = base_and_targets("llama")
    mine = ours(base, "a", r=4, target_modules=["q_proj"], rank_pattern={"layers.1": 2, "layers.0.self_attn.q_proj": 3})
    mine.peft_config["b"] = LoraConfig(r=4, target_modules=["q_proj"])
    mine.inject_adapter(mine.model, "b")
    with pytest.raises(ValueError, match="needs equal ranks"):
        mine.add_weighted_adapter(["a", "b"], [1, 1], "new", "linear")
    assert list(mine.peft_config) == ["a", "b"] and not any(".new." in n for n, _ in mine.named_parameters())


def test_kinds_of_target_modules() -> None:
    base, _ = base_and_targets("llama")
    mine = ours(base, "a", r=4, target_modules=r".*\.q_proj")
    for name, targets in (("b", r".*\.v_proj"), ("c", ["q_proj"])):
        mine.peft_config[name] = LoraConfig(r=4, target_modules=targets)
        mine.inject_adapter(mine.model, name)
    mine.add_weighted_adapter(["a", "b"], [1, 1], "new", "linear")
    assert mine.peft_config["new"].target_modules == r"(.*\.q_proj)|(.*\.v_proj)"
    with pytest.raises(ValueError, match="same target modules type"):
        mine.add_weighted_adapter(["a", "c"], [1, 1], "newer", "linear")


def test_subtract_mutated_init() -> None:
    """A trained pissa adapter as plain LoRA of twice the rank: on the old base it does what it did on its own."""
    base, targets = base_and_targets("llama")
    config = dict(r=4, lora_alpha=6, target_modules=targets)
    trained = ours(base, init_lora_weights="pissa", **config)
    start = {k: v.clone() for k, v in trained.state_dict().items() if "lora_" in k}
    randomize(trained)
    trained.peft_config["initial"] = LoraConfig(**config)
    trained.inject_adapter(trained.model, "initial")
    trained.load_state_dict({k.replace(".default.", ".initial."): v for k, v in start.items()}, strict=False)
    file = {"base_model." + k.replace(".default.", "."): v for k, v in trained.state_dict().items() if ".default." in k}
    converted = trained.subtract_mutated_init(file, "initial")
    assert converted.keys() == file.keys()
    plain = ours(base, **config | dict(r=8, lora_alpha=12))
    weights = {k.removeprefix("base_model.").replace(".weight", ".default.weight"): v for k, v in converted.items()}
    assert not plain.load_state_dict(weights, strict=False).unexpected_keys
    torch.testing.assert_close(logits(plain), logits(trained), rtol=1e-3, atol=1e-4)

"""LoraModel on tiny models of every kind: logits, gradients and merging beside the installed peft."""

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from lora_pairs import (
    BASES,
    assert_as_accurate_as,
    assert_runs_as_accurate,
    base_and_targets,
    in_fp64,
    llama,
    logits,
    ours,
    pair,
    randomize,
    run,
    same_weights,
    theirs,
)
from torch import nn

from numerics import assert_as_accurate
from peft_fast.tuners.lora import LoraConfig, LoraModel
from peft_fast.tuners.lora.layer import Linear, LoraLayer

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": dict(r=4, lora_alpha=16),
    "rslora-odd-rank": dict(r=5, lora_alpha=3, use_rslora=True),
    "lora_bias": dict(r=4, lora_alpha=6, lora_bias=True),
    "bias-all": dict(r=4, lora_alpha=6, bias="all"),
    "bias-lora_only": dict(r=4, lora_alpha=6, bias="lora_only"),
}


@pytest.mark.parametrize("name", BASES)
def test_logits_and_gradients(name: str) -> None:
    mine, their = pair(name, r=4, lora_alpha=6)
    got = assert_as_accurate_as(mine, their, in_fp64(their))
    adapters = [n for n, p in mine.named_parameters() if "lora_" in n]
    assert adapters and all(n in got for n in adapters)
    assert (logits(mine) - logits(base_and_targets(name)[0])).abs().max() > 0.01


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.filterwarnings("ignore:.*lora_bias")
def test_settings(name: str, config: dict[str, Any]) -> None:
    mine, their = pair(name, **config)
    got = assert_as_accurate_as(mine, their, in_fp64(their))
    assert any(n.endswith("base_layer.bias") for n in got) == ("bias" in config)


def test_rank_and_alpha_patterns() -> None:
    config = dict(
        r=4,
        lora_alpha=6,
        rank_pattern={"q_proj": 2, r"layers\.1\..*down_proj": 7},
        alpha_pattern={"^model.layers.0.mlp.up_proj": 1, "v_proj": 30},
    )
    mine, their = pair("llama", **config)
    assert_as_accurate_as(mine, their, in_fp64(their))
    layers = {n: m for n, m in mine.named_modules() if isinstance(m, LoraLayer)}
    others = {n: m for n, m in their.named_modules() if n in layers}
    assert {n: (m.r, m.lora_alpha, m.scaling) for n, m in layers.items()} == {
        n: (m.r, m.lora_alpha, m.scaling) for n, m in others.items()
    }
    assert len({m.scaling["default"] for m in layers.values()}) >= 4


def _several(make: Any, config_cls: Any, base: nn.Module) -> Any:
    model = make(base, "a", r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    for name, targets in (("b", ["v_proj", "down_proj"]), ("c", ["q_proj"])):
        model.peft_config[name] = config_cls(r=3, lora_alpha=9, target_modules=targets, use_rslora=True)
        model.inject_adapter(model.model, name)
    return model


@pytest.mark.parametrize("active", [["a"], ["b"], ["b", "a"], ["a", "b", "c"]], ids="-".join)
def test_several_active_adapters(active: list[str]) -> None:
    base = base_and_targets("llama")[0]
    mine, their = _several(ours, LoraConfig, base), _several(theirs, peft.LoraConfig, base)
    randomize(mine)
    same_weights(mine, their)
    for model in (mine, their):
        model.set_adapter(active)
    got = assert_as_accurate_as(mine, their, in_fp64(their))
    assert {n.split(".")[-2] for n in got if "lora_" in n} == set(active)


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_bf16_base(name: str, adapters: torch.dtype) -> None:
    """The same dtype is plain torch with the adapters in bf16, as under autocast."""
    base, targets = base_and_targets(name)
    config = dict(r=4, lora_alpha=6, target_modules=targets)
    mine, their = ours(base.bfloat16(), **config), theirs(base.bfloat16(), **config)
    for model in (mine, their):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    mine._cast_adapter_dtype("default", adapters == torch.float32)
    randomize(mine)
    exact = in_fp64(their)
    same_weights(mine, exact)  # before the adapters are rounded to bf16
    same_weights(mine, their)
    got, same, reference = run(mine), run(their), run(exact)
    assert got["logits"].dtype == torch.bfloat16
    assert {value.dtype for key, value in got.items() if key != "logits"} == {adapters}
    assert_runs_as_accurate({key: value.bfloat16() for key, value in got.items()}, same, reference)


def test_fp32_base_with_bf16_adapters() -> None:
    mine, their = pair("llama", r=4, lora_alpha=6)
    for model in (mine, their):
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.bfloat16()
    assert_as_accurate_as(mine, their, in_fp64(their))


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(base_dtype: torch.dtype) -> None:
    mine, their = pair("llama", r=4, lora_alpha=6)
    exact = in_fp64(their)
    for model in (mine, their):
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                parameter.data = parameter.data.to(base_dtype)
    if base_dtype == torch.bfloat16:
        exact = in_fp64(their)
    assert_as_accurate_as(mine, their, exact, context=torch.autocast("cpu", torch.bfloat16))


# ------------------------------------------------------------------------------------------------------------ dropout
def test_dropout_only_in_training() -> None:
    mine, their = pair("llama", r=4, lora_alpha=6, lora_dropout=0.5)
    for model in (mine, their):
        model.eval()
    assert torch.equal(logits(mine), logits(mine))
    assert_as_accurate_as(mine, their, in_fp64(their))
    mine.train()
    first, second = run(mine, seed=1), run(mine, seed=2)
    assert not torch.equal(first["logits"], second["logits"])
    again = run(mine, seed=1)
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_an_adapter_added_to_an_evaluated_model_does_not_drop() -> None:
    mine = ours(llama(), r=4, target_modules=["q_proj"])
    mine.eval()
    mine.peft_config["b"] = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.5)
    mine.inject_adapter(mine.model, "b")
    mine.set_adapter("b")
    randomize(mine)
    assert torch.equal(logits(mine), logits(mine))


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_with_dropout(reentrant: bool) -> None:
    mine = pair("llama", r=4, lora_alpha=6, lora_dropout=0.3)[0]
    mine.train()
    plain = run(mine)
    mine.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    mine.model.enable_input_require_grads()
    again = run(mine)
    assert plain.keys() == again.keys()
    for key, value in plain.items():
        torch.testing.assert_close(again[key], value, rtol=0, atol=0, msg=key)


# ------------------------------------------------------------------------------------------------------------ merging
@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("name", BASES)
@pytest.mark.filterwarnings("ignore:.*tied_target_modules")
def test_merge_and_unmerge(name: str, safe: bool) -> None:
    mine, their = pair(name, r=4, lora_alpha=6)
    unmerged, before = logits(mine), {k: v.clone() for k, v in mine.state_dict().items()}
    for model in (mine, their):
        model.merge_adapter(safe_merge=safe)
    after, expected = mine.state_dict(), their.state_dict()
    if "tied" not in name:  # there PEFT's one weight gets what belongs to both
        for key, value in expected.items():
            torch.testing.assert_close(after[key], value, rtol=1e-6, atol=1e-7, msg=key)
        assert_as_accurate("merged", logits(mine), logits(their), logits(in_fp64(their)))
    assert (logits(mine) - unmerged).abs().max() < 1e-4
    mine.unmerge_adapter()
    for key, value in mine.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=1e-5, atol=1e-6, msg=key)
    assert not any(layer.merged for layer in mine.modules() if isinstance(layer, LoraLayer))


@pytest.mark.parametrize("safe", [False, True])
def test_merge_on_bf16_equals_peft(safe: bool) -> None:
    base, targets = base_and_targets("llama")
    config = dict(r=4, lora_alpha=6, target_modules=targets)
    mine, their = ours(base.bfloat16(), **config), theirs(base.bfloat16(), **config)
    for model in (mine, their):
        model._cast_adapter_dtype("default", True)
    randomize(mine)
    same_weights(mine, their)
    mine, their = mine.merge_and_unload(safe_merge=safe), their.merge_and_unload(safe_merge=safe)
    assert type(mine) is type(base)
    got, expected = mine.state_dict(), their.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in got)


def test_merge_and_unload_of_two_adapters() -> None:
    base = base_and_targets("llama")[0]
    mine = _several(ours, LoraConfig, base)
    randomize(mine)
    mine.set_adapter(["a", "b"])
    expected, exact = logits(mine), in_fp64(mine)
    merged = mine.merge_and_unload()
    assert not any(isinstance(module, LoraLayer) for module in merged.modules())
    assert_as_accurate("merged", logits(merged), expected, logits(exact), factor=4)


def test_merged_layers_run_the_base_alone_and_disabling_unmerges() -> None:
    mine = pair("llama", r=4, lora_alpha=6)[0]
    original = logits(base_and_targets("llama")[0])
    adapted = logits(mine)
    mine.merge_adapter()
    mine.disable_adapter_layers()
    torch.testing.assert_close(logits(mine), original, rtol=1e-4, atol=1e-5)
    assert not any(layer.merged for layer in mine.modules() if isinstance(layer, LoraLayer))
    mine.enable_adapter_layers()
    torch.testing.assert_close(logits(mine), adapted, rtol=1e-4, atol=1e-5)


def test_safe_merge_refuses_nan_and_changes_nothing() -> None:
    mine = pair("llama", r=4, lora_alpha=6)[0]
    layer = mine.model.model.layers[1].mlp.down_proj
    layer.lora_B["default"].weight.data[0, 0] = float("nan")
    before = {k: v.clone() for k, v in mine.state_dict().items() if "base_layer" in k}
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        mine.merge_adapter(safe_merge=True)
    for key, value in before.items():
        torch.testing.assert_close(mine.state_dict()[key], value, rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------------- copies, dtypes, memory
def test_deepcopy_and_pickle() -> None:
    mine = pair("gpt2", r=4, lora_alpha=6, lora_dropout=0.1)[0]
    mine.eval()
    expected = logits(mine)
    assert torch.equal(logits(copy.deepcopy(mine)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(mine))), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_whole_model_to_another_dtype(dtype: torch.dtype) -> None:
    mine, their = pair("llama", r=4, lora_alpha=6)
    mine, their = mine.to(dtype), their.to(dtype)
    exact = in_fp64(their)
    assert_as_accurate_as(mine, their, exact)


def test_weights_changed_between_calls() -> None:
    """Nothing of a weight is cached: edits through .data, load_state_dict and a new Parameter all count at once."""
    mine, their = pair("llama", r=4, lora_alpha=6)
    run(mine)
    for step in range(3):
        for model in (mine, their):
            torch.manual_seed(step)
            for name, module in model.named_modules():
                if name.endswith(("lora_B.default", "base_layer", "lora_A.default")):
                    new = torch.randn_like(module.weight) * 0.1
                    if step == 0:
                        module.weight.data.copy_(new)
                    elif step == 1:
                        module.weight.data = new
                    else:
                        module.weight = nn.Parameter(new, requires_grad=module.weight.requires_grad)
        assert_as_accurate_as(mine, their, in_fp64(their))


def test_low_cpu_mem_usage() -> None:
    base, targets = base_and_targets("gpt2")
    filled = pair("gpt2", r=4, lora_alpha=6)[0]
    model = LoraModel(
        copy.deepcopy(base),
        LoraConfig(r=4, lora_alpha=6, target_modules=targets, fan_in_fan_out=True),
        "default",
        low_cpu_mem_usage=True,
    )
    on_meta = {n for n, p in model.named_parameters() if p.is_meta}
    assert on_meta == {n for n, _ in model.named_parameters() if "lora_" in n}
    model.load_state_dict(filled.state_dict(), assign=True)
    assert torch.equal(logits(model), logits(filled))


# ------------------------------------------------------------------------------------------------- structure, errors
@pytest.mark.parametrize("name", BASES)
def test_same_names_and_modules(name: str) -> None:
    mine, their = pair(name, r=4, lora_alpha=6, lora_dropout=0.1)
    assert {n: (p.shape, p.requires_grad) for n, p in mine.named_parameters()} == {
        n: (p.shape, p.requires_grad) for n, p in their.named_parameters()
    }
    assert repr(mine) == repr(their)
    assert mine.targeted_module_names == their.targeted_module_names


def test_tied_weights_stay_tied() -> None:
    mine = pair("llama-tied", r=4, lora_alpha=6)[0]
    assert mine.model.lm_head.weight is mine.model.model.embed_tokens.weight
    assert type(mine.model.lm_head) is Linear


def test_fan_in_fan_out_is_set_right_with_a_warning() -> None:
    base, targets = base_and_targets("gpt2")
    config = LoraConfig(target_modules=targets)
    with pytest.warns(UserWarning, match="fan_in_fan_out is set to False but the target module is `Conv1D`"):
        LoraModel(base, config, "default")
    assert config.fan_in_fan_out is True
    config = LoraConfig(target_modules=["q_proj"], fan_in_fan_out=True)
    with pytest.warns(UserWarning, match="fan_in_fan_out is set to True but the target module is `torch.nn.Linear`"):
        LoraModel(llama(), config, "default")
    assert config.fan_in_fan_out is False


def test_targets_by_model_type() -> None:
    base = llama()
    assert LoraModel(base, LoraConfig(), "default").targeted_module_names == [
        f"model.layers.{i}.self_attn.{n}" for i in range(2) for n in ("q_proj", "v_proj")
    ]


def test_refusals() -> None:
    mine = ours(llama(), target_modules=["q_proj"])
    layer = mine.model.model.layers[0].self_attn.q_proj
    with pytest.raises(ValueError, match="alora_offsets is not supported by peft_fast yet"):
        mine._enable_peft_forward_hooks(alora_offsets=[1]).__enter__()
    with pytest.raises(ValueError, match=r"Target module LlamaRMSNorm.* is not supported"):
        ours(llama(), target_modules=["input_layernorm"])
    with pytest.raises(ValueError, match="`r` should be a positive integer"):
        layer.update_layer("x", 0, 1, LoraConfig())
    with pytest.raises(ValueError, match="layer_replication is not supported"):
        mine._prepare_model(SimpleNamespace(layer_replication=[(0, 1)]), mine.model)


def test_a_failed_injection_leaves_the_model_as_it_was() -> None:
    mine = ours(llama(), target_modules=["q_proj"])
    before = repr(mine), {n: p.requires_grad for n, p in mine.named_parameters()}
    mine.peft_config["b"] = LoraConfig(target_modules=["q_proj", "input_layernorm"])
    with pytest.raises(ValueError, match="is not supported"):
        mine.inject_adapter(mine.model, "b")
    assert (repr(mine), {n: p.requires_grad for n, p in mine.named_parameters()}) == before
    assert list(mine.peft_config) == ["default"]


@pytest.mark.filterwarnings("ignore:Adapter b was active")
def test_a_new_adapter_is_frozen_and_not_active() -> None:
    mine = ours(llama(), target_modules=["q_proj"])
    mine.peft_config["b"] = LoraConfig(target_modules=["q_proj", "v_proj"])
    mine.inject_adapter(mine.model, "b")
    trained = {n for n, p in mine.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in mine.named_parameters() if ".default." in n}
    mine.set_adapter("b")
    trained = {n for n, p in mine.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in mine.named_parameters() if ".b." in n}
    mine.delete_adapter("b")
    assert mine.active_adapters == ["default"] and not any(".b." in n for n, _ in mine.named_parameters())

"""Files both ways: what peft 0.21.2 saves loads here with equal results, what is saved here loads in peft."""

import json
import os
import warnings
from pathlib import Path

import peft
import pytest
import torch
from file_cases import CASES, Case, llama, quiet, randomise
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import peft_fast
from peft_fast.checkpoint import WEIGHTS_NAME
from peft_fast.utils.save_and_load import (
    get_peft_model_state_dict,
    load_adapter_weights,
    load_peft_weights,
    set_peft_model_state_dict,
)

WEIGHTS = "adapter_model.safetensors"


def adapted(library, case: Case, adapter_name: str = "default") -> nn.Module:
    """The case's model with an adapter of random weights, the same for both libraries."""
    with quiet():
        model = library.get_peft_model(case.model(), library.LoraConfig(**case.config), adapter_name).eval()
        state = randomise(library.get_peft_model_state_dict(model, adapter_name=adapter_name, **case.save))
        library.set_peft_model_state_dict(model, state, adapter_name=adapter_name)
    return model


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def test_state_dicts_and_files_equal_peft_s(case: Case, tmp_path: Path) -> None:
    theirs, ours = adapted(peft, case), adapted(peft_fast, case)
    with quiet():
        same(peft.get_peft_model_state_dict(theirs, **case.save), get_peft_model_state_dict(ours, **case.save))
        theirs.save_pretrained(tmp_path / "theirs", **case.save)
        ours.save_pretrained(tmp_path / "ours", **case.save)
    assert sorted(os.listdir(tmp_path / "ours")) == sorted(os.listdir(tmp_path / "theirs"))
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (tmp_path / "theirs" / WEIGHTS).read_bytes()
    configs = [json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("theirs", "ours")]
    for config in configs:  # a set became a list
        if isinstance(config["target_modules"], list):
            config["target_modules"].sort()
    if configs[0]["auto_mapping"]:
        assert configs[0]["auto_mapping"]["base_model_class"] == configs[1]["auto_mapping"]["base_model_class"]
    assert configs[0] == configs[1]
    with safe_open(tmp_path / "ours" / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("safe", [True, False])
def test_peft_s_directories_load_here(case: Case, safe: bool, tmp_path: Path) -> None:
    theirs = adapted(peft, case, "tuned")
    with quiet():
        theirs.save_pretrained(tmp_path, safe_serialization=safe, **case.save)
        directory = tmp_path / "tuned"
        ours = peft_fast.PeftModel.from_pretrained(case.model(), directory)
        state = peft.get_peft_model_state_dict(theirs, adapter_name="tuned", save_embedding_layers=False)
        state = {name.replace(".tuned.", ".default."): tensor for name, tensor in state.items()}
        same(state, get_peft_model_state_dict(ours, save_embedding_layers=False))
        light = peft_fast.PeftModel.from_pretrained(case.model(), directory, low_cpu_mem_usage=True)
    expected = case.outputs(theirs)
    torch.testing.assert_close(case.outputs(ours), expected)
    torch.testing.assert_close(case.outputs(light), expected)
    assert not torch.allclose(case.outputs(case.model()), expected, atol=1e-3), "the adapter should matter"


@pytest.mark.parametrize("safe", [True, False])
def test_our_directories_load_in_peft(case: Case, safe: bool, tmp_path: Path) -> None:
    ours = adapted(peft_fast, case)
    with quiet():
        ours.save_pretrained(tmp_path, safe_serialization=safe, **case.save)
        theirs = peft.PeftModel.from_pretrained(case.model(), tmp_path)
    with quiet():
        same(
            get_peft_model_state_dict(ours, save_embedding_layers=False),
            peft.get_peft_model_state_dict(theirs, save_embedding_layers=False),
        )
    torch.testing.assert_close(case.outputs(theirs), case.outputs(ours))


def test_setting_returns_what_peft_returns(case: Case) -> None:
    theirs, ours = adapted(peft, case), adapted(peft_fast, case)
    with quiet():
        state = get_peft_model_state_dict(ours, **case.save)
        some = dict(list(state.items())[2:]) if not case.config.get("modules_to_save") else state
        some["base_model.model.unknown.weight"] = torch.ones(1)
        expected = peft.set_peft_model_state_dict(theirs, some)
        result = set_peft_model_state_dict(ours, some)
    assert result.unexpected_keys == expected.unexpected_keys
    assert set(result.missing_keys) == set(expected.missing_keys)


def test_several_adapters_of_different_targets(tmp_path: Path) -> None:
    """Adapter names that are also names of modules are no trouble; each adapter has its folder and its own tensors."""
    case = CASES["llama"]
    config = {"task_type": "CAUSAL_LM", "r": 2}
    with quiet():
        model = peft_fast.get_peft_model(case.model(), peft_fast.LoraConfig(target_modules=["q_proj"], **config))
        model.add_adapter("self_attn", peft_fast.LoraConfig(target_modules=["k_proj"], **config))
        model.add_adapter("weight", peft_fast.LoraConfig(target_modules=["q_proj", "v_proj"], **config))
        for name in model.peft_config:
            state = randomise(get_peft_model_state_dict(model, adapter_name=name))
            assert set_peft_model_state_dict(model, state, adapter_name=name).unexpected_keys == []
            same(state, get_peft_model_state_dict(model, adapter_name=name))
        model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        WEIGHTS,
        "self_attn",
        "weight",
    ]
    assert sorted(os.listdir(tmp_path / "self_attn")) == ["adapter_config.json", WEIGHTS]
    targets = {"default": "q_proj", "self_attn": "k_proj", "weight": "q_proj v_proj"}
    for name, projections in targets.items():
        saved = load_file(tmp_path / ("" if name == "default" else name) / WEIGHTS)
        assert {key.split(".")[-3] for key in saved} == set(projections.split())
        with quiet():
            theirs = peft.PeftModel.from_pretrained(
                case.model(), tmp_path, subfolder=None if name == "default" else name
            )
        model.set_adapter(name)
        torch.testing.assert_close(case.outputs(theirs), case.outputs(model))


def test_a_model_without_peft_model(tmp_path: Path) -> None:
    """Injected adapters (transformers' own integration): names without the prefix out, with or without it in."""
    case = CASES["llama"]
    with quiet():
        model = peft_fast.inject_adapter_in_model(peft_fast.LoraConfig(**case.config), case.model())
        theirs = peft.inject_adapter_in_model(peft.LoraConfig(**case.config), case.model())
    state = randomise(get_peft_model_state_dict(model))
    assert list(state) == list(peft.get_peft_model_state_dict(theirs))
    assert not any(name.startswith("base_model.") for name in state)
    for prefix in ("", "base_model.model."):
        fresh = {prefix + name: tensor + len(prefix) for name, tensor in state.items()}
        assert set_peft_model_state_dict(model, fresh).unexpected_keys == []
        for name, tensor in get_peft_model_state_dict(model).items():
            assert torch.equal(tensor, fresh[prefix + name])
    with quiet():
        adapted(peft, case).save_pretrained(tmp_path)
    result = load_adapter_weights(model, tmp_path, "default")
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    saved = load_file(tmp_path / WEIGHTS)
    assert all(torch.equal(t, saved[f"base_model.model.{n}"]) for n, t in get_peft_model_state_dict(model).items())


# ------------------------------------------------------------------------------------------------ options of saving
def embedding_keys(state: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in state if "lora" not in name]


def test_a_changed_vocabulary_is_found_without_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def no_network(*args, **kwargs):
        raise AssertionError("asked the Hub")

    for name in ("file_exists", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, name, no_network)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    llama().save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    config = peft_fast.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    model = peft_fast.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert embedding_keys(get_peft_model_state_dict(model)) == []
    model.get_base_model().resize_token_embeddings(48)
    with pytest.warns(UserWarning, match="as the embedding layer has been resized during finetuning"):
        state = get_peft_model_state_dict(model)
    names = ["base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"]
    assert embedding_keys(state) == names
    assert all(state[name].shape[0] == 48 for name in names)
    model.peft_config["default"].base_model_name_or_path = "nobody/nothing"
    with pytest.warns(UserWarning, match="Could not find a config file in nobody/nothing - will assume that the voc"):
        assert embedding_keys(get_peft_model_state_dict(model)) == []


def test_models_without_embeddings_say_so() -> None:
    case = CASES["conv"]
    model = adapted(peft_fast, case)
    with pytest.warns(UserWarning, match="Could not identify embedding layer"):
        get_peft_model_state_dict(model, save_embedding_layers=True)


def test_compiled_and_gathered_models() -> None:
    case = CASES["llama"]
    model = adapted(peft_fast, case)
    expected = get_peft_model_state_dict(model)
    same(get_peft_model_state_dict(torch.compile(model), unwrap_compiled=True), expected)
    gathered = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    taken = get_peft_model_state_dict(model, state_dict=gathered)
    same(taken, {name: tensor + 1 for name, tensor in expected.items()})
    assert get_peft_model_state_dict(model, state_dict={}) == {}


def test_shards_are_noticed() -> None:
    model = adapted(peft_fast, CASES["llama"])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_A["default"].weight.data = torch.empty(0)
    with pytest.warns(UserWarning, match=r"1 LoRA tensor\(s\) have invalid shape: .*q_proj.lora_A.weight:\(0,\)"):
        get_peft_model_state_dict(model)

    class Sharded(torch.Tensor):
        def full_tensor(self):
            raise RuntimeError("Expected all ranks")

    shard = torch.ones(2, 2).as_subclass(Sharded)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    with pytest.raises(RuntimeError, match=r"'default': tensor .*lora_A.weight' is sharded.*call this on all ranks"):
        get_peft_model_state_dict(model, state_dict={key: shard})


@pytest.fixture
def one_process_group():
    """torch.distributed with this process alone."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_dtensors_are_gathered_and_filled(one_process_group: None, tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    case = CASES["llama"]
    model = adapted(peft_fast, case)
    expected = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    model.save_pretrained(tmp_path)
    outputs = case.outputs(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    parameters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert all(isinstance(p, DTensor) for p in parameters.values())
    same(get_peft_model_state_dict(model), expected)
    for load in ("directory", "dictionary"):
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.zero_()
        if load == "directory":
            load_adapter_weights(model, tmp_path, "default")
        else:
            set_peft_model_state_dict(model, expected)
        same(get_peft_model_state_dict(model), expected)
        torch.testing.assert_close(case.outputs(model), outputs)


def test_unknown_adapters_and_methods() -> None:
    model = adapted(peft_fast, CASES["llama"])
    with pytest.raises(KeyError):
        get_peft_model_state_dict(model, adapter_name="nobody")
    with pytest.raises(KeyError):
        set_peft_model_state_dict(model, {}, adapter_name="nobody")


# ------------------------------------------------------------------------------------------------ options of loading
def test_load_peft_weights(tmp_path: Path) -> None:
    case = CASES["llama"]
    model = adapted(peft_fast, case, "tuned")
    model.save_pretrained(tmp_path)
    expected = peft.load_peft_weights(str(tmp_path / "tuned"), device="cpu")
    for loaded in (
        load_peft_weights(str(tmp_path / "tuned")),
        load_peft_weights(tmp_path, subfolder="tuned", device="cpu"),
    ):
        assert set(loaded) == set(expected) and all(torch.equal(loaded[name], expected[name]) for name in loaded)
    mapping = {r"^model\.layers": "decoder.blocks", "self_attn": "never reached"}
    theirs = peft.load_peft_weights(str(tmp_path / "tuned"), device="cpu", key_mapping=mapping)
    ours = load_peft_weights(tmp_path / "tuned", device="cpu", key_mapping=mapping)
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(name.startswith("base_model.model.decoder.blocks.") for name in ours)
    with pytest.raises(ValueError, match=r"key_mapping gives tensors .* the same name"):
        load_peft_weights(tmp_path / "tuned", key_mapping={r".*": "x"})
    with pytest.raises(ValueError, match="Can't find"):
        load_peft_weights(tmp_path / "nobody")


def test_missing_weights(tmp_path: Path) -> None:
    case = CASES["bert"]
    model = adapted(peft_fast, case)
    state = get_peft_model_state_dict(model)
    missing = [name for name in state if "layer.1" in name or "classifier.bias" in name]
    from peft_fast.checkpoint import read_config, save_adapter

    model.save_pretrained(tmp_path)
    config = read_config(tmp_path)
    save_adapter(tmp_path, config, {name: t for name, t in state.items() if name not in missing})
    with pytest.warns(UserWarning, match="Found missing adapter keys while loading the checkpoint:") as caught:
        loaded = peft_fast.PeftModel.from_pretrained(case.model(), tmp_path)
    text = next(str(w.message) for w in caught if "missing adapter" in str(w.message))
    assert "layer.1.attention.self.query.lora_A.default.weight" in text
    assert "classifier.modules_to_save.default.bias" in text and "layer.0" not in text
    with pytest.warns(UserWarning):
        result = load_adapter_weights(loaded, tmp_path, "default")
    assert len(result.missing_keys) == len(missing) and result.unexpected_keys == []
    before = {name: t.clone() for name, t in loaded.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"adapter 'default', file .*Found missing adapter keys.*strict=True needs all"
    ):
        load_adapter_weights(loaded, tmp_path, "default", strict=True)
    same(before, dict(loaded.state_dict()))
    with pytest.raises(ValueError, match="With low_cpu_mem_usage=True there is nothing to start from"), quiet():
        peft_fast.PeftModel.from_pretrained(case.model(), tmp_path, low_cpu_mem_usage=True)


def test_ignore_mismatched_sizes(tmp_path: Path) -> None:
    case = CASES["llama"]
    model = adapted(peft_fast, case)
    state = {name: t.clone() for name, t in get_peft_model_state_dict(model).items()}
    bad = next(name for name in state if "lora_B" in name)
    changed = {name: t + 1 for name, t in state.items()} | {bad: torch.ones(3, 4)}
    theirs = adapted(peft, case)
    message = r"not initialized from the model checkpoint.*found shape torch.Size\(\[3, 4\]\) in the checkpoint and"
    for library, target in ((peft, theirs), (peft_fast, model)):
        with pytest.raises(RuntimeError, match="size mismatch"):
            library.set_peft_model_state_dict(target, changed)
        with pytest.warns(UserWarning, match=message):
            library.set_peft_model_state_dict(target, changed, ignore_mismatched_sizes=True)
    same(get_peft_model_state_dict(model), peft.get_peft_model_state_dict(theirs))
    assert torch.equal(get_peft_model_state_dict(model)[bad], state[bad])
    assert changed[bad].shape == (3, 4), "the caller's dictionary stays as it is"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_files(dtype: torch.dtype, autocast: bool, tmp_path: Path) -> None:
    case = CASES["bert"]
    with quiet():
        models = [
            library.get_peft_model(
                case.model().to(dtype), library.LoraConfig(**case.config), autocast_adapter_dtype=autocast
            )
            for library in (peft, peft_fast)
        ]
    theirs, ours = models
    state = randomise(peft.get_peft_model_state_dict(theirs))
    peft.set_peft_model_state_dict(theirs, state)
    set_peft_model_state_dict(ours, state)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (tmp_path / "theirs" / WEIGHTS).read_bytes()
    for low in (True, False):
        with quiet():
            again = [
                library.PeftModel.from_pretrained(
                    case.model().to(dtype), tmp_path / "ours", autocast_adapter_dtype=autocast, low_cpu_mem_usage=low
                )
                for library in (peft, peft_fast)
            ]
        same(peft.get_peft_model_state_dict(again[0]), get_peft_model_state_dict(again[1]))


def test_loading_does_not_get_slower_with_adapters(tmp_path: Path) -> None:
    """The walk that finds an adapter's tensors visits no module of another adapter."""
    from peft_fast.utils._survey import survey_adapter

    case = CASES["llama"]
    model = adapted(peft_fast, case)
    one = len(survey_adapter(model, "default").seen)
    for index in range(3):
        model.add_adapter(f"more{index}", peft_fast.LoraConfig(**case.config))
    survey = survey_adapter(model, "default")
    assert len(survey.seen) == one
    assert sorted(survey.own) == sorted(get_peft_model_state_dict(model))


def test_trainer_s_checkpoints_keep_their_other_files(tmp_path: Path) -> None:
    model = adapted(peft_fast, CASES["llama"])
    (tmp_path / "optimizer.pt").write_bytes(b"state")
    model.save_pretrained(tmp_path, safe_serialization=False)
    model.save_pretrained(tmp_path, state_dict={name: t + 1 for name, t in model.state_dict().items()})
    assert (tmp_path / "optimizer.pt").read_bytes() == b"state"
    assert (tmp_path / WEIGHTS_NAME).exists()
    loaded = load_file(tmp_path / WEIGHTS)
    assert all(torch.equal(loaded[name], t + 1) for name, t in get_peft_model_state_dict(model).items())

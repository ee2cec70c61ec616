"""PeftModel against the installed peft: adapters added, switched, disabled, deleted, saved and loaded."""

import copy
import json
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import FAMILIES, gradients, make_base, make_config, make_inputs, make_pair, output_tensors, trainable
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peft_fast
from numerics import assert_as_accurate

TASK = "CAUSAL_LM"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def logits(model: Any, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=make_inputs(TASK)["input_ids"], **kwargs).logits


def recorded(action: Callable[[], Any]) -> tuple[str, list[str]]:
    """What an action raised, and the warnings of the adapters' library that it gave, without the punctuation."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            action()
            raised = ""
        except (ValueError, TypeError, KeyError) as error:
            raised = f"{type(error).__name__}: {str(error).strip('.')[:25]}"
    messages = [str(w.message)[:60] for w in seen if issubclass(w.category, UserWarning)]
    return raised, list(dict.fromkeys(messages))  # peft repeats some for each layer


def state(model: Any) -> dict[str, Any]:
    status = model.get_model_status()
    return {
        "active": model.active_adapters,
        "names": list(model.peft_config),
        "trainable": sorted(trainable(model)),
        "enabled": status.enabled,
        "merged": status.merged_adapters,
        "available": status.available_adapters,
        "keys": sorted(model.state_dict()),
    }


# ------------------------------------------------------------------------------------------- sequences of operations
SEQUENCES: dict[str, list[Callable[[Any, Any], Any]]] = {
    "add and set": [
        lambda m, lib: m.add_adapter("other", make_config(lib, "llama", TASK, r=2)),
        lambda m, lib: m.set_adapter("other"),
        lambda m, lib: m.set_adapter("default", inference_mode=True),
        lambda m, lib: m.set_requires_grad("other"),
        lambda m, lib: m.set_requires_grad(["other", "default"], requires_grad=False),
    ],
    "several active": [
        lambda m, lib: m.add_adapter("other", make_config(lib, "llama", TASK, target_modules=["k_proj"])),
        lambda m, lib: m.base_model.set_adapter(["default", "other"]),
        lambda m, lib: m.set_adapter("other"),
    ],
    "delete": [
        lambda m, lib: m.add_adapter("other", make_config(lib, "llama", TASK)),
        lambda m, lib: m.add_adapter("third", make_config(lib, "llama", TASK, target_modules=["k_proj"])),
        lambda m, lib: m.delete_adapter("third"),
        lambda m, lib: m.delete_adapter("default"),
        lambda m, lib: m.delete_adapter("default"),
    ],
    "errors": [
        lambda m, lib: m.set_adapter("nobody"),
        lambda m, lib: m.set_adapter(["default"]),
        lambda m, lib: m.delete_adapter("nobody"),
        lambda m, lib: m.add_adapter("default", make_config(lib, "llama", TASK)),
        lambda m, lib: m.add_adapter("bad", make_config(lib, "llama", TASK, target_modules=["nothing_here"])),
        lambda m, lib: m.add_adapter("lora", make_config(lib, "llama", TASK)),
    ],
    "merge": [
        lambda m, lib: m.merge_adapter(),
        lambda m, lib: m.merge_adapter(),
        lambda m, lib: m.unmerge_adapter(),
    ],
    "head": [
        lambda m, lib: m.add_adapter("other", make_config(lib, "llama", TASK, modules_to_save=["lm_head"])),
        lambda m, lib: m.set_adapter("other"),
        lambda m, lib: m.set_adapter("default"),
        lambda m, lib: m.delete_adapter("other"),
    ],
    "disable": [
        lambda m, lib: m.base_model.disable_adapter_layers(),
        lambda m, lib: m.base_model.enable_adapter_layers(),
    ],
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequences_are_pefts(name: str) -> None:
    theirs, ours = make_pair("llama", TASK)
    for step, action in enumerate(SEQUENCES[name]):
        torch.manual_seed(step)
        expected = recorded(lambda action=action: action(theirs, peft))  # type: ignore[misc]
        torch.manual_seed(step)
        got = recorded(lambda action=action: action(ours, peft_fast))  # type: ignore[misc]
        assert got == expected, f"step {step}"
        assert state(ours) == state(theirs), f"step {step}"
        for model in (theirs, ours):
            model.eval()
        torch.testing.assert_close(logits(ours), logits(theirs))


def test_adapters_of_other_methods_are_refused() -> None:
    _, ours = make_pair("llama", TASK)
    config = make_config(peft_fast, "llama", TASK)
    config.peft_type = "IA3"
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        ours.add_adapter("b", config)
    assert list(ours.peft_config) == ["default"]


@pytest.mark.parametrize("name", ["", "a.b", "../up", "a/b", "nul", "~x", " a"])
def test_names_are_checked_before_anything_happens(name: str, tmp_path: Path) -> None:
    _, ours = make_pair("llama", TASK)
    ours.save_pretrained(tmp_path)
    before = sorted(ours.state_dict())
    for act in (
        lambda: peft_fast.get_peft_model(make_base("llama", TASK), make_config(peft_fast, "llama", TASK), name),
        lambda: ours.add_adapter(name, make_config(peft_fast, "llama", TASK)),
        lambda: ours.load_adapter(tmp_path, name),
        lambda: peft_fast.PeftModel.from_pretrained(make_base("llama", TASK), tmp_path, name),
        lambda: peft_fast.inject_adapter_in_model(
            make_config(peft_fast, "llama", TASK), make_base("llama", TASK), name
        ),
    ):
        with pytest.raises(ValueError, match="cannot be the name of an adapter"):
            act()
    assert sorted(ours.state_dict()) == before and list(ours.peft_config) == ["default"]


# ---------------------------------------------------------------------------------------------------------- disabling
@pytest.mark.parametrize("inference_mode", [False, True])
def test_disable_adapter_leaves_no_trace(inference_mode: bool) -> None:
    theirs, ours = make_pair("llama", TASK, inference_mode=inference_mode)
    base = logits(make_base("llama", TASK))
    before, flags = logits(ours), trainable(ours)
    assert bool(flags) is not inference_mode
    with ours.disable_adapter():
        torch.testing.assert_close(logits(ours), base, rtol=0, atol=0)
        assert trainable(ours) == [] and not ours.has_active_enabled_adapter
        with ours.disable_adapter():
            pass
        assert ours.get_model_status().enabled is False and not ours.has_active_enabled_adapter
    assert ours.has_active_enabled_adapter and ours.get_model_status().enabled is True
    assert trainable(ours) == flags
    assert torch.equal(logits(ours), before)
    with theirs.disable_adapter():
        torch.testing.assert_close(logits(theirs), base)


def test_disable_adapter_restores_after_an_exception() -> None:
    _, ours = make_pair("llama", TASK)
    before, flags = logits(ours), trainable(ours)
    with pytest.raises(KeyError), ours.disable_adapter():
        raise KeyError
    assert trainable(ours) == flags and torch.equal(logits(ours), before)


def test_disable_adapter_warns_of_layers_that_differ() -> None:
    theirs, ours = make_pair("llama", TASK)
    for model in (theirs, ours):
        model.base_model.model.model.layers[0].self_attn.q_proj.enable_adapters(False)
        assert model.get_model_status().enabled == "irregular"
        with (
            pytest.warns(UserWarning, match="some adapter layers that are enabled and others"),
            model.disable_adapter(),
        ):
            pass
        assert model.get_model_status().enabled is True


def test_a_disabled_model_stays_disabled() -> None:
    _, ours = make_pair("llama", TASK)
    ours.base_model.disable_adapter_layers()
    with ours.disable_adapter():
        pass
    assert ours.get_model_status().enabled is False


# --------------------------------------------------------------------------------------------------- dtypes, devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_autocast_adapter_dtype(dtype: torch.dtype, autocast: bool, tmp_path: Path) -> None:
    def dtypes(model: Any) -> dict[str, torch.dtype]:
        return {name: parameter.dtype for name, parameter in model.named_parameters()}

    base = make_base("llama", TASK).to(dtype)
    models = []
    for library in (peft, peft_fast):
        config = make_config(library, "llama", TASK, init_lora_weights=False)
        torch.manual_seed(1)
        model = library.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=autocast)
        model.add_adapter("b", make_config(library, "llama", TASK), autocast_adapter_dtype=autocast)
        model.save_pretrained(str(tmp_path / library.__name__))
        model.load_adapter(str(tmp_path / library.__name__), "c", autocast_adapter_dtype=autocast)
        models.append(model)
    assert dtypes(models[0]) == dtypes(models[1])
    assert {t for n, t in dtypes(models[1]).items() if "lora_" in n} == {torch.float32 if autocast else dtype}
    assert models[1].base_model_torch_dtype == dtype
    loaded = peft_fast.PeftModel.from_pretrained(
        copy.deepcopy(base), tmp_path / "peft", autocast_adapter_dtype=autocast
    )
    assert {t for n, t in dtypes(loaded).items() if "lora_" in n} == {torch.float32 if autocast else dtype}


@pytest.mark.parametrize("library", [peft, peft_fast])
def test_low_cpu_mem_usage(library: Any, tmp_path: Path) -> None:
    _, ours = make_pair("llama", TASK)
    ours.save_pretrained(tmp_path)
    loaded = library.PeftModel.from_pretrained(make_base("llama", TASK), str(tmp_path), low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in loaded.parameters())
    torch.testing.assert_close(logits(loaded), logits(ours))
    loaded.load_adapter(str(tmp_path), "b", low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in loaded.parameters())
    fresh = library.get_peft_model(
        make_base("llama", TASK), make_config(library, "llama", TASK), low_cpu_mem_usage=True
    )
    assert {p.is_meta for n, p in fresh.named_parameters() if "lora_" in n} == {True}
    assert not any(p.is_meta for n, p in fresh.named_parameters() if "lora_" not in n)


# -------------------------------------------------------------------------------------------------- saving and loading
def test_several_adapters_on_disk(tmp_path: Path) -> None:
    folders = {}
    for library, model in zip((peft, peft_fast), make_pair("llama", TASK), strict=True):
        torch.manual_seed(3)
        model.add_adapter("b", make_config(library, "llama", TASK, r=2, init_lora_weights=False))
        model.save_pretrained(str(tmp_path / library.__name__))
        root = tmp_path / library.__name__
        folders[library.__name__] = {p.relative_to(root) for p in root.rglob("*") if p.is_file()}
    assert folders["peft"] == folders["peft_fast"]
    root = tmp_path / "peft_fast"
    for library in (peft, peft_fast):
        loaded = library.PeftModel.from_pretrained(make_base("llama", TASK), str(root))
        result = loaded.load_adapter(str(root), "second", subfolder="b")
        assert list(result.missing_keys) == [] and loaded.active_adapters == ["default"]
        loaded.set_adapter("second")
        model.set_adapter("b")
        torch.testing.assert_close(logits(loaded.eval()), logits(model.eval()))
    model.save_pretrained(tmp_path / "only", selected_adapters=["b"])
    assert sorted(os.listdir(tmp_path / "only")) == ["README.md", "b"]
    with pytest.raises(ValueError, match="invalid `selected_adapters`"):
        model.save_pretrained(tmp_path / "only", selected_adapters=["nobody"])
    with pytest.raises(ValueError, match="should be a directory, not a file"):
        model.save_pretrained(root / WEIGHTS)


@pytest.mark.parametrize("task", [TASK, None])
def test_the_saved_config_is_pefts(task: str | None, tmp_path: Path) -> None:
    """All keys; without a task type the file names the class of the base."""
    contents = []
    for library in (peft, peft_fast):
        model = library.get_peft_model(make_base("llama", TASK), make_config(library, "llama", task))
        model.save_pretrained(str(tmp_path / library.__name__))
        content = json.loads((tmp_path / library.__name__ / CONFIG).read_text())
        contents.append({**content, "target_modules": sorted(content["target_modules"])})
        assert model.peft_config["default"].inference_mode is False
    assert contents[0] == contents[1]
    assert contents[1]["inference_mode"] is True
    assert (contents[1]["auto_mapping"] is None) == (task is not None)


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    _, ours = make_pair("llama", TASK)
    ours.save_pretrained(tmp_path / "no", is_main_process=False)
    assert not (tmp_path / "no").exists()


def test_a_state_dict_that_was_gathered_elsewhere(tmp_path: Path) -> None:
    _, ours = make_pair("llama", TASK)
    gathered = {key: torch.full_like(value, 0.5) for key, value in ours.state_dict().items()}
    ours.save_pretrained(tmp_path, state_dict=gathered)
    assert all((value == 0.5).all() for value in load_file(tmp_path / WEIGHTS).values())


def test_legacy_bin(tmp_path: Path) -> None:
    theirs, ours = make_pair("llama", TASK)
    ours.save_pretrained(tmp_path / "ours", safe_serialization=False)
    theirs.save_pretrained(str(tmp_path / "theirs"), safe_serialization=False)
    assert sorted(os.listdir(tmp_path / "ours")) == sorted(os.listdir(tmp_path / "theirs"))
    here = peft_fast.PeftModel.from_pretrained(make_base("llama", TASK), tmp_path / "theirs")
    there = peft.PeftModel.from_pretrained(make_base("llama", TASK), str(tmp_path / "ours"))
    torch.testing.assert_close(logits(here), logits(theirs))
    torch.testing.assert_close(logits(there), logits(theirs))


@pytest.mark.parametrize("is_trainable", [False, True])
def test_loading_for_inference_and_for_training(is_trainable: bool, tmp_path: Path) -> None:
    _, ours = make_pair("llama", TASK)
    ours.save_pretrained(tmp_path)
    models = []
    for library in (peft, peft_fast):
        model = library.PeftModel.from_pretrained(
            make_base("llama", TASK).train(), str(tmp_path), is_trainable=is_trainable
        )
        model.load_adapter(str(tmp_path), "b", is_trainable=is_trainable)
        models.append(model)
    assert trainable(models[0]) == trainable(models[1])
    assert models[0].training == models[1].training == is_trainable
    assert models[1].peft_config["b"].inference_mode is not is_trainable


def test_a_config_given_by_the_caller(tmp_path: Path) -> None:
    _, ours = make_pair("llama", TASK)
    ours.save_pretrained(tmp_path)
    config = make_config(peft_fast, "llama", TASK, lora_alpha=60)
    loaded = peft_fast.PeftModel.from_pretrained(make_base("llama", TASK), tmp_path, config=config)
    assert loaded.peft_config["default"] is config and not torch.allclose(logits(loaded), logits(ours))
    with pytest.raises(ValueError, match="The input config must be a PeftConfig"):
        peft_fast.PeftModel.from_pretrained(make_base("llama", TASK), tmp_path, config={"r": 4})  # type: ignore[arg-type]


def test_loading_into_an_adapter_that_is_there(tmp_path: Path) -> None:
    _, ours = make_pair("llama", TASK)
    ours.save_pretrained(tmp_path)
    _, other = make_pair("llama", TASK)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_" in name:
                parameter.zero_()
    other.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(logits(other), logits(ours)) and trainable(other) == trainable(ours)


def test_missing_weights_warn_as_in_peft(tmp_path: Path) -> None:
    _, ours = make_pair("llama", TASK)
    ours.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    lost = sorted(tensors)[0]
    del tensors[lost]
    save_file(tensors, tmp_path / WEIGHTS)
    for library in (peft, peft_fast):
        with pytest.warns(UserWarning, match="Found missing adapter keys while loading the checkpoint") as seen:
            library.PeftModel.from_pretrained(make_base("llama", TASK), str(tmp_path))
        assert any(lost.replace(".weight", ".default.weight") in str(w.message) for w in seen)
        model = library.get_peft_model(make_base("llama", TASK), make_config(library, "llama", TASK))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = model.load_adapter(str(tmp_path), "second")  # peft looks for the name anywhere in the key
        assert list(result.missing_keys) == [lost.replace(".weight", ".second.weight")]
    with pytest.raises(ValueError, match=r"strict=True needs all of them"):
        peft_fast.PeftModel.from_pretrained(make_base("llama", TASK), str(tmp_path), strict=True)


def damaged(how: str, directory: Path) -> None:
    tensors = load_file(directory / WEIGHTS)
    first = sorted(tensors)[0]
    if how == "nan":
        tensors[first][0, 0] = float("nan")
    elif how == "shape":
        tensors[first] = tensors[first][:, :-1].contiguous()
    elif how == "leftover":
        tensors["base_model.model.model.norm.weight"] = torch.ones(32)
    elif how == "none":
        tensors = {"something": torch.ones(2)}
    save_file(tensors, directory / WEIGHTS)


@pytest.mark.parametrize("how", ["nan", "shape", "leftover", "none"])
def test_a_bad_file_changes_nothing(how: str, tmp_path: Path) -> None:
    _, ours = make_pair("llama", TASK)
    ours.save_pretrained(tmp_path)
    damaged(how, tmp_path)
    error = RuntimeError if how == "shape" else ValueError
    base = make_base("llama", TASK)
    keys, flags = list(base.state_dict()), trainable(base)
    expected = logits(base)
    with pytest.raises(error, match="size mismatch" if how == "shape" else None):
        peft_fast.PeftModel.from_pretrained(base, tmp_path)
    assert list(base.state_dict()) == keys and trainable(base) == flags and not hasattr(base, "peft_config")
    assert torch.equal(logits(base), expected)
    before, flags, weights = logits(ours), trainable(ours), {k: v.clone() for k, v in ours.state_dict().items()}
    for name in ("new", "default"):
        with pytest.raises(error):
            ours.load_adapter(tmp_path, name)
    assert list(ours.peft_config) == ["default"] and trainable(ours) == flags
    assert list(ours.state_dict()) == list(weights)
    assert all(torch.equal(value, weights[key]) for key, value in ours.state_dict().items())
    assert torch.equal(logits(ours), before)


def test_a_feature_that_is_missing_is_refused_from_a_file(tmp_path: Path) -> None:
    theirs, _ = make_pair("llama", TASK)
    theirs.add_adapter("dora", make_config(peft, "llama", TASK, use_dora=True))
    theirs.save_pretrained(str(tmp_path))
    base = make_base("llama", TASK)
    keys = list(base.state_dict())
    with pytest.raises(ValueError, match=r"LoraConfig\(use_dora=True\) is not supported by peft_fast yet"):
        peft_fast.PeftModel.from_pretrained(base, tmp_path, subfolder="dora")
    assert list(base.state_dict()) == keys


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_conversion_to_plain_lora(init: str, use_rslora: bool, tmp_path: Path) -> None:
    """Taken out of the base weights, trained, saved as plain LoRA: the untouched base gives the same output with it."""
    base = make_base("llama", TASK)
    config = make_config(peft_fast, "llama", TASK, init_lora_weights=init, use_rslora=use_rslora)
    model = peft_fast.get_peft_model(copy.deepcopy(base), config)
    torch.testing.assert_close(logits(model.eval()), logits(base), rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "initial")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    assert model.peft_config["default"].r == 4  # the model's own config is left alone
    saved = json.loads((tmp_path / "plain" / CONFIG).read_text())
    assert saved["r"] == 8 and saved["init_lora_weights"] is True
    exact = logits(copy.deepcopy(model).double())
    for library in (peft, peft_fast):
        loaded = library.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "plain"))
        got = logits(loaded)
        assert not torch.allclose(got, logits(base), atol=1e-3)
        # the residual weight was rounded once when the adapter was taken out of it: one more fp32 rounding per site
        assert (got.double() - exact).abs().max() < 64 * torch.finfo(torch.float32).eps * exact.abs().max()


def test_conversion_needs_the_initial_weights(tmp_path: Path) -> None:
    config = make_config(peft_fast, "llama", TASK, init_lora_weights="pissa")
    model = peft_fast.get_peft_model(make_base("llama", TASK), config)
    with pytest.raises(ValueError, match="nowhere"):
        model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion=str(tmp_path / "nowhere"))
    other = peft_fast.get_peft_model(make_base("llama", TASK), make_config(peft_fast, "llama", TASK, r=3))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"expected .* with shape \(4, 32\), got \(3, 32\)"):
        model.save_pretrained(tmp_path / "x", path_initial_model_for_weight_conversion=str(tmp_path / "other"))


def test_adapters_that_changed_the_base_warn_beside_others(tmp_path: Path) -> None:
    for library in (peft, peft_fast):
        config = make_config(library, "llama", TASK, init_lora_weights="olora")
        model = library.get_peft_model(make_base("llama", TASK), config)
        make_pair("llama", TASK)[1].save_pretrained(tmp_path)
        with pytest.warns(UserWarning, match="OLoRA changes the base weights"):
            model.load_adapter(str(tmp_path), "b")


def test_push_to_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls: dict[str, Any] = {}

    class Api:
        def __init__(self, token: Any = None) -> None:
            calls["token"] = token

        def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
            calls["repo"] = kwargs
            return type("Url", (), {"repo_id": f"me/{repo_id}"})

        def create_branch(self, repo_id: str, **kwargs: Any) -> None:
            calls["branch"] = kwargs["branch"]

        def upload_folder(self, **kwargs: Any) -> str:
            calls.update(kwargs, files=sorted(os.listdir(kwargs["folder_path"])))
            calls["card"] = huggingface_hub.ModelCard.load(Path(kwargs["folder_path"]) / "README.md").data.to_dict()
            return "done"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    _, ours = make_pair("llama", TASK)
    assert ours.push_to_hub("x", private=True, token="t", tags=["mine"], revision="dev", commit_message="hi") == "done"
    assert calls["repo_id"] == "me/x" and calls["token"] == "t" and calls["repo"]["private"] is True
    assert calls["files"] == ["README.md", CONFIG, WEIGHTS] and calls["branch"] == calls["revision"] == "dev"
    assert calls["commit_message"] == "hi" and "mine" in calls["card"]["tags"] and "lora" in calls["card"]["tags"]


# ------------------------------------------------------------------------------------- what torch does with a model
def test_deepcopy_and_pickle() -> None:
    _, ours = make_pair("llama", TASK)
    for clone in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(clone) is type(ours) and list(clone.state_dict()) == list(ours.state_dict())
        assert torch.equal(logits(clone), logits(ours)) and trainable(clone) == trainable(ours)
        clone.add_adapter("b", make_config(peft_fast, "llama", TASK))
        assert "b" not in ours.peft_config


def test_state_dict_round_trip_and_edits_in_place() -> None:
    theirs, ours = make_pair("llama", TASK)
    _, other = make_pair("llama", TASK, r=4)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.data.mul_(1.5)
    assert not torch.allclose(logits(other), logits(ours))
    other.load_state_dict(ours.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(logits(other), logits(ours))
    torch.testing.assert_close(logits(theirs), logits(ours))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("when", ["before", "after"])
def test_gradient_checkpointing(use_reentrant: bool, when: str) -> None:
    inputs = make_inputs(TASK)
    grads: list[dict[str, Tensor]] = []
    hooks: list[int] = []
    for library in (peft, peft_fast):
        base = make_base("llama", TASK)
        torch.manual_seed(2)
        settings = {"gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
        if when == "before":
            base.gradient_checkpointing_enable(**settings)
        model = library.get_peft_model(base, make_config(library, "llama", TASK, init_lora_weights=False))
        if when == "after":
            model.gradient_checkpointing_enable(**settings)
            model.enable_input_require_grads()
        hooks.append(len(base.get_input_embeddings()._forward_hooks))
        model.train()(**inputs).loss.backward()
        grads.append(gradients(model))
    assert hooks[1] == hooks[0] > 0
    assert list(grads[0]) == list(grads[1]) and len(grads[0]) == 12
    for key in grads[0]:
        torch.testing.assert_close(grads[1][key], grads[0][key])


@pytest.mark.parametrize("training", [False, True])
def test_compile_without_graph_breaks(training: bool) -> None:
    _, ours = make_pair("llama", TASK, lora_dropout=0.1 if training else 0.0)
    ours.train(training)
    inputs = make_inputs(TASK)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    output = compiled(**inputs)
    torch.manual_seed(0)
    expected = ours(**inputs)
    if not training:  # a compiled dropout draws other numbers
        torch.testing.assert_close(output.logits, expected.logits)
    output.loss.backward()
    assert any(parameter.grad is not None for parameter in ours.parameters())


def test_training_under_autocast_agrees_with_peft() -> None:
    theirs, ours = make_pair("llama", TASK)
    inputs = make_inputs(TASK)
    exact = copy.deepcopy(theirs).double()
    outputs = []
    for model in (ours, theirs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs.append(model(**inputs).logits)
    assert outputs[0].dtype == outputs[1].dtype
    assert_as_accurate("logits", outputs[0], outputs[1], exact(**inputs).logits)


# ---------------------------------------------------------------------------------------------- get_peft_model & co.
def test_get_peft_model_names_the_base() -> None:
    for library in (peft, peft_fast):
        base = make_base("llama", TASK)
        base.name_or_path = "org/new"
        config = make_config(library, "llama", TASK, base_model_name_or_path="org/old", revision="one")
        with pytest.warns(UserWarning) as seen:
            library.get_peft_model(base, config, revision="two")
        messages = [str(w.message) for w in seen if issubclass(w.category, UserWarning)]
        assert any("was renamed from 'org/old' to 'org/new'" in message for message in messages)
        assert any("overwriting with revision two" in message for message in messages)
        assert config.base_model_name_or_path == "org/new" and config.revision == "two"


def test_get_peft_model_twice_warns() -> None:
    for library in (peft, peft_fast):
        model = library.get_peft_model(make_base("llama", TASK), make_config(library, "llama", TASK))
        with pytest.warns(UserWarning, match="second time"):
            library.get_peft_model(model.get_base_model(), make_config(library, "llama", TASK))


def test_the_first_name_is_checked_against_the_prefix() -> None:
    for library in (peft, peft_fast):
        with pytest.warns(UserWarning, match="should not be contained in the prefix 'lora_'"):
            library.get_peft_model(make_base("llama", TASK), make_config(library, "llama", TASK), adapter_name="lora")


def test_a_failed_get_peft_model_changes_nothing() -> None:
    base = make_base("llama", TASK)
    keys, flags = list(base.state_dict()), trainable(base)
    with pytest.raises(ValueError, match="not found in the base model"):
        peft_fast.get_peft_model(base, make_config(peft_fast, "llama", TASK, target_modules=["nothing"]))
    assert list(base.state_dict()) == keys and trainable(base) == flags and not hasattr(base, "peft_config")


def test_mixed_models_are_refused() -> None:
    with pytest.raises(ValueError, match=r"mixed=True.* is not supported by peft_fast yet"):
        peft_fast.get_peft_model(make_base("llama", TASK), make_config(peft_fast, "llama", TASK), mixed=True)
    with pytest.raises(ValueError, match="not supported by peft_fast yet"):
        peft_fast.PeftMixedModel.from_pretrained(make_base("llama", TASK), "somewhere")


def test_a_configuration_without_its_methods_fields_is_refused() -> None:
    from peft_fast.config import PromptLearningConfig

    base = make_base("llama", TASK)
    config = PromptLearningConfig(peft_type="PREFIX_TUNING", task_type=TASK, num_virtual_tokens=4)
    with pytest.raises(TypeError, match="PREFIX_TUNING needs a PrefixTuningConfig, got PromptLearningConfig"):
        peft_fast.PeftModelForCausalLM(base, config)
    with pytest.raises(ValueError, match="does not support prompt learning"):
        peft_fast.inject_adapter_in_model(config, base)


@pytest.mark.parametrize("family", FAMILIES)
def test_inject_adapter_in_model(family: str) -> None:
    task = "SEQ_2_SEQ_LM" if family in ("t5", "bart") else "SEQ_CLS"
    models = []
    for library in (peft, peft_fast):
        base = make_base(family, task)
        torch.manual_seed(4)
        model = library.inject_adapter_in_model(make_config(library, family, None, init_lora_weights=False), base)
        assert model is base and list(model.peft_config) == ["default"]
        models.append(model)
    assert list(models[0].state_dict()) == list(models[1].state_dict())
    assert trainable(models[0]) == trainable(models[1])
    inputs = make_inputs(task)
    outputs = [output_tensors(model(**inputs)) for model in models]
    for key, value in outputs[0].items():
        torch.testing.assert_close(outputs[1][key], value)


def test_a_model_that_transformers_does_not_know(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    x = torch.randn(4, 6)
    models = []
    for library in (peft, peft_fast):
        torch.manual_seed(1)
        config = library.LoraConfig(target_modules=["0"], modules_to_save=["2"], init_lora_weights=False)
        models.append(library.get_peft_model(make(), config))
    assert type(models[1]) is peft_fast.PeftModel and trainable(models[0]) == trainable(models[1])
    torch.testing.assert_close(models[1](x), models[0](x))
    models[1].save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["auto_mapping"] == {
        "base_model_class": "Sequential",
        "parent_library": "torch.nn.modules.container",
    }
    for library in (peft, peft_fast):
        torch.testing.assert_close(library.PeftModel.from_pretrained(make(), str(tmp_path))(x), models[1](x))


def test_attributes_of_the_tuner_and_the_base_are_reached() -> None:
    theirs, ours = make_pair("llama", TASK)
    assert ours.config is ours.base_model.model.config and ours.device == theirs.device
    assert ours.special_peft_forward_args == theirs.special_peft_forward_args
    assert ours.active_peft_config is ours.peft_config["default"] and ours.peft_type == theirs.peft_type
    assert ours.supports_lora_conversion() == theirs.supports_lora_conversion()
    merged = ours.merge_and_unload()
    assert type(merged) is type(make_base("llama", TASK)) and not hasattr(merged, "peft_config")
    torch.testing.assert_close(logits(merged), logits(theirs.merge_and_unload()))
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = make_pair("llama", TASK)[1].nothing_of_the_kind


def test_no_adapter_left() -> None:
    """peft raises KeyError in this state; the base model is what is left."""
    _, ours = make_pair("llama", TASK)
    ours.delete_adapter("default")
    assert ours.active_adapters == [] and not ours.has_active_enabled_adapter
    torch.testing.assert_close(logits(ours), logits(make_base("llama", TASK)), rtol=0, atol=0)


def test_a_base_that_accelerate_offloads(tmp_path: Path) -> None:
    from accelerate import cpu_offload, disk_offload

    _, ours = make_pair("llama", TASK)
    ours.save_pretrained(tmp_path / "adapter")
    base = cpu_offload(make_base("llama", TASK), execution_device=torch.device("cpu"))
    assert {p.device.type for p in base.parameters()} == {"meta"}
    loaded = peft_fast.PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(ours))
    on_disk = disk_offload(make_base("llama", TASK), tmp_path / "weights", execution_device=torch.device("cpu"))
    for module in on_disk.modules():  # as for a model that was loaded straight to disk
        if getattr(getattr(module, "_hf_hook", None), "offload", False):
            module._hf_hook.original_devices = dict.fromkeys(module._hf_hook.original_devices, torch.device("meta"))
    expected = logits(on_disk)
    with pytest.raises(ValueError, match="offloaded to disk is not supported by peft_fast yet"):
        peft_fast.PeftModel.from_pretrained(on_disk, tmp_path / "adapter")
    assert torch.equal(logits(on_disk), expected)


def test_ignore_mismatched_sizes(tmp_path: Path) -> None:
    _, ours = make_pair("llama", TASK, modules_to_save=["lm_head"])
    ours.save_pretrained(tmp_path)
    for library in (peft, peft_fast):
        with pytest.raises(RuntimeError, match="size mismatch"):
            library.PeftModel.from_pretrained(make_base("llama", TASK, vocab_size=70), str(tmp_path))
        with pytest.warns(UserWarning, match="ignore_mismatched_sizes=True"):
            loaded = library.PeftModel.from_pretrained(
                make_base("llama", TASK, vocab_size=70), str(tmp_path), ignore_mismatched_sizes=True
            )
        assert loaded.get_output_embeddings().weight.shape[0] == 70


def test_key_mapping(tmp_path: Path) -> None:
    """Names that the file has from an older version of the architecture."""
    _, ours = make_pair("llama", TASK)
    ours.save_pretrained(tmp_path)
    old = {key.replace(".layers.", ".blocks."): value for key, value in load_file(tmp_path / WEIGHTS).items()}
    save_file(old, tmp_path / WEIGHTS)
    for library in (peft, peft_fast):
        loaded = library.PeftModel.from_pretrained(
            make_base("llama", TASK), str(tmp_path), key_mapping={r"\.blocks\.": ".layers."}
        )
        torch.testing.assert_close(logits(loaded), logits(ours))

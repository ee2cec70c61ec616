"""Files of prompt learning both ways with the installed peft, and directories that are refused."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import peft
import pytest
import torch
from file_cases import quiet
from huggingface_hub import ModelCard
from prompt_models import (
    METHODS,
    TOKENS,
    about_the_text,
    adapt,
    batch,
    make_base,
    make_config,
    make_pair,
    own_state,
    randomize,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peft_fast
from peft_fast.cli.main import main
from peft_fast.utils.save_and_load import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
CASES = [
    ("llama", "CAUSAL_LM"), ("gpt2", "CAUSAL_LM"), ("bert", "SEQ_CLS"), ("bert", "TOKEN_CLS"), ("bert", "QUESTION_ANS"),
    ("llama", "SEQ_CLS"), ("t5", "SEQ_2_SEQ_LM"),
]  # fmt: skip
PLAIN = ("prefix", "prompt", "multitask")  # without a network
each_method = pytest.mark.parametrize("method", METHODS)
each_case = pytest.mark.parametrize(("family", "task"), CASES, ids=["-".join(case) for case in CASES])


def fresh(family: str, task: str) -> Any:
    """A base model, the same every time."""
    torch.manual_seed(1)
    return make_base(family, task)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def config_of(directory: Path) -> dict[str, Any]:
    """The configuration in a directory, with each module to save once: peft names heads twice."""
    content: dict[str, Any] = json.loads((directory / CONFIG).read_text())
    return {**content, "modules_to_save": list(dict.fromkeys(content["modules_to_save"] or ())) or None}


def same_models(a: nn.Module, b: nn.Module) -> None:
    """The order of the parameters may differ."""
    same(dict(sorted(own_state(a).items())), dict(sorted(own_state(b).items())))


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that loading could change: tensors, gradient flags, hooks, the attention that the base uses."""
    flags = {f"{name} requires_grad": p.requires_grad for name, p in model.named_parameters()}
    hooks = {f"{name} hooks": len(m._forward_pre_hooks) + len(m._forward_hooks) for name, m in model.named_modules()}
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {**tensors, **flags, **hooks, "attention": model.config._attn_implementation}


def unchanged(model: nn.Module, before: dict[str, Any]) -> bool:
    after = state_of(model)
    return after.keys() == before.keys() and all(
        torch.equal(value, before[name]) if isinstance(value, Tensor) else value == before[name]
        for name, value in after.items()
    )


def outputs(model: Any, task: str, method: str) -> dict[str, Tensor]:
    inputs = batch(task)
    if method == "multitask" and task in ("QUESTION_ANS", "FEATURE_EXTRACTION"):
        return {}  # peft passes no task_ids on
    if task in ("TOKEN_CLS", "QUESTION_ANS"):  # peft's loss of these is wrong
        inputs = {key: value for key, value in inputs.items() if key in ("input_ids", "attention_mask")}
    more = {"task_ids": torch.tensor([2, 0, 1])} if method == "multitask" else {}
    with quiet(), torch.no_grad():
        return families.output_tensors(model(**inputs, **more))


# ------------------------------------------------------------------------------------------------------ both ways
@each_method
@each_case
def test_files_are_pefts(family: str, task: str, method: str, tmp_path: Path) -> None:
    theirs, ours = make_pair(family, task, method)
    with quiet():
        same(peft.get_peft_model_state_dict(theirs), get_peft_model_state_dict(ours))
        everything = {"save_embedding_layers": True}
        same(peft.get_peft_model_state_dict(theirs, **everything), get_peft_model_state_dict(ours, **everything))
        for model, name in ((theirs, "theirs"), (ours, "ours")):
            model.save_pretrained(tmp_path / name)
    assert sorted(os.listdir(tmp_path / "ours")) == sorted(os.listdir(tmp_path / "theirs"))
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (tmp_path / "theirs" / WEIGHTS).read_bytes()
    assert config_of(tmp_path / "ours") == config_of(tmp_path / "theirs")
    cards = [ModelCard.load(tmp_path / name / "README.md") for name in ("theirs", "ours")]
    assert cards[1].text == f"{cards[0].text}\n- peft_fast {peft_fast.__version__}"
    # peft forgets a tag where the base model has no part that is called "model"
    assert set(cards[1].data.tags) == {*cards[0].data.tags, "transformers"}
    assert {**cards[1].data.to_dict(), "tags": []} == {**cards[0].data.to_dict(), "tags": []}


@each_method
@each_case
def test_each_library_loads_the_others_files(family: str, task: str, method: str, tmp_path: Path) -> None:
    theirs, ours = make_pair(family, task, method)
    base = fresh(family, task)
    with quiet():
        for model, name in ((theirs, "theirs"), (ours, "ours")):
            model.save_pretrained(tmp_path / name)
        into_peft = peft.PeftModel.from_pretrained(fresh(family, task), tmp_path / "ours")
        into_ours = peft_fast.PeftModel.from_pretrained(base, tmp_path / "theirs")
    about_the_text(into_peft)
    same_models(into_peft, into_ours)
    flags = [{name: p.requires_grad for name, p in model.named_parameters()} for model in (into_peft, into_ours)]
    assert flags[0] == flags[1]
    assert type(into_ours).__name__ == type(into_peft).__name__ and not into_ours.training
    configs = [{**m.peft_config["default"].to_dict(), "modules_to_save": None} for m in (into_ours, into_peft)]
    assert configs[0] == configs[1]
    reference, found = outputs(into_peft, task, method), outputs(into_ours, task, method)
    assert reference.keys() == found.keys()
    for key, value in reference.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)
    with quiet():  # and saved again it is the same file
        into_ours.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "theirs" / WEIGHTS).read_bytes()
    assert config_of(tmp_path / "again") == config_of(tmp_path / "theirs")


@pytest.mark.parametrize("method", ["prefix", "projection", "p-lstm"])
def test_several_adapters(method: str, tmp_path: Path) -> None:
    adapters: Any = {"default": (method, {}), "second": (method, {"num_virtual_tokens": 3}), "third": (method, {})}
    theirs, ours = make_pair("bert", "SEQ_CLS", adapters=adapters)
    with quiet():
        for model, name in ((theirs, "theirs"), (ours, "ours")):
            model.save_pretrained(tmp_path / name, selected_adapters=["default", "second"])
        loaded = peft_fast.PeftModel.from_pretrained(fresh("bert", "SEQ_CLS"), tmp_path / "theirs")
        before = outputs(loaded, "SEQ_CLS", method)
        result = loaded.load_adapter(tmp_path / "theirs" / "second", "second")
        assert (result.missing_keys, result.unexpected_keys) == ([], [])
        peer = peft.PeftModel.from_pretrained(fresh("bert", "SEQ_CLS"), tmp_path / "ours")
        peer.load_adapter(tmp_path / "ours" / "second", "second")
    assert not (tmp_path / "ours" / "third").exists()
    for folder in ("", "second"):
        directories = [tmp_path / name / folder for name in ("ours", "theirs")]
        assert config_of(directories[0]) == config_of(directories[1])
        assert (directories[0] / WEIGHTS).read_bytes() == (directories[1] / WEIGHTS).read_bytes()
    assert torch.equal(outputs(loaded, "SEQ_CLS", method)["logits"], before["logits"])  # the new one is not active
    assert sorted(loaded.state_dict()) == sorted(own_state(peer))
    for model in (loaded, peer):
        model.set_adapter("second")
    reference, found = outputs(peer, "SEQ_CLS", method), outputs(loaded, "SEQ_CLS", method)
    torch.testing.assert_close(found["logits"], reference["logits"], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found["logits"], before["logits"])


@each_method
@pytest.mark.filterwarnings("ignore:.*is a pickle")
def test_pickles_and_loading_without_memory(method: str, tmp_path: Path) -> None:
    _, ours = make_pair("bert", "TOKEN_CLS", method)
    with quiet():
        ours.save_pretrained(tmp_path, safe_serialization=False)
        assert (tmp_path / "adapter_model.bin").exists() and not (tmp_path / WEIGHTS).exists()
        peer = peft.PeftModel.from_pretrained(fresh("bert", "TOKEN_CLS"), tmp_path)
        for low_cpu_mem_usage in (False, True):
            loaded = peft_fast.PeftModel.from_pretrained(
                fresh("bert", "TOKEN_CLS"), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
            )
            same_models(peer, loaded)
            loaded.load_adapter(tmp_path, "more", low_cpu_mem_usage=low_cpu_mem_usage)
            same(get_peft_model_state_dict(loaded), get_peft_model_state_dict(loaded, adapter_name="more"))


@each_method
def test_a_gathered_state_dict(method: str, tmp_path: Path) -> None:
    """What FSDP and ZeRO-3 hand over is saved, a network's output computed from it; peft looks at the shards."""
    _, ours = make_pair("bert", "SEQ_CLS", method)
    gathered = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    expected = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(ours).items()}
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    same(expected, get_peft_model_state_dict(ours, state_dict=gathered))
    with quiet():
        ours.save_pretrained(tmp_path, state_dict=gathered)
    saved = load_file(tmp_path / WEIGHTS)
    assert saved.keys() == expected.keys() and all(torch.equal(saved[name], expected[name]) for name in saved)


def test_half_precision_files_become_fp32(tmp_path: Path) -> None:
    _, ours = make_pair("llama", "CAUSAL_LM", "prefix")
    with quiet():
        ours.save_pretrained(tmp_path)
        narrow = {name: tensor.bfloat16() for name, tensor in load_file(tmp_path / WEIGHTS).items()}
        save_file(narrow, tmp_path / WEIGHTS)
        for library in (peft, peft_fast):
            loaded = library.PeftModel.from_pretrained(fresh("llama", "CAUSAL_LM").bfloat16(), tmp_path)
            weight = loaded.prompt_encoder["default"].embedding.weight
            assert weight.dtype == torch.float32 and torch.equal(weight, narrow["prompt_embeddings"].float())


# --------------------------------------------------------------------------------------- state dicts and existing names
@pytest.mark.parametrize("method", PLAIN)
def test_weights_into_an_adapter_that_is_there(method: str, tmp_path: Path) -> None:
    """What a Trainer does when it resumes, or loads the best checkpoint."""
    _, ours = make_pair("bert", "SEQ_CLS", method)
    with quiet():
        ours.save_pretrained(tmp_path)
    expected = get_peft_model_state_dict(ours)
    expected = {name: tensor.clone() for name, tensor in expected.items()}
    trainable, parameters = families.trainable(ours), [id(p) for p in ours.parameters()]
    for is_trainable in (True, False):
        randomize(ours, seed=9)
        ours.train()
        assert not torch.equal(get_peft_model_state_dict(ours)["prompt_embeddings"], expected["prompt_embeddings"])
        with quiet():
            result = ours.load_adapter(str(tmp_path), "default", is_trainable=is_trainable)
        assert (result.missing_keys, result.unexpected_keys) == ([], [])
        same(get_peft_model_state_dict(ours), expected)
        assert families.trainable(ours) == trainable and [id(p) for p in ours.parameters()] == parameters
        assert ours.training == is_trainable and not ours.peft_config["default"].inference_mode


@pytest.mark.parametrize("method", PLAIN)
def test_state_dicts_by_hand(method: str, tmp_path: Path) -> None:
    theirs, ours = make_pair("bert", "SEQ_CLS", method)
    state = {name: torch.randn(tensor.shape) for name, tensor in get_peft_model_state_dict(ours).items()}
    peft.set_peft_model_state_dict(theirs, dict(state))
    result = set_peft_model_state_dict(ours, state)
    same_models(theirs, ours)
    assert result.unexpected_keys == [] and not any("default" in key for key in result.missing_keys)
    extra = set_peft_model_state_dict(ours, {**state, "nonsense": torch.zeros(2)})
    assert extra.unexpected_keys == ["nonsense"]
    for library, model in ((peft, theirs), (peft_fast, ours)):
        with pytest.raises(KeyError, match="prompt_embeddings"):
            lacking = {name: tensor for name, tensor in state.items() if name != "prompt_embeddings"}
            library.set_peft_model_state_dict(model, lacking)
        with pytest.raises(RuntimeError, match="size mismatch"):
            library.set_peft_model_state_dict(model, {**state, "prompt_embeddings": torch.zeros(3, 5)})
    with quiet():
        ours.save_pretrained(tmp_path)
    same(dict(sorted(load_peft_weights(tmp_path, "cpu").items())), dict(sorted(state.items())))


@pytest.mark.parametrize("method", ["projection", "p-mlp", "p-lstm"])
def test_there_is_no_way_back_into_a_network(method: str, tmp_path: Path) -> None:
    """peft fails for a projection with a size mismatch, and for P-tuning trains on from wrong numbers."""
    _, ours = make_pair("bert", "SEQ_CLS", method)
    with quiet():
        ours.save_pretrained(tmp_path)
    before = state_of(ours)
    for is_trainable in (True, False):
        with pytest.raises(ValueError, match=r"adapter 'default', file .*load it under another name"), quiet():
            ours.load_adapter(tmp_path, "default", is_trainable=is_trainable)
    with pytest.raises(ValueError, match=r"adapter 'default': .*load it under another name"):
        set_peft_model_state_dict(ours, get_peft_model_state_dict(ours))
    assert unchanged(ours, before)
    with quiet():
        ours.load_adapter(tmp_path, "best")
    expected = outputs(ours, "SEQ_CLS", method)["logits"]
    ours.set_adapter("best", inference_mode=True)
    torch.testing.assert_close(outputs(ours, "SEQ_CLS", method)["logits"], expected, rtol=1e-5, atol=1e-6)


@each_method
def test_a_loaded_adapter_cannot_be_trainable(method: str, tmp_path: Path) -> None:
    _, ours = make_pair("bert", "SEQ_CLS", method)
    message = "Cannot set a prompt learning adapter to trainable when loading pretrained adapter."
    with quiet():
        ours.save_pretrained(tmp_path)
    for library in (peft, peft_fast):
        with pytest.raises(ValueError, match=message), quiet():
            library.PeftModel.from_pretrained(fresh("bert", "SEQ_CLS"), tmp_path, is_trainable=True)
    before = state_of(ours)
    with pytest.raises(ValueError, match=message), quiet():
        ours.load_adapter(tmp_path, "new", is_trainable=True)
    assert unchanged(ours, before) and list(ours.peft_config) == ["default"]


# ------------------------------------------------------------------------------------------------ beside LoRA adapters
def with_lora(task: str = "SEQ_CLS") -> Any:
    """A LoRA model with a LoRA adapter "tuned" and a prefix "prefixed"."""
    model = peft_fast.get_peft_model(
        fresh("bert", task), families.make_config(peft_fast, "bert", task), adapter_name="tuned"
    )
    model.add_adapter("prefixed", make_config(peft_fast, "prefix", task))
    randomize(model)
    return model.eval()


def test_a_prefix_beside_lora_has_the_same_files(tmp_path: Path) -> None:
    """They load in peft and in a model without LoRA, and the other way round."""
    model = with_lora()
    with quiet():
        model.save_pretrained(tmp_path)
        alone = peft_fast.PeftModel.from_pretrained(fresh("bert", "SEQ_CLS"), tmp_path / "prefixed")
        peer = peft.PeftModel.from_pretrained(fresh("bert", "SEQ_CLS"), tmp_path / "prefixed")
        same_models(peer, alone)
        same(get_peft_model_state_dict(model, adapter_name="prefixed"), get_peft_model_state_dict(alone))
        names = list(load_file(tmp_path / "tuned" / WEIGHTS))
        assert "prompt_embeddings" not in names and not any("prompt_encoder" in name for name in names)
        other = peft_fast.PeftModel.from_pretrained(fresh("bert", "SEQ_CLS"), tmp_path / "tuned", "tuned")
        result = other.load_adapter(tmp_path / "prefixed", "prefixed")
        assert (result.missing_keys, result.unexpected_keys) == ([], [])
        same_models(model, other)
        alone.save_pretrained(tmp_path / "again")
        randomize(model, seed=9)
        model.load_adapter(tmp_path / "again", "prefixed")
    same(get_peft_model_state_dict(model, adapter_name="prefixed"), get_peft_model_state_dict(alone))
    for name in ("tuned", "prefixed"):
        for models in (model, other):
            models.set_adapter(name)
        state = get_peft_model_state_dict(other, adapter_name=name)
        set_peft_model_state_dict(model, state, adapter_name=name)
        assert torch.equal(*(outputs(m, "SEQ_CLS", "prefix")["logits"] for m in (model, other)))


def test_embeddings_of_a_prefix_beside_lora_have_the_same_names() -> None:
    model, (_, alone) = with_lora(), make_pair("bert", "SEQ_CLS", "prefix")
    with quiet():
        beside = get_peft_model_state_dict(model, adapter_name="prefixed", save_embedding_layers=True)
        assert list(beside) == list(get_peft_model_state_dict(alone, save_embedding_layers=True))


def test_a_prefix_is_not_registered(tmp_path: Path) -> None:
    model = with_lora()
    with quiet():
        model.save_pretrained(tmp_path)
    config, weights = (
        peft_fast.PeftConfig.from_pretrained(tmp_path / "prefixed"),
        load_file(tmp_path / "prefixed" / WEIGHTS),
    )
    before = state_of(model)
    for source in (tmp_path / "prefixed", (config, weights)):
        model.adapter_bank.register("later", source)
        with pytest.raises(ValueError, match=r"'later' \(PrefixTuningConfig\) .*add it with load_adapter"):
            model.adapter_bank.pin("later")
        model.adapter_bank.unregister("later")
    assert unchanged(model, before) and sorted(model.peft_config) == ["prefixed", "tuned"]


def test_the_name_of_a_prefix_is_not_registered(tmp_path: Path) -> None:
    model = with_lora()
    with pytest.raises(ValueError, match=r"'prefixed' is a prefix of this model.*always loaded"):
        model.adapter_bank.register("prefixed", tmp_path)
    assert model.adapter_bank.registered() == []
    model.adapter_bank.register("later", tmp_path)
    with pytest.raises(ValueError, match="'later' already exists: it is registered"):
        model.add_adapter("later", make_config(peft_fast, "prefix", "SEQ_CLS"))
    assert sorted(model.peft_config) == sorted([*model.prompt_encoder, "tuned"]) == ["prefixed", "tuned"]
    model.delete_adapter("prefixed")
    model.adapter_bank.register("prefixed", tmp_path)


# -------------------------------------------------------------------------------------------------------- refusals
WIDER = {"hidden_size": 64, "intermediate_size": 48}
OTHER_BASES: list[tuple[str, str, str, dict[str, Any], str]] = [
    ("bert", "SEQ_CLS", "prefix", WIDER, r"token_dim=\b32\b.* got .*\b64\b"),
    ("bert", "SEQ_CLS", "projection", {"num_attention_heads": 2}, r"num_attention_heads=\b4\b.* got .*\b2\b"),
    ("bert", "SEQ_CLS", "prefix", {"num_hidden_layers": 1}, r"num_layers=\b2\b.* got .*\b1\b"),
    ("bert", "SEQ_CLS", "prefix", {"num_hidden_layers": 5}, r"num_layers=\b2\b.* got .*\b5\b"),
    ("llama", "CAUSAL_LM", "prefix", WIDER, r"token_dim=\b16\b.* got .*\b32\b"),
    ("llama", "CAUSAL_LM", "prefix", {"num_key_value_heads": 4}, r"token_dim=\b16\b.* got .*\b32\b"),
    ("llama", "CAUSAL_LM", "prefix", {"num_hidden_layers": 5}, r"num_layers=\b2\b.* got .*\b5\b"),
    ("bert", "SEQ_CLS", "prompt", WIDER, r"token_dim=\b32\b.* got .*\b64\b"),
    ("llama", "CAUSAL_LM", "p-mlp", WIDER, r"token_dim=\b32\b.* got .*\b64\b"),
    ("bert", "SEQ_CLS", "multitask", WIDER, r"token_dim=\b32\b.* got .*\b64\b"),
]


@pytest.mark.parametrize(("family", "task", "method", "other", "sizes"), OTHER_BASES)
def test_an_adapter_of_another_base_is_refused_by_that_name(
    family: str, task: str, method: str, other: dict[str, Any], sizes: str, tmp_path: Path
) -> None:
    with quiet():
        adapt(peft_fast, make_base(family, task, **other), task, {"default": (method, {})}).save_pretrained(tmp_path)
        base = fresh(family, task)
        before = state_of(base)
        message = f"(?s){tmp_path}.* was made for another base model: .*{sizes}"
        with pytest.raises((ValueError, RuntimeError), match=message) as raised:
            peft_fast.PeftModel.from_pretrained(base, tmp_path)
        assert "Leave" not in str(raised.value)  # there is no configuration to leave it out of
        assert unchanged(base, before)
        model = adapt(peft_fast, base, task, {"default": (method, {})})
        with pytest.raises((ValueError, RuntimeError), match=message):
            model.load_adapter(tmp_path, "second")
    assert list(model.peft_config) == list(model.prompt_encoder) == ["default"]


def test_layers_of_an_encoder_deeper_than_its_decoder(tmp_path: Path) -> None:
    """PEFT counts the encoder's, and the decoder leaves some of them unused: such files load."""
    deep = {"encoder_layers": 4, "decoder_layers": 2}
    theirs, ours = make_pair("bart", "SEQ_2_SEQ_LM", base=deep)
    assert ours.peft_config["default"].num_layers == 4
    with quiet():
        theirs.save_pretrained(tmp_path)
        loaded = peft_fast.PeftModel.from_pretrained(make_base("bart", "SEQ_2_SEQ_LM", **deep), tmp_path)
        same_models(theirs, loaded)
        with pytest.raises(ValueError, match=r"num_layers=3, got 4"):
            peft_fast.PeftModel.from_pretrained(make_base("bart", "SEQ_2_SEQ_LM"), tmp_path)


Change = Callable[[dict[str, Tensor], dict[str, Any]], None]


def put(name: str, value: Any) -> Change:
    return lambda tensors, config: tensors.update({name: value(tensors[name]) if callable(value) else value})


def without(name: str) -> Change:
    return lambda tensors, config: tensors.__delitem__(name)


def configure(**fields: Any) -> Change:
    return lambda tensors, config: config.update(fields)


def together(*changes: Change) -> Change:
    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        for one in changes:
            one(tensors, config)

    return change


def with_nan(tensor: Tensor) -> Tensor:
    return tensor.clone().index_fill_(0, torch.tensor([0]), float("nan"))


MISMATCH = "size mismatch for prompt_embeddings"
HOSTILE: dict[str, tuple[str, Change, type[Exception], str]] = {
    "nan": ("prefix", put("prompt_embeddings", with_nan), ValueError, "finite"),
    "nan_in_rows": ("multitask", put("prefix_task_rows", with_nan), ValueError, "prefix_task_rows.*finite"),
    "nan_in_head": ("prompt", put("base_model.classifier.bias", with_nan), ValueError, "classifier.bias.*finite"),
    "integers": ("prompt", put("prompt_embeddings", lambda t: t.int()), ValueError, "expected a float dtype"),
    "huge_tokens": ("prefix", configure(num_virtual_tokens=10**9), RuntimeError, rf"{MISMATCH}.*1000000000"),
    "larger_than_any_tensor": ("prompt", configure(num_virtual_tokens=10**400), RuntimeError, MISMATCH),
    "huge_layers": ("prefix", configure(num_layers=10**9), RuntimeError, MISMATCH),
    "huge_width": ("prompt", configure(token_dim=10**9), RuntimeError, MISMATCH),
    "huge_submodules": ("prompt", configure(num_transformer_submodules=10**9), RuntimeError, MISMATCH),
    "huge_tasks": ("multitask", configure(num_tasks=10**9), RuntimeError, "size mismatch for prefix_task_cols"),
    "huge_ranks": ("multitask", configure(num_ranks=10**9), RuntimeError, "size mismatch for prefix_task_cols"),
    "tasks_without_weights": (
        "multitask",
        together(without("prefix_task_cols"), without("prefix_task_rows"), configure(num_tasks=10**9)),
        ValueError,
        "'prefix_task_cols' is not in the file",
    ),
    "another_base": ("prompt", put("prompt_embeddings", torch.zeros(TOKENS, 64)), RuntimeError, MISMATCH),
    "fewer_tokens": ("prefix", put("prompt_embeddings", lambda t: t[:2].clone()), RuntimeError, MISMATCH),
    "flat": ("prompt", put("prompt_embeddings", lambda t: t.flatten()), RuntimeError, MISMATCH),
    "no_tokens": ("prompt", configure(num_virtual_tokens=0), ValueError, "num_virtual_tokens to be a positive integer"),
    "tokens_are_text": ("prompt", configure(num_virtual_tokens="4"), ValueError, "num_virtual_tokens to be a positive"),
    "tokens_missing": ("prompt", configure(num_virtual_tokens=None), ValueError, "num_virtual_tokens must be given"),
    "heads": ("prefix", configure(num_attention_heads=7), ValueError, "no multiple of num_attention_heads=7"),
    "empty": ("p-mlp", without("prompt_embeddings"), ValueError, "'prompt_embeddings' is not in the file"),
    "base_weight": (
        "prompt", put("base_model.bert.pooler.dense.weight", torch.zeros(32, 32)), ValueError, "would overwrite",
    ),
    "original_head": (
        "prompt", put("base_model.classifier.original_module.bias", torch.zeros(2)), ValueError, "would overwrite",
    ),
    "another_adapter": (
        "prompt", put("prompt_encoder.default.embedding.weight", torch.zeros(4, 32)), ValueError, "does not belong",
    ),
    "network": ("p-mlp", put("mlp_head.0.weight", torch.zeros(12, 32)), ValueError, "does not belong"),
    "lora": ("prompt", put("base_model.bert.lora_A.weight", torch.zeros(4, 32)), ValueError, "does not belong"),
    "other_method": ("prompt", configure(peft_type="PREFIX_TUNING"), RuntimeError, MISMATCH),
    "unknown_method": ("prompt", configure(peft_type="CARTRIDGE"), ValueError, "not supported by peft_fast yet"),
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
    """For each method, what is in the files of a good adapter."""
    files = {}
    for method in METHODS:
        directory = tmp_path_factory.mktemp("good")
        with quiet():
            adapt(peft_fast, fresh("bert", "SEQ_CLS"), "SEQ_CLS", {"default": (method, {})}).save_pretrained(directory)
        files[method] = load_file(directory / WEIGHTS), json.loads((directory / CONFIG).read_text())
    return files


def write(directory: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    directory.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / WEIGHTS)
    (directory / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}, {"ignore_mismatched_sizes": True}], ids=str)
def test_refused_and_nothing_changed(case: str, options: dict[str, bool], good: Any, tmp_path: Path) -> None:
    method, change, error, message = HOSTILE[case]
    tensors, config = dict(good[method][0]), dict(good[method][1])
    write(tmp_path / "good", tensors, config)
    change(tensors, config)
    write(tmp_path / "bad", tensors, config)
    base = fresh("bert", "SEQ_CLS")
    before, started = state_of(base), time.perf_counter()
    with pytest.raises(error, match=message), quiet():
        peft_fast.PeftModel.from_pretrained(base, tmp_path / "bad", "evil", **options)
    assert unchanged(base, before) and not hasattr(base, "peft_config")
    with quiet():
        model = peft_fast.PeftModel.from_pretrained(base, tmp_path / "good")
        before = state_of(model)
        with pytest.raises((error, ValueError), match=message):
            model.load_adapter(tmp_path / "bad", "evil", **options)
    assert unchanged(model, before) and list(model.peft_config) == list(model.prompt_encoder) == ["default"]
    assert time.perf_counter() - started < 20, "something large was made"


def test_a_file_does_not_buy_more_memory_than_it_has(tmp_path: Path) -> None:
    """A base model with key heads of its own decides the width: what the file has per layer would be multiplied."""
    base = fresh("llama", "CAUSAL_LM")
    config = make_config(peft_fast, "prefix", "CAUSAL_LM").to_dict()
    layers = 2**20
    sizes = {"num_layers": layers, "token_dim": 1, "num_attention_heads": 1, "num_virtual_tokens": 1}
    write(tmp_path, {"prompt_embeddings": torch.zeros(1, 2 * layers)}, {**config, **sizes})
    with pytest.raises(RuntimeError, match=rf"{MISMATCH}.*\[1, {2 * layers}\].*\[1, {2 * layers * 16}\]"), quiet():
        peft_fast.PeftModel.from_pretrained(base, tmp_path)


@pytest.mark.parametrize("case", HOSTILE)
def test_refused_beside_lora(case: str, good: Any, tmp_path: Path) -> None:
    method, change, error, _ = HOSTILE[case]
    tensors, config = dict(good[method][0]), dict(good[method][1])
    change(tensors, config)
    write(tmp_path, tensors, config)
    model = with_lora()
    before, prefix = state_of(model), dict(good["prefix"][0])
    with pytest.raises((error, ValueError)), quiet():
        model.load_adapter(tmp_path, "evil")
    assert unchanged(model, before) and sorted(model.peft_config) == ["prefixed", "tuned"]
    write(tmp_path, {**prefix, "prompt_encoder.prefixed.embedding.weight": torch.zeros(TOKENS, 128)}, good["prefix"][1])
    for name in ("evil", "prefixed"):
        with pytest.raises(ValueError, match="does not belong to the adapter"), quiet():
            model.load_adapter(tmp_path, name)
    assert unchanged(model, before) and sorted(model.peft_config) == ["prefixed", "tuned"]


def test_a_lora_file_that_brings_a_prefix_is_refused(tmp_path: Path) -> None:
    model = with_lora()
    with quiet():
        model.save_pretrained(tmp_path, selected_adapters=["tuned"])
    tensors = load_file(tmp_path / "tuned" / WEIGHTS)
    for name in ("prompt_embeddings", "prompt_encoder.prefixed.embedding.weight"):
        save_file({**tensors, name: torch.zeros(TOKENS, 128)}, tmp_path / "tuned" / WEIGHTS)
        before = state_of(model)
        for adapter in ("tuned", "evil"):
            with pytest.raises(ValueError, match="does not belong to the adapter"), quiet():
                model.load_adapter(tmp_path / "tuned", adapter)
        assert unchanged(model, before) and sorted(model.peft_config) == ["prefixed", "tuned"]


@pytest.mark.parametrize("method", ["prompt", "multitask"])
def test_loading_opens_no_other_file(method: str, good: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tokens started as is history: nothing that the configuration names is looked for."""
    tensors, config = good[method]
    text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x", "tokenizer_name_or_path": str(tmp_path / "t")}
    fields: list[dict[str, Any]] = [{**text, "tokenizer_kwargs": {"trust_remote_code": True}}]
    fields.append({"prompt_tuning_init": "SAMPLE_VOCAB"})
    if method == "multitask":
        path = tmp_path / "source.bin"
        path.write_bytes(b"cos\nsystem\n(S'true'\ntR.")
        fields.append(
            {"prompt_tuning_init": "AVERAGE_SOURCE_TASKS", "prompt_tuning_init_state_dict_path": os.fspath(path)}
        )
    opened: list[str] = []
    real = torch.load
    monkeypatch.setattr(torch, "load", lambda path, **kw: (opened.append(str(path)), real(path, **kw))[1])
    for inference_mode in (True, False):
        for more in fields:
            write(tmp_path / "adapter", tensors, {**config, **more, "inference_mode": inference_mode})
            with quiet():
                model = peft_fast.PeftModel.from_pretrained(fresh("bert", "SEQ_CLS"), tmp_path / "adapter")
                model.load_adapter(tmp_path / "adapter", "second")
            assert torch.equal(model.prompt_encoder["second"].embedding.weight, tensors["prompt_embeddings"])
    assert opened == []


def test_a_head_that_is_missing_is_said(good: Any, tmp_path: Path) -> None:
    tensors, config = good["prompt"]
    write(tmp_path, {name: t for name, t in tensors.items() if "classifier" not in name}, config)
    with pytest.warns(UserWarning, match=r"Found missing adapter keys.*classifier.modules_to_save.default.weight"):
        peft_fast.PeftModel.from_pretrained(fresh("bert", "SEQ_CLS"), tmp_path)
    with pytest.raises(ValueError, match="strict=True needs all of them"):
        peft_fast.PeftModel.from_pretrained(fresh("bert", "SEQ_CLS"), tmp_path, strict=True)


def test_a_configuration_by_hand_needs_no_sizes(good: Any, tmp_path: Path) -> None:
    """The base model tells them, as in peft."""
    for method in ("prefix", "prompt"):
        tensors, config = good[method]
        sizes = ("token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules", "encoder_hidden_size")
        write(tmp_path, tensors, {key: value for key, value in config.items() if key not in sizes})
        with quiet():
            model = peft_fast.PeftModel.from_pretrained(fresh("bert", "SEQ_CLS"), tmp_path)
        assert torch.equal(model.prompt_encoder["default"].embedding.weight, tensors["prompt_embeddings"])


@each_method
def test_the_check_command(method: str, good: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = fresh("bert", "SEQ_CLS")
    base.save_pretrained(tmp_path / "base")
    tensors, config = good[method]
    write(tmp_path / "adapter", tensors, config)
    capsys.readouterr()
    assert main(["check", str(tmp_path / "adapter"), "--base", str(tmp_path / "base")]) == 0
    said = capsys.readouterr().out
    assert config["peft_type"] in said and "every weight has its place" in said
    write(tmp_path / "adapter", tensors, {**config, "num_virtual_tokens": 10**9})
    assert main(["check", str(tmp_path / "adapter")]) == 1
    assert MISMATCH in capsys.readouterr().err

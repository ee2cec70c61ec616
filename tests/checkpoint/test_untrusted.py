"""Adapter directories made to do harm, or made by mistake: each is refused, and the model stays as it was."""

from __future__ import annotations

import functools
import json
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from file_cases import CASES, quiet, randomise
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peft_fast
from peft_fast.utils.save_and_load import get_peft_model_state_dict, load_adapter_weights, set_peft_model_state_dict

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LLAMA = "base_model.model.model.layers.0.self_attn."
BERT = "base_model.model.bert.encoder.layer.0."
A, B = f"{LLAMA}q_proj.lora_A.weight", f"{LLAMA}q_proj.lora_B.weight"
Tensors = dict[str, Tensor]


def put(name: str, value: Callable[[Tensor], Tensor] | Tensor) -> Callable[[Tensors, dict], None]:
    """Change (or add) one tensor of the file."""

    def change(tensors: Tensors, config: dict) -> None:
        tensors[name] = value(tensors[name]).contiguous() if callable(value) else value

    return change


def at_first(value: float) -> Callable[[Tensor], Tensor]:
    """The tensor with one element replaced."""
    return lambda tensor: torch.cat([torch.tensor([value]), tensor.flatten()[1:]]).view(tensor.shape)


def configure(**fields: Any) -> Callable[[Tensors, dict], None]:
    """Change fields of the config."""
    return lambda tensors, config: config.update(fields)


def rename(pattern: str, replacement: str) -> Callable[[Tensors, dict], None]:
    """Change the names of tensors."""

    def change(tensors: Tensors, config: dict) -> None:
        items = [(re.sub(pattern, replacement, name), tensor) for name, tensor in tensors.items()]
        tensors.clear()
        tensors.update(items)

    return change


@dataclass
class Hostile:
    """What is done to a good directory of a case, and how loading answers (`says`: parts of the message)."""

    case: str
    change: Callable[[Tensors, dict], None]
    error: type[Exception]
    says: tuple[str, ...]


VALUE, SIZE = ValueError, RuntimeError
MISMATCH = "size mismatch"
BASE = "would overwrite weights of the base model"
LEFT = "does not belong to the adapter"
HOSTILE = {
    # numbers
    "nan": Hostile("llama", put(A, at_first(float("nan"))), VALUE, (A, "finite")),
    "inf": Hostile("llama", put(B, at_first(float("inf"))), VALUE, (B, "finite")),
    "minus_inf_bf16": Hostile("llama", put(B, lambda t: at_first(-float("inf"))(t).bfloat16()), VALUE, (B, "finite")),
    "nan_in_head": Hostile(
        "bert", put("base_model.model.classifier.bias", at_first(float("nan"))), VALUE, ("classifier.bias", "finite")
    ),
    "nan_in_bias": Hostile(
        "bert_bias_all", put(f"{BERT}output.dense.bias", at_first(float("nan"))), VALUE, ("output.dense.bias", "finite")
    ),
    "nan_scaling": Hostile("llama", configure(lora_alpha=float("nan")), VALUE, ("lora_alpha = nan",)),
    "inf_scaling": Hostile("llama", configure(lora_alpha=float("inf")), VALUE, ("lora_alpha = inf",)),
    "inf_scaling_pattern": Hostile("llama", configure(alpha_pattern={"q": float("inf")}), VALUE, ("alpha_pattern.q",)),
    "huge_scaling": Hostile("llama", configure(lora_alpha=10**400), VALUE, ("lora_alpha", "finite number")),
    # ranks
    "zero_rank": Hostile("llama", configure(r=0), VALUE, ()),
    "huge_rank": Hostile("llama", configure(r=10**9), SIZE, (MISMATCH, "[4, 32]", "[1000000000, 32]")),
    "huge_rank_pattern": Hostile(
        "llama", configure(rank_pattern={"v_proj": 10**9}), SIZE, (MISMATCH, "[4, 32]", "[1000000000, 32]")
    ),
    "huge_default_rank": Hostile(
        "llama", configure(r=10**9, rank_pattern={"q_proj": 4, "v_proj": 4}), SIZE, (MISMATCH, "1000000000")
    ),
    "huge_rank_without_weights": Hostile(
        "embeddings_saved",
        lambda tensors, config: (config.update(r=10**9), [tensors.pop(n) for n in list(tensors) if "lora" in n]),
        VALUE,
        ("none of the adapter's",),
    ),
    "huge_rank_in_empty_tensors": Hostile(
        "llama",
        lambda tensors, config: (
            config.update(r=10**9, rank_pattern={"v_proj": 4}),
            tensors.update({A: torch.empty(10**9, 0), B: torch.empty(0, 10**9)}),
        ),
        SIZE,
        (MISMATCH, "1000000000"),
    ),
    "other_rank": Hostile("llama", configure(r=8), SIZE, (MISMATCH, "[4, 32]", "[8, 32]")),
    "rank_of_another_module": Hostile(
        "rank_pattern", configure(rank_pattern={"q_proj": 3}), SIZE, (MISMATCH, "[4, 32]", "[3, 32]")
    ),
    "rank_differs_between_a_and_b": Hostile(
        "llama", put(B, lambda t: t[:, :3]), SIZE, (MISMATCH, B, "[32, 3]", "[32, 4]")
    ),
    # shapes
    "transposed": Hostile("llama", put(A, lambda t: t.t()), SIZE, (MISMATCH, A, "[32, 4]")),
    "wide": Hostile("llama", put(A, lambda t: torch.cat([t, t], 1)), SIZE, (MISMATCH, A, "[4, 64]", "[4, 32]")),
    "flat": Hostile("llama", put(A, lambda t: t.flatten()), SIZE, (MISMATCH, A, "[128]", "[4, 32]")),
    "scalar": Hostile("llama", put(B, torch.tensor(1.0)), SIZE, (MISMATCH, B, "[32, 4]")),
    "empty": Hostile("llama", put(B, torch.empty(0, 4)), SIZE, (MISMATCH, B, "[0, 4]", "[32, 4]")),
    "other_vocabulary": Hostile(
        "embeddings_saved",
        put("base_model.model.lm_head.weight", lambda t: t[:-1]),
        SIZE,
        (MISMATCH, "lm_head.weight", "[39, 32]", "[40, 32]"),
    ),
    "other_head": Hostile(
        "bert", put("base_model.model.classifier.weight", torch.ones(3, 32)), SIZE, (MISMATCH, "[3, 32]", "[2, 32]")
    ),
    "duplicate_of_another_size": Hostile(
        "bert_bias_all",
        put("base_model.model.classifier.modules_to_save.bias", torch.ones(99)),
        SIZE,
        (MISMATCH, "[99]"),
    ),
    # dtypes
    "int8": Hostile("llama", put(A, lambda t: t.to(torch.int8)), VALUE, (A, "expected a float dtype, got I8")),
    "bool": Hostile("llama", put(B, lambda t: t > 0), VALUE, (B, "expected a float dtype, got BOOL")),
    "complex": Hostile("llama", put(B, lambda t: t.to(torch.complex64)), VALUE, (B, "expected a float dtype, got C64")),
    "int_head": Hostile(
        "bert", put("base_model.model.classifier.weight", lambda t: t.long()), VALUE, ("classifier.weight", "got I64")
    ),
    "float_count": Hostile(
        "conv",
        put("base_model.model.norm.num_batches_tracked", torch.tensor(1.0)),
        VALUE,
        ("num_batches_tracked", "expected a integer dtype, got F32"),
    ),
    # names
    "leftover": Hostile("llama", put("base_model.model.extra.weight", torch.ones(2)), VALUE, ("extra.weight", LEFT)),
    "no_prefix": Hostile("llama", rename(r"^base_model\.model\.", ""), VALUE, ("model.layers.0", LEFT)),
    "not_targeted": Hostile("llama", configure(target_modules=["q_proj"]), VALUE, ("v_proj.lora_A.weight", LEFT)),
    "not_trained": Hostile("conv", configure(modules_to_save=["norm"]), VALUE, ("head.weight", BASE)),
    "none_present": Hostile(
        "llama", lambda tensors, config: tensors.clear(), VALUE, ("none of the adapter's", "no tensor")
    ),
    "only_embeddings": Hostile(
        "embeddings_saved",
        lambda tensors, config: [tensors.pop(n) for n in list(tensors) if "lora" in n],
        VALUE,
        ("none of",),
    ),
    # base weights
    "base_weight": Hostile("llama", put(f"{LLAMA}o_proj.weight", torch.zeros(32, 32)), VALUE, ("o_proj.weight", BASE)),
    "targeted_base_weight": Hostile(
        "llama", put(f"{LLAMA}q_proj.base_layer.weight", torch.zeros(32, 32)), VALUE, ("q_proj.base_layer.weight", BASE)
    ),
    "targeted_base_weight_by_its_old_name": Hostile(
        "llama", put(f"{LLAMA}q_proj.weight", torch.zeros(32, 32)), VALUE, ("q_proj.weight", BASE)
    ),
    "norm": Hostile("llama", put("base_model.model.model.norm.weight", torch.zeros(32)), VALUE, ("norm.weight", BASE)),
    "bias_without_bias": Hostile(
        "bert", put(f"{BERT}attention.self.query.base_layer.bias", torch.zeros(32)), VALUE, ("base_layer.bias", BASE)
    ),
    "bias_beyond_lora_only": Hostile(
        "bert_bias_lora_only", put(f"{BERT}output.LayerNorm.bias", torch.zeros(32)), VALUE, ("LayerNorm.bias", BASE)
    ),
    "weight_with_bias_all": Hostile(
        "bert_bias_all", put(f"{BERT}output.LayerNorm.weight", torch.zeros(32)), VALUE, ("LayerNorm.weight", BASE)
    ),
    "original_of_trained": Hostile(
        "bert", put("base_model.model.classifier.original_module.weight", torch.zeros(2, 32)), VALUE, ("original", BASE)
    ),
}


@functools.cache
def good_files(case_name: str) -> tuple[bytes, str]:
    """Weights and config of a good adapter of random values, as saved."""
    case = CASES[case_name]
    with quiet(), tempfile.TemporaryDirectory() as directory:
        model = peft_fast.get_peft_model(case.model(), peft_fast.LoraConfig(**case.config))
        set_peft_model_state_dict(model, randomise(get_peft_model_state_dict(model, **case.save)))
        model.save_pretrained(directory, **case.save)
        return Path(directory, WEIGHTS).read_bytes(), Path(directory, CONFIG).read_text()


def good_directory(case_name: str, directory: Path) -> tuple[Tensors, dict]:
    """Make a directory of a good adapter; returns what is in its files."""
    weights, config = good_files(case_name)
    directory.mkdir(exist_ok=True)
    (directory / WEIGHTS).write_bytes(weights)
    (directory / CONFIG).write_text(config)
    return load_file(directory / WEIGHTS), json.loads(config)


def hostile_directory(hostile: Hostile, directory: Path) -> None:
    tensors, config = good_directory(hostile.case, directory)
    hostile.change(tensors, config)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / CONFIG).write_text(json.dumps(config))


def state_of(model: nn.Module) -> Tensors:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(params=HOSTILE)
def hostile(request: pytest.FixtureRequest) -> Hostile:
    return HOSTILE[request.param]


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_refused_as_the_first_adapter(hostile: Hostile, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    hostile_directory(hostile, tmp_path)
    base = CASES[hostile.case].model()
    before = state_of(base)
    started = time.perf_counter()
    with pytest.raises(hostile.error) as error, quiet():
        peft_fast.PeftModel.from_pretrained(base, tmp_path, "evil", low_cpu_mem_usage=low_cpu_mem_usage)
    assert time.perf_counter() - started < 20, "something large was made"
    assert same(state_of(base), before), "the base model is as it was"
    for part in hostile.says:
        assert part in str(error.value)
    if hostile.says and "lora_alpha" not in hostile.says[0] and "alpha_pattern" not in hostile.says[0]:
        assert "adapter 'evil'" in str(error.value) and str(tmp_path / WEIGHTS) in str(error.value)


def test_refused_beside_another_adapter(hostile: Hostile, tmp_path: Path) -> None:
    """The adapters that are there, and one of the same name, keep their weights."""
    case = CASES[hostile.case]
    if case.config.get("bias", "none") != "none":
        return  # only one adapter can train biases
    hostile_directory(hostile, tmp_path / "evil")
    good_directory(hostile.case, tmp_path / "good")
    with quiet():
        model = peft_fast.PeftModel.from_pretrained(case.model(), tmp_path / "good")
        before = state_of(model)
        with pytest.raises(hostile.error):
            model.load_adapter(tmp_path / "evil", "evil")
    assert list(model.peft_config) == ["default"]
    assert same(state_of(model), before)
    if hostile.change.__qualname__.startswith("configure"):
        return
    with pytest.raises(hostile.error), quiet():
        model.load_adapter(tmp_path / "evil", "default")
    assert same(state_of(model), before)


@pytest.mark.parametrize("name", CASES)
def test_the_same_directories_load_unchanged(name: str, tmp_path: Path) -> None:
    """The checks refuse nothing that is good (otherwise the table above would prove little)."""
    tensors, _ = good_directory(name, tmp_path)
    hostile_directory(Hostile(name, lambda tensors, config: None, VALUE, ()), tmp_path)
    with quiet():
        model = peft_fast.PeftModel.from_pretrained(CASES[name].model(), tmp_path)
        own = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert set(own) <= set(tensors) and all(torch.equal(own[key], tensors[key]) for key in own)


def test_what_peft_writes_about_the_base_is_loaded(tmp_path: Path) -> None:
    """Biases (bias != "none") and embeddings are the base weights that a file may bring; they arrive."""
    for name, key in (("bert_bias_all", "output.LayerNorm.bias"), ("embeddings_saved", "embed_tokens.weight")):
        tensors, _ = good_directory(name, tmp_path / name)
        with quiet():
            model = peft_fast.PeftModel.from_pretrained(CASES[name].model(), tmp_path / name)
        state = model.state_dict()
        brought = [file_name for file_name in tensors if file_name.endswith(key)]
        assert brought and all(torch.equal(state[file_name], tensors[file_name]) for file_name in brought)


def test_names_of_the_base_depend_on_nothing_but_the_layer(tmp_path: Path) -> None:
    """`x.bias` and `x.base_layer.bias` are one tensor: which name was written depends on the other adapters then."""
    case = CASES["bert_bias_all"]
    tensors, _ = good_directory("bert_bias_all", tmp_path)
    key = f"{BERT}attention.self.query.base_layer.bias"
    other = f"{BERT}attention.self.key.bias"
    tensors[key.replace(".base_layer", "")] = tensors.pop(key)
    tensors[other.replace(".bias", ".base_layer.bias")] = tensors.pop(other)
    save_file(tensors, tmp_path / WEIGHTS)
    with quiet():
        model = peft_fast.PeftModel.from_pretrained(case.model(), tmp_path)
    state = model.state_dict()
    assert torch.equal(state[key], tensors[key.replace(".base_layer", "")])
    assert torch.equal(state[other], tensors[other.replace(".bias", ".base_layer.bias")])


def test_ignored_sizes_are_skipped_and_said(tmp_path: Path) -> None:
    """ignore_mismatched_sizes lets sizes pass as in PEFT, but no leftover, no NaN and no huge rank."""
    case = CASES["llama"]
    for name, hostile in HOSTILE.items():
        if hostile.case != "llama":
            continue
        directory = tmp_path / name
        hostile_directory(hostile, directory)
        absurd = "huge" in name or hostile.error is VALUE
        with quiet():
            if absurd:
                with pytest.raises(hostile.error):
                    peft_fast.PeftModel.from_pretrained(case.model(), directory, ignore_mismatched_sizes=True)
                continue
        with pytest.warns(UserWarning, match="are being ignored because you passed `ignore_mismatched_sizes=True`"):
            peft_fast.PeftModel.from_pretrained(case.model(), directory, ignore_mismatched_sizes=True)


@pytest.mark.filterwarnings("ignore:.*is a pickle")
def test_bin_files_pass_the_same_checks(tmp_path: Path) -> None:
    case = CASES["llama"]
    for name, change in (
        ("nan", put(A, at_first(float("nan")))),
        ("base", put(f"{LLAMA}o_proj.weight", torch.zeros(32, 32))),
    ):
        tensors, config = good_directory("llama", tmp_path / name)
        change(tensors, config)
        (tmp_path / name / WEIGHTS).unlink()
        torch.save(tensors, tmp_path / name / "adapter_model.bin")
        with pytest.raises(ValueError, match=r"adapter 'default', file .*adapter_model.bin"):
            peft_fast.PeftModel.from_pretrained(case.model(), tmp_path / name)
    tensors, _ = good_directory("llama", tmp_path / "stride")
    (tmp_path / "stride" / WEIGHTS).unlink()
    tensors[A] = torch.ones(1).expand(10**6, 10**6)  # four bytes that claim to be terabytes
    torch.save(tensors, tmp_path / "stride" / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"expected the data of all 1000000000000 elements .* got 4 bytes"):
        peft_fast.PeftModel.from_pretrained(case.model(), tmp_path / "stride")


def test_broken_weights_name_the_file(tmp_path: Path) -> None:
    case = CASES["llama"]
    good_directory("llama", tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()
    for content in (whole[:-8], whole[:20], b""):
        (tmp_path / WEIGHTS).write_bytes(content)
        with pytest.raises(ValueError, match=r"adapter 'evil', file .*expected a complete safetensors file"):
            peft_fast.PeftModel.from_pretrained(case.model(), tmp_path, "evil")


def test_set_peft_model_state_dict_keeps_peft_s_contract() -> None:
    """Only directories are checked: a dictionary comes from the program itself."""
    case = CASES["llama"]
    with quiet():
        model = peft_fast.get_peft_model(case.model(), peft_fast.LoraConfig(**case.config))
    result = set_peft_model_state_dict(model, {A: torch.full((4, 32), float("nan")), "x": torch.ones(1)})
    assert result.unexpected_keys == ["x"] and A.replace(".weight", ".default.weight") not in result.missing_keys


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/b", "..", "a.b", ""])
def test_adapter_names_stay_inside(name: str, tmp_path: Path) -> None:
    case = CASES["llama"]
    good_directory("llama", tmp_path / "good")
    with pytest.raises(ValueError, match="cannot be the name of an adapter"):
        peft_fast.PeftModel.from_pretrained(case.model(), tmp_path / "good", name)
    with quiet():
        model = peft_fast.PeftModel.from_pretrained(case.model(), tmp_path / "good")
    with pytest.raises(ValueError, match="cannot be the name of an adapter"):
        model.load_adapter(tmp_path / "good", name)
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "other").symlink_to(tmp_path / "elsewhere")
    with quiet():
        model.load_adapter(tmp_path / "good", "other")
        with pytest.raises(ValueError, match="is a link to"):
            model.save_pretrained(tmp_path / "out")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_strict_needs_every_weight(tmp_path: Path) -> None:
    case = CASES["llama"]
    tensors, _ = good_directory("llama", tmp_path)
    with quiet():
        model = peft_fast.PeftModel.from_pretrained(case.model(), tmp_path)
    load_adapter_weights(model, tmp_path, "default", strict=True)
    del tensors[A]
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"Found missing adapter keys while loading the checkpoint: .*q_proj.lora_A"):
        load_adapter_weights(model, tmp_path, "default", strict=True)


@pytest.mark.parametrize(
    ("field", "value"), [("lora_alpha", float("nan")), ("alpha_pattern", {"q": float("inf")}), ("r", 0)]
)
def test_a_config_that_the_program_changed_is_checked_too(field: str, value: Any, tmp_path: Path) -> None:
    """check_adapter_directory takes the config that will be injected, wherever it comes from."""
    good_directory("llama", tmp_path)
    config = peft_fast.PeftConfig.from_pretrained(tmp_path)
    setattr(config, field, value)
    with pytest.raises(ValueError, match=rf"adapter 'evil', file .*: expected {field}"):
        peft_fast.PeftModel.from_pretrained(CASES["llama"].model(), tmp_path, "evil", config=config)

"""Which modules a config means: the same as in the installed peft, for the model families that people use."""

import copy
import time
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.tuners import tuners_utils as peft_tuners_utils
from peft.utils import constants as peft_constants, other as peft_other
from torch import nn

from peft_fast.tuners import _matching
from peft_fast.tuners._matching import PatternBudget, TargetMatcher, unused_patterns
from peft_fast.tuners.lora import LoraConfig, LoraModel
from peft_fast.tuners.tuners_utils import (
    _find_minimal_target_modules,
    check_target_module_exists,
    get_pattern_key,
    inspect_matched_modules,
)
from peft_fast.utils import constants
from peft_fast.utils.error import NoMatchingPeftModuleError
from peft_fast.utils.other import walk

SIZES = dict(vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24)
GPT2 = dict(vocab_size=40, n_embd=16, n_layer=3, n_head=2)
BLOOM = dict(vocab_size=40, hidden_size=16, n_layer=3, n_head=2)
T5 = dict(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=3, num_heads=2)
OPT = dict(SIZES, ffn_dim=24, word_embed_proj_dim=16)
GQA = dict(SIZES, num_key_value_heads=1)
FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, GQA),
    "llama-cls": (transformers.LlamaForSequenceClassification, transformers.LlamaConfig, GQA),
    "llama-tied": (transformers.LlamaForCausalLM, transformers.LlamaConfig, dict(GQA, tie_word_embeddings=True)),
    "mistral": (transformers.MistralForCausalLM, transformers.MistralConfig, GQA),
    "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config, GQA),
    "gemma2": (transformers.Gemma2ForCausalLM, transformers.Gemma2Config, dict(GQA, head_dim=8)),
    "phi": (transformers.PhiForCausalLM, transformers.PhiConfig, SIZES),
    "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config, GPT2),
    "gpt_neox": (transformers.GPTNeoXForCausalLM, transformers.GPTNeoXConfig, SIZES),
    "bloom": (transformers.BloomForCausalLM, transformers.BloomConfig, BLOOM),
    "opt": (transformers.OPTForCausalLM, transformers.OPTConfig, OPT),
    "t5": (transformers.T5ForConditionalGeneration, transformers.T5Config, T5),
    "bert": (transformers.BertModel, transformers.BertConfig, SIZES),
    "bert-cls": (transformers.BertForSequenceClassification, transformers.BertConfig, SIZES),
    "bert-mlm": (transformers.BertForMaskedLM, transformers.BertConfig, SIZES),
    "roberta-cls": (transformers.RobertaForSequenceClassification, transformers.RobertaConfig, SIZES),
}  # fmt: skip
_BUILT: dict[str, nn.Module] = {}


def base_model(family: str) -> nn.Module:
    if family not in _BUILT:
        model_class, config_class, sizes = FAMILIES[family]
        torch.manual_seed(0)
        _BUILT[family] = model_class(config_class(**sizes)).eval()
    return copy.deepcopy(_BUILT[family])


def both(family: str, **fields: Any) -> tuple[Any, Any]:
    """(peft's LoraModel, ours) on equal base models with equal configs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.LoraModel(base_model(family), {"default": peft.LoraConfig(r=2, **fields)}, "default")
        ours = LoraModel(base_model(family), {"default": LoraConfig(r=2, **fields)}, "default")
    return theirs, ours


def assert_equal_structure(theirs: Any, ours: Any) -> None:
    assert set(ours.targeted_module_names) == set(theirs.targeted_module_names)
    assert {n: p.requires_grad for n, p in ours.named_parameters()} == {
        n: p.requires_grad for n, p in theirs.named_parameters()
    }
    assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_default_targets(family: str) -> None:
    theirs, ours = both(family)
    assert ours.targeted_module_names
    assert_equal_structure(theirs, ours)
    assert ours.peft_config["default"].target_modules == theirs.peft_config["default"].target_modules


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear(family: str) -> None:
    task = "SEQ_CLS" if family.endswith("-cls") else None
    theirs, ours = both(family, target_modules="all-linear", task_type=task)
    assert_equal_structure(theirs, ours)
    # a list of 20 and more is written in its shortest form, and that is what the file says
    assert ours.peft_config["default"].target_modules == theirs.peft_config["default"].target_modules


QUERIES = {
    "names": dict(target_modules=["q_proj", "v_proj"]),
    "name that is an ending, not after a dot": dict(target_modules=["proj", "q_proj"]),
    "with a level": dict(target_modules=["self_attn.q_proj", "1.mlp.up_proj"]),
    "whole name": dict(target_modules=["model.layers.1.self_attn.k_proj"]),
    "pattern": dict(target_modules=r".*\.(0|2)\..*(q|k)_proj"),
    "pattern is matched whole": dict(target_modules=r".*q_pro|.*up_proj"),
    "exclude names": dict(target_modules=["q_proj", "v_proj"], exclude_modules=["v_proj", "0.self_attn.q_proj"]),
    "exclude pattern": dict(target_modules=["q_proj", "v_proj"], exclude_modules=r".*layers\.1\..*"),
    "all-linear but": dict(target_modules="ALL-linear", exclude_modules=["down_proj"]),
    "trained whole": dict(target_modules=["q_proj", "up_proj"], modules_to_save=["up_proj"]),
    "inside what is trained whole": dict(target_modules=["q_proj", "up_proj"], modules_to_save=["mlp"]),
    "layer": dict(target_modules=["q_proj"], layers_to_transform=1),
    "layers": dict(target_modules=["q_proj", "up_proj"], layers_to_transform=[0, 2]),
    "layers pattern": dict(target_modules=["q_proj"], layers_to_transform=[0, 2], layers_pattern="layers"),
    "layers patterns": dict(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern=["h", "layers"]),
    "no layers": dict(target_modules=["q_proj"], layers_to_transform=[]),
    "long list": dict(target_modules=[f"model.layers.{i}.{n}" for i in range(3) for n in
                                      ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                                       "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")]),
    "biases": dict(target_modules=["q_proj"], bias="all"),
    "biases of the targets": dict(target_modules=["q_proj"], bias="lora_only"),
    "inference": dict(target_modules=["q_proj"], inference_mode=True, modules_to_save=["lm_head"]),
}  # fmt: skip


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_queries(family: str, query: str) -> None:
    theirs, ours = both(family, **QUERIES[query])
    assert_equal_structure(theirs, ours)
    assert ours.peft_config["default"].target_modules == theirs.peft_config["default"].target_modules
    assert inspect_matched_modules(ours)["matched"] == ours.targeted_module_names


@pytest.mark.parametrize("query", [q for q in QUERIES if "all-linear" not in q])
def test_check_target_module_exists(query: str) -> None:
    ours, theirs = LoraConfig(**QUERIES[query]), peft.LoraConfig(**QUERIES[query])
    names = [name for name, _ in base_model("llama").named_modules()]
    names += ["model.layers.1.experts.0.q_proj", "layers.0.q_proj", "h.2.q_proj", "a.h.1.q_proj", "xq_proj", "q_proj"]
    for name in names:
        assert bool(check_target_module_exists(ours, name)) == bool(
            peft_tuners_utils.check_target_module_exists(theirs, name)
        ), name


FAILURES = {
    "no such name": dict(target_modules=["nope"]),
    "no such name in these layers": dict(target_modules=["q_proj"], layers_to_transform=[7], layers_pattern="layers"),
    "all excluded": dict(target_modules=["q_proj"], exclude_modules=r".*"),
    "targets excluded": dict(target_modules=["q_proj"], exclude_modules=["q_proj"]),
    "targets trained whole": dict(target_modules=["q_proj"], modules_to_save=["q_proj"]),
    "no targets": dict(target_modules=[]),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_nothing_matches(failure: str) -> None:
    messages = []
    for lora_model, config_class in ((peft.LoraModel, peft.LoraConfig), (LoraModel, LoraConfig)):
        with pytest.raises(ValueError) as caught:
            lora_model(base_model("llama"), {"default": config_class(**FAILURES[failure])}, "default")
        messages.append(str(caught.value))
    assert isinstance(caught.value, NoMatchingPeftModuleError)
    assert messages[0] == messages[1]


def test_unknown_model_type() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

    with pytest.raises(ValueError, match="Please specify `target_modules` in `peft_config`"):
        LoraModel(Net(), LoraConfig(), "default")


def test_unused_settings_warn() -> None:
    with pytest.warns(UserWarning, match="no modules were excluded"):
        LoraModel(base_model("llama"), LoraConfig(target_modules=["q_proj"], exclude_modules=["zzz"]), "default")
    with pytest.warns(RuntimeWarning, match=r"alpha_pattern keys did not match .* \['k_proj', 'roj'\]"):
        config = LoraConfig(target_modules=["q_proj"], alpha_pattern={"roj": 3, "k_proj": 5, r"layers\.\d+\..*": 2})
        LoraModel(base_model("llama"), config, "default")


def test_table_is_pefts() -> None:
    name = "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"
    assert getattr(constants, name) == getattr(peft_constants, name)
    for name in vars(constants):
        if name.isupper():
            assert getattr(constants, name) == getattr(peft_constants, name), name


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "t5", "bert-mlm", "bert", "opt"])
def test_tied_names(family: str) -> None:
    from peft_fast.utils.other import _get_module_names_tied_with_embedding

    model = base_model(family)
    expected = peft_other._get_module_names_tied_with_embedding(model)
    assert _get_module_names_tied_with_embedding(model) == expected
    assert bool(expected) == (family not in {"llama", "bert"})


def test_pattern_keys() -> None:
    names = ["model.layers.10.q_proj", "q_proj", "xq_proj", "model.layers.1.q_proj", "a.b"]
    for keys in (["q_proj"], ["model.layers.1.q_proj"], [r"layers\.\d\.q_proj"], [r".*", "q_proj"], ["b|q_proj"], []):
        for name in names:
            assert get_pattern_key(keys, name) == peft_other.get_pattern_key(keys, name)


def test_minimal_targets() -> None:
    targets = [f"m.{i}.attn.{n}" for i in range(30) for n in ("q", "v")]
    for others in ([f"m.{i}.attn.k" for i in range(30)], [f"n.{i}.attn.q" for i in range(30)], ["q", "m"], []):
        assert _find_minimal_target_modules(targets, others) == peft_tuners_utils._find_minimal_target_modules(
            targets, others
        )
    for bad in ("q", [], ["a", ""]):
        with pytest.raises(ValueError):
            _find_minimal_target_modules(bad, [])
    with pytest.raises(ValueError, match="common elements"):
        _find_minimal_target_modules(["a"], ["a"])


# never ends with Python's re
CATASTROPHE = r"(?:\w|\w\w|[.])+[^\w.]"


def _within(seconds: float, function: Callable[[], Any]) -> None:
    start = time.perf_counter()
    function()
    assert time.perf_counter() - start < seconds


@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"]
)
def test_catastrophic_pattern_is_refused(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_matching, "MATCH_SECONDS", 0.05)
    fields: dict[str, Any] = {"target_modules": ["q_proj"]}
    fields[field] = {CATASTROPHE: 3} if field in {"rank_pattern", "alpha_pattern"} else CATASTROPHE
    if field == "layers_pattern":
        fields["layers_to_transform"] = [0]
    model = base_model("llama")
    before = list(model.state_dict())

    def inject() -> None:
        with pytest.raises(ValueError, match=rf"^{field}: matching '\(\?:"):
            LoraModel(model, LoraConfig(**fields), "default")

    _within(10, inject)
    assert list(model.state_dict()) == before


def test_budget_is_for_all_modules_together() -> None:
    budget = PatternBudget(0.2)
    with pytest.raises(ValueError, match=r"took more than 0\.2 s"):
        for _ in range(1_000_000):  # a fast machine needs more of them
            budget.match("target_modules", r"(?:a|a|aa)+[^a]", "a" * 10)
    with pytest.raises(ValueError, match="took more than"):
        budget.match("target_modules", r"(?:a|a|aa)+[^a]", "a" * 40)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("(", "is not a regular expression"), ("(" * 5000, "is not a regular expression"),
     ("((a{1000}){1000}){1000}", "too long"), ("a{99999999999}", "too long"), ("a" * 300_000, "too long")],
)  # fmt: skip
def test_patterns_that_cannot_be_compiled(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^target_modules: .*{message}"):
        check_target_module_exists(LoraConfig(target_modules=pattern), "q_proj")


def test_unused_patterns_asks_about_every_name() -> None:
    """What runs for each module later (get_pattern_key) has then been within the budget once."""
    config = LoraConfig(target_modules=["a"], rank_pattern={"q": 1, "z": 2})
    asked = []

    class Counting(PatternBudget):
        def match(self, field: str, pattern: str, text: str, template: str = "{}", full: bool = False) -> bool:
            asked.append((pattern, text))
            return super().match(field, pattern, text, template, full)

    assert unused_patterns(config, "rank_pattern", ["x.q", "x.v"], Counting()) == ["z"]
    assert sorted(asked) == [(p, n) for p in ("q", "z") for n in ("x.q", "x.v")]


def test_walk_is_named_modules() -> None:
    model = base_model("t5")
    assert [(site.name, site.module) for site in walk(model)] == list(model.named_modules())
    assert all(site.parent is None or getattr(site.parent, site.child_name) is site.module for site in walk(model))


def test_second_adapter_matches_the_original_names() -> None:
    theirs, ours = both("llama", target_modules=["q_proj"])
    for tuner, config_class in ((theirs, peft.LoraConfig), (ours, LoraConfig)):
        tuner.peft_config["second"] = config_class(r=2, target_modules="all-linear", exclude_modules=["down_proj"])
        tuner.inject_adapter(tuner.model, "second")
        # names that only an adapter layer has
        tuner.peft_config["third"] = config_class(r=2, target_modules=["base_layer", "lora_A", "default", "up_proj"])
        tuner.inject_adapter(tuner.model, "third")
    assert_equal_structure(theirs, ours)


def test_matcher_is_prepared_once() -> None:
    matcher = TargetMatcher(LoraConfig(target_modules=["b.c", "d"]))
    assert [bool(matcher(key)) for key in ("a.b.c", "b.c", "xb.c", "c", "d", "a.d", "ad")] == [
        True, True, False, False, True, True, False,
    ]  # fmt: skip


def test_state_dict_decides() -> None:
    model = base_model("llama")
    keys = {f"model.layers.{i}.self_attn.o_proj.lora_{m}.weight": torch.empty(0) for i in (0, 2) for m in "AB"}
    with pytest.warns(RuntimeWarning, match="additional target modules") as caught:
        ours = LoraModel(model, LoraConfig(target_modules=["q_proj"]), "default", state_dict=keys)
    with pytest.warns(RuntimeWarning) as expected:
        theirs = peft.LoraModel(
            base_model("llama"), peft.LoraConfig(target_modules=["q_proj"]), "default", state_dict=keys
        )
    assert_equal_structure(theirs, ours)
    assert str(caught[0].message) == str(expected[0].message)

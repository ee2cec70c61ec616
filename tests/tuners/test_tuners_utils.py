"""`BaseTuner` and `BaseTunerLayer`: injection, switching, removing, merging, beside the installed peft."""

import copy
import pickle
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.tuners import tuners_utils as peft_tuners_utils
from torch import Tensor, nn

from peft_fast import functional
from peft_fast.tuners.lora import LoraConfig, LoraModel
from peft_fast.tuners.tuners_utils import BaseTuner, BaseTunerLayer, set_adapter, tuner_layers
from peft_fast.utils import other

SIZES = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
INPUT = torch.arange(12).reshape(2, 6)
COMMON = dict(r=2, target_modules=["query", "value"], modules_to_save=["classifier"], init_lora_weights=False)


def bert() -> Any:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)).eval()


def llama(**sizes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=1, **sizes)
    return transformers.LlamaForCausalLM(config).eval()


def both(model: Callable[[], Any] = bert, **fields: Any) -> list[tuple[Any, Any]]:
    """(LoraModel, LoraConfig) of peft and ours, on equal models with equal weights."""
    fields = {**COMMON, **fields}
    pairs = []
    for tuner_class, config_class in ((peft.LoraModel, peft.LoraConfig), (LoraModel, LoraConfig)):
        torch.manual_seed(1)
        pairs.append((tuner_class(model(), {"default": config_class(**fields)}, "default"), config_class))
    return pairs


def add(tuner: Any, config_class: Any, name: str, **fields: Any) -> None:
    tuner.peft_config[name] = config_class(**{**COMMON, **fields})
    tuner.inject_adapter(tuner.model, name)


def flags(module: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in module.named_parameters()}


def same_weights(theirs: Any, ours: Any) -> None:
    """Random adapters and heads, the same in both."""
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.3)
    theirs.load_state_dict(ours.state_dict())


def assert_same(theirs: Any, ours: Any) -> None:
    assert flags(ours) == flags(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.active_adapters == theirs.active_adapters
    assert sorted(ours.peft_config) == sorted(theirs.peft_config)
    assert sorted(ours.targeted_module_names) == sorted(theirs.targeted_module_names)
    for (name, our_layer), (_, their_layer) in zip(adapted(ours), adapted(theirs), strict=True):
        assert our_layer.active_adapters == their_layer.active_adapters, name
        assert our_layer.disable_adapters == their_layer.disable_adapters, name
        assert our_layer._get_available_adapters() == their_layer._get_available_adapters(), name
    with torch.no_grad():
        expected, found = theirs(INPUT).logits, ours(INPUT).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def adapted(tuner: Any) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in tuner.named_modules() if hasattr(type(module), "adapter_layer_names")]


OTHER_LAYERS = dict(target_modules=["query", "key"], modules_to_save=None)
STEPS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda t, c: add(t, c, "second"),
    "add elsewhere": lambda t, c: add(t, c, "third", **OTHER_LAYERS),
    "add for inference": lambda t, c: add(t, c, "fourth", inference_mode=True),
    "set second": lambda t, c: t.set_adapter("second"),
    "set both": lambda t, c: t.set_adapter(["second", "third"]),
    "set third": lambda t, c: t.set_adapter("third"),
    "set default, frozen": lambda t, c: t.set_adapter("default", inference_mode=True),
    "disable": lambda t, c: t.disable_adapter_layers(),
    "enable": lambda t, c: t.enable_adapter_layers(),
    "train second": lambda t, c: t.set_requires_grad("second"),
    "freeze both": lambda t, c: t.set_requires_grad(["second", "default"], False),
    "delete second": lambda t, c: t.delete_adapter("second"),
    "delete third": lambda t, c: t.delete_adapter("third"),
    "delete default": lambda t, c: t.delete_adapter("default"),
    "merge": lambda t, c: t.merge_adapter(),
    "unmerge": lambda t, c: t.unmerge_adapter(),
}
SEQUENCES = [
    ["add", "set second", "disable", "enable", "delete second"],
    ["add", "add elsewhere", "set both", "set third", "set second", "delete third", "delete default"],
    ["add elsewhere", "add", "set default, frozen", "add for inference", "train second", "freeze both", "disable"],
    ["add", "merge", "unmerge", "set second", "merge", "unmerge", "disable", "enable"],
    ["disable", "add", "enable", "set second", "delete default", "delete second"],
    ["freeze both", "add", "set default, frozen", "add elsewhere"],
]


@pytest.mark.parametrize("sequence", SEQUENCES, ids=lambda steps: " - ".join(steps))
@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.filterwarnings("ignore")
def test_sequences_as_peft(sequence: list[str], bias: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if bias == "all":  # peft leaves the bias of a new, inactive adapter's head trainable
        monkeypatch.setitem(COMMON, "modules_to_save", None)
    (theirs, their_config), (ours, our_config) = both(bias=bias)
    for step in sequence:
        STEPS[step](theirs, their_config)
        STEPS[step](ours, our_config)
        same_weights(theirs, ours) if step.startswith("add") else None
        assert_same(theirs, ours)


def test_deleting_the_active_adapter_warns_as_peft() -> None:
    messages = []
    for tuner, config_class in both():
        add(tuner, config_class, "b")
        add(tuner, config_class, "a")
        with pytest.warns(UserWarning, match="active which is now deleted") as caught:
            tuner.delete_adapter("default")
        messages.append(str(caught[0].message))
        assert tuner.active_adapters == ["a"]
    assert messages[0] == messages[1] and len(caught) == 1


def test_delete_leaves_nothing_behind() -> None:
    _, (tuner, config_class) = both()
    keys = list(tuner.state_dict())
    add(tuner, config_class, "second", **OTHER_LAYERS, lora_dropout=0.1)
    add(tuner, config_class, "third", rank_pattern={"query": 3})
    tuner.delete_adapter("second")
    tuner.delete_adapter("third")
    assert [key for key in tuner.state_dict() if "second" in key or "third" in key] == []
    assert [key for key in tuner.state_dict() if "key.base_layer" not in key] == [
        key for key in keys if "attention.self.key" not in key
    ]
    for layer in tuner_layers(tuner):
        assert layer._all_available_adapter_names() in (["default"], [])
    with pytest.raises(ValueError, match="Adapter second does not exist"):
        tuner.delete_adapter("second")


def test_an_adapter_on_other_layers_becomes_active_everywhere() -> None:
    """Where the deleted adapter's layers have no other adapter, the successor is still one for the whole model."""
    _, (tuner, config_class) = both(target_modules=["query"], modules_to_save=None)
    add(tuner, config_class, "second", target_modules=["key"], modules_to_save=None)
    with pytest.warns(UserWarning, match="Setting active adapter to second"):
        tuner.delete_adapter("default")
    assert tuner.active_adapters == ["second"]
    assert {tuple(layer.active_adapters) for layer in tuner_layers(tuner)} == {("second",)}


def test_the_successor_of_a_deleted_adapter_runs_with_its_head() -> None:
    _, (tuner, config_class) = both()
    add(tuner, config_class, "second", **OTHER_LAYERS)
    tuner.set_adapter("second")
    assert tuner.model.classifier.active_adapters == []
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        tuner.delete_adapter("second")
    assert tuner.model.classifier.active_adapters == ["default"]


def test_a_new_inactive_adapter_is_frozen_beside_trained_biases() -> None:
    _, (tuner, config_class) = both(bias="all")
    add(tuner, config_class, "second")
    assert not any(requires_grad for name, requires_grad in flags(tuner).items() if ".second." in name)


def test_merged_adapters_are_not_deleted_and_are_unmerged_to_switch() -> None:
    _, (tuner, config_class) = both()
    add(tuner, config_class, "second")
    tuner.merge_adapter()
    with pytest.raises(ValueError, match=r"Cannot delete adapter\(s\) \['default'\] while they are merged"):
        tuner.delete_adapter("default")
    assert "default" in tuner.peft_config
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        tuner.set_adapter("second")
    assert not any(layer.merged for layer in tuner_layers(tuner))


def test_unknown_adapter_is_refused_before_anything_changes() -> None:
    _, (tuner, _) = both()
    before = flags(tuner)
    with pytest.raises(ValueError, match="Adapter nope not found"):
        tuner.set_adapter(["default", "nope"])
    assert flags(tuner) == before and tuner.active_adapters == ["default"]


# --------------------------------------------------------------------------------------------------------- injection
def state_of(model: nn.Module) -> Any:
    """Everything that a failed injection must leave as it was."""
    return (
        [(name, id(module)) for name, module in model.named_modules()],
        [(name, id(p), p.requires_grad, p.data_ptr(), p._version) for name, p in model.named_parameters()],
        [
            (module._active_adapter, module._disable_adapters, sorted(module._get_available_adapters()))
            for module in model.modules()
            if hasattr(type(module), "adapter_layer_names")
        ],
    )


class Boom(BaseException):
    """Not an Exception: as KeyboardInterrupt."""


def fail_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    original, calls = LoraModel._create_and_replace, []

    def create(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == call:
            raise Boom

    monkeypatch.setattr(LoraModel, "_create_and_replace", create)


@pytest.mark.parametrize("call", [1, 3])
def test_failed_first_injection_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    model, config = bert(), LoraConfig(**{**COMMON, "target_modules": "all-linear"})
    model.bert.pooler.requires_grad_(False)
    before = state_of(model)
    fail_at(monkeypatch, call)
    with pytest.raises(Boom):
        LoraModel(model, config, "default")
    assert state_of(model) == before
    assert config.target_modules == "all-linear" and not hasattr(model, "peft_config")


def test_failure_after_the_base_was_frozen_gives_the_gradients_back() -> None:
    model = bert()
    before = state_of(model)
    with pytest.raises(TypeError, match="modules_to_save cannot be applied"):  # a ModuleList cannot be trained whole
        LoraModel(
            model, LoraConfig(target_modules=["pooler.dense"], modules_to_save=["classifier", "layer"]), "default"
        )
    assert state_of(model) == before and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("active", [False, True])
@pytest.mark.parametrize("call", [1, 3])
def test_failed_second_injection_leaves_the_first(monkeypatch: pytest.MonkeyPatch, call: int, active: bool) -> None:
    _, (tuner, config_class) = both()
    tuner.set_requires_grad("default", False)
    with torch.no_grad():
        logits = tuner(INPUT).logits
    before = state_of(tuner)
    fail_at(monkeypatch, call)
    with pytest.raises(Boom):
        if active:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                LoraModel(tuner.model, config_class(**COMMON), "second")
        else:
            add(tuner, config_class, "second", target_modules=["query", "key"])
    assert state_of(tuner) == before
    assert list(tuner.peft_config) == ["default"] and tuner.targeted_module_names
    with torch.no_grad():
        assert torch.equal(tuner(INPUT).logits, logits)


@pytest.mark.parametrize(
    "fields",
    [
        dict(modules_to_save=["layer"]),  # a ModuleList cannot be trained whole
        dict(modules_to_save=["query"], target_modules=["key"]),  # an adapter layer of the first adapter
        dict(target_modules=["LayerNorm", "query"]),  # no LoRA for LayerNorm
        dict(target_modules="("),
        dict(target_modules=["nope"]),
    ],
    ids=str,
)
def test_refused_second_adapter_leaves_the_first(fields: dict[str, Any]) -> None:
    _, (tuner, config_class) = both()
    before = state_of(tuner)
    with pytest.raises((ValueError, TypeError)):
        add(tuner, config_class, "second", **fields)
    assert state_of(tuner) == before and list(tuner.peft_config) == ["default"]


def test_second_tuner_on_one_model_as_peft() -> None:
    """What get_peft_model does to a model that has adapters: the new one is active."""
    tuners = []
    for tuner, config_class in both(modules_to_save=None):
        with pytest.warns(UserWarning, match="Already found a `peft_config` attribute"):
            fields = {**COMMON, "modules_to_save": None}
            tuners.append(type(tuner)(tuner.model, {"second": config_class(**fields)}, "second"))
    same_weights(*tuners)
    assert_same(*tuners)
    assert sorted(tuners[1].peft_config) == ["default", "second"]


def test_second_tuner_trains_its_own_head() -> None:
    _, (first, config_class) = both()
    with pytest.warns(UserWarning, match="Already found a `peft_config` attribute"):
        second = LoraModel(first.model, config_class(**COMMON), "second")
    assert second.model.classifier.active_adapters == ["second"]
    assert all(p.requires_grad for p in second.model.classifier.modules_to_save["second"].parameters())


def test_low_cpu_mem_usage_creates_on_meta() -> None:
    tuner = LoraModel(bert(), LoraConfig(**COMMON), "default", low_cpu_mem_usage=True)
    for name, parameter in tuner.named_parameters():
        assert parameter.is_meta == ("lora_" in name), name


def test_adding_an_adapter_visits_no_more_modules_when_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    _, (tuner, config_class) = both(modules_to_save=None)
    visits: list[str] = []

    class CountingSite(other.Site):
        def __new__(cls, name: str, *args: Any) -> Any:
            visits.append(name)
            return super().__new__(cls, name, *args)

    monkeypatch.setattr(other, "Site", CountingSite)
    named_modules = nn.Module.named_modules

    def counting_named_modules(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for name, module in named_modules(self, *args, **kwargs):
            visits.append(name)
            yield name, module

    monkeypatch.setattr(nn.Module, "named_modules", counting_named_modules)
    counts = []
    for i in range(12):
        visits.clear()
        add(tuner, config_class, f"adapter{i}", modules_to_save=None)
        tuner.set_adapter(f"adapter{i}")
        counts.append(len(visits))
    assert len(set(counts[1:])) == 1 and counts[1] > 0


def test_setting_an_adapter_touches_old_and_new_only(monkeypatch: pytest.MonkeyPatch) -> None:
    _, (tuner, config_class) = both()
    for name in ("b", "c", "d"):
        add(tuner, config_class, name)
    touched = set()
    original = Tensor.requires_grad_

    def record(self: Tensor, value: bool = True) -> Tensor:
        touched.add(id(self))
        return original(self, value)

    monkeypatch.setattr(Tensor, "requires_grad_", record)
    tuner.set_adapter("b")
    names = {name for name, p in tuner.named_parameters() if id(p) in touched}
    assert names and all(".default." in name or ".b." in name for name in names)


def test_adapters_of_one_bias_only() -> None:
    _, (tuner, config_class) = both(bias="all")
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        add(tuner, config_class, "second", bias="lora_only")
    assert list(tuner.peft_config) == ["default"]


def test_disabling_warns_of_trained_biases() -> None:
    for tuner, _ in both(bias="all"):
        with pytest.warns(UserWarning, match="Careful, disabling adapter layers with bias configured to be 'all'"):
            tuner.disable_adapter_layers()


# -------------------------------------------------------------------------------------------------- merge and unload
def modules_of(model: nn.Module) -> dict[str, int]:
    return {name: id(module) for name, module in model.named_modules()}


def test_unload_gives_back_the_original_layers() -> None:
    model = bert()
    before, weights = modules_of(model), copy.deepcopy(model.state_dict())
    tuner = LoraModel(model, LoraConfig(**{**COMMON, "modules_to_save": None}), "default")
    assert modules_of(model) != before
    assert tuner.unload() is model
    assert modules_of(model) == before and not hasattr(model, "peft_config")
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("method", ["merge_and_unload", "unload"])
def test_unloaded_models_as_peft(method: str) -> None:
    (theirs, their_config), (ours, our_config) = both()
    for tuner, config_class in ((theirs, their_config), (ours, our_config)):
        add(tuner, config_class, "second", target_modules=["query", "key"])
    same_weights(theirs, ours)
    for name in ("default", "second"):
        copies = [copy.deepcopy(tuner) for tuner in (theirs, ours)]
        for tuner in copies:
            tuner.set_adapter(name)
        models = [getattr(tuner, method)() for tuner in copies]
        assert list(models[1].state_dict()) == list(models[0].state_dict())
        with torch.no_grad():
            expected, found = models[0](INPUT).logits, models[1](INPUT).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert not any(hasattr(type(module), "adapter_layer_names") for module in models[1].modules())


def test_merge_of_named_adapters_as_peft(capsys: pytest.CaptureFixture[str]) -> None:
    pairs = both(modules_to_save=None)
    for tuner, config_class in pairs:
        add(tuner, config_class, "second", modules_to_save=None)
    same_weights(pairs[0][0], pairs[1][0])
    models = [t.merge_and_unload(adapter_names=["default", "second"], progressbar=True) for t, _ in pairs]
    for key, tensor in models[1].state_dict().items():
        torch.testing.assert_close(tensor, models[0].state_dict()[key], rtol=1e-5, atol=1e-6)
    assert capsys.readouterr().err.count("Unloading and merging model") >= 1


def test_refused_safe_merge_merges_nothing() -> None:
    tuner = LoraModel(bert(), LoraConfig(**{**COMMON, "modules_to_save": None}), "default")
    weights = {key: tensor.clone() for key, tensor in tuner.state_dict().items()}
    layers = tuner_layers(tuner)
    with torch.no_grad():
        layers[-1].lora_A["default"].weight.fill_(float("nan"))
    for method in (tuner.merge_adapter, tuner.merge_and_unload):
        with pytest.raises(ValueError, match="NaN"):
            method(safe_merge=True)
        assert not any(layer.merged for layer in layers)
        assert tuner_layers(tuner) == layers and hasattr(tuner.model, "peft_config")
    for key, tensor in tuner.state_dict().items():
        if "base_layer" in key:  # subtracting what was added rounds once
            torch.testing.assert_close(tensor, weights[key], rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Model has")
def test_a_target_with_a_tied_weight_gets_its_own_when_it_is_merged() -> None:
    """PEFT adds the adapter of one to both: the merged model answers otherwise than the unmerged one."""
    for tuner_class, config_class in ((peft.LoraModel, peft.LoraConfig), (LoraModel, LoraConfig)):
        model = llama(tie_word_embeddings=True)
        config = config_class(target_modules=["lm_head", "q_proj"], init_lora_weights=False)
        with pytest.warns(UserWarning, match="but `ensure_weight_tying` is not set to True"):
            tuner = tuner_class(model, {"default": config}, "default")
    tuner.eval()
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        before = tuner(tokens).logits
        with pytest.warns(UserWarning, match="tie_word_embeddings=True"):
            tuner.merge_adapter()
        torch.testing.assert_close(tuner(tokens).logits, before, rtol=1e-4, atol=1e-5)
        tuner.unmerge_adapter()
        assert tuner.model.lm_head.base_layer.weight is tuner.model.model.embed_tokens.weight, "tied again"
        torch.testing.assert_close(tuner(tokens).logits, before, rtol=1e-4, atol=1e-5)
        with pytest.warns(UserWarning, match="tie_word_embeddings"):
            merged = tuner.merge_and_unload()
        torch.testing.assert_close(merged(tokens).logits, before, rtol=1e-4, atol=1e-5)
    assert merged.config.tie_word_embeddings is False and merged.lm_head.weight is not merged.model.embed_tokens.weight


def test_untied_by_modules_to_save_is_said_in_the_config() -> None:
    for tuner_class, config_class in ((peft.LoraModel, peft.LoraConfig), (LoraModel, LoraConfig)):
        model = llama(tie_word_embeddings=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = config_class(target_modules=["q_proj"], modules_to_save=["lm_head"])
            tuner = tuner_class(model, {"default": config}, "default")
        with pytest.warns(UserWarning, match="no longer tied after merging"):
            merged = tuner.merge_and_unload()
        assert merged.config.tie_word_embeddings is False


# -------------------------------------------------------------------------------------------- functions and layers
def test_functions_on_a_model_that_is_no_tuner() -> None:
    models = []
    for library, config_class in ((peft_tuners_utils, peft.LoraConfig), (functional, LoraConfig)):
        inject = peft.inject_adapter_in_model if library is peft_tuners_utils else functional.inject_adapter_in_model
        model = inject(config_class(**COMMON), bert())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = inject(config_class(**COMMON), model, "second")
        library.set_adapter(model, "default")
        library.set_requires_grad(model, ["second"])
        assert library.delete_adapter(model, "default", prefix="lora_") == ["second"]
        models.append(model)
    assert flags(models[1]) == flags(models[0])
    assert list(models[1].state_dict()) == list(models[0].state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_cast_adapter_dtype_as_peft(dtype: torch.dtype) -> None:
    found = []
    for library, (tuner, config_class) in zip((peft_tuners_utils, functional), both(), strict=True):
        add(tuner, config_class, "second")
        tuner.to(dtype)
        requires_grad = flags(tuner)
        library.cast_adapter_dtype(tuner, "default", autocast_adapter_dtype=False)
        assert {p.dtype for p in tuner.parameters()} == {dtype}
        library.cast_adapter_dtype(tuner, "default")
        found.append({name: p.dtype for name, p in tuner.named_parameters()})
        assert flags(tuner) == requires_grad
    assert found[1] == found[0]
    wide = {name for name, t in found[1].items() if t == torch.float32}
    if dtype in (torch.float16, torch.bfloat16):
        assert wide == {name for name in found[1] if "lora_" in name and ".default." in name}


class Scale(nn.Module, BaseTunerLayer):
    """The smallest method: y = base(x) * product of the active adapters' scales."""

    adapter_layer_names = ("tiny_scale",)
    other_param_names = ("note",)

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.tiny_scale = nn.ParameterDict()
        self.note: dict[str, int] = {}
        self.merged_adapters = []
        self._active_adapter = adapter_name
        self.add(adapter_name)

    def add(self, name: str) -> None:
        self.tiny_scale[name] = nn.Parameter(torch.full((1,), 2.0))
        self.note[name] = 1
        self._move_adapter_to_device_of_base_layer(name)

    def forward(self, x: Tensor) -> Tensor:
        self._check_forward_args(x)
        y = self.base_layer(x)
        for name in [] if self.disable_adapters else self.active_adapters:
            if name in self.tiny_scale:
                y = y * self._cast_input_dtype(self.tiny_scale[name], y.dtype)
        return y


class ScaleModel(BaseTuner):
    prefix = "tiny_"
    tuner_layer_cls = Scale
    target_module_mapping: Mapping[str, list[str] | str] = MappingProxyType({"custom": ["0"]})

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: Any,
        current_key: str,
        **_: Any,
    ) -> None:
        if isinstance(target, Scale):
            target.add(adapter_name)
        else:
            self._replace_module(parent, target_name, Scale(target, adapter_name), target)


def test_another_method_needs_a_layer_and_one_function() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).to(torch.bfloat16)
    x = torch.randn(3, 4, dtype=torch.bfloat16)
    expected = net(x)
    tuner = ScaleModel(net, LoraConfig(), "default")  # target_modules=None: by model type
    assert tuner.targeted_module_names == ["0"]
    layer = tuner.model[0]
    assert layer.weight is layer.base_layer.weight and layer.bias is layer.get_base_layer().bias
    assert layer.tiny_scale["default"].dtype == torch.bfloat16
    assert [name for name, p in tuner.named_parameters() if p.requires_grad] == ["model.0.tiny_scale.default"]
    assert not torch.equal(tuner(x), expected)
    tuner.disable_adapter_layers()
    assert torch.equal(tuner(x), expected)
    tuner.enable_adapter_layers()
    for clone in (copy.deepcopy(tuner), pickle.loads(pickle.dumps(tuner))):
        assert torch.equal(clone(x), tuner(x)) and flags(clone) == flags(tuner)
        assert clone.active_adapters == ["default"] and clone.model is not tuner.model
    tuner.peft_config["second"] = LoraConfig(target_modules=["0", "1"])
    tuner.inject_adapter(net, "second")
    assert [name for name, p in tuner.named_parameters() if p.requires_grad] == ["model.0.tiny_scale.default"]
    assert [layer.active_adapters for layer in tuner_layers(net)] == [["default"]] * 2
    tuner.delete_adapter("second")
    functional.cast_adapter_dtype(net, "default")
    assert layer.tiny_scale["default"].dtype == torch.float32 and layer.tiny_scale["default"].requires_grad
    set_adapter(net, [])
    assert torch.equal(tuner(x), expected)
    assert torch.equal(tuner.unload()(x), expected)


def test_what_a_layer_does_not_do_is_said() -> None:
    layer = Scale(nn.Linear(2, 2), "default")
    for method in (layer.merge, layer.unmerge):
        with pytest.raises(NotImplementedError):
            method()
    with pytest.raises(ValueError, match=r"adapter_names .* is not supported by peft_fast yet"):
        layer._check_forward_args(torch.zeros(1), adapter_names=["default"])
    assert layer.supports_lora_conversion() is False
    tuner = ScaleModel(nn.Sequential(nn.Linear(2, 2)), LoraConfig(), "default")
    with (
        pytest.raises(ValueError, match="adapter_names is not supported"),
        tuner._enable_peft_forward_hooks(adapter_names=["a"]),
    ):
        pass
    with pytest.raises(AttributeError, match="nope"):
        _ = tuner.nope


def test_mamba_blocks_are_refused() -> None:
    sizes = dict(vocab_size=20, hidden_size=8, num_hidden_layers=1, state_size=2)
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))
    with pytest.raises(ValueError, match="incompatible with Mamba-based models"):
        LoraModel(model, LoraConfig(target_modules=["in_proj", "out_proj"]), "default")
    assert not tuner_layers(model)

"""Mixed batches where more than plain linear layers differ by row: trained heads, embeddings, convolutions, biases,
hooks, base layers of unknown types."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from families import VOCAB
from mixed_models import (
    BASE,
    DTYPES,
    ROWS,
    add_adapters,
    assert_rows_right,
    batch,
    compositions,
    logits,
    mixed_model,
    mixed_pair,
    outputs,
    randomize,
    together,
)
from torch import Tensor, nn

import peft_fast
from peft_fast.routing.batch import MixedBatch
from peft_fast.utils.other import ModulesToSaveWrapper

NAMES = ["a", BASE, "c", "b", "a"]
Q = {"target_modules": ["q_proj"]}


def check(family: str, task: str, adapters: dict[str, Any], dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    """Both models, after the test that each row of our batch, by names and by ids, is as in peft alone."""
    theirs, ours = mixed_pair(family, task, adapters, dtype, **kwargs)
    exact = copy.deepcopy(theirs).double()
    for names in compositions(list(adapters)):
        inputs = batch(task)
        got = together(ours, inputs, names)
        assert_rows_right(got, theirs, inputs, names, exact)
        with torch.no_grad():
            by_ids = outputs(ours(**inputs, adapter_ids=ours.adapter_slots(names)))
        assert all(torch.equal(by_ids[key], value) for key, value in got.items())
    return theirs, ours


def counted(model: Any) -> Counter[str]:
    """Calls from now on of every copy of a module that is trained whole, by adapter."""
    calls: Counter[str] = Counter()
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for name, part in [(BASE, module.original_module), *module.modules_to_save.items()]:
                part.register_forward_hook(lambda *args, name=name: calls.update([name]))
    return calls


# -------------------------------------------------------------------------------------------------------------- heads
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["bert", "llama", "roberta"])
def test_classifiers(family: str, dtype: torch.dtype) -> None:
    adapters: dict[str, Any] = {"a": {}, "b": dict(r=3), "c": dict(r=8)}
    _, ours = check(family, "SEQ_CLS", adapters, dtype)
    heads = [m for m in ours.modules() if isinstance(m, ModulesToSaveWrapper)]
    assert len(heads) == 1 and (type(heads[0].original_module) is nn.Linear) == (family != "roberta")


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_every_copy_runs_at_most_once(family: str) -> None:
    _, ours = mixed_pair(family, "SEQ_CLS", {"a": {}, "b": {}, "c": {}})
    calls = counted(ours)
    for names in (NAMES, ["a"] * ROWS, [BASE] * ROWS, ["b", "a", "b", "a", "b"]):
        for given in ({"adapter_names": names}, {"adapter_ids": ours.adapter_slots(names)}):
            calls.clear()
            with torch.no_grad():
                ours(**batch("SEQ_CLS"), **given)
            assert set(calls.values()) == {1} and set(calls) - {BASE} == set(names) - {BASE}


@pytest.mark.parametrize("module", ["pooler", "encoder.layer.0.attention.output", "encoder.layer.1.output"])
def test_modules_of_any_kind(module: str) -> None:
    """With arguments of their own, and outputs of other shapes than their inputs; peft refuses them."""
    whole = dict(modules_to_save=[module])
    _, ours = check("bert", "FEATURE_EXTRACTION", {"a": whole, "b": {}, "c": whole})
    assert sum(isinstance(m, ModulesToSaveWrapper) for m in ours.modules()) == 1
    calls = counted(ours)
    together(ours, batch("FEATURE_EXTRACTION"), NAMES)
    assert set(calls.values()) == {1} and set(calls) == {"a", "c", BASE}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("modules", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]], ids="-".join)
@pytest.mark.filterwarnings("ignore:.*tie")
def test_embeddings_and_language_heads(modules: list[str], tied: bool) -> None:
    """`b` has no copy: its rows take the original."""
    whole = dict(modules_to_save=modules)
    _, ours = check("llama", "CAUSAL_LM", {"a": whole, "b": {}, "c": dict(r=8, **whole)}, tie_word_embeddings=tied)
    heads = [m for m in ours.modules() if isinstance(m, ModulesToSaveWrapper)]
    assert [set(head.modules_to_save) for head in heads] == [{"a", "c"}] * len(modules)


class _Fork(nn.Module):
    """A head that returns a mapping and a tuple of rows, and what is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor, *, factor: float) -> Any:
        return {"left": self.left(x) * factor, "pair": (self.right(x), None), "note": "text", "list": [self.left(x)]}


class _Forked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.fork = nn.Linear(8, 6), _Fork()

    def forward(self, x: Tensor) -> Any:
        return self.fork(self.body(x), factor=3.0)


def test_heads_that_return_several_things() -> None:
    config = dict(target_modules=["body"], modules_to_save=["fork"])
    model = peft_fast.get_peft_model(_Forked(), peft_fast.LoraConfig(**config), adapter_name="one")
    model.add_adapter("two", peft_fast.LoraConfig(**config))
    randomize(model.eval())
    x, names = torch.randn(4, 5, 8), ["two", BASE, "one", "two"]
    with torch.no_grad():
        got = model(x, adapter_names=names)
        for i, name in enumerate(names):
            if name == BASE:
                with model.disable_adapter():
                    alone = model(x[i : i + 1])
            else:
                model.set_adapter(name)
                alone = model(x[i : i + 1])
            torch.testing.assert_close(got["left"][i : i + 1], alone["left"])
            torch.testing.assert_close(got["pair"][0][i : i + 1], alone["pair"][0])
            torch.testing.assert_close(got["list"][0][i : i + 1], alone["list"][0])
    assert got["pair"][1] is None and got["note"] == "text" and set(got) == set(alone)
    assert isinstance(got["pair"], tuple) and isinstance(got["list"], list)


def test_gradients_of_heads_are_pefts() -> None:
    """Of a copy on a row that is not its own there is none."""
    found = []
    for model in mixed_pair("bert", "SEQ_CLS", {"a": {}, "b": {}, "c": {}}):
        model.set_requires_grad(["a", "b", "c"])
        model(**batch("SEQ_CLS"), adapter_names=["a", "b", "b", BASE, "a"]).logits.square().sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.grad.any()})
    theirs, ours = found
    assert ours.keys() == theirs.keys() and any("modules_to_save.b" in name for name in ours)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------------------- embeddings and convolutions
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding_adapters(dtype: torch.dtype) -> None:
    both = ["embed_tokens", "q_proj"]
    adapters = {"a": dict(target_modules=both), "b": Q, "c": dict(r=8, use_rslora=True, target_modules=both)}
    theirs, ours = check("llama", "CAUSAL_LM", adapters, dtype)
    if dtype == torch.float32:
        torch.testing.assert_close(logits(ours, adapter_names=NAMES), logits(theirs, adapter_names=NAMES))


def test_embeddings_with_a_scale() -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sizes = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(7)
    base = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, num_key_value_heads=2, head_dim=8, pad_token_id=0)).eval()
    assert float(base.model.embed_tokens.embed_scale) > 5
    embedding = dict(target_modules=["embed_tokens"])
    check("llama", "CAUSAL_LM", {"a": embedding, "b": Q, "c": dict(r=8, **embedding)}, base=base)


class _Vision(nn.Module):
    def __init__(self, dims: int) -> None:
        super().__init__()
        conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.conv, self.out = conv(3, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, pixel_values: Tensor) -> Tensor:
        result: Tensor = self.out(self.conv(pixel_values).flatten(2).mean(2))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions(dims: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    both = ["conv", "out"]
    adapters = {
        "a": dict(target_modules=both),
        "b": dict(r=3, target_modules=["conv"]),
        "c": dict(target_modules=["out"]),
    }
    theirs, ours = mixed_pair("llama", None, adapters, dtype, base=_Vision(dims))  # type: ignore[arg-type]
    inputs = {"pixel_values": torch.randn(ROWS, 3, *[6] * dims, dtype=dtype)}
    exact = copy.deepcopy(theirs).double()
    exact.forward = lambda pixel_values, m=exact.forward: m(pixel_values=pixel_values.double())
    for names in compositions("abc"):
        got = together(ours, inputs, names)
        assert_rows_right(got, theirs, inputs, names, exact)
        if dtype == torch.float32:
            torch.testing.assert_close(got, together(theirs, inputs, names))


# --------------------------------------------------------------------------------------- adapters that are not plain
@pytest.mark.filterwarnings("ignore:.*lora_bias")
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_adapters_with_a_bias(family: str) -> None:
    adapters = {"a": dict(lora_bias=True), "b": {}, "c": dict(r=8, lora_bias=True)}
    theirs, ours = check(family, "CAUSAL_LM", adapters)
    got = logits(ours, adapter_names=NAMES)
    torch.testing.assert_close(got, logits(theirs, adapter_names=NAMES))
    for name, parameter in ours.named_parameters():
        if name.endswith("lora_B.a.bias"):
            parameter.data.zero_()
    moved = (logits(ours, adapter_names=NAMES) - got).abs().amax((1, 2)) > 1e-3
    assert moved.tolist() == [name == "a" for name in NAMES]


def test_gpt2_with_everything_adapted() -> None:
    every = dict(target_modules=["c_attn", "c_fc", "c_proj", "wte"])
    theirs, ours = check("gpt2", "CAUSAL_LM", {"a": every, "b": {}, "c": dict(r=8, **every)})
    torch.testing.assert_close(logits(ours, adapter_names=NAMES), logits(theirs, adapter_names=NAMES))


def test_flattened_tokens() -> None:
    """OPT gives fc1 and fc2 all tokens of all rows as one dimension, which peft cannot tell apart."""
    theirs, _ = check("opt", "CAUSAL_LM", {"a": dict(target_modules=["fc1", "fc2"]), "b": {}, "c": dict(r=8)})
    with pytest.raises(ValueError, match="should be the same as the number of inputs, but got 5 and 30"):
        logits(theirs, adapter_names=NAMES)


@pytest.mark.parametrize("kind", ["forward hook", "forward pre-hook", "patched forward", "other module"])
@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_hooks_on_an_adapter_run(part: str, kind: str) -> None:
    ours = mixed_model(adapters={"a": Q, "b": Q, "c": Q})
    before = logits(ours, adapter_names=NAMES)
    layer = ours.base_model.model.model.layers[1].self_attn.q_proj
    module, calls = getattr(layer, part)["a"], []
    if kind == "forward hook":
        module.register_forward_hook(lambda m, args, y: calls.append(1) or 3 * y)
    elif kind == "forward pre-hook":
        module.register_forward_pre_hook(lambda m, args: calls.append(1) or (3 * args[0],))
    elif kind == "patched forward":
        plain = module.forward
        module.forward = lambda x: calls.append(1) or 3 * plain(x)
    else:
        getattr(layer, part)["a"] = nn.Sequential(copy.deepcopy(module), nn.Identity())
        getattr(layer, part)["a"][0].weight.data.mul_(3)
        calls.append(1)
    for given in ({"adapter_names": NAMES}, {"adapter_ids": ours.adapter_slots(NAMES)}):
        got = logits(ours, **given)
        assert calls, "the hook did not run"
        moved = (got - before).abs().amax((1, 2)) > 1e-4
        assert moved.tolist() == [name == "a" for name in NAMES]
        ours.set_adapter("a")
        torch.testing.assert_close(got[0], logits(ours)[0])
        calls.clear() if kind != "other module" else None
    logits(ours, adapter_names=["b"] * ROWS)
    assert not calls or kind == "other module", "it ran for rows of others only"


def test_a_pruned_adapter() -> None:
    """Pruning takes the weight away from the module's parameters, after the adapter was served."""
    from torch.nn.utils import prune

    ours = mixed_model(adapters={"a": Q, "b": Q, "c": Q})
    before = logits(ours, adapter_names=NAMES)
    for layer in ours.base_model.model.model.layers:
        prune.l1_unstructured(layer.self_attn.q_proj.lora_A["a"], "weight", amount=0.5)
    got = logits(ours, adapter_names=NAMES)
    ours.set_adapter("a")
    torch.testing.assert_close(got[0], logits(ours)[0])
    assert (got - before)[0].abs().max() > 1e-4


# ----------------------------------------------------------------------------------------------- opaque base layers
class _Halved(nn.Linear):
    """Not what nn.Linear computes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


def _own_kind(layer: Any) -> None:
    layer.__class__ = _Halved


def _forward_hook(layer: Any) -> None:
    layer.register_forward_hook(lambda module, args, y: y / 2)


def _same_memory(layer: Any) -> None:
    """What it returns must not be written to: it is returned again."""
    kept: dict[int, Tensor] = {}
    plain = layer.forward
    layer.forward = lambda x: kept.setdefault(x.shape[0] * 1000 + x.shape[1], plain(torch.zeros_like(x)))


@pytest.mark.parametrize("change", [_own_kind, _forward_hook, _same_memory])
@pytest.mark.parametrize("wrapped_first", [False, True])
@pytest.mark.parametrize("tables", [False, True])
@torch.no_grad()
def test_opaque_base_layers(change: Any, wrapped_first: bool, tables: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if tables:  # as on a device
        monkeypatch.setattr(MixedBatch, "on_host", lambda *args: False)
    base = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)).eval()
    if not wrapped_first:
        change(base[0])
    adapters = {
        "a": dict(target_modules=["0", "1"]),
        "b": dict(r=3, target_modules=["0"]),
        "c": dict(target_modules=["1"]),
    }
    ours = add_adapters(peft_fast, base, "llama", None, adapters)
    if wrapped_first:
        change(ours.base_model.model[0].base_layer)
    randomize(ours)
    x = torch.randn(ROWS, 7, 8)
    for _ in range(3):
        got = ours(x, adapter_names=NAMES)
        for i, name in enumerate(NAMES):
            layers = [ours.base_model.model[0].base_layer, ours.base_model.model[1].base_layer]
            y = x[i : i + 1] if change is not _same_memory else x
            for layer, lora in zip(layers, ours.base_model.model, strict=True):
                update = 0
                if name in lora.lora_A:
                    update = lora.lora_B[name](lora.lora_A[name](y)) * lora.scaling[name]
                y = layer(y).clone() + update
            torch.testing.assert_close(got[i], y[i if change is _same_memory else 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_arithmetic_of_peft(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """PEFT_FAST_LORA=peft runs an adapter's modules as peft does; rows are multiplied in other groups."""
    monkeypatch.setenv("PEFT_FAST_LORA", "peft")
    theirs, ours = mixed_pair("llama", "CAUSAL_LM", dtype=dtype)
    calls: list[int] = []
    ours.base_model.model.model.layers[0].self_attn.q_proj.lora_A["a"].forward = lambda x, m=nn.Linear.forward: (
        calls.append(1),
        m(ours.base_model.model.model.layers[0].self_attn.q_proj.lora_A["a"], x),
    )[1]
    got, expected = logits(ours, adapter_names=NAMES), logits(theirs, adapter_names=NAMES)
    assert calls
    if dtype == torch.float32:
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert_rows_right(together(ours, batch("CAUSAL_LM"), NAMES), theirs, batch("CAUSAL_LM"), NAMES)

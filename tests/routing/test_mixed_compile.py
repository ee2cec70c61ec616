"""torch.compile of a PeftModel with `adapter_ids`: one graph for whatever the ids are."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from mixed_models import BASE, ROWS, batch, mixed_model, one_by_one, outputs, randomize
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import peft_fast

MIXES = [["a", BASE, "c", "b", "a"], [BASE] * ROWS, ["b"] * ROWS, ["c", "b", BASE, BASE, "a"]]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Small(nn.Module):
    """Every kind of layer that adapters change by row, and little to compile."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv, self.linear, self.head = (
            nn.Embedding(60, 16), nn.Conv1d(16, 16, 3, padding=1), nn.Linear(16, 24), nn.Linear(24, 5)
        )  # fmt: skip

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.table(input_ids)
        hidden = torch.tanh(hidden + self.conv(hidden.transpose(1, 2)).transpose(1, 2))
        result: Tensor = self.head(torch.tanh(self.linear(hidden)))
        return result


SETTINGS: dict[str, dict[str, Any]] = {
    "a": dict(r=8, target_modules=["linear", "table"]),
    "b": dict(r=3, target_modules=["linear"], lora_bias=True, modules_to_save=["head"]),
    "c": dict(r=4, target_modules=["linear", "conv"], use_rslora=True, modules_to_save=["head"]),
    "d": dict(r=16, target_modules=["table", "linear"]),
}


def add(model: Any, name: str, seed: int = 3) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter(name, peft_fast.LoraConfig(**SETTINGS[name]))
    randomize(model.eval(), seed)
    model.load_state_dict(before, strict=False)


def small(*names: str) -> Any:
    """A model with these adapters, all frozen."""
    torch.manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, *others = [(name, peft_fast.LoraConfig(**SETTINGS[name])) for name in names]
        model = peft_fast.get_peft_model(Small(), first[1], adapter_name=first[0])
        for name, config in others:
            model.add_adapter(name, config)
    randomize(model.eval())
    return model.requires_grad_(False)


def inputs_of(rows: int = ROWS, length: int = 6) -> dict[str, Tensor]:
    return {"input_ids": batch("", rows=rows, length=length)["input_ids"]}


class Compiled:
    """A model compiled as a whole, and how many graphs that took so far."""

    def __init__(self, model: Any, **options: Any) -> None:
        self.model, self.counter = model, CompileCounterWithBackend("aot_eager")
        self.compiled = torch.compile(model, fullgraph=True, backend=self.counter, **options)

    @property
    def graphs(self) -> int:
        return int(self.counter.frame_count)

    def __call__(self, inputs: dict[str, Tensor], names: Sequence[str] | None = None, ids: Any = None) -> Tensor:
        ids = self.model.adapter_slots(names) if ids is None else ids
        with torch.no_grad():
            return outputs(self.compiled(**inputs, adapter_ids=ids)).popitem()[1]


def alone(model: Any, inputs: dict[str, Tensor], names: Sequence[str]) -> Tensor:
    """What each row has to be: its adapter's. Which adapter is active is as it was."""
    active = model.active_adapter
    result = one_by_one(model, inputs, names).popitem()[1]
    model.set_adapter(active, inference_mode=True)
    return result


def assert_same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "small"])
def test_one_graph_for_all_compositions(kind: str) -> None:
    """Of ids, the first of which name no adapter: for linear layers, embeddings, convolutions, biases and heads."""
    if kind == "small":
        model, inputs = small("a", "b", "c"), inputs_of()
    else:
        adapters = {
            "a": {},
            "b": dict(r=8, modules_to_save=["lm_head"]),
            "c": dict(r=3, target_modules=["embed_tokens"]),
        }
        model, inputs = mixed_model(adapters=adapters, num_hidden_layers=1).requires_grad_(False), batch("CAUSAL_LM")
        model.config.use_cache = False
    expected = [alone(model, inputs, names) for names in MIXES]
    model.adapter_slots("abc")
    compiled = Compiled(model)
    assert_same(compiled(inputs, [BASE] * ROWS), expected[1])
    for names, right in zip(MIXES, expected, strict=True):
        assert_same(compiled(inputs, names), right)
    assert compiled.graphs == 1


def test_adapter_slots_come_first() -> None:
    """Without a bank there is nothing that a graph could read: the error says what to do."""
    compiled = Compiled(small("a"))
    with pytest.raises(Exception, match="Call adapter_slots"):
        compiled(inputs_of(), ids=torch.full((ROWS,), -1, dtype=torch.int32))
    torch._dynamo.reset()
    compiled.model.adapter_slots(["a"])
    torch.testing.assert_close(
        compiled(inputs_of(), [BASE, *"aaaa"]), alone(compiled.model, inputs_of(), [BASE, *"aaaa"])
    )


def test_changes_in_place_need_no_new_graph() -> None:
    """An optimizer's step shows in the next call where weights are not copied; `refresh` shows it where they are."""
    model, inputs, names = small("a", "c"), inputs_of(), ["a", "c", BASE, "a", "c"]
    ids = model.adapter_slots(names)
    compiled = Compiled(model)
    before = compiled(inputs, ids=ids)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                parameter.mul_(1.5)
    expected = alone(model, inputs, names)
    assert_same(compiled(inputs, ids=ids)[0], expected[0])  # a, whose rank is 8
    model.adapter_bank.refresh()
    assert_same(compiled(inputs, ids=ids), expected)
    assert (expected - before).abs().amax((1, 2))[[0, 1]].min() > 1e-3 and compiled.graphs == 1


def test_adapters_that_come_and_go() -> None:
    """Added at the same sites, at new ones, deleted: results stay right, whatever has to be compiled for it."""
    model, inputs, names = small("a", "b"), inputs_of(), ["a", BASE, "b", "b", "a"]
    ids = model.adapter_slots(names)
    expected = alone(model, inputs, names)
    compiled = Compiled(model)
    assert_same(compiled(inputs, ids=ids), expected)
    for name in "dc":  # c adapts a layer that no other does
        add(model, name)
        model.requires_grad_(False)
        assert_same(compiled(inputs, ids=ids), expected)  # ids of before, and no call of adapter_slots since
        assert_same(compiled(inputs, [name, "a", BASE, name, "b"]), alone(model, inputs, [name, "a", BASE, name, "b"]))
    model.release_slots(ids)
    model.adapter_bank.configure(max_loaded=5)
    with pytest.raises(ValueError, match="handed out"):
        model.delete_adapter("d")


def test_heads_whose_adapters_change_their_slots() -> None:
    """A graph with heads knows which slots are theirs."""
    model, inputs = small("a", "b", "c"), inputs_of()
    model.adapter_bank.configure(slots=2)
    mixes = [[*pair, BASE, *pair] for pair in ("ab", "bc", "ca", "ab")]
    expected = [alone(model, inputs, names) for names in mixes]
    compiled = Compiled(model)
    for names, right in zip(mixes, expected, strict=True):
        ids = model.adapter_slots(names)
        assert_same(compiled(inputs, ids=ids), right)
        model.release_slots(ids)


@pytest.mark.parametrize("target", ["the PeftModel", "the base model"])
def test_after_the_dtype_changed(target: str) -> None:
    model, inputs = small("a", "d"), inputs_of()
    names = ["a", BASE, "d", "d", "a"]
    ids = model.adapter_slots(names)
    compiled = Compiled(model)
    compiled(inputs, ids=ids)
    if target == "the PeftModel":
        model.to(torch.float64)
    else:  # of which the tuner is not told
        model.get_base_model().to(torch.float64)
        model.adapter_bank.refresh()
    got = compiled(inputs, ids=ids)
    assert got.dtype == torch.float64
    assert_same(got, alone(model, inputs, names))


def test_packed_sequences_in_one_graph() -> None:
    model = mixed_model(attn_implementation="sdpa", num_hidden_layers=1)
    model.config.use_cache = False
    positions = torch.cat([torch.arange(length) for length in (3, 1, 4)])[None]
    inputs = {"input_ids": batch("", rows=1, length=8)["input_ids"], "position_ids": positions}
    mixes = [["a", "b", "c"], [BASE, "c", "a"], [BASE] * 3]
    with torch.no_grad():
        expected = [model(**inputs, adapter_names=names).logits for names in mixes]
    model.adapter_slots("abc")
    compiled = Compiled(model)
    for names, right in zip(mixes, expected, strict=True):
        assert_same(compiled(inputs, names), right)
    assert compiled.graphs == 1


def test_one_graph_for_all_sizes() -> None:
    """Where torch is told that they change: no size after the first costs anything."""
    model, graphs = small("a", "b"), []
    model.adapter_slots("ab")
    compiled = Compiled(model, dynamic=True)
    for rows, length in ((5, 6), (4, 7), (3, 9), (7, 5)):
        names, inputs = ["a", BASE, "b", "b", "a", "a", BASE][:rows], inputs_of(rows, length)
        assert_same(compiled(inputs, names), alone(model, inputs, names))
        graphs.append(compiled.graphs)
    assert len(set(graphs)) == 1

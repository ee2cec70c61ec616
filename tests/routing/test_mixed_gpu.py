"""What only a GPU can show of mixed batches: graph replay with other adapters, streams, memory of the two kinds."""

import threading
from typing import Any

import pytest
import torch
from mixed_models import BASE, ROWS, batch, mixed_model, one_by_one
from torch import Tensor

pytestmark = pytest.mark.gpu
MIXES = [["a", "b", "c", "b", "a"], [BASE] * ROWS, ["c"] * ROWS, ["b", BASE, BASE, "a", "c"]]


@pytest.fixture
def model() -> Any:
    return mixed_model().cuda().requires_grad_(False)


def inputs() -> dict[str, Tensor]:
    return {key: value.cuda() for key, value in batch("CAUSAL_LM").items()}


@torch.no_grad()
def right(model: Any, names: list[str], got: Tensor) -> bool:
    expected = one_by_one(model, inputs(), names)["logits"]
    return torch.allclose(got, expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["grouped", "split", "one_launch"])
def test_every_implementation(model: Any, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_FAST_LORA", implementation)
    for names in MIXES:
        got = model(**inputs(), adapter_names=names).logits
        monkeypatch.delenv("PEFT_FAST_LORA")
        assert right(model, names, got)
        monkeypatch.setenv("PEFT_FAST_LORA", implementation)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["grouped", "one_launch"])
def test_a_graph_replays_with_any_other_mix(model: Any, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured with one composition; the known failure is work that is dropped when there are more adapters."""
    monkeypatch.setenv("PEFT_FAST_LORA", implementation)
    slots = [model.adapter_slots(names) for names in MIXES]
    static, given = slots[2].clone(), inputs() | {"use_cache": False}
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            model(**given, adapter_ids=static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = model(**given, adapter_ids=static).logits
    monkeypatch.delenv("PEFT_FAST_LORA")
    for names, ids in zip(MIXES, slots, strict=True):
        static.copy_(ids)
        graph.replay()
        assert right(model, names, got)


@torch.no_grad()
def test_one_launch_repeats_to_the_bit(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """10,000 launches: a race between the programs that shrink and those that wait would show as another result."""
    monkeypatch.setenv("PEFT_FAST_LORA", "one_launch")
    given, ids = inputs() | {"use_cache": False}, model.adapter_slots(MIXES[0])
    first = model(**given, adapter_ids=ids).logits
    for _ in range(1 + 10_000 // len(model.adapter_bank.layers)):
        assert torch.equal(model(**given, adapter_ids=ids).logits, first)


@torch.no_grad()
def test_threads_with_streams_of_their_own(model: Any) -> None:
    """Different mixes, few slots: adapters lose them all the time, and never while the device reads them."""
    model.adapter_bank.configure(slots=3)
    mixes = [["a", "a", BASE, "a", "a"], ["b"] * ROWS, ["c", BASE, "c", "c", "c"]]
    expected = [one_by_one(model, inputs(), names)["logits"] for names in mixes]
    wrong: list[int] = []

    def serve(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
            for _ in range(100):
                got = model(**inputs(), adapter_names=mixes[i]).logits
                wrong.extend([i] * (not torch.allclose(got, expected[i], rtol=1e-3, atol=1e-3)))

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(len(mixes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.no_grad()
def test_registered_adapters_wait_on_the_host(model: Any, tmp_path: Any) -> None:
    expected = {name: model(**inputs(), adapter_names=[name] * ROWS).logits for name in "abc"}
    model.save_pretrained(tmp_path)
    for name in "bc":
        model.delete_adapter(name)
        model.adapter_bank.register(name, tmp_path / name)
    model.adapter_bank.configure(slots=1)
    for name in "bcacb":
        torch.testing.assert_close(model(**inputs(), adapter_names=[name] * ROWS).logits, expected[name])
    devices = {n: p.device.type for n, p in model.named_parameters() if "lora_" in n}
    assert {d for n, d in devices.items() if ".b." in n or ".c." in n} == {"cpu"}
    assert {d for n, d in devices.items() if ".a." in n} == {"cuda"}
    model.set_adapter("b", inference_mode=True)
    torch.testing.assert_close(model(**inputs()).logits, expected["b"])

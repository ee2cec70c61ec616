"""Several threads on one model: each call has its own adapters; changes wait for the calls that they would break."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_config
from mixed_models import BASE, ROWS, batch, logits, mixed_model, randomize, settings
from torch import Tensor

import peft_fast
from peft_fast.peft_model import files
from peft_fast.routing.batch import MixedBatch, current

NAMES = ["a", BASE, "c", "b", "a"]
WAIT = 10.0  # seconds after which a thread hangs
pytestmark = pytest.mark.filterwarnings("ignore:Adapter . was active which is now deleted")


@pytest.fixture
def model() -> Any:
    return mixed_model(adapters=settings("llama") | {"d": dict(r=8, target_modules=["k_proj", "embed_tokens"])})


@pytest.fixture
def quick_switches() -> Iterator[None]:
    """Threads take turns after a few bytecodes, not after 5 ms."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


class Worker(threading.Thread):
    """A thread that keeps what its function returned or raised."""

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.function, self.result, self.error = function, None, None
        self.start()

    def run(self) -> None:
        try:
            self.result = self.function()
        except BaseException as error:
            self.error = error

    def value(self) -> Any:
        """What the function returned. Raises what it raised."""
        self.join(WAIT)
        assert not self.is_alive(), "the thread hangs"
        if self.error is not None:
            raise self.error
        return self.result

    def waits(self, seconds: float = 0.15) -> bool:
        """Whether it is still running after a while."""
        self.join(seconds)
        return self.is_alive()


class Gate:
    """Something that a call enters and leaves only when it is opened."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()

    def __call__(self, *args: Any) -> None:
        self.entered.set()
        assert self.opened.wait(WAIT)


def slow_call(model: Any, names: list[str]) -> tuple[Worker, Gate]:
    """A thread in the middle of a call that uses these adapters, and the gate that lets it go on."""
    gate = Gate()
    caller: list[int] = []

    def hook(module: Any, args: Any) -> None:
        if threading.get_ident() in caller and not gate.opened.is_set():
            gate()

    model.get_base_model().model.layers[1].register_forward_pre_hook(hook)

    def call() -> Tensor:
        caller.append(threading.get_ident())
        return logits(model, adapter_names=names)

    worker = Worker(call)
    assert gate.entered.wait(WAIT)
    return worker, gate


def same(got: Tensor, expected: Tensor) -> bool:
    return torch.allclose(got, expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- undisturbed
@pytest.mark.usefixtures("quick_switches")
@pytest.mark.parametrize("by", ["names", "ids", "tables"])
def test_threads_do_not_mix(model: Any, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if by == "tables":
        monkeypatch.setattr(MixedBatch, "on_host", lambda *args: False)
    mixes = [NAMES, ["b"] * ROWS, [BASE, "d", "d", "c", BASE], ["c", "a", "d", "b", BASE]]
    expected = [logits(model, adapter_names=names) for names in mixes]
    ids = [model.adapter_slots(names) for names in mixes]

    def serve(i: int) -> int:
        right = 0
        for _ in range(40):
            given = {"adapter_ids": ids[i]} if by == "ids" else {"adapter_names": mixes[i]}
            right += same(logits(model, **given), expected[i])
        return right

    workers = [Worker(lambda i=i: serve(i)) for i in range(len(mixes))]  # type: ignore[misc]
    assert [worker.value() for worker in workers] == [40] * len(mixes)


@pytest.mark.usefixtures("quick_switches")
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_changes_to_other_adapters_do_not_disturb(model: Any, tmp_path: Path, gradients: bool) -> None:
    """Loaded, added, deleted, switched off: what the calls use stays as it was. Adapters of one's own are different."""
    mixes = [NAMES, ["b", "a", BASE, "b", "b"]]
    expected = [logits(model, adapter_names=names) for names in mixes]
    model.save_pretrained(tmp_path)
    model.delete_adapter("d")
    stop = threading.Event()

    def serve(i: int) -> tuple[int, int]:
        calls = right = 0
        while not stop.is_set():
            with torch.enable_grad() if gradients else torch.no_grad():
                got = model(**batch("CAUSAL_LM"), adapter_names=mixes[i]).logits.detach()
            calls += 1
            right += same(got, expected[i])
        return calls, right

    workers = [Worker(lambda i=i: serve(i)) for i in range(2)]  # type: ignore[misc]
    base = logits(mixed_model(), adapter_names=[BASE] * ROWS)
    try:
        for round_ in range(6):
            model.load_adapter(tmp_path / "d", "d")
            with model.disable_adapter():
                assert same(logits(model), base) and same(logits(model, adapter_names=NAMES), base)
            model.add_adapter("e", make_config(peft_fast, "llama", "CAUSAL_LM", target_modules=["k_proj", "up_proj"]))
            model.set_adapter("e" if round_ % 2 else "c")
            model.set_adapter("a")
            model.delete_adapter("e")
            model.delete_adapter("d")
    finally:
        stop.set()
    for calls, right in [worker.value() for worker in workers]:
        assert right == calls > 1  # how many there is time for is the machine's affair
    assert set(model.peft_config) == set("abc")


@pytest.mark.usefixtures("quick_switches")
@pytest.mark.filterwarnings("ignore")
def test_registered_adapters_come_and_go_under_several_threads(model: Any, tmp_path: Path) -> None:
    """More of them than may be in memory: they are read and dropped all the time."""
    expected = {name: logits(model, adapter_names=[name] * ROWS) for name in "abcd"}
    model.save_pretrained(tmp_path)
    for name in "bcd":
        model.delete_adapter(name)
        model.adapter_bank.register(name, tmp_path / name)
    model.adapter_bank.configure(max_loaded=1)

    def serve(names: str) -> list[str]:
        return [n for n in names * 4 if not same(logits(model, adapter_names=[n] * ROWS), expected[n])]

    workers = [Worker(lambda names=names: serve(names)) for names in ("bcd", "dcb", "aaa")]  # type: ignore[misc]
    assert [worker.value() for worker in workers] == [[], [], []]
    assert model.adapter_bank.stats().evictions > 0


# ------------------------------------------------------------------------------------------------------------ loading
@pytest.mark.parametrize("registered", [True, False])
def test_an_adapter_that_is_being_loaded_is_not_used(
    model: Any, tmp_path: Path, registered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = logits(model, adapter_names=["b"] * ROWS)
    model.save_pretrained(tmp_path)
    model.delete_adapter("b")
    gate, load = Gate(), files.load_adapter_weights

    def slow(*args: Any, **kwargs: Any) -> Any:
        gate()
        return load(*args, **kwargs)

    monkeypatch.setattr(files, "load_adapter_weights", slow)
    if registered:
        model.adapter_bank.register("b", tmp_path / "b")
    first = Worker(
        lambda: logits(model, adapter_names=["b"] * ROWS) if registered else model.load_adapter(tmp_path / "b", "b")
    )
    assert gate.entered.wait(WAIT)
    second = Worker(lambda: logits(model, adapter_names=["b"] * ROWS))
    others = Worker(lambda: logits(model, adapter_names=["a"] * ROWS))
    assert second.waits()
    others.value()  # these need not wait
    gate.opened.set()
    first.value()
    assert same(second.value(), expected) and same(logits(model, adapter_names=["b"] * ROWS), expected)


def test_new_weights_for_an_adapter_in_use_wait(model: Any, tmp_path: Path) -> None:
    """`load_adapter` of a name that is there replaces its weights: between two calls, not during one."""
    model.delete_adapter("b")
    model.add_adapter("b", make_config(peft_fast, "llama", "CAUSAL_LM", **settings("llama")["c"]))
    randomize(model.eval(), seed=31)
    old = logits(model, adapter_names=["b"] * ROWS)
    new = logits(model, adapter_names=["c"] * ROWS)
    model.save_pretrained(tmp_path)
    worker, gate = slow_call(model, ["b"] * ROWS)
    loader = Worker(lambda: model.load_adapter(tmp_path / "c", "b"))
    assert loader.waits()
    gate.opened.set()
    assert same(worker.value(), old)
    loader.value()
    assert same(logits(model, adapter_names=["b"] * ROWS), new) and not same(old, new)


def test_an_adapter_that_is_being_added_is_not_used(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    create = type(model.base_model)._create_and_replace

    def slow(self: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs["current_key"].startswith("model.layers.1"):
            gate()
        return create(self, config, *args, **kwargs)

    monkeypatch.setattr(type(model.base_model), "_create_and_replace", slow)
    config = make_config(peft_fast, "llama", "CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    adder = Worker(lambda: model.add_adapter("new", config))
    assert gate.entered.wait(WAIT)
    second = Worker(lambda: logits(model, adapter_names=["new"] * ROWS))
    second.waits()
    gate.opened.set()
    adder.value()
    model.eval()
    try:
        got = second.value()
    except ValueError as error:
        assert "non-existing adapter" in str(error)
    else:
        assert same(got, logits(model, adapter_names=["new"] * ROWS))


# ----------------------------------------------------------------------------------------------------------- deletion
def test_a_deletion_waits_for_the_calls_that_use_it(model: Any) -> None:
    expected = logits(model, adapter_names=NAMES)
    worker, gate = slow_call(model, NAMES)
    model.delete_adapter("d")  # not used: at once
    deletion = Worker(lambda: model.delete_adapter("b"))
    assert deletion.waits() and "b" in model.peft_config
    others = Worker(lambda: logits(model, adapter_names=["a", "c", BASE, "a", "c"]))
    others.value()
    late = Worker(lambda: logits(model, adapter_names=["b"] * ROWS))  # came after it was decided
    assert late.waits()
    gate.opened.set()
    assert same(worker.value(), expected)
    deletion.value()
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): b"):
        late.value()
    assert set(model.peft_config) == {"a", "c"}


def test_a_generation_is_one_call(model: Any) -> None:
    ids = batch("")["input_ids"]
    options = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
    expected = model.generate(input_ids=ids, adapter_names=NAMES, **options)
    started, seen = threading.Event(), []

    def hook(*args: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            started.set()
            time.sleep(0.02)
            seen.append("b" in model.peft_config)

    model.get_base_model().lm_head.register_forward_hook(hook)
    worker = Worker(lambda: model.generate(input_ids=ids, adapter_names=NAMES, **options))
    assert started.wait(WAIT)
    model.delete_adapter("b")
    assert torch.equal(worker.value(), expected) and seen == [True] * 4


def test_a_call_cannot_delete_what_it_uses(model: Any) -> None:
    caught = []

    def hook(module: Any, args: Any) -> None:
        model.delete_adapter("d")
        try:
            model.delete_adapter("b")
        except RuntimeError as error:
            caught.append(str(error))

    expected = logits(model, adapter_names=NAMES)
    handle = model.get_base_model().model.layers[0].register_forward_pre_hook(hook)
    torch.testing.assert_close(logits(model, adapter_names=NAMES), expected)
    handle.remove()
    assert len(caught) == 1 and "Adapter b is used by the call that is running in this thread" in caught[0]
    torch.testing.assert_close(logits(model, adapter_names=NAMES), expected)
    model.delete_adapter("b")
    assert set(model.peft_config) == {"a", "c"}


@pytest.mark.parametrize("nested", ["the same", "a registered one"])
def test_a_call_inside_a_call_while_it_is_deleted(model: Any, tmp_path: Path, nested: str) -> None:
    """A deletion waits for the outer call; the inner one must not wait for the deletion."""
    if nested == "a registered one":
        model.save_pretrained(tmp_path)
        model.delete_adapter("d")
        model.adapter_bank.register("d", tmp_path / "d")
    inner = {"the same": ["b"] * ROWS, "a registered one": ["d"] * ROWS}[nested]
    gate, results = Gate(), []

    def hook(module: Any, args: Any) -> None:
        handle.remove()
        gate()
        results.append(logits(model, adapter_names=inner))

    expected = logits(model, adapter_names=NAMES)
    handle = model.get_base_model().model.layers[1].register_forward_pre_hook(hook)
    worker = Worker(lambda: logits(model, adapter_names=NAMES))
    assert gate.entered.wait(WAIT)
    deletion = Worker(lambda: model.delete_adapter("b"))
    assert deletion.waits()
    gate.opened.set()
    worker.join(3)
    assert not worker.is_alive(), "deadlock"
    assert same(worker.value(), expected) and len(results) == 1
    deletion.value()


def test_calls_inside_calls_keep_their_adapters(model: Any) -> None:
    """A hook runs the model with other adapters, with none, and another model; the outer call goes on as it was."""
    other, seen = mixed_model("qwen2"), []
    plain, of_others = logits(model), logits(other)
    expected = logits(model, adapter_names=["b"] * ROWS)

    def hook(module: Any, args: Any) -> None:
        handle.remove()
        seen.append(same(logits(model, adapter_names=["b"] * ROWS), expected))
        seen.append(same(logits(model), plain))
        seen.append(same(logits(other), of_others))

    before = logits(model, adapter_names=NAMES)
    handle = model.get_base_model().model.layers[1].register_forward_pre_hook(hook)
    assert same(logits(model, adapter_names=NAMES), before) and seen == [True] * 3


# ---------------------------------------------------------------------------------------------------- disable_adapter
def test_disabled_in_one_thread_only(model: Any) -> None:
    expected, base = logits(model, adapter_names=NAMES), logits(model, adapter_names=[BASE] * ROWS)
    with model.disable_adapter():
        assert same(Worker(lambda: logits(model, adapter_names=NAMES)).value(), expected)
        assert same(logits(model, adapter_names=NAMES), base)
    assert same(logits(model, adapter_names=NAMES), expected)


@pytest.mark.parametrize("first_leaves_first", [True, False])
def test_two_threads_disable_at_the_same_time(model: Any, first_leaves_first: bool) -> None:
    plain, expected, base = (
        logits(model),
        logits(model, adapter_names=NAMES),
        logits(model, adapter_names=[BASE] * ROWS),
    )
    flags = [p.requires_grad for p in model.parameters()]
    gates = [Gate(), Gate()]

    def disabled(gate: Gate) -> tuple[bool, bool]:
        with model.disable_adapter():
            gate()
            return same(logits(model), base), same(logits(model, adapter_names=NAMES), base)

    workers = []
    for gate in gates:
        workers.append(Worker(lambda gate=gate: disabled(gate)))  # type: ignore[misc]
        assert gate.entered.wait(WAIT)
    order = [0, 1] if first_leaves_first else [1, 0]
    for i in order:
        gates[i].opened.set()
        assert workers[i].value() == (True, True)
    assert same(logits(model), plain) and same(logits(model, adapter_names=NAMES), expected)
    assert [p.requires_grad for p in model.parameters()] == flags
    with model.disable_adapter():
        assert same(logits(model), base)
    assert same(logits(model), plain)


# --------------------------------------------------------------------------------------------------------- exceptions
@pytest.mark.parametrize("where", ["layer", "lora_A", "rows", "generate"])
def test_an_exception_leaves_nothing_behind(model: Any, where: str) -> None:
    plain, expected = logits(model), logits(model, adapter_names=NAMES)
    layers = model.get_base_model().model.layers

    def hook(*args: Any) -> None:
        raise KeyError("on purpose")

    module = layers[1] if where != "lora_A" else layers[1].self_attn.q_proj.lora_A["b"]
    handle = module.register_forward_pre_hook(hook)
    act: Callable[[], Any] = lambda: logits(model, adapter_names=NAMES)  # noqa: E731
    if where == "generate":
        act = lambda: model.generate(input_ids=batch("")["input_ids"], adapter_names=NAMES)  # noqa: E731
    elif where == "rows":
        handle.remove()
        handle = model.get_base_model().model.register_forward_pre_hook(
            lambda m, args, kwargs: (args, kwargs | {"input_ids": torch.ones(7, 3, dtype=torch.long)}), with_kwargs=True
        )
    for _ in range(2):
        with pytest.raises((KeyError, ValueError)):
            act()
        assert current() is None
    handle.remove()
    assert same(logits(model), plain) and same(logits(model, adapter_names=NAMES), expected)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    for name in ("b", "c"):
        Worker(lambda name=name: model.delete_adapter(name)).value()  # type: ignore[misc]


def test_names_that_fail_hold_nothing(model: Any) -> None:
    for names in (["a", "nobody", "b", "c", "a"], ["a"] * 3):
        with pytest.raises(ValueError):
            logits(model, adapter_names=names)
    for name in ("a", "b"):
        Worker(lambda name=name: model.delete_adapter(name)).value()  # type: ignore[misc]
    assert set(model.peft_config) == {"c", "d"}

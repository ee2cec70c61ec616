"""AdapterBank: slots, eviction, adapters read when they are needed, and tables that follow the parameters."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_config
from mixed_models import BASE, ROWS, batch, logits, mixed_model, one_by_one, randomize, settings
from torch import Tensor

import peft_fast
from peft_fast.routing.batch import MixedBatch

NAMES = ["a", BASE, "c", "b", "a"]
Q = {"target_modules": ["q_proj", "v_proj"]}
pytestmark = [
    pytest.mark.filterwarnings("ignore:Adapter . was active which is now deleted"),
    pytest.mark.filterwarnings("ignore:Adapter name 'a' should not be contained in the prefix"),
]


@pytest.fixture
def model() -> Any:
    """Adapters a (rank 4), b (8), c (3 and 7), d (8)."""
    return mixed_model(adapters=settings("llama") | {"d": dict(r=8, **Q)})


@pytest.fixture
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers look adapters up in the bank's tables, as on a GPU and in compiled graphs."""
    monkeypatch.setattr(MixedBatch, "on_host", lambda *args: False)


def alone(model: Any, names: list[str] = NAMES) -> Tensor:
    """What `logits` has to give: each row with its adapter active."""
    return one_by_one(model, batch("CAUSAL_LM", seed=3), names)["logits"]


def check(model: Any, names: list[str] = NAMES) -> Tensor:
    """Logits of the batch, after the test that each row is as its adapter's alone."""
    got = logits(model, adapter_names=names)
    torch.testing.assert_close(got, alone(model, names), rtol=1e-4, atol=1e-5)
    return got


def use_once(model: Any, *names: str) -> None:
    """Give adapters a slot and let them go."""
    model.release_slots(model.adapter_slots(names))


def in_slots(bank: Any) -> set[str]:
    return {name for name in bank.names_of(range(bank.capacity)) if name != BASE}


# -------------------------------------------------------------------------------------------------------------- slots
def test_ids_pin_their_adapters(model: Any) -> None:
    ids = model.adapter_slots(NAMES)
    assert ids.dtype == torch.int32 and ids[1] == -1 and ids[0] == ids[4] and len(set(ids.tolist())) == 4
    use_once(model, "d")
    model.delete_adapter("d")
    assert torch.equal(model.adapter_slots(["a"]), ids[:1])
    with pytest.raises(ValueError, match=r"Adapter b has its slot id \d+ handed out by adapter_slots"):
        model.delete_adapter("b")
    assert "b" in model.peft_config
    check(model)
    model.release_slots(ids)
    model.delete_adapter("b")
    with pytest.raises(ValueError, match="handed out"):  # the second time that its id was given away
        model.delete_adapter("a")
    model.release_slots([int(ids[0])])
    model.delete_adapter("a")
    assert list(model.peft_config) == ["c"] and in_slots(model.adapter_bank) == {"c"}


def test_ids_of_unknown_names(model: Any) -> None:
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): else, nobody"):
        model.adapter_slots(["a", "nobody", "else"])
    model.delete_adapter("a")
    assert model.adapter_bank.stats().slots_used == 0


def test_releasing_what_is_not_handed_out(model: Any) -> None:
    ids = model.adapter_slots(["a", "b", "a"])
    for wrong in ([*ids.tolist(), int(ids[0])], [int(ids[1])] * 2, [int(ids[0]), 77], [10**9]):
        with pytest.raises(ValueError, match="is not handed out"):
            model.release_slots(wrong)
    model.release_slots(ids)  # nothing was released by the calls that failed
    model.release_slots(torch.tensor([-1, -1]))
    for name in ("a", "b"):
        model.delete_adapter(name)


@pytest.mark.usefixtures("as_on_a_device")
def test_an_id_without_adapter_means_none(model: Any) -> None:
    ids = model.adapter_slots(NAMES)
    model.release_slots(ids)
    model.delete_adapter("b")
    bank, row = model.adapter_bank, NAMES.index("b")
    assert bank.names_of([int(ids[row])]) == [BASE]
    assert not any(site.ranks[ids[row]] for site in bank.sites)
    names = [BASE if name == "b" else name for name in NAMES]
    torch.testing.assert_close(logits(model, adapter_ids=ids), alone(model, names), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tables", [False, True])
def test_the_longest_unused_loses_its_slot(model: Any, tables: bool, request: pytest.FixtureRequest) -> None:
    if tables:
        request.getfixturevalue("as_on_a_device")
    bank = model.adapter_bank
    bank.configure(slots=2)
    use_once(model, "a")
    use_once(model, "b")
    use_once(model, "a")
    use_once(model, "c")
    assert in_slots(bank) == {"a", "c"} and bank.stats().evictions == 1
    for name in "abcdbca":
        ids = model.adapter_slots([name, BASE] * 2 + [name])
        expected = alone(model, [name, BASE] * 2 + [name])
        torch.testing.assert_close(logits(model, adapter_ids=ids), expected, rtol=1e-4, atol=1e-5)
        model.release_slots(ids)
    assert bank.stats().slots_used == bank.stats().slots == 2


def test_a_call_is_a_use(model: Any) -> None:
    """Adapters that rows asked for by name are not the longest unused."""
    model.adapter_bank.configure(slots=2)
    use_once(model, "a", "b")
    logits(model, adapter_names=["a"] * ROWS)
    use_once(model, "c")
    assert in_slots(model.adapter_bank) == {"a", "c"}


def test_all_slots_in_use(model: Any) -> None:
    bank = model.adapter_bank
    bank.configure(slots=2)
    ids = model.adapter_slots(["a", "b"])
    with pytest.raises(RuntimeError, match="Adapter c needs a slot and all 2 are in use or pinned"):
        model.adapter_slots(["a", "c"])
    assert bank.names_of(ids.tolist()) == ["a", "b"]
    model.release_slots(ids)
    with pytest.raises(ValueError, match="not handed out"):
        model.release_slots(ids[:1])
    assert bank.names_of(model.adapter_slots(["c", "d"]).tolist()) == ["c", "d"]


def test_pinned_adapters_keep_their_slots(model: Any) -> None:
    bank = model.adapter_bank
    bank.configure(slots=2)
    bank.pin("a")
    use_once(model, "a")
    for name in "bcd":
        use_once(model, name)
        assert in_slots(bank) == {"a", name}
    bank.pin("d")
    with pytest.raises(RuntimeError, match="in use or pinned"):
        use_once(model, "b")
    bank.unpin("a", "nobody")
    use_once(model, "b")
    assert in_slots(bank) == {"b", "d"}
    with pytest.raises(ValueError, match="non-existing"):
        bank.pin("nobody")


@pytest.mark.parametrize("wrong", [dict(slots=0), dict(max_loaded=-1), dict(max_rank=0), dict(slots=2, max_rank=0)])
def test_configure_refuses(model: Any, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected numbers of at least 1"):
        model.adapter_bank.configure(**wrong)
    assert model.adapter_bank.capacity == 128


@pytest.mark.usefixtures("as_on_a_device")
def test_configure_exchanges_tables_that_nobody_holds(model: Any) -> None:
    check(model)
    ids = model.adapter_slots(["a"])
    with pytest.raises(
        RuntimeError, match=r"cannot get 7 slots while some of its 128 are used or handed out, by \['a'\]"
    ):
        model.adapter_bank.configure(slots=7)
    model.release_slots(ids)
    model.adapter_bank.configure(slots=7, max_rank=33)
    assert model.adapter_bank.sites[0].ranks.shape == (7,) and model.adapter_bank.max_rank == 64
    check(model)


# ---------------------------------------------------------------------------------------------------------- max_rank
@pytest.mark.usefixtures("as_on_a_device")
def test_tables_grow_for_a_large_rank(model: Any) -> None:
    check(model)
    bank = model.adapter_bank
    assert bank.max_rank == 64
    model.add_adapter("large", make_config(peft_fast, "llama", "CAUSAL_LM", r=100))
    randomize(model.eval())
    ids = model.adapter_slots(["a"])
    with pytest.raises(RuntimeError, match="for ranks up to 100"):
        model.adapter_slots(["large"])
    assert torch.equal(model.adapter_slots(["a"]), ids)
    model.release_slots(torch.cat([ids, ids]))
    check(model, ["a", "large", BASE, "b", "large"])
    assert bank.max_rank == 128 and {site.max_rank for site in bank.sites} == {128}


# -------------------------------------------------------------------------------------------------- from directories
@pytest.fixture
def saved(model: Any, tmp_path: Path) -> dict[str, Tensor]:
    """All adapters are in tmp_path / name; here are their logits. The model has only "a" of them."""
    expected = {name: logits(model, adapter_names=[name] * ROWS) for name in "abcd"}
    model.save_pretrained(tmp_path)
    for name in "bcd":
        model.delete_adapter(name)
    return expected


def test_registered_adapters_are_read_when_used(model: Any, saved: dict[str, Tensor], tmp_path: Path) -> None:
    bank = model.adapter_bank
    before = bank.stats()
    for name in "bcd":
        bank.register(name, tmp_path / name)
    assert list(model.peft_config) == ["a"] and bank.registered() == ["b", "c", "d"] and bank.stats().registered == 3
    got = logits(model, adapter_names=NAMES)
    assert list(model.peft_config) == ["a", "c", "b"]
    for row, name in enumerate(NAMES):
        if name != BASE:
            torch.testing.assert_close(got[row], saved[name][row])
    stats = bank.stats()
    assert (stats.loads - before.loads, stats.loaded, stats.evictions) == (2, 3, before.evictions)
    assert stats.hits - before.hits == 1  # a
    logits(model, adapter_names=NAMES)
    assert (bank.stats().loads, bank.stats().hits) == (stats.loads, stats.hits + 3)
    assert model.active_adapters == ["a"] and not any(
        p.requires_grad for n, p in model.named_parameters() if ".b." in n
    )
    assert not model.training


@pytest.mark.parametrize("how", ["names", "ids", "generate"])
def test_registered_adapters_come_and_go(model: Any, saved: dict[str, Tensor], tmp_path: Path, how: str) -> None:
    bank = model.adapter_bank
    for name in "bcd":
        bank.register(name, tmp_path / name)
    bank.configure(max_loaded=2)
    loaded = []
    for name in ("b", "c", "b", "d", "c", "b", "b", "d"):
        if how == "generate":
            model.generate(input_ids=batch("")["input_ids"], max_new_tokens=1, adapter_names=[name] * ROWS)
        elif how == "ids":
            ids = model.adapter_slots([name] * ROWS)
            torch.testing.assert_close(logits(model, adapter_ids=ids), saved[name])
            model.release_slots(ids)
        else:
            torch.testing.assert_close(logits(model, adapter_names=[name] * ROWS), saved[name])
        loaded.append("".join(sorted(set(model.peft_config) - {"a"})))
    assert loaded == ["b", "bc", "bc", "bd", "cd", "bc", "bc", "bd"]
    assert bank.registered() == ["b", "c", "d"]
    torch.testing.assert_close(logits(model, adapter_names=["a"] * ROWS), saved["a"])


def test_adapters_in_use_are_not_dropped(model: Any, saved: dict[str, Tensor], tmp_path: Path) -> None:
    bank = model.adapter_bank
    for name in "bcd":
        bank.register(name, tmp_path / name)
    bank.configure(max_loaded=1)
    got = logits(model, adapter_names=["b", "c", "d", "b", "c"])  # more than one at a time
    assert set(model.peft_config) == set("abcd")
    torch.testing.assert_close(got[1], saved["c"][1])
    ids = model.adapter_slots(["b"])
    bank.pin("c")
    logits(model, adapter_names=["d"] * ROWS)
    model.delete_adapter("d")
    bank.register("d", tmp_path / "d")
    logits(model, adapter_names=["d"] * ROWS)
    assert set(model.peft_config) == set("abcd")
    model.release_slots(ids)
    bank.unpin("c")
    model.delete_adapter("d")
    bank.register("d", tmp_path / "d")
    logits(model, adapter_names=["d"] * ROWS)
    assert set(model.peft_config) == {"a", "d"}


def test_the_active_adapter_is_not_dropped(model: Any, saved: dict[str, Tensor], tmp_path: Path) -> None:
    bank = model.adapter_bank
    for name in "bcd":
        bank.register(name, tmp_path / name)
    bank.configure(max_loaded=1)
    logits(model, adapter_names=["b"] * ROWS)
    model.set_adapter("b")
    for name in "cd":
        logits(model, adapter_names=[name] * ROWS)
        assert set(model.peft_config) == {"a", "b", name} and model.active_adapters == ["b"]
    torch.testing.assert_close(logits(model), saved["b"])


def test_pinning_reads(model: Any, saved: dict[str, Tensor], tmp_path: Path) -> None:
    bank = model.adapter_bank
    bank.register("b", tmp_path / "b")
    bank.pin("b")
    assert "b" in model.peft_config or bank.load is None
    torch.testing.assert_close(logits(model, adapter_names=["b"] * ROWS), saved["b"])


def test_registering(model: Any, saved: dict[str, Tensor], tmp_path: Path) -> None:
    bank = model.adapter_bank
    bank.register("b", tmp_path / "b")
    for taken in ("a", "b", BASE):
        with pytest.raises(ValueError, match=f"Adapter with name '{taken}' already exists"):
            bank.register(taken, tmp_path / "b")
    with pytest.raises(ValueError, match=r"Adapter 'a' is not registered\. There are: \['b'\]"):
        bank.unregister("a")
    logits(model, adapter_names=["b"] * ROWS)
    ids = model.adapter_slots(["b"])
    with pytest.raises(ValueError, match="handed out"):
        bank.unregister("b")
    assert bank.registered() == ["b"] and "b" in model.peft_config
    model.release_slots(ids)
    model.delete_adapter("b")  # whoever deletes it does not want it again
    assert bank.registered() == []
    with pytest.raises(ValueError, match="non-existing"):
        logits(model, adapter_names=["b"] * ROWS)
    bank.register("b", tmp_path / "b")
    torch.testing.assert_close(logits(model, adapter_names=["b"] * ROWS), saved["b"])
    bank.unregister("b")
    assert bank.registered() == [] and list(model.peft_config) == ["a"]
    with pytest.raises(ValueError, match="non-existing"):
        logits(model, adapter_names=["b"] * ROWS)
    bank.register("b", tmp_path / "c")
    bank.unregister("b")  # before it was ever read
    bank.register("b", tmp_path / "c")
    torch.testing.assert_close(logits(model, adapter_names=["b"] * ROWS), saved["c"])


def test_a_name_that_was_asked_for_in_vain_can_be_registered(
    model: Any, saved: dict[str, Tensor], tmp_path: Path
) -> None:
    for act in (
        lambda: logits(model, adapter_names=["b"] * ROWS),
        lambda: model.adapter_slots(["b"]),
        lambda: model.adapter_bank.pin("b"),
        lambda: model.delete_adapter("b"),
    ):
        with pytest.raises(ValueError):
            act()
    model.adapter_bank.register("b", tmp_path / "b")
    torch.testing.assert_close(logits(model, adapter_names=["b"] * ROWS), saved["b"])


def test_a_directory_that_cannot_be_read(model: Any, saved: dict[str, Tensor], tmp_path: Path) -> None:
    before = sorted(model.state_dict())
    model.adapter_bank.register("b", tmp_path / "later")
    model.adapter_bank.register("c", tmp_path / "c")
    with pytest.raises((ValueError, OSError)):
        logits(model, adapter_names=["b", "c", "a", "a", "a"])
    with pytest.raises((ValueError, OSError)):
        model.adapter_slots(["b"])
    model.adapter_bank.unregister("c")
    assert sorted(model.state_dict()) == before and list(model.peft_config) == ["a"]
    torch.testing.assert_close(logits(model, adapter_names=["a"] * ROWS), saved["a"])
    (tmp_path / "b").rename(tmp_path / "later")
    torch.testing.assert_close(logits(model, adapter_names=["b"] * ROWS), saved["b"])


def test_registered_adapters_with_layers_of_their_own(model: Any, saved: dict[str, Tensor], tmp_path: Path) -> None:
    """`c` adapts layers that no other adapter does, and the bank has seen the model without them."""
    use_once(model, "a")
    model.adapter_bank.register("c", tmp_path / "c")
    torch.testing.assert_close(logits(model, adapter_names=["c"] * ROWS), saved["c"])


# ---------------------------------------------------------------------------------------------- changes of parameters
def _step(model: Any) -> None:
    """Of an optimizer: every value changes in place."""
    model.set_requires_grad(["a", "b", "c", "d"])
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    model.set_requires_grad(["a", "b", "c", "d"], False)


def _lora(model: Any) -> list[Any]:
    return [p for n, p in model.named_parameters() if "lora_" in n]


def _replace_data(model: Any) -> None:
    for parameter in _lora(model):
        parameter.data = parameter.data * 2


def _cut_rank(model: Any) -> None:
    """The memory stays where it is, the shape does not."""
    for name, parameter in model.named_parameters():
        if ".a.weight" in name:
            parameter.data = parameter.data[:2] if "lora_A" in name else parameter.data[:, :2]


def _load_state_dict(model: Any) -> None:
    model.load_state_dict({key: value * 2 if "lora_" in key else value for key, value in model.state_dict().items()})


def _assign_state_dict(model: Any) -> None:
    state = {key: value * 2 if "lora_" in key else value for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def _scale(model: Any) -> None:
    for layer in model.base_model.mixed_layers():
        for name in layer.scaling:
            layer.scaling[name] *= 3


def _new_modules(model: Any) -> None:
    for layer in model.base_model.mixed_layers():
        for name in list(layer.lora_A):
            layer.lora_A[name] = copy.deepcopy(layer.lora_A[name])
            layer.lora_A[name].weight.data.mul_(2)


def _anew(model: Any) -> None:
    model.delete_adapter("b")
    model.add_adapter("b", make_config(peft_fast, "llama", "CAUSAL_LM", r=5, target_modules=["k_proj", "v_proj"]))
    randomize(model.eval(), seed=77)


def _to_double(model: Any) -> None:
    model.to(torch.float64)


CHANGES = [
    _step, _replace_data, _cut_rank, _load_state_dict, _assign_state_dict, _scale, _new_modules, _anew, _to_double,
]  # fmt: skip


@pytest.mark.parametrize("tables", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_the_next_call_sees_changes(
    model: Any, change: Callable[[Any], None], tables: bool, request: pytest.FixtureRequest
) -> None:
    if tables:
        request.getfixturevalue("as_on_a_device")
    before = check(model)
    change(model)
    after = check(model)
    changed = ["b"] if change is _anew else ["a"] if change is _cut_rank else list("abc")
    moved = (after - before).abs().amax((1, 2)) > 1e-3
    if change is not _to_double:
        assert all(moved[row] for row, name in enumerate(NAMES) if name in changed)
    assert after.dtype == (torch.float64 if change is _to_double else torch.float32)


@pytest.mark.parametrize("change", [c for c in CHANGES if c is not _anew])
def test_ids_see_changes(model: Any, change: Callable[[Any], None]) -> None:
    """On a CPU; ids that were handed out before."""
    ids = model.adapter_slots(NAMES)
    logits(model, adapter_ids=ids)
    change(model)
    torch.testing.assert_close(logits(model, adapter_ids=ids), alone(model), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adapters_too", [False, True])
def test_tables_after_the_dtype_changed(model: Any, dtype: torch.dtype, adapters_too: bool) -> None:
    """Sites are made once, and what they point at is of the new dtype."""
    exact = copy.deepcopy(model)
    check(model)
    (model if adapters_too else model.get_base_model()).to(dtype)
    if not adapters_too:
        for parameter in _lora(model):
            parameter.data = parameter.data.float()
    got = logits(model, adapter_names=NAMES)
    assert got.dtype == dtype and got.isfinite().all()
    torch.testing.assert_close(got.float(), alone(exact), rtol=0.1, atol=0.1)


@pytest.mark.usefixtures("as_on_a_device")
def test_a_call_looks_at_a_few_sites(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at all of them, of which there are thousands in a large model with many adapters."""
    layers, looks = model.base_model.mixed_layers(), []
    for layer in layers:
        find = layer.mixed_entry
        monkeypatch.setattr(layer, "mixed_entry", lambda name, find=find: looks.append(name) or find(name))
    check(model)
    assert len(looks) >= 3 * len(layers) >= 24
    model.adapter_slots(NAMES)
    looks.clear()
    model.adapter_bank.check_handed_out()
    assert {name: looks.count(name) for name in "abcd"} == {"a": 4, "b": 4, "c": 4, "d": 0}


def _one_site(model: Any) -> Any:
    """The last of the layers that adapter a is in."""
    return [layer for layer in model.base_model.mixed_layers() if layer.mixed_has("a")][-1]


def _patch(model: Any) -> None:
    module = _one_site(model).lora_A["a"]
    plain = module.forward
    module.forward = lambda x: 3 * plain(x)


def _hook(model: Any) -> None:
    _one_site(model).lora_A["a"].register_forward_hook(lambda module, args, y: 3 * y)


def _load_one(model: Any) -> None:
    state = model.state_dict()
    key = [key for key in state if "lora_A.a." in key][-1]
    model.load_state_dict({key: state[key] * 3}, strict=False, assign=True)


def _scale_one(model: Any) -> None:
    _one_site(model).scaling["a"] *= 3


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("change, at_once", [(_hook, True), (_load_one, True), (_scale_one, True), (_patch, False)])
@pytest.mark.parametrize("refresh", [False, True])
def test_changes_of_one_site(model: Any, change: Callable[[Any], None], at_once: bool, refresh: bool) -> None:
    """What the bank cannot be told of is found when the site's turn comes, or by `refresh`."""
    before = check(model)
    change(model)
    if refresh:
        model.adapter_bank.refresh()
    for _ in range(1 if at_once or refresh else model.adapter_bank._adapters["a"].watch.turns):
        after = logits(model, adapter_names=NAMES)
    torch.testing.assert_close(after, alone(model), rtol=1e-4, atol=1e-5)
    assert (after - before)[0].abs().max() > 1e-4


@pytest.mark.usefixtures("as_on_a_device")
def test_one_trained_site_is_looked_at_in_every_call(model: Any) -> None:
    """Its copies are made anew: writes through `.data` are seen as soon as the model was told what is trained."""
    before = check(model)
    model.set_requires_grad(["a"])
    for layer in model.base_model.mixed_layers():
        layer.set_requires_grad("a", layer is _one_site(model))
    check(model)
    _one_site(model).lora_A["a"].weight.data.mul_(3)
    assert (check(model) - before)[0].abs().max() > 1e-4


@pytest.mark.usefixtures("as_on_a_device")
def test_refresh_sees_what_nothing_else_can(model: Any) -> None:
    """Copies, here of rank 4, do not follow writes through `.data`; what is not copied does."""
    use_once(model, "a", "b", "c")
    before = check(model)
    for parameter in _lora(model):
        parameter.data.mul_(2)
    model.adapter_bank.refresh()
    after = check(model)
    assert all((after - before).abs().amax((1, 2))[row] > 1e-3 for row in (0, 2, 3))


@pytest.mark.usefixtures("as_on_a_device")
def test_trained_adapters_need_no_refresh(model: Any) -> None:
    """The copies of an adapter that requires grad are made anew at every use."""
    before = check(model)
    model.set_requires_grad(["a"])
    logits(model, adapter_names=NAMES)
    for name, parameter in model.named_parameters():
        if ".a." in name:
            parameter.data.mul_(2)
    after = logits(model, adapter_names=NAMES)
    torch.testing.assert_close(after, alone(model), rtol=1e-4, atol=1e-5)
    assert (after - before)[0].abs().max() > 1e-3


@pytest.mark.parametrize("tables", [False, True])
def test_layers_that_came_later(model: Any, tables: bool, request: pytest.FixtureRequest) -> None:
    if tables:
        request.getfixturevalue("as_on_a_device")
    ids = model.adapter_slots(NAMES)
    expected = logits(model, adapter_ids=ids)
    model.add_adapter("e", make_config(peft_fast, "llama", "CAUSAL_LM", r=8, target_modules=["k_proj", "embed_tokens"]))
    model.eval()
    torch.testing.assert_close(logits(model, adapter_ids=ids), expected)
    for name, parameter in model.named_parameters():
        if ".e" in name and "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    check(model, ["e", "a", BASE, "b", "e"])


@pytest.mark.usefixtures("as_on_a_device")
def test_no_row_with_an_adapter_before_the_first_scan() -> None:
    fresh = mixed_model()
    got = logits(fresh, adapter_ids=torch.full((ROWS,), -1, dtype=torch.int32))
    torch.testing.assert_close(got, alone(fresh, [BASE] * ROWS))


def test_a_weighted_adapter_in_a_batch(model: Any) -> None:
    check(model)
    model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "sum", combination_type="cat")
    check(model, ["sum", "a", BASE, "c", "sum"])


# ----------------------------------------------------------------------------------------------------- memory, copies
def test_what_is_copied(model: Any) -> None:
    def size(name: str) -> int:
        return sum(p.nbytes for n, p in model.named_parameters() if f".{name}." in n and "lora_" in n)

    bank = model.adapter_bank
    assert bank.stats().bytes_served == 0
    use_once(model, "b", "d")
    stats = bank.stats()
    assert stats.bytes_copied == 0 and stats.bytes_served == size("b") + size("d") and stats.slots_used == 2
    use_once(model, "a")
    stats = bank.stats()
    # rows of B are 8 instead of 4 long
    assert size("a") < stats.bytes_copied < 2 * size("a") and stats.slots_used == 3
    model.delete_adapter("a")
    model.delete_adapter("b")
    assert bank.stats().bytes_copied == 0 and bank.stats().bytes_served == size("d")


def test_adapters_of_another_dtype_are_copied() -> None:
    adapters = {"a": dict(r=8, **Q), "b": dict(r=16, **Q)}
    model = mixed_model(adapters=adapters)
    model.get_base_model().to(torch.bfloat16)
    for parameter in _lora(model):
        parameter.data = parameter.data.float()
    use_once(model, "a", "b")
    full = sum(p.nbytes for p in _lora(model))
    assert model.adapter_bank.stats().bytes_copied == model.adapter_bank.stats().bytes_served == full // 2


def test_serving_changes_no_file(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "before")
    check(model)
    ids = model.adapter_slots(NAMES)
    logits(model, adapter_ids=ids)
    model.save_pretrained(tmp_path / "after")
    files = sorted(p.relative_to(tmp_path / "before") for p in (tmp_path / "before").rglob("*") if p.is_file())
    assert len(files) >= 8
    for name in files:
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes(), name
    assert sorted(model.state_dict()) == sorted(
        mixed_model(adapters=settings("llama") | {"d": dict(r=8, **Q)}).state_dict()
    )


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("tables", [False, True])
def test_copies_have_their_own_bank(model: Any, make: Any, tables: bool, request: pytest.FixtureRequest) -> None:
    if tables:
        request.getfixturevalue("as_on_a_device")
    before = check(model)
    ids = model.adapter_slots(NAMES)
    twin = make(model)
    assert twin.adapter_bank is not model.adapter_bank and twin.adapter_bank.stats().slots_used == 0
    torch.testing.assert_close(logits(twin, adapter_names=NAMES), before)
    _replace_data(twin)
    check(twin)
    twin.delete_adapter("b")  # its ids are not the copy's
    del twin
    torch.testing.assert_close(logits(model, adapter_ids=ids), before)
    torch.testing.assert_close(logits(model, adapter_names=NAMES), before)


def test_stats_count(model: Any) -> None:
    bank = model.adapter_bank
    assert bank.stats() == (0, 0, 0, 128, 0, 4, 0, 0, 0)
    logits(model, adapter_names=NAMES)
    stats = bank.stats()
    assert (stats.hits, stats.evictions, stats.loaded) == (3, 0, 4)
    use_once(model, "a", "a", BASE)
    assert bank.stats().hits == 4 and bank.stats().loads == stats.loads + 1


# -------------------------------------------------------------------------------------------------- from state dicts
def test_registered_state_dicts(model: Any, saved: dict[str, Tensor], tmp_path: Path) -> None:
    config = peft_fast.PeftConfig.from_pretrained(tmp_path / "b")
    tensors = peft_fast.load_peft_weights(tmp_path / "b", device="cpu")
    bank = model.adapter_bank
    bank.register("b", (config, tensors))
    bank.register("c", tmp_path / "c")
    bank.configure(max_loaded=1)
    for name in "bcb":
        torch.testing.assert_close(logits(model, adapter_names=[name] * ROWS), saved[name])
    assert set(model.peft_config) == {"a", "b"} and bank.stats().evictions == 2
    ids = model.adapter_slots(["c"])  # read by name of the slot, not by a call
    torch.testing.assert_close(logits(model, adapter_ids=ids.repeat(ROWS)), saved["c"])


@pytest.mark.parametrize("fault", ["missing", "unknown", "shape", "nan"])
def test_a_wrong_state_dict_changes_nothing(model: Any, saved: dict[str, Tensor], tmp_path: Path, fault: str) -> None:
    config = peft_fast.PeftConfig.from_pretrained(tmp_path / "b")
    tensors = dict(peft_fast.load_peft_weights(tmp_path / "b", device="cpu"))
    name = next(iter(tensors))
    if fault == "missing":
        del tensors[name]
    elif fault == "unknown":
        tensors["base_model.model.other.lora_A.weight"] = tensors[name]
    else:
        tensors[name] = tensors[name][:, 1:] if fault == "shape" else tensors[name] * float("nan")
    model.adapter_bank.register("b", (config, tensors))
    before = model.state_dict()
    with pytest.raises((ValueError, RuntimeError), match="size mismatch" if fault == "shape" else "adapter 'b'"):
        logits(model, adapter_names=["b"] * ROWS)
    after = model.state_dict()
    assert list(after) == list(before) and list(model.peft_config) == ["a"]
    torch.testing.assert_close(logits(model, adapter_names=["a"] * ROWS), saved["a"])

"""The base model under a learned prompt: given back as it was, shared, used by several threads; and what errors say."""

import copy
import gc
import io
import pickle
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import torch
from families import output_tensors
from prompt_models import (
    TOKENS,
    adapt,
    batch,
    copy_weights,
    generate,
    make_base,
    make_config,
    make_pair,
    prefix_of,
    randomize,
    run,
)
from torch import Tensor, nn

import peft_fast

BASE = "__base__"
MODELS = [
    ("llama", "CAUSAL_LM"),
    ("gpt2", "CAUSAL_LM"),
    ("bloom", "CAUSAL_LM"),
    ("opt", "CAUSAL_LM"),
    ("t5", "SEQ_2_SEQ_LM"),
    ("bart", "SEQ_2_SEQ_LM"),
    ("bert", "SEQ_CLS"),
    ("roberta", "QUESTION_ANS"),
    ("distilbert", "FEATURE_EXTRACTION"),
    ("albert", "TOKEN_CLS"),
    ("rembert", "SEQ_CLS"),
]
each_model = pytest.mark.parametrize(("family", "task"), MODELS, ids=[f"{family}-{task}" for family, task in MODELS])
each_method = pytest.mark.parametrize("method", ["prefix", "projection", "prompt", "p-mlp"])
pytestmark = pytest.mark.filterwarnings("ignore:Adapter . was active which is now deleted")


def settings(family: str, method: str) -> dict[str, Any]:
    """Sizes of tokens that PEFT does not find by itself either."""
    if method in ("prefix", "projection"):
        return {}
    return {"albert": {"token_dim": 16}, "distilbert": {"token_dim": 32, "num_attention_heads": 4}}.get(family, {})


def anatomy(base: nn.Module) -> dict[str, Any]:
    """All of a model that a wrapper could change: attributes, hooks, implementations, flags, parameters."""
    state: dict[str, Any] = {"": type(base)} | {f"config {key}": value for key, value in base.config.to_dict().items()}
    del state["config problem_type"]  # set by transformers' own forward
    for field in ("_attn_implementation", "_attn_implementation_internal"):
        state[field] = getattr(base.config, field, None)
    for name, module in base.named_modules():
        state[name] = type(module)
        for key, value in vars(module).items():
            if key in ("_modules", "_parameters", "_buffers"):
                state[f"{name} {key}"] = list(value)
            elif key.endswith("_hooks") or "_hooks_" in key:
                state[f"{name} {key}"] = list(value.values()) if value else []
            else:
                state[f"{name} {key}"] = value if isinstance(value, bool | int | float | str | None) else id(value)
        for attribute in ("forward", "prepare_inputs_for_generation", "generate"):
            if hasattr(module, attribute):
                state[f"{name} {attribute}"] = getattr(module, attribute).__func__
    for name, parameter in base.named_parameters():
        state[f"{name} id"] = id(parameter)
    return state


def outputs(model: Any, inputs: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
    """Without gradients: plain torch takes other roads with them, to other last bits."""
    with torch.no_grad():
        return output_tensors(model(**inputs, **kwargs))


def assert_given_back(base: nn.Module, before: dict[str, Any], besides: tuple[str, ...] = ()) -> None:
    after = anatomy(base)
    changed = {key for key in before.keys() | after.keys() if before.get(key, "-") != after.get(key, "-")}
    left = {key for key in changed if not any(part in key for part in besides)}
    assert not left, {key: (before.get(key, "-"), after.get(key, "-")) for key in left}


def use(model: Any, task: str) -> None:
    """Training step, forward, generation."""
    inputs = batch(task, "left")
    run(model, inputs)
    with torch.no_grad():
        model(**inputs)
    if task.endswith("LM"):
        generate(model, inputs, new=2)


# ------------------------------------------------------------------------------------------------------ given back
@each_method
@each_model
def test_unload(family: str, task: str, method: str) -> None:
    base = make_base(family, task)
    before, expected = anatomy(base), outputs(base, batch(task, "left"))
    model = peft_fast.get_peft_model(base, make_config(peft_fast, method, task, **settings(family, method)))
    randomize(model)
    use(model, task)
    assert model.unload() is base
    assert_given_back(base, before)
    got = outputs(base, batch(task, "left"))
    assert all(torch.equal(got[key], expected[key]) for key in expected)
    again = peft_fast.get_peft_model(base, make_config(peft_fast, method, task, **settings(family, method)))
    use(again, task)


@pytest.mark.parametrize("how", ["unload", "merge_and_unload"])
def test_unload_beside_lora(how: str) -> None:
    base = make_base("llama", "CAUSAL_LM")
    before = anatomy(base)
    config = peft_fast.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft_fast.get_peft_model(base, config, adapter_name="low")
    model.add_adapter("p", make_config(peft_fast, "prefix", "CAUSAL_LM"))
    randomize(model.eval())
    model(**batch("CAUSAL_LM", "left"), adapter_names=["low", "p", BASE])
    expected = outputs(model, batch("CAUSAL_LM", "left"))["logits"]
    got = getattr(model, how)()
    assert got is base
    assert_given_back(base, before, besides=("q_proj", "self_attn _modules"))
    if how == "merge_and_unload":
        merged = outputs(base, batch("CAUSAL_LM", "left"))["logits"]
        torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)


@each_method
@each_model
def test_deleting_the_last_adapter(family: str, task: str, method: str) -> None:
    base = make_base(family, task)
    before, expected = anatomy(base), outputs(base, batch(task, "left"))
    model = peft_fast.get_peft_model(base, make_config(peft_fast, method, task, **settings(family, method)))
    randomize(model)
    use(model, task)
    model.delete_adapter("default")
    assert not model.peft_config and not len(model.prompt_encoder) and not model.prompt_tokens
    # a wrapper of the head without adapters stays, as with LoRA
    assert_given_back(base, before, besides=("classifier", "score", "qa_outputs"))
    got = outputs(base, batch(task, "left"))
    assert all(torch.equal(got[key], expected[key]) for key in expected)


@each_model
def test_disabled_or_not_the_base_object_runs_plain(family: str, task: str) -> None:
    """A prefix belongs to calls of the PeftModel: the base model itself, called directly, has none."""
    base = make_base(family, task)
    expected = outputs(base, batch(task, "left"))
    model = peft_fast.get_peft_model(base, make_config(peft_fast, "prefix", task))
    randomize(model)
    model(**batch(task, "left"))
    if task.endswith("LM") or task == "FEATURE_EXTRACTION":  # the others have a trained head in it
        got = outputs(base, batch(task, "left"))
        assert all(torch.equal(got[key], expected[key]) for key in expected)
    with model.disable_adapter():
        got = outputs(model, batch(task, "left"))
        assert all(torch.equal(got[key], expected[key]) for key in expected)
    got = outputs(model, batch(task, "left"))
    assert any(got[key].shape != expected[key].shape or not torch.allclose(got[key], expected[key]) for key in expected)


class Broken(Exception):
    pass


@contextmanager
def breaking(module: nn.Module, calls: int = 1) -> Iterator[None]:
    """The module's forward raises from the given call on."""
    count = 0

    def raise_(*_: Any) -> None:
        nonlocal count
        count += 1
        if count >= calls:
            raise Broken

    handle = module.register_forward_pre_hook(raise_)
    try:
        yield
    finally:
        handle.remove()


def some_layer(model: nn.Module) -> nn.Module:
    """A norm in the last layer: attention of the layers before has run when it does."""
    return [part for name, part in model.named_modules() if "norm" in type(part).__name__.lower()][-1]


@each_method
@each_model
def test_after_an_exception(family: str, task: str, method: str) -> None:
    base = make_base(family, task)
    model = peft_fast.get_peft_model(base, make_config(peft_fast, method, task, **settings(family, method))).eval()
    randomize(model)
    inputs = batch(task, "left")
    with torch.no_grad():
        expected, before = outputs(model, inputs), anatomy(base)
        for calls in (1, 2):
            with breaking(some_layer(base), calls):
                if calls == 1:
                    with pytest.raises(Broken):
                        model(**inputs)
                    with pytest.raises(Broken), model.disable_adapter():
                        model(**inputs)
                if task.endswith("LM"):
                    with pytest.raises(Broken):
                        generate(model, inputs)
                    with pytest.raises(Broken), model.disable_adapter():
                        generate(model, inputs)
        with pytest.raises(Broken), model.disable_adapter():
            raise Broken
        assert_given_back(base, before)
        got = outputs(model, inputs)
        assert all(torch.equal(got[key], expected[key]) for key in expected)
        with model.disable_adapter():
            got = outputs(model, inputs)
    expected = outputs(make_base(family, task), inputs)
    assert all(torch.equal(got[key], expected[key]) for key in expected)
    model.unload()
    got = outputs(base, inputs)
    assert all(torch.equal(got[key], expected[key]) for key in expected)


@each_model
def test_a_construction_that_fails_leaves_the_model(family: str, task: str) -> None:
    base = make_base(family, task)
    before = anatomy(base)
    bad = {"num_layers": 1} if family == "llama" else {"num_attention_heads": 3}  # llama's heads are its own
    with pytest.raises(ValueError):
        peft_fast.get_peft_model(base, make_config(peft_fast, "prefix", task, **bad))
    assert_given_back(base, before)
    model = peft_fast.get_peft_model(base, make_config(peft_fast, "prefix", task))
    state = anatomy(base)
    with pytest.raises(ValueError):
        model.add_adapter("bad", make_config(peft_fast, "prefix", task, **bad))
    assert list(model.peft_config) == ["default"] and list(model.prompt_encoder) == ["default"]
    assert list(model.prompt_tokens) == ["default"]
    assert_given_back(base, state)
    use(model, task)


@pytest.mark.parametrize("kind", ["flash_attention_2 is not installed", "eager"])
def test_attention_implementation_chosen_later(kind: str) -> None:
    """`set_attn_implementation` after the wrapping is a choice of the user: it takes effect, the prefix stays."""
    base = make_base("llama", "CAUSAL_LM")
    model = adapt(peft_fast, base, "CAUSAL_LM", {"default": ("prefix", {})})
    expected = outputs(model, batch("CAUSAL_LM", "left"))["logits"]
    inner = model.get_base_model()
    if kind == "eager":
        inner.set_attn_implementation("eager")
        got = outputs(model, batch("CAUSAL_LM", "left"))["logits"]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        plain = model.unload()
        assert plain.config._attn_implementation == "eager"
        base.set_attn_implementation("eager")
        inputs = batch("CAUSAL_LM", "left")
        assert torch.equal(outputs(plain, inputs)["logits"], outputs(base, inputs)["logits"])
    else:
        with pytest.raises((ImportError, ValueError)):
            inner.set_attn_implementation("flash_attention_2")
        assert torch.equal(outputs(model, batch("CAUSAL_LM", "left"))["logits"], expected)


# ---------------------------------------------------------------------------------------------------- side by side
def test_two_models_in_one_process() -> None:
    """Of one class and of different ones, with prefixes of different lengths, called in turns and inside each other."""
    first = adapt(peft_fast, make_base("llama", "CAUSAL_LM"), "CAUSAL_LM", {"default": ("prefix", {})})
    more = {"num_virtual_tokens": 9}
    second = adapt(peft_fast, make_base("llama", "CAUSAL_LM"), "CAUSAL_LM", {"default": ("prefix", more)})
    third = adapt(peft_fast, make_base("gpt2", "CAUSAL_LM"), "CAUSAL_LM", {"default": ("prompt", {})})
    plain = make_base("llama", "CAUSAL_LM")
    inputs = batch("CAUSAL_LM", "left")
    models = (first, second, third, plain)
    with torch.no_grad():
        expected = [outputs(model, inputs)["logits"] for model in models]
        for _ in range(2):
            for model, logits in zip(models, expected, strict=True):
                assert torch.equal(outputs(model, inputs)["logits"], logits)
        with first.disable_adapter():
            assert torch.equal(outputs(first, inputs)["logits"], expected[3])
            for model, logits in list(zip(models, expected, strict=True))[1:]:
                assert torch.equal(outputs(model, inputs)["logits"], logits)
        inner: list[Tensor] = []

        def call_others(*_: Any) -> None:
            inner.extend(outputs(model, inputs)["logits"] for model in (second, second.get_base_model(), plain))

        handle = first.get_base_model().model.layers[0].register_forward_hook(call_others)
        assert torch.equal(outputs(first, inputs)["logits"], expected[0])
        assert all(torch.equal(*pair) for pair in zip(inner, (expected[1], expected[3], expected[3]), strict=True))
        handle.remove()
        first.unload()
        for model, logits in list(zip(models, expected, strict=True))[1:]:
            assert torch.equal(outputs(model, inputs)["logits"], logits)


@pytest.mark.parametrize("inside", ["disable_adapter", "adapter_names"])
def test_disabling_is_for_one_model(inside: str) -> None:
    """Another model's calls, of whatever method, are its own: a reward model beside a policy that is switched off."""
    inputs = {key: value for key, value in batch("SEQ_CLS", "right").items() if key != "labels"}
    first = adapt(peft_fast, make_base("bert", "SEQ_CLS"), "SEQ_CLS", {"default": ("prefix", {})})
    lora = peft_fast.LoraConfig(target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False)
    others = [
        peft_fast.get_peft_model(make_base("bert", "SEQ_CLS"), lora).eval(),
        adapt(peft_fast, make_base("bert", "SEQ_CLS"), "SEQ_CLS", {"default": ("prompt", {})}),
    ]
    randomize(others[0])
    expected = [outputs(model, inputs)["logits"] for model in others]
    got: list[Tensor] = []
    if inside == "disable_adapter":
        with first.disable_adapter():
            got += [outputs(model, inputs)["logits"] for model in others]
    else:
        layer = first.get_base_model().bert.encoder.layer[0]
        layer.register_forward_hook(lambda *_: got.extend(outputs(model, inputs)["logits"] for model in others))
        first(**inputs, adapter_names=["default", BASE, "default"])
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


def test_a_second_construction_that_fails() -> None:
    """The first wrapper of the base goes on as before."""
    model = peft_fast.get_peft_model(make_base("gpt2", "CAUSAL_LM"), make_config(peft_fast, "prefix", "CAUSAL_LM"))
    randomize(model.eval())
    expected = outputs(model, batch("CAUSAL_LM"))["logits"]
    with pytest.raises(ValueError, match="num_attention_heads"):
        bad = make_config(peft_fast, "prefix", "CAUSAL_LM", num_attention_heads=3)
        peft_fast.get_peft_model(model.get_base_model(), bad)
    assert torch.equal(outputs(model, batch("CAUSAL_LM"))["logits"], expected)


def test_two_wrappers_of_one_base() -> None:
    """Each wrapper has its own prefix; the one that goes does not take the other's with it."""
    base = make_base("llama", "CAUSAL_LM")
    before = anatomy(base)
    first = peft_fast.get_peft_model(base, make_config(peft_fast, "prefix", "CAUSAL_LM")).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        second = peft_fast.get_peft_model(
            base, make_config(peft_fast, "prefix", "CAUSAL_LM", num_virtual_tokens=7)
        ).eval()
    randomize(first, seed=1)
    randomize(second, seed=2)
    oracle = {}
    for model, count in ((first, TOKENS), (second, 7)):
        other = adapt(
            peft, make_base("llama", "CAUSAL_LM"), "CAUSAL_LM", {"default": ("prefix", {"num_virtual_tokens": count})}
        )
        with torch.no_grad():
            prefix_of(other).copy_(prefix_of(model))
        oracle[model] = outputs(other, batch("CAUSAL_LM", "left"))["logits"]
    for model, expected in oracle.items():
        torch.testing.assert_close(outputs(model, batch("CAUSAL_LM", "left"))["logits"], expected, rtol=1e-4, atol=1e-4)
    first.unload()
    torch.testing.assert_close(
        outputs(second, batch("CAUSAL_LM", "left"))["logits"], oracle[second], rtol=1e-4, atol=1e-4
    )
    second.unload()
    assert_given_back(base, before)


def test_nothing_is_kept_alive() -> None:
    import weakref

    base = make_base("llama", "CAUSAL_LM")
    model = peft_fast.get_peft_model(base, make_config(peft_fast, "prefix", "CAUSAL_LM"))
    use(model, "CAUSAL_LM")
    watched = [weakref.ref(value) for value in (model, prefix_of(model), model.prompt_encoder["default"])]
    model.unload()
    del model
    gc.collect()
    assert [ref() for ref in watched] == [None] * 3
    base_ref = weakref.ref(base)
    del base
    gc.collect()
    assert base_ref() is None


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@each_model
def test_copies(family: str, task: str, how: str) -> None:
    base = make_base(family, task)
    model = adapt(peft_fast, base, task, {"a": ("prefix", {}), "b": ("projection", {"num_virtual_tokens": 7})})
    inputs = batch(task, "left")
    expected = outputs(model, inputs)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    with torch.no_grad():
        prefix_of(model, "a").zero_()
    got = outputs(other, inputs)
    assert all(torch.equal(got[key], expected[key]) for key in expected)
    other.set_adapter("b")
    model.set_adapter("b")
    got, expected = outputs(other, inputs), outputs(model, inputs)
    assert all(torch.equal(got[key], expected[key]) for key in expected)
    with other.disable_adapter():
        got, expected = outputs(other, inputs), outputs(base, inputs)
        assert all(torch.equal(got[key], expected[key]) for key in expected)
    if task.endswith("LM"):
        assert torch.equal(generate(other, inputs)[0], generate(model, inputs)[0])
    got = outputs(model, inputs)
    assert any(not torch.equal(got[key], expected[key]) for key in expected)


def test_a_copy_of_a_wrapped_base() -> None:
    """Copied alone it is a plain model, and can be wrapped."""
    model = adapt(peft_fast, make_base("llama", "CAUSAL_LM"), "CAUSAL_LM", {"default": ("prefix", {})})
    inputs = batch("CAUSAL_LM", "left")
    plain = copy.deepcopy(model.get_base_model())
    assert torch.equal(outputs(plain, inputs)["logits"], outputs(make_base("llama", "CAUSAL_LM"), inputs)["logits"])
    again = peft_fast.get_peft_model(plain, make_config(peft_fast, "prefix", "CAUSAL_LM"))
    randomize(again)
    assert torch.equal(outputs(again, inputs)["logits"], outputs(model, inputs)["logits"])


# --------------------------------------------------------------------------------------------------------- threads
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
        self.join(60)
        assert not self.is_alive(), "the thread hangs"
        if self.error is not None:
            raise self.error
        return self.result


@pytest.mark.parametrize("family", ["llama", "bloom", "t5", "bert"])
def test_threads(family: str) -> None:
    """Each has its own rows; one is inside disable_adapter; none notices the others."""
    task = {"t5": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS"}.get(family, "CAUSAL_LM")
    base = make_base(family, task)
    adapters = {"a": ("prefix", {}), "b": ("prefix", {"num_virtual_tokens": 9})}
    model = adapt(peft_fast, base, task, adapters)
    inputs = batch(task, "left", rows=3)
    inputs.pop("labels")
    if task == "SEQ_2_SEQ_LM":
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :5]
    wanted = [["a", "b", BASE], ["b", "b", "b"], ["a", BASE, "b"], None]
    with torch.no_grad():
        expected = [model(**inputs, adapter_names=names).logits for names in wanted]
        plain = outputs(base, inputs)["logits"]
    start = threading.Barrier(len(wanted) + 1)

    def rows(index: int) -> int:
        right = 0
        start.wait(20)
        with torch.no_grad():
            for _ in range(25):
                right += torch.equal(model(**inputs, adapter_names=wanted[index]).logits, expected[index])
        return right

    def disabled() -> int:
        right = 0
        start.wait(20)
        with torch.no_grad():
            for _ in range(25):
                with model.disable_adapter():
                    right += torch.equal(outputs(model, inputs)["logits"], plain)
                    right += torch.equal(model(**inputs, adapter_names=["a", "b", "a"]).logits, plain)
        return right

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        # the None of `wanted` is the active adapter, which another thread's disable_adapter does not touch
        workers = [Worker(lambda index=index: rows(index)) for index in range(len(wanted))] + [Worker(disabled)]
        results = [worker.value() for worker in workers]
    finally:
        sys.setswitchinterval(before)
    assert results == [25, 25, 25, 25, 50]
    assert torch.equal(outputs(model, inputs)["logits"], expected[3])


def test_threads_generate_and_train() -> None:
    model = adapt(peft_fast, make_base("llama", "CAUSAL_LM"), "CAUSAL_LM", {"a": ("prefix", {}), "b": ("prefix", {})})
    inputs = batch("CAUSAL_LM", "left")
    names = [["a"] * 3, ["b", BASE, "a"]]
    expected = [generate(model, inputs, adapter_names=rows)[0] for rows in names]
    loss = run(model, inputs)["loss"]
    workers = [
        Worker(lambda rows=rows: [generate(model, inputs, adapter_names=rows)[0] for _ in range(4)]) for rows in names
    ]
    workers.append(Worker(lambda: [model(**inputs).loss.detach() for _ in range(20)]))
    for worker, tokens in zip(workers[:2], expected, strict=True):
        assert all(torch.equal(got, tokens) for got in worker.value())
    assert all(torch.equal(got, loss) for got in workers[2].value())


# ---------------------------------------------------------------------------------------------- switching, deleting
def test_set_adapter_and_requires_grad() -> None:
    theirs, ours = make_pair(
        "bert", "SEQ_CLS", adapters={"a": ("prefix", {}), "b": ("prefix", {"num_virtual_tokens": 7})}
    )
    for name, frozen in (("b", False), ("a", True), ("b", False)):
        for model in (theirs, ours):
            model.set_adapter(name, inference_mode=frozen)
        heads = [
            {key: p.requires_grad for key, p in model.named_parameters() if "modules_to_save" in key}
            for model in (theirs, ours)
        ]
        assert heads[0] == heads[1]
    with pytest.raises(ValueError, match="nobody"):
        ours.set_adapter("nobody")
    assert ours.active_adapter == "b"
    with pytest.raises(TypeError, match="not supported for prompt learning"):
        ours.set_requires_grad("a")


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_deletion(method: str) -> None:
    """As in PEFT, which cannot delete one of three adapters with heads: the oracle keeps them."""
    adapters = {name: (method, {"num_virtual_tokens": count}) for name, count in (("a", 4), ("b", 7), ("c", 2))}
    theirs, ours = make_pair("bert", "SEQ_CLS", adapters=adapters)
    inputs = batch("SEQ_CLS", "right")
    theirs.set_adapter("b")
    for name in ("a", "c"):  # the active one, then another
        ours.delete_adapter(name)
        assert ours.active_adapter == "b" and name not in ours.peft_config
        assert name not in ours.prompt_encoder and name not in ours.prompt_tokens
        assert not [key for key in ours.state_dict() if f".{name}." in key]
        got, expected = outputs(ours, inputs)["logits"], outputs(theirs, inputs)["logits"]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="does not exist"):
        ours.delete_adapter("a")
    ours.add_adapter("a", make_config(peft_fast, method, "SEQ_CLS"))
    ours.set_adapter("a")
    outputs(ours, inputs)


def test_without_adapters_it_is_the_base_model() -> None:
    base = make_base("llama", "CAUSAL_LM")
    model = adapt(peft_fast, base, "CAUSAL_LM", {"default": ("prefix", {})})
    model.delete_adapter("default")
    inputs = batch("CAUSAL_LM", "left")
    assert torch.equal(outputs(model, inputs)["logits"], outputs(base, inputs)["logits"])
    assert torch.equal(generate(model, inputs)[0], generate(base, inputs)[0])
    model.add_adapter("new", make_config(peft_fast, "prefix", "CAUSAL_LM"))
    model.set_adapter("new")
    assert not torch.equal(outputs(model, inputs)["logits"], outputs(base, inputs)["logits"])


def test_disable_adapter_nests_and_keeps_flags() -> None:
    model = adapt(peft_fast, make_base("bert", "SEQ_CLS"), "SEQ_CLS", {"default": ("prefix", {})})
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    inputs = batch("SEQ_CLS")
    expected = outputs(model, inputs)["logits"]
    base = outputs(make_base("bert", "SEQ_CLS"), inputs)["logits"]
    with model.disable_adapter():
        with model.disable_adapter():
            assert torch.equal(outputs(model, inputs)["logits"], base)
        assert torch.equal(outputs(model, inputs)["logits"], base)
        model.eval()
    assert torch.equal(outputs(model, inputs)["logits"], expected)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags


# ---------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("family", "task"),
    [
        *(("gpt2", "CAUSAL_LM"), ("opt", "CAUSAL_LM"), ("bert", "SEQ_CLS")),
        *(("roberta", "SEQ_CLS"), ("bart", "SEQ_2_SEQ_LM")),
    ],
)
def test_prefix_longer_than_the_positions_left(family: str, task: str) -> None:
    """The model has 64 positions (RoBERTa: 62 of them for text)."""
    base = make_base(family, task)
    model = peft_fast.get_peft_model(base, make_config(peft_fast, "prefix", task, num_virtual_tokens=60))
    with pytest.raises(ValueError, match=r"(?s)60.*position|position.*60"):
        model(**batch(task, length=9))
    if family != "roberta":
        model(**batch(task, length=4))
    if task.endswith("LM"):
        with pytest.raises(ValueError, match=r"(?s)60.*position|position.*60"):
            generate(model, {"input_ids": batch(task)["input_ids"][:, :2]}, new=8)


def test_the_last_position_can_be_used() -> None:
    for family in ("gpt2", "opt"):
        theirs, ours = make_pair(family, "CAUSAL_LM", num_virtual_tokens=57)
        inputs = batch("CAUSAL_LM", length=7)
        torch.testing.assert_close(
            outputs(ours, inputs)["logits"], outputs(theirs, inputs)["logits"], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    "bad",
    [{"num_attention_heads": 3}, {"token_dim": 64}, {"token_dim": 16}, {"num_layers": 1}, {"num_layers": 6}],
    ids=str,
)
@pytest.mark.parametrize("family", ["gpt2", "bert", "t5", "gptj", "bloom"])
def test_sizes_that_do_not_fit(family: str, bad: dict[str, int]) -> None:
    """At the latest in the first call, naming what is to be changed."""
    task = {"t5": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS"}.get(family, "CAUSAL_LM")
    with pytest.raises(ValueError, match=r"num_attention_heads|token_dim|num_layers"):
        model = peft_fast.get_peft_model(make_base(family, task), make_config(peft_fast, "prefix", task, **bad))
        model(**batch(task))


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("family", ["deberta_v2", "mpnet", "fnet"])
def test_encoders_that_cannot_have_a_prefix(family: str, padding: str) -> None:
    """As in PEFT, and never a model that runs without its prefix."""
    for task in ("SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION"):
        with pytest.raises(ValueError, match=r"past.key.values|cache"):
            model = peft_fast.get_peft_model(make_base(family, task), make_config(peft_fast, "prefix", task))
            model(**batch(task, padding))


def test_heads_of_multi_query_attention() -> None:
    """PEFT takes the number of query heads for Falcon's keys and fails in the first forward."""
    base = make_base("falcon", "CAUSAL_LM", new_decoder_architecture=False, multi_query=True)
    config = make_config(peft_fast, "prefix", "CAUSAL_LM")
    try:
        model = peft_fast.get_peft_model(base, config)
        model(**batch("CAUSAL_LM"))
    except ValueError as error:
        assert "num_attention_heads" in str(error)
        config = make_config(peft_fast, "prefix", "CAUSAL_LM", num_attention_heads=1, token_dim=8)
        model = peft_fast.get_peft_model(make_base("falcon", "CAUSAL_LM", **{
            "new_decoder_architecture": False, "multi_query": True
        }), config)  # fmt: skip
        model(**batch("CAUSAL_LM"))
    theirs = adapt(peft, base, "CAUSAL_LM", {"default": ("prefix", {"num_attention_heads": 1, "token_dim": 8})})
    randomize(model)
    torch.testing.assert_close(
        outputs(model, batch("CAUSAL_LM", "left"))["logits"],
        outputs(theirs, batch("CAUSAL_LM", "left"))["logits"],
        rtol=1e-4,
        atol=1e-4,
    )


def test_bad_calls() -> None:
    _, model = make_pair("llama", "CAUSAL_LM")
    with pytest.raises(ValueError, match="input_ids"):
        model(attention_mask=torch.ones(1, 3))
    inputs = batch("CAUSAL_LM")
    with pytest.raises(ValueError, match="nothing_like_this"):
        model.generate(input_ids=inputs["input_ids"], nothing_like_this=3)
    expected = outputs(make_pair("llama", "CAUSAL_LM")[1], inputs)["logits"]
    assert torch.equal(outputs(model, inputs)["logits"], expected)
    with pytest.raises(ValueError, match="num_virtual_tokens"):
        make_config(peft_fast, "prefix", "CAUSAL_LM", num_virtual_tokens=0)


def test_an_unknown_architecture_uses_its_cache() -> None:
    """A class that no table knows, with PEFT's results; it may even have attention of its own."""
    import transformers

    class Unheard(transformers.LlamaForCausalLM):
        pass

    class UnheardConfig(transformers.LlamaConfig):
        model_type = "unheard"

    base = make_base("llama", "CAUSAL_LM")
    config = UnheardConfig(**base.config.to_dict() | {"model_type": "unheard"})
    own = Unheard(config).eval()
    own.load_state_dict(base.state_dict())
    theirs, ours = (adapt(library, own, "CAUSAL_LM", {"default": ("prefix", {})}) for library in (peft, peft_fast))
    copy_weights(theirs, ours)
    for padding in ("none", "left", "right"):
        got, same = (run(model, batch("CAUSAL_LM", padding)) for model in (ours, theirs))
        for key, value in same.items():
            torch.testing.assert_close(got[key], value, rtol=1e-3, atol=1e-3)
    tokens = [generate(model, batch("CAUSAL_LM", "left"))[0] for model in (ours, theirs)]
    assert torch.equal(*tokens)
    static = generate(ours, batch("CAUSAL_LM", "left"), cache_implementation="static")[0]
    assert torch.equal(static, tokens[1])

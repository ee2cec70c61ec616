"""One adapter per row, beside the installed peft: every family and task, generation, errors, packed rows, gradients."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from families import CASES, VOCAB, make_base
from lora_pairs import assert_runs_as_accurate
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
    one_by_one,
    outputs,
    settings,
    together,
)
from torch import Tensor, nn

import peft_fast
from numerics import assert_as_accurate
from peft_fast.routing.batch import current

NAMES = ["a", BASE, "c", "b", "a"]
IDS = ["-".join(case) for case in CASES]


# ------------------------------------------------------------------------------------------------------------ forward
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family, task", CASES, ids=IDS)
def test_forward(family: str, task: str, dtype: torch.dtype) -> None:
    theirs, ours = mixed_pair(family, task, dtype=dtype)
    exact = copy.deepcopy(theirs).double()
    halves = dtype != torch.float32
    for seed, names in enumerate(compositions("abc", count=1 if halves else 2), start=halves):
        inputs = batch(task, "left" if seed % 2 else "right", seed)
        got = together(ours, inputs, names)
        assert_rows_right(got, theirs, inputs, names, exact)
        with torch.no_grad():
            by_ids = outputs(ours(**inputs, adapter_ids=ours.adapter_slots(names)))
        assert all(torch.equal(by_ids[key], value) for key, value in got.items())
        # peft refuses roberta's head, and layers that see flattened tokens, as opt's
        if dtype == torch.float32 and (family, task) != ("roberta", "SEQ_CLS") and family != "opt":
            for key, value in together(theirs, inputs, names).items():
                torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-5)
    base = outputs(make_base(family, task).to(dtype)(**inputs))
    assert any((got[key] - base[key]).abs().max() > 0.01 for key in got)


def test_the_active_adapter_does_not_matter() -> None:
    ours = mixed_model()
    expected = logits(ours, adapter_names=NAMES)
    for active in ("b", "c"):
        ours.set_adapter(active)
        assert torch.equal(logits(ours, adapter_names=NAMES), expected)
    ours.base_model.set_adapter(["a", "c"])
    assert torch.equal(logits(ours, adapter_names=NAMES), expected)


def test_plain_calls_before_and_after_are_as_ever() -> None:
    ours = mixed_model()
    before = logits(ours)
    logits(ours, adapter_names=NAMES)
    assert torch.equal(logits(ours), before) and current() is None


@pytest.mark.parametrize("rows", [1, 2, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(rows: int, dtype: torch.dtype) -> None:
    """A row alone, and so many to an adapter that the products are torch's."""
    theirs, ours = mixed_pair("llama", "CAUSAL_LM", dtype=dtype)
    inputs = batch("CAUSAL_LM", rows=rows, length=9)
    inputs["attention_mask"].fill_(1)
    for names in compositions("ab", rows=rows):
        assert_rows_right(together(ours, inputs, names), theirs, inputs, names)


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_of_another_dtype_than_the_base(dtype: torch.dtype, adapters: torch.dtype) -> None:
    theirs, ours = mixed_pair("llama", "CAUSAL_LM", dtype=dtype)
    for model in (theirs, ours):
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(adapters)
    inputs = batch("CAUSAL_LM")
    got = together(ours, inputs, NAMES)
    assert got["logits"].dtype == dtype
    assert_rows_right(got, theirs, inputs, NAMES)


def test_autocast() -> None:
    theirs, ours = mixed_pair("llama", "CAUSAL_LM")
    inputs, exact = batch("CAUSAL_LM"), copy.deepcopy(theirs).double()
    with torch.autocast("cpu", torch.bfloat16):
        got, same = together(ours, inputs, NAMES)["logits"], one_by_one(theirs, inputs, NAMES)["logits"]
    assert_as_accurate("logits", got, same, one_by_one(exact, inputs, NAMES)["logits"])


@pytest.mark.parametrize("given", ["inputs_embeds", "positional"])
def test_other_ways_to_give_the_inputs(given: str) -> None:
    theirs, ours = mixed_pair("llama", "CAUSAL_LM")
    ids = batch("CAUSAL_LM")["input_ids"]
    with torch.no_grad():
        if given == "positional":
            got = ours(ids, adapter_names=NAMES)
        else:
            got = ours(inputs_embeds=ours.get_input_embeddings()(ids), adapter_names=NAMES)
    assert_rows_right(outputs(got), theirs, {"input_ids": ids}, NAMES)


class _Custom(nn.Module):
    """A model whose input has a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 6)

    def forward(self, signal: Tensor) -> Tensor:
        result: Tensor = self.linear(signal)
        return result


def _custom(library: Any) -> Any:
    torch.manual_seed(3)
    config = dict(target_modules=["linear"], init_lora_weights=False, r=4)
    model = library.get_peft_model(_Custom(), library.LoraConfig(**config), adapter_name="first")
    model.add_adapter("second", library.LoraConfig(**config))
    return model.eval()


@pytest.mark.parametrize("x", [torch.randn(4, 8), torch.randn(4, 3, 8), torch.randn(4, 8, requires_grad=True)])
def test_custom_models(x: Tensor) -> None:
    theirs, ours, names = _custom(peft), _custom(peft_fast), ["second", BASE, "first", "second"]
    for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with context:
            torch.testing.assert_close(ours(x, adapter_names=names), theirs(x, adapter_names=names))
            torch.testing.assert_close(ours(signal=x, adapter_names=names), theirs(signal=x, adapter_names=names))


def test_the_input_is_not_changed() -> None:
    ours, x = _custom(peft_fast), torch.randn(4, 8)
    before = x.clone()
    with torch.no_grad():
        ours(x, adapter_names=["second", "first", "second", BASE])
    assert torch.equal(x, before)


# --------------------------------------------------------------------------------------------------------- generation
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": dict(num_beams=3),
    "beams returned": dict(num_beams=3, num_return_sequences=2),
}
GENERATORS = ["llama", "qwen2", "gpt2", "opt", "t5", "bart"]


def generation(family: str) -> tuple[Any, Any, dict[str, Tensor]]:
    task = "SEQ_2_SEQ_LM" if family in ("t5", "bart") else "CAUSAL_LM"
    inputs = batch("", "right" if task == "SEQ_2_SEQ_LM" else "left")
    return *mixed_pair(family, task), inputs


def generate(model: Any, *, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
    with torch.no_grad():
        names = {} if adapter_names is None else {"adapter_names": adapter_names}
        return model.generate(**kwargs, **names, do_sample=kwargs.pop("do_sample", False), **_LENGTHS)


_LENGTHS = dict(max_new_tokens=5, min_new_tokens=5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", GENERATORS)
def test_generate(family: str, way: str) -> None:
    theirs, ours, inputs = generation(family)
    differ = 0
    for names in compositions("abc", count=2 if way == "greedy" else 1):
        got = generate(ours, **inputs, **WAYS[way], adapter_names=names)
        alone = one_by_one(theirs, inputs, names, lambda model, **row: generate(model, **row, **WAYS[way]))
        assert torch.equal(got, alone["output"])
        if "returned" not in way and family != "opt":  # which peft refuses
            assert torch.equal(got, generate(theirs, **inputs, **WAYS[way], adapter_names=names))
        with torch.no_grad():
            by_ids = ours.generate(**inputs, **WAYS[way], **_LENGTHS, adapter_ids=ours.adapter_slots(names))
        assert torch.equal(got, by_ids)
        differ += not torch.equal(got, generate(ours, **inputs, **WAYS[way], adapter_names=[BASE] * ROWS))
    assert differ


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_sampled_sequences_have_the_adapter_of_their_prompt(family: str) -> None:
    """The logits that were sampled from are those of the finished sequence, read again with its prompt's adapter."""
    theirs, ours, inputs = generation(family)
    options = dict(do_sample=True, num_return_sequences=3, return_dict_in_generate=True, output_logits=True)
    torch.manual_seed(1)
    with torch.no_grad():
        got = ours.generate(**inputs, **_LENGTHS, **options, adapter_names=NAMES)
        torch.manual_seed(1)
        again = ours.generate(**inputs, **_LENGTHS, **options, adapter_ids=ours.adapter_slots(NAMES))
    assert torch.equal(got.sequences, again.sequences) and len(got.sequences) == 3 * ROWS
    names = [name for name in NAMES for _ in range(3)]
    repeated = {key: value.repeat_interleave(3, 0) for key, value in inputs.items()}
    if family == "t5":
        repeated["decoder_input_ids"] = got.sequences
    else:
        repeated["input_ids"] = got.sequences
        mask = torch.cat([repeated["attention_mask"], torch.ones(3 * ROWS, 5, dtype=torch.long)], 1)
        repeated |= dict(attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    expected = one_by_one(theirs, repeated, names)["logits"][:, -6:-1]
    torch.testing.assert_close(torch.stack(got.logits, 1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_generate_from_encoder_outputs(family: str) -> None:
    _, ours, inputs = generation(family)
    with torch.no_grad(), ours.base_model.mixed_batch(NAMES):
        encoded = ours.get_encoder()(**inputs)
    mask = inputs["attention_mask"]
    got = generate(ours, encoder_outputs=encoded, attention_mask=mask, adapter_names=NAMES)
    assert torch.equal(got, generate(ours, **inputs, adapter_names=NAMES))
    with pytest.raises(ValueError, match="should be the same as the number of inputs, but got 1 and 5"):
        generate(ours, encoder_outputs=encoded, attention_mask=mask, adapter_names=["a"])


@torch.no_grad()
def test_a_batch_that_an_engine_enters() -> None:
    ours, inputs = mixed_model(), batch("CAUSAL_LM")
    base = ours.get_base_model()
    expected, plain = ours(**inputs, adapter_names=NAMES).logits, ours(**inputs).logits
    with ours.mixed_batch(NAMES):
        assert torch.equal(base(**inputs).logits, expected) and torch.equal(ours(**inputs).logits, expected)
        assert torch.equal(ours(**inputs, adapter_names=NAMES[::-1]).logits[2], expected[2])
        assert torch.equal(base(**inputs).logits, expected)  # a call with names of its own leaves the batch in force
    with ours.mixed_batch(adapter_ids=ours.adapter_slots(NAMES)):
        assert torch.equal(base(**inputs).logits, expected)
    assert torch.equal(ours(**inputs).logits, plain) and not torch.equal(plain, expected)


# ------------------------------------------------------------------------------------------------------------- errors
def raised(act: Callable[[], Any]) -> str:
    """An error's type and words."""
    with pytest.raises((ValueError, TypeError)) as caught:
        act()
    return f"{caught.type.__name__}: {caught.value}"


def _train(model: Any) -> Any:
    model.train()
    return logits(model, adapter_names=NAMES)


def _merge(model: Any) -> Any:
    model.merge_adapter()
    return logits(model, adapter_names=NAMES)


ERRORS: dict[str, Callable[[Any], Any]] = {
    "unknown": lambda m: logits(m, adapter_names=["a", "nobody", "c", "b", "else"]),
    "unknown of one": lambda m: logits(m, adapter_names=["default", *"abca"]),
    "too few": lambda m: logits(m, adapter_names=NAMES[:-1]),
    "too many": lambda m: logits(m, adapter_names=[*NAMES, "a"]),
    "twice as many": lambda m: logits(m, adapter_names=[*NAMES, *NAMES]),
    "one": lambda m: logits(m, adapter_names=["a"]),
    "none": lambda m: logits(m, adapter_names=[]),
    "training": _train,
    "merged": _merge,
    "text": lambda m: generate(m, input_ids=batch("")["input_ids"], num_beams=2, adapter_names="abcab"),  # type: ignore[arg-type]
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_pefts(name: str) -> None:
    theirs, ours = mixed_pair("llama", "CAUSAL_LM")
    assert raised(lambda: ERRORS[name](ours)) == raised(lambda: ERRORS[name](theirs))
    ours.unmerge_adapter()
    ours.eval()
    assert current() is None
    torch.testing.assert_close(logits(ours, adapter_names=NAMES), logits(mixed_model(), adapter_names=NAMES))


def test_custom_models_are_told_of_a_wrong_length() -> None:
    for count in (1, 2, 3, 8):
        for model in (_custom(peft), _custom(peft_fast)):
            with pytest.raises(ValueError, match="should be the same as the number of inputs"):
                model(signal=torch.randn(4, 8), adapter_names=["first"] * count)


def test_ids_have_the_same_errors() -> None:
    ours = mixed_model()
    ids = ours.adapter_slots(NAMES)
    with pytest.raises(ValueError, match="Pass adapter_names or adapter_ids, not both"):
        logits(ours, adapter_names=NAMES, adapter_ids=ids)
    for wrong in (ids[:-1], torch.cat([ids, ids])):
        with pytest.raises(ValueError, match="should be the same as the number of inputs"):
            logits(ours, adapter_ids=wrong)
    for wrong in (ids.float(), ids[None], ids.tolist()):
        with pytest.raises(TypeError, match="adapter_ids must be an int32 tensor"):
            logits(ours, adapter_ids=wrong)
    ours.train()
    with pytest.raises(ValueError, match="in training mode"):
        logits(ours, adapter_ids=ids)
    ours.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours.merge_adapter()
        with pytest.raises(ValueError, match="when there are merged adapters"):
            logits(ours, adapter_ids=ids)


def test_ids_of_both_integer_types_and_of_no_slot() -> None:
    ours = mixed_model()
    ids = ours.adapter_slots(NAMES)
    assert ids.dtype == torch.int32 and ids[1] == -1
    expected = logits(ours, adapter_names=NAMES)
    assert torch.equal(logits(ours, adapter_ids=ids.long()), expected)
    ids[1] = 10**6
    assert torch.equal(logits(ours, adapter_ids=ids), expected)


@pytest.mark.parametrize("kind", ["linear", "embedding", "head"])
def test_layers_called_by_themselves(kind: str) -> None:
    adapters = {"a": dict(target_modules=["embed_tokens", "q_proj"], modules_to_save=["lm_head"]), "b": {}}
    adapters["b"] = dict(adapters["a"], r=7)
    theirs, ours = mixed_pair("llama", "CAUSAL_LM", adapters)
    path = {"linear": "model.layers.0.self_attn.q_proj", "embedding": "model.embed_tokens", "head": "lm_head"}[kind]
    layers = [m.get_base_model().get_submodule(path) for m in (ours, theirs)]
    x = torch.randint(0, VOCAB, (4, 3)) if kind == "embedding" else torch.randn(4, 3, 32)
    for names in (["a", "b", BASE, "a"], ["b"] * 4, [BASE] * 4):
        with torch.no_grad():
            torch.testing.assert_close(layers[0](x, adapter_names=names), layers[1](x, adapter_names=names))
    for wrong in (["a"], ["a"] * 3, ["a"] * 8):
        mine, their = (raised(lambda layer=layer, names=wrong: layer(x, adapter_names=names)) for layer in layers)  # type: ignore[misc]
        assert mine == their
    for model in (ours, theirs):
        model.base_model.disable_adapter_layers()
    torch.testing.assert_close(layers[0](x, adapter_names=names), layers[1](x, adapter_names=names))
    if kind != "head":
        for model in (ours, theirs):
            model.base_model.enable_adapter_layers()
            model.merge_adapter()
        assert raised(lambda: layers[0](x, adapter_names=names)) == raised(lambda: layers[1](x, adapter_names=names))


@pytest.mark.parametrize("by", ["names", "ids", "unknown"])
def test_disable_adapter_gives_the_base(by: str) -> None:
    theirs, ours = mixed_pair("llama", "CAUSAL_LM")
    base = logits(make_base("llama", "CAUSAL_LM"))
    given = {"adapter_names": NAMES if by == "names" else ["nobody"] * ROWS}
    with theirs.disable_adapter():
        assert torch.equal(logits(theirs, **given), base)
    if by == "ids":
        given = {"adapter_ids": ours.adapter_slots(NAMES)}
    with ours.disable_adapter():
        assert torch.equal(logits(ours, **given), base)
    torch.testing.assert_close(logits(ours, adapter_names=NAMES), logits(theirs, adapter_names=NAMES))


def test_disabled_layers_give_the_base() -> None:
    base = logits(make_base("llama", "CAUSAL_LM"))
    for model in mixed_pair("llama", "CAUSAL_LM"):
        model.base_model.disable_adapter_layers()
        assert torch.equal(logits(model, adapter_names=NAMES), base), type(model)


def test_alora_is_refused() -> None:
    with pytest.raises(ValueError, match="alora_offsets is not supported by peft_fast yet"):
        logits(mixed_model(), adapter_names=NAMES, alora_offsets=[1] * ROWS)


# ----------------------------------------------------------------------------- sites that see something else than rows
@pytest.mark.parametrize("setting", [dict(target_modules=["wpe"]), dict(modules_to_save=["wpe"])], ids=str)
@pytest.mark.parametrize("length", [ROWS - 1, ROWS, 2 * ROWS])
def test_position_embeddings(setting: dict[str, Any], length: int) -> None:
    """They see the positions once for all rows: right for every row, or an error, as in peft; never mixed up."""
    theirs, ours = mixed_pair("gpt2", "CAUSAL_LM", {"a": setting, "b": setting})
    inputs = {"input_ids": batch("", length=length)["input_ids"]}
    names = ["a", "b", BASE, "b", "a"]
    try:
        got = together(ours, inputs, names)
    except ValueError as error:
        assert "should be the same as the number of inputs" in str(error)
    else:
        assert_rows_right(got, theirs, inputs, names)


# --------------------------------------------------------------------------------------------------- packed sequences
def packed(lengths: list[int], seed: int = 0) -> tuple[dict[str, Tensor], list[Tensor]]:
    """One row of sequences with their positions, and the sequences."""
    generator = torch.Generator().manual_seed(seed)
    sequences = [torch.randint(3, VOCAB, (1, length), generator=generator) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return {"input_ids": torch.cat(sequences, 1), "position_ids": positions}, sequences


def packed_model(attention: str, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Any, Any]:
    adapters = settings("llama")
    adapters["a"] = changes
    return mixed_pair("llama", "CAUSAL_LM", adapters, dtype, attn_implementation=attention)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "changes",
    [{}, dict(modules_to_save=["lm_head"], target_modules=["embed_tokens", "v_proj"])],
    ids=["plain", "whole"],
)
def test_packed_sequences(attention: str, dtype: torch.dtype, changes: dict[str, Any]) -> None:
    theirs, ours = packed_model(attention, dtype, **changes)
    exact = copy.deepcopy(theirs).double()
    for seed, (names, lengths) in enumerate([(NAMES, [3, 1, 4, 2, 2]), (["c", "a"], [6, 1]), (["b"], [4])]):
        row, sequences = packed(lengths, seed)
        with torch.no_grad():
            got = ours(**row, use_cache=False, adapter_names=names).logits
            by_ids = ours(**row, use_cache=False, adapter_ids=ours.adapter_slots(names)).logits
        assert torch.equal(got, by_ids)
        pairs = zip(sequences, names, strict=True)
        runs = [[one_by_one(m, {"input_ids": s}, [name])["logits"] for m in (theirs, exact)] for s, name in pairs]
        same, truth = (torch.cat(parts, 1) for parts in zip(*runs, strict=True))
        assert_as_accurate("logits", got, same, truth)


@torch.no_grad()
def test_packed_sequences_by_their_ends() -> None:
    """cu_seq_lens_q, as transformers' flash attention takes it, beside positions that attention goes by here."""
    ours = packed_model("sdpa")[1]
    row, _ = packed([3, 1, 4, 2, 2])
    row["use_cache"] = False
    expected = ours(**row, adapter_names=NAMES).logits
    ends = torch.tensor([0, 3, 4, 8, 10, 12], dtype=torch.int32)
    for given in ({"adapter_names": NAMES}, {"adapter_ids": ours.adapter_slots(NAMES)}):
        assert torch.equal(ours(**row, cu_seq_lens_q=ends, **given).logits, expected)
    assert not torch.equal(ours(**row, adapter_names=NAMES[::-1]).logits, expected)
    with pytest.raises(ValueError, match="One row of 5 packed sequences needs a name for each, got 4"):
        ours(**row, cu_seq_lens_q=ends, adapter_names=NAMES[:4])


def test_packed_sequences_with_a_wrong_number_of_names() -> None:
    ours = mixed_model()
    row, _ = packed([3, 2, 2])
    for names in (["a", "b"], ["a", "b", "c", "a"], ["a"] * 7):
        with pytest.raises(ValueError, match="packed sequences"):
            ours(**row, adapter_names=names)
    with pytest.raises(ValueError, match="should be the same as the number of inputs, but got 3 and 1"):
        ours(input_ids=row["input_ids"], adapter_names=["a", "b", "c"])
    with pytest.raises(ValueError, match="should be the same as the number of inputs, but got 3 and 2"):
        ours(**{key: value.repeat(2, 1) for key, value in row.items()}, adapter_names=["a", "b", "c"])


# ---------------------------------------------------------------------------------------------------------- gradients
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family, task", [("llama", "CAUSAL_LM"), ("gpt2", "CAUSAL_LM"), ("bert", "SEQ_CLS")])
def test_gradients_in_eval_mode(family: str, task: str, dtype: torch.dtype) -> None:
    adapters = settings(family)
    if family == "llama":
        adapters["c"]["target_modules"] = ["embed_tokens", "o_proj", "gate_proj"]
    theirs, ours = mixed_pair(family, task, adapters, dtype)
    exact = copy.deepcopy(theirs).double()
    for names in (NAMES, ["b", "b", "a", "a", BASE]):
        found = []
        for model in (ours, theirs, exact):
            model.set_requires_grad(["a", "b", "c"])
            model.zero_grad()
            result = model(**batch(task), adapter_names=names).logits
            weights = torch.linspace(-1, 1, result.numel(), dtype=torch.float64).view(result.shape)
            (result.double() * weights).sum().backward()
            found.append(
                {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
            )
        got, same, truth = found
        used = {name for name in "abc" if name in names}
        assert {part for name in got for part in name.split(".") if part in "abc"} == used
        assert got.keys() == same.keys()
        assert_runs_as_accurate(got, same, truth)


def test_add_adapters_sees_differences() -> None:
    """The tests above mean something: no two adapters give the same logits."""
    ours = add_adapters(peft_fast, make_base("llama", "CAUSAL_LM"), "llama", "CAUSAL_LM", settings("llama"))
    assert torch.equal(logits(ours, adapter_names=NAMES), logits(ours))  # B is zero: nothing differs yet
    results = [logits(mixed_model(), adapter_names=[name] * ROWS) for name in (*"abc", BASE)]
    assert all((x - y).abs().max() > 0.01 for i, x in enumerate(results) for y in results[:i])

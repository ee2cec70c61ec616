"""What PEFT cannot do with learned prompts and this library does. The oracle: peft's model with one adapter at a time,
or the base model."""

import copy
from collections.abc import Sequence
from typing import Any

import families
import peft
import pytest
import torch
import transformers
from prompt_models import (
    METHODS,
    TOKENS,
    adapt,
    assert_runs_as_accurate,
    batch,
    copy_weights,
    generate,
    in_fp64,
    make_base,
    make_config,
    make_pair,
    prefix_of,
    randomize,
    run,
)
from test_prefix_tuning import ENCODER_DECODERS, FUSED, cases
from torch import Tensor
from transformers import masking_utils
from transformers.integrations import flex_attention as flex_module
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface

import peft_fast

BASE = "__base__"
DECODERS = [
    *((family, "CAUSAL_LM") for family in ("llama", "mistral", "gemma3", "gpt2", "opt", "bloom", "gptj", "gpt_neo")),
    *((family, "SEQ_2_SEQ_LM") for family in ENCODER_DECODERS),
]
ENCODERS = [("bert", "SEQ_CLS"), ("roberta", "TOKEN_CLS"), ("electra", "FEATURE_EXTRACTION"), ("llama", "SEQ_CLS")]
ADAPTERS = {
    "a": ("prefix", {}),
    "b": ("prefix", {"num_virtual_tokens": 9}),
    "c": ("projection", {"num_virtual_tokens": 1}),
}
MIXED = [["a", BASE, "b", "a", "c"], ["b", "b", "b", "b", "b"], [BASE] * 5, ["c", "a", BASE, BASE, "b"]]
LORA = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn"], "bert": ["query", "value"], "t5": ["q", "v"]}


# ----------------------------------------------------------------------------------------------- static caches, compile
@cases(
    [(family, "CAUSAL_LM") for family in [*FUSED, "bloom", "falcon", "gptj", "codegen"]]
    + [(family, "SEQ_2_SEQ_LM") for family in ENCODER_DECODERS]
)
def test_static_cache(family: str, task: str) -> None:
    theirs, ours = make_pair(family, task)
    inputs = batch(task, "left")
    for more in ({}, {"num_beams": 2}):
        expected, expected_logits = generate(theirs, inputs, new=9, **more)
        tokens, logits = generate(ours, inputs, new=9, cache_implementation="static", **more)
        assert torch.equal(tokens, expected)
        torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "bloom", "falcon", "gptj", "gpt_neo", "codegen"])
def test_generate_without_cache(family: str) -> None:
    theirs, ours = make_pair(family, "CAUSAL_LM")
    expected, expected_logits = generate(theirs, batch("CAUSAL_LM", "left"))
    tokens, logits = generate(ours, batch("CAUSAL_LM", "left"), use_cache=False)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_compiled_generation(family: str) -> None:
    """As generate compiles on GPUs: one whole graph for the steps, the same for other prompts and lengths."""
    theirs, ours = make_pair(family, "CAUSAL_LM")
    compiled = transformers.CompileConfig(backend="eager", fullgraph=True, dynamic=False, mode=None)
    compiled._compile_all_devices = True
    torch._dynamo.reset()
    plain = make_base(family, "CAUSAL_LM")
    generate(plain, batch("CAUSAL_LM", "left"), cache_implementation="static", compile_config=compiled)
    allowed = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = []
    for seed in (3, 4):
        inputs = batch("CAUSAL_LM", "left", seed=seed)
        expected, _ = generate(theirs, inputs)
        tokens, _ = generate(ours, inputs, cache_implementation="static", compile_config=compiled)
        assert torch.equal(tokens, expected)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] <= 2 * allowed and graphs[0] == graphs[1]  # the hook is one of its own
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_compiled_forward_and_backward(family: str) -> None:
    task = {"bert": "SEQ_CLS"}.get(family, "CAUSAL_LM")
    theirs, ours = make_pair(family, task)
    torch._dynamo.reset()
    inputs = batch(task, "right")
    got, same, exact = (run(model, inputs) for model in (torch.compile(ours, backend="eager"), theirs, in_fp64(theirs)))
    assert_runs_as_accurate({key.replace("_orig_mod.", ""): value for key, value in got.items()}, same, exact)
    torch._dynamo.reset()


# -------------------------------------------------------------------------------------------------- less memory or work
@pytest.mark.parametrize(
    ("reentrant", "when"), [(True, "after"), (False, "before")], ids=["reentrant-after", "not-reentrant-before"]
)
@pytest.mark.parametrize("method", ["prefix", "projection", "p-mlp"])
@cases(
    [(family, "CAUSAL_LM") for family in ("llama", "gpt2", "gpt_neox", "opt")]
    + [("bert", "SEQ_CLS"), ("t5", "SEQ_2_SEQ_LM"), ("bart", "SEQ_2_SEQ_LM")]
)
def test_gradient_checkpointing(family: str, task: str, method: str, reentrant: bool, when: str) -> None:
    base = make_base(family, task)
    theirs = adapt(peft, base, task, {"default": (method, {})})
    if when == "before":
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    ours = adapt(peft_fast, base, task, {"default": (method, {})})
    copy_weights(theirs, ours)
    if when == "after":
        ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        ours.enable_input_require_grads()
    inputs = batch(task, "right")
    exact = in_fp64(theirs)
    for model in (theirs, ours, exact):
        model.train()
    for _ in range(2):
        assert_runs_as_accurate(run(ours, inputs), run(theirs, inputs), run(exact, inputs))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_where_the_prefix_is_in_the_cache(reentrant: bool) -> None:
    """transformers drops the cache then: the right numbers, or an error that says what to do."""
    for family in ("bloom", "falcon", "gptj", "gpt_neo", "codegen"):
        theirs, ours = make_pair(family, "CAUSAL_LM")
        ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        ours.enable_input_require_grads()
        inputs = batch("CAUSAL_LM", "right")
        for model in (theirs, ours):
            model.train()
        try:
            got = run(ours, inputs)
        except ValueError as error:
            assert "gradient checkpointing" in str(error)
        else:
            assert_runs_as_accurate(got, run(theirs, inputs), run(in_fp64(theirs), inputs))
        ours.gradient_checkpointing_disable()
        assert_runs_as_accurate(run(ours, inputs), run(theirs, inputs), run(in_fp64(theirs), inputs))


def test_checkpointing_recomputes_with_the_rows_own_prefixes() -> None:
    """The backward comes after another adapter has become active, and after the call's rows are forgotten."""
    theirs, ours = make_pair("llama", "CAUSAL_LM", adapters=ADAPTERS)
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    inputs = batch("CAUSAL_LM", "right")
    ours.train()
    loss = ours(**inputs).loss
    ours.set_adapter("b")
    ours(**inputs)
    loss.backward()
    theirs(**inputs).loss.backward()
    torch.testing.assert_close(prefix_of(ours, "a").grad, prefix_of(theirs, "a").grad, rtol=1e-4, atol=1e-5)
    assert prefix_of(ours, "b").grad is None or not prefix_of(ours, "b").grad.any()


@pytest.mark.parametrize("method", ["projection", "p-mlp", "p-lstm"])
def test_the_learned_network_runs_once_per_call(method: str) -> None:
    """On as many rows as there are virtual tokens, whatever the batch; PEFT's projection runs on batch x P rows."""
    for family, task in (("llama", "CAUSAL_LM"), ("bloom", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")):
        model = adapt(peft_fast, make_base(family, task), task, {"default": (method, {})})
        rows: list[int] = []

        def count(_: Any, inputs: Any, __: Any, rows: list[int] = rows) -> None:
            rows.append(inputs[0][..., 0].numel())

        for part in model.prompt_encoder["default"].modules():
            if isinstance(part, torch.nn.Linear | torch.nn.LSTM):
                part.register_forward_hook(count)
        model(**batch(task, "left"))
        limit = TOKENS * (2 if task == "SEQ_2_SEQ_LM" and method != "projection" else 1)
        assert rows and max(rows) <= limit
        forward = len(rows)
        generate(model, batch(task, "left"), num_beams=2)
        assert len(rows) <= forward * (1 + 7)


# ------------------------------------------------------------------------------------------------ a prefix for each row
def per_name(model: Any, inputs: dict[str, Tensor], names: Sequence[str], call: Any) -> list[Any]:
    """What `call(model, rows)` gives for the rows of each name alone: (row numbers, result)."""
    results = []
    for name in dict.fromkeys(names):
        rows = [row for row, other in enumerate(names) if other == name]
        part = {key: value[rows] for key, value in inputs.items()}
        if name == BASE:
            results.append((rows, call(model.get_base_model(), part)))
        else:
            model.set_adapter(name)
            results.append((rows, call(model, part)))
    return results


def together(results: list[Any], dim: int = 0) -> Tensor:
    order = torch.tensor([row for rows, _ in results for row in rows]).argsort()
    return torch.cat([value for _, value in results], dim).index_select(dim, order)


def unlabelled(inputs: dict[str, Tensor], task: str) -> dict[str, Tensor]:
    """Without the loss, which is a mean over the rows."""
    if task == "SEQ_2_SEQ_LM":
        inputs["decoder_input_ids"] = inputs["labels"]
    return {key: value for key, value in inputs.items() if key not in ("labels", "start_positions", "end_positions")}


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@cases(DECODERS + ENCODERS)
def test_rows_with_their_own_prefixes(family: str, task: str, padding: str) -> None:
    theirs, ours = make_pair(family, task, adapters=ADAPTERS)
    base = make_base(family, task)
    theirs.get_base_model = lambda: base  # with its own head
    inputs = unlabelled(batch(task, padding, rows=5), task)
    key = "last_hidden_state" if task == "FEATURE_EXTRACTION" else "logits"
    for names in MIXED:
        with torch.no_grad():
            got = ours(**inputs, adapter_names=names)[key]
            expected = together(per_name(theirs, inputs, names, lambda model, rows: model(**rows)[key]))
        if padding == "left" and task == "CAUSAL_LM":  # what padding sees that has no prefix is nothing
            blind = torch.tensor([name == BASE for name in names])[:, None] & (inputs["attention_mask"] == 0)
            got, expected = got[~blind], expected[~blind]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert ours.active_adapter == "a"


@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}, {"cache_implementation": "static"}],
    ids=["greedy", "beams", "returned", "static"],
)  # fmt: skip
@cases(DECODERS)
def test_generate_with_a_prefix_per_row(family: str, task: str, how: dict[str, Any]) -> None:
    if family == "gpt_neo" and "cache_implementation" in how:
        pytest.skip("gpt_neo itself is wrong with a static cache")
    theirs, ours = make_pair(family, task, adapters=ADAPTERS)
    base = make_base(family, task)
    theirs.get_base_model = lambda: base
    inputs = batch(task, "left", rows=5)
    inputs.pop("labels")
    oracle = {key: value for key, value in how.items() if key != "cache_implementation"}
    copies = how.get("num_return_sequences", 1)

    def alone(model: Any, rows: dict[str, Tensor]) -> Tensor:
        return generate(model, rows, **oracle)[0].unflatten(0, (-1, copies))

    for names in MIXED[:1] + MIXED[3:]:
        tokens, _ = generate(ours, inputs, adapter_names=names, **how)
        assert torch.equal(tokens.unflatten(0, (-1, copies)), together(per_name(theirs, inputs, names, alone)))


def test_sampling_and_assistance_with_a_prefix_per_row() -> None:
    _, ours = make_pair("llama", "CAUSAL_LM", adapters=ADAPTERS)
    inputs = batch("CAUSAL_LM", "left", rows=2)
    first, _ = generate(ours, inputs, do_sample=True, adapter_names=["a", BASE])
    again, _ = generate(ours, inputs, do_sample=True, adapter_names=["a", BASE])
    assert torch.equal(first, again)
    one = {key: value[:1] for key, value in batch("CAUSAL_LM").items()}
    expected, _ = generate(ours, one, adapter_names=["b"])
    looked_up = ours.generate(
        one["input_ids"], adapter_names=["b"], prompt_lookup_num_tokens=2, max_new_tokens=6, min_new_tokens=6,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(looked_up, expected)


def test_rows_gradients() -> None:
    """Rows train the prefixes that they use. LoRA's mixed batches are for inference; prefixes have gradients, or the
    call says that it is for inference only."""
    theirs, ours = make_pair("llama", "CAUSAL_LM", adapters={"a": ADAPTERS["a"], "b": ADAPTERS["b"]})
    for parameter in (*ours.prompt_encoder.parameters(), *theirs.prompt_encoder.parameters()):
        parameter.requires_grad_(True)
    inputs = unlabelled(batch("CAUSAL_LM", "right", rows=4), "CAUSAL_LM")
    names = ["a", "b", BASE, "a"]
    ours(**inputs, adapter_names=names).logits.square().sum().backward()
    for rows, name in (([0, 3], "a"), ([1], "b")):
        theirs.set_adapter(name)
        theirs(**{key: value[rows] for key, value in inputs.items()}).logits.square().sum().backward()
        expected = prefix_of(theirs, name).grad
        scale = expected.abs().max().item()
        torch.testing.assert_close(prefix_of(ours, name).grad, expected, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_positions_are_counted_for_each_row(family: str) -> None:
    """64 positions: a long prefix before a short text, beside a long text without one."""
    adapters = {"long": ("prefix", {"num_virtual_tokens": 57}), "short": ("prefix", {"num_virtual_tokens": 2})}
    theirs, ours = make_pair(family, "CAUSAL_LM", adapters=adapters)
    names, lengths = ["long", "short", BASE], [3, 20, 40]
    ids = torch.randint(3, 60, (3, 40), generator=torch.Generator().manual_seed(2))
    for side in ("left", "right"):
        shown = [slice(40 - n, None) if side == "left" else slice(0, n) for n in lengths]
        mask = torch.zeros(3, 40, dtype=torch.long)
        for row, part in enumerate(shown):
            mask[row, part] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        inputs = {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask, "position_ids": positions}
        if family == "opt":
            inputs["position_ids"] = mask.cumsum(1) * mask - 1
        elif side == "right":
            del inputs["position_ids"]  # those of padding are beyond the last one
        got = ours(**inputs, adapter_names=names).logits
        for row, (name, part) in enumerate(zip(names, shown, strict=True)):
            text = ids[row : row + 1, part]
            if name == BASE:
                expected = make_base(family, "CAUSAL_LM")(text).logits
            else:
                theirs.set_adapter(name)
                expected = theirs(text).logits
            torch.testing.assert_close(got[row : row + 1, part], expected, rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match=r"57 virtual tokens and 20 tokens of text need 77 positions.* has 64"):
            ours(**inputs, adapter_names=["short", "long", BASE])
    left = {"input_ids": torch.cat([ids[:, :5], ids[:, :15]], 1)[:, -20:], "attention_mask": torch.ones(3, 20).long()}
    left["attention_mask"][0, :17] = 0  # 3 tokens after the long prefix, and 4 more
    tokens, _ = generate(ours, left, new=4, adapter_names=names)
    theirs.set_adapter("long")
    alone, _ = generate(theirs, {"input_ids": left["input_ids"][:1, 17:]}, new=4)
    assert torch.equal(tokens[0, 17:], alone[0])
    with pytest.raises(ValueError, match="57 virtual tokens and 8 tokens"):
        generate(ours, left, new=7, adapter_names=names)


@cases([("gpt2", "CAUSAL_LM"), ("opt", "CAUSAL_LM"), ("roberta", "SEQ_CLS"), ("bart", "SEQ_2_SEQ_LM")])
def test_positions_of_rows_whose_prefix_goes_through_the_cache(family: str, task: str) -> None:
    """There all rows have the room of the longest prefix."""
    _, ours = make_pair(family, task, adapters=ADAPTERS, base={"attn_implementation": "eager"})
    for padding in ("none", "left"):
        inputs = unlabelled(batch(task, padding), task)
        got, expected = (
            ours(**inputs, adapter_names=["b", BASE, "a"], output_attentions=weights).logits
            for weights in (True, False)
        )
        if task == "CAUSAL_LM" and padding == "left":  # what padding sees differs
            got, expected = (logits[inputs["attention_mask"].bool()] for logits in (got, expected))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_positions_of_rows_that_are_counted_from_padding() -> None:
    """RoBERTa: 62 positions for prefix and text."""
    adapters = {"long": ("prefix", {"num_virtual_tokens": 55}), "short": ("prefix", {"num_virtual_tokens": 2})}
    _, ours = make_pair("roberta", "SEQ_CLS", adapters=adapters)
    ids = torch.randint(3, 60, (2, 30), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    inputs = {"input_ids": ids.masked_fill(mask == 0, ours.config.pad_token_id), "attention_mask": mask}
    got = ours(**inputs, adapter_names=["long", "short"]).logits
    for row, (name, length) in enumerate((("long", 7), ("short", 30))):
        ours.set_adapter(name)
        torch.testing.assert_close(got[row], ours(ids[row : row + 1, :length]).logits[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"55 virtual tokens and 30 tokens of text need 85 positions.* has 62"):
        ours(**inputs, adapter_names=["short", "long"])


def test_errors_of_names_for_rows() -> None:
    _, ours = make_pair("llama", "CAUSAL_LM", adapters=ADAPTERS)
    inputs = unlabelled(batch("CAUSAL_LM"), "CAUSAL_LM")
    with pytest.raises(ValueError, match="adapter_names"):
        ours(**inputs, adapter_names=["a", "b"])
    with pytest.raises(ValueError, match="nobody"):
        ours(**inputs, adapter_names=["a", "nobody", BASE])
    expected = ours(**inputs).logits
    with ours.disable_adapter():
        base = ours(**inputs, adapter_names=["a", "b", "c"]).logits  # as for LoRA: nothing is used
    torch.testing.assert_close(base, make_base("llama", "CAUSAL_LM")(**inputs).logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours(**inputs).logits, expected)


FLEX = [("llama", "CAUSAL_LM"), ("gemma2", "CAUSAL_LM"), ("opt", "CAUSAL_LM"), ("bart", "SEQ_2_SEQ_LM"),
        ("bert", "SEQ_CLS")]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@cases(FLEX)
def test_flex_attention(family: str, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in PEFT, through the cache. torch has no backward of it on a CPU."""
    # torch 2.13's C++ for some of these sizes does not compile
    monkeypatch.setattr(flex_module.WrappedFlexAttention, "__call__", lambda self: flex_module.flex_attention)
    make_mask = masking_utils.create_block_mask
    monkeypatch.setattr(masking_utils, "create_block_mask", lambda *a, **kw: make_mask(*a, **kw | {"_compile": False}))
    plain, base = (make_base(family, task) for _ in range(2))
    base.set_attn_implementation("flex_attention")
    adapters = {name: ADAPTERS[name] for name in ("a", "b")}
    theirs, ours, sdpa = (
        adapt(library, model, task, adapters)
        for library, model in ((peft, base), (peft_fast, base), (peft_fast, plain))
    )
    copy_weights(ours, theirs)
    with torch.no_grad():
        for padding in ("none", "left"):
            inputs = unlabelled(batch(task, padding), task)
            got = ours(**inputs).logits
            torch.testing.assert_close(got, sdpa(**inputs).logits, rtol=1e-4, atol=1e-4)
            if (family, padding) != ("bert", "none"):  # PEFT fails there: it makes the mask for the text alone
                torch.testing.assert_close(got, theirs(**inputs).logits, rtol=1e-4, atol=1e-4)
            names = ["b", BASE, "a"]
            mixed = [model(**inputs, adapter_names=names).logits for model in (ours, sdpa)]
            torch.testing.assert_close(*mixed, rtol=1e-4, atol=1e-4)
    if task.endswith("LM"):
        inputs = batch(task, "left")
        expected = generate(theirs, inputs)[0]
        assert torch.equal(generate(ours, inputs)[0], expected)
        if task == "CAUSAL_LM":
            assert torch.equal(generate(ours, inputs, cache_implementation="static")[0], expected)


# --------------------------------------------------------------------------------------------- prefixes in a LoRA model
def lora_and_prefixes(family: str, task: str) -> tuple[Any, dict[str, Any]]:
    """(our LoRA model with two prefixes, name -> peft's model with that adapter alone)."""
    base = make_base(family, task)
    settings = {"r": 3, "target_modules": LORA[family], "task_type": task, "fan_in_fan_out": family == "gpt2"}
    ours = peft_fast.get_peft_model(copy.deepcopy(base), peft_fast.LoraConfig(**settings), adapter_name="low")
    ours.add_adapter("p", make_config(peft_fast, "prefix", task))
    ours.add_adapter("high", peft_fast.LoraConfig(**settings | {"r": 5}))
    ours.add_adapter("q", make_config(peft_fast, "projection", task, num_virtual_tokens=7))
    randomize(ours)
    alone = {}
    for name, rank in (("low", 3), ("high", 5)):
        config = peft.LoraConfig(**settings | {"r": rank})
        alone[name] = peft.get_peft_model(copy.deepcopy(base), config, adapter_name=name).eval()
    alone |= {name: adapt(peft, base, task, {name: (method, more)}) for name, method, more in (
        ("p", "prefix", {}), ("q", "projection", {"num_virtual_tokens": 7}),
    )}  # fmt: skip
    source = dict(ours.named_parameters())
    with torch.no_grad():
        for model in alone.values():
            for name, parameter in model.named_parameters():
                if "prompt_encoder" in name or "lora_" in name:
                    parameter.copy_(source[name])
                elif "modules_to_save" in name:
                    found = [key for key in source if key.endswith(name.removeprefix("base_model."))]
                    parameter.copy_(source[found[0]])
    return ours.eval(), alone | {BASE: base}


@cases([("llama", "CAUSAL_LM"), ("gpt2", "CAUSAL_LM"), ("bert", "SEQ_CLS"), ("t5", "SEQ_2_SEQ_LM")])
def test_prefixes_beside_lora(family: str, task: str) -> None:
    ours, alone = lora_and_prefixes(family, task)
    assert set(ours.prompt_encoder) == {"p", "q"} and set(ours.peft_config) == {"low", "p", "high", "q"}
    inputs = unlabelled(batch(task, "left", rows=5), task)

    def expected(names: Sequence[str]) -> Tensor:
        one = {key: [value[row : row + 1] for row in range(5)] for key, value in inputs.items()}
        rows = [{key: value[row] for key, value in one.items()} for row in range(5)]
        return torch.cat([alone[name](**row).logits for name, row in zip(names, rows, strict=True)])

    with torch.no_grad():
        for names in (
            ["low", "p", BASE, "high", "q"],
            ["q", "q", "low", "p", BASE],
            ["p"] * 5,
            ["low", "high"] * 2 + [BASE],
        ):
            torch.testing.assert_close(
                ours(**inputs, adapter_names=names).logits, expected(names), rtol=1e-4, atol=1e-4
            )
        for name in ("low", "p", "high", "q", "low"):
            ours.set_adapter(name)
            torch.testing.assert_close(ours(**inputs).logits, expected([name] * 5), rtol=1e-4, atol=1e-4)
            with ours.disable_adapter():
                torch.testing.assert_close(ours(**inputs).logits, expected([BASE] * 5), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(ours(**inputs).logits, expected([name] * 5), rtol=1e-4, atol=1e-4)
    if task.endswith("LM"):
        prompts = {key: value for key, value in inputs.items() if key != "decoder_input_ids"}
        names = ["low", "p", BASE, "high", "q"]
        one = [{key: value[row : row + 1] for key, value in prompts.items()} for row in range(5)]
        for more in ({}, {"num_beams": 2}):
            tokens, _ = generate(ours, prompts, adapter_names=names, **more)
            rows = [generate(alone[name], row, **more)[0] for name, row in zip(names, one, strict=True)]
            assert torch.equal(tokens, torch.cat(rows))


def test_training_a_prefix_beside_lora() -> None:
    ours, alone = lora_and_prefixes("llama", "CAUSAL_LM")
    inputs = batch("CAUSAL_LM", "right")
    for name in ("p", "low"):
        ours.set_adapter(name)
        got, expected = run(ours, inputs), run(alone[name], inputs)
        learned = [key for key in got if key.startswith("grad")]
        assert learned and all(f".{name}." in key for key in learned)
        for key in learned:
            torch.testing.assert_close(got[key], expected[key], rtol=1e-4, atol=1e-4)


def test_deleting_a_prefix_beside_lora() -> None:
    ours, alone = lora_and_prefixes("llama", "CAUSAL_LM")
    inputs = unlabelled(batch("CAUSAL_LM", "left"), "CAUSAL_LM")
    ours.delete_adapter("p")
    assert "p" not in ours.peft_config and set(ours.prompt_encoder) == {"q"}
    ours.delete_adapter("q")
    assert set(ours.peft_config) == {"low", "high"}
    torch.testing.assert_close(ours(**inputs).logits, alone["low"](**inputs).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="p"):
        ours(**inputs, adapter_names=["low", "p", BASE])
    assert torch.equal(ours.unload()(**inputs).logits, alone[BASE](**inputs).logits)


@pytest.mark.parametrize("first", ["lora", "prefix", "prompt"])
@pytest.mark.parametrize("second", ["lora", "prefix", "prompt", "p-mlp", "multitask"])
def test_other_combinations_raise(first: str, second: str) -> None:
    def config(library: Any, method: str) -> Any:
        if method == "lora":
            return library.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
        return make_config(library, method, "CAUSAL_LM")

    if first == second or (first, second) == ("lora", "prefix"):
        return
    base = make_base("llama", "CAUSAL_LM")
    messages = []
    for library in (peft, peft_fast):
        model = library.get_peft_model(copy.deepcopy(base), config(library, first))
        with pytest.raises(ValueError, match="Cannot combine adapters with different peft types") as error:
            model.add_adapter("other", config(library, second))
        messages.append(str(error.value))
        assert list(model.peft_config) == ["default"]
        model(**batch("CAUSAL_LM"))
    assert messages[0] == messages[1]


# --------------------------------------------------------------------------------------------------- more architectures
def concatenated(prefixes: Sequence[Tensor]) -> Any:
    """An attention function that puts the next prefix of the list before the keys and values; (2, heads, P, D) each.
    Its slots are ordinary positions before the text's, as far as a window is concerned."""
    calls = iter(prefixes)

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: Any = None, **more: Any) -> Any:
        prefix = next(calls)
        rows, tokens = q.shape[0], prefix.shape[-2]
        k, v = (torch.cat([part.expand(rows, *part.shape), own], 2) for part, own in zip(prefix, (k, v), strict=True))
        scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
        if mask is not None:
            scores = scores + torch.nn.functional.pad(mask, (tokens, 0))
        if more.get("sliding_window"):
            distance = tokens + torch.arange(q.shape[2])[:, None] - torch.arange(tokens)
            hidden = torch.nn.functional.pad(distance >= more["sliding_window"], (0, q.shape[2]))
            scores = scores.masked_fill(hidden, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2).contiguous(), None

    return attention


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@cases(
    [("distilbert", task) for task in families._SUFFIX if "LM" not in task]
    + [("albert", task) for task in families._SUFFIX if "LM" not in task]
    + [("modernbert", task) for task in ("SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION")]
    + [("bert", "TOKEN_CLS")]  # the oracle's own test: peft has this one
)
def test_encoders_without_a_cache(family: str, task: str, padding: str) -> None:
    base = make_base(family, task)
    config = make_config(peft_fast, "prefix", task)
    ours = peft_fast.get_peft_model(copy.deepcopy(base), config).eval()
    randomize(ours)
    heads = [name for name, parameter in ours.named_parameters() if "modules_to_save" in name]
    with torch.no_grad():  # the oracle has the base's heads
        own = dict(base.named_parameters())
        for name, parameter in ours.named_parameters():
            if name in heads:
                parameter.copy_(own[name.removeprefix("base_model.").replace("modules_to_save.default.", "")])
    table = prefix_of(ours)
    assert table.shape == (TOKENS, 2 * 2 * 32)
    layers = [part.transpose(1, 2) for part in table.view(TOKENS, 2, 2, 4, 8).permute(1, 2, 0, 3, 4)]
    AttentionInterface.register("test_concatenated", concatenated(layers))
    AttentionMaskInterface.register("test_concatenated", eager_mask)
    base.set_attn_implementation("test_concatenated")
    inputs = batch(task, padding)
    try:
        if family == "distilbert":  # its head models take no positions
            positions = base.get_submodule("embeddings" if task == "FEATURE_EXTRACTION" else "distilbert.embeddings")
            positions.position_ids = positions.position_ids + TOKENS
            expected = base(**inputs)
        else:
            expected = base(**inputs, position_ids=TOKENS + torch.arange(7)[None])
    finally:
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop("test_concatenated", None)
    got = ours(**inputs)
    for key, value in families.output_tensors(expected).items():
        torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-4)
    weights = torch.linspace(-1, 1, got[0].numel()).view(got[0].shape)
    (grad,) = torch.autograd.grad((expected[0] * weights).sum(), table)
    (got[0] * weights).sum().backward()
    torch.testing.assert_close(table.grad, grad, rtol=1e-3, atol=1e-4)


def test_rows_of_encoders_without_a_cache() -> None:
    for family in ("distilbert", "albert", "modernbert"):
        base = make_base(family, "SEQ_CLS")
        ours = adapt(peft_fast, base, "SEQ_CLS", {"a": ("prefix", {}), "b": ("prefix", {"num_virtual_tokens": 6})})
        inputs = unlabelled(batch("SEQ_CLS", "right", rows=4), "SEQ_CLS")
        names = ["b", BASE, "a", "b"]
        with torch.no_grad():
            got = ours(**inputs, adapter_names=names).logits
            expected = per_name(_Alone(ours, base), inputs, names, lambda model, rows: model(**rows).logits)
        torch.testing.assert_close(got, together(expected), rtol=1e-4, atol=1e-4)


class _Alone:
    """A model for `per_name` whose base is another object."""

    def __init__(self, model: Any, base: Any) -> None:
        self.model, self.base, self.set_adapter = model, base, model.set_adapter

    def get_base_model(self) -> Any:
        return self.base

    def __call__(self, **inputs: Any) -> Any:
        return self.model(**inputs)


# ------------------------------------------------------------------------------------------- tasks that PEFT gets wrong
@pytest.mark.parametrize("method", ["prompt", "p-mlp", "multitask"])
def test_token_classification_with_labels(method: str) -> None:
    """PEFT raises: its labels are shorter than its logits."""
    theirs, ours = make_pair("bert", "TOKEN_CLS", method)
    inputs = batch("TOKEN_CLS", "right")
    tasks = {"task_ids": torch.tensor([2, 0, 1])} if method == "multitask" else {}
    labels = inputs.pop("labels")
    labels[2, 3] = -100
    with pytest.raises(ValueError, match="batch_size"):
        theirs(**inputs, labels=labels, **tasks)
    output, expected = ours(**inputs, labels=labels, **tasks), theirs(**inputs, **tasks)
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert output.logits.shape == (3, 7, 2)
    loss = torch.nn.functional.cross_entropy(expected.logits.reshape(-1, 2), labels.view(-1))
    torch.testing.assert_close(output.loss, loss, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["prompt", "p-mlp"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_question_answering_is_about_the_text(family: str, method: str) -> None:
    """PEFT's loss is about positions among the virtual tokens, and its answers are off by them."""
    theirs, ours = make_pair(family, "QUESTION_ANS", method)
    inputs = batch("QUESTION_ANS", "right")
    start, end = (inputs.pop(name) for name in ("start_positions", "end_positions"))
    end[1] = 50  # outside: counts for nothing
    output = ours(**inputs, start_positions=start, end_positions=end)
    expected = theirs(**inputs)
    assert output.start_logits.shape == (3, 7)
    losses = [
        torch.nn.functional.cross_entropy(logits, places.clamp(max=7), ignore_index=7)
        for logits, places in ((expected.start_logits, start), (expected.end_logits, end))
    ]
    torch.testing.assert_close(output.loss, sum(losses) / 2, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.start_logits, expected.start_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [*METHODS])
@cases([("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM"), ("gpt2", "CAUSAL_LM"), ("bloom", "CAUSAL_LM"), *ENCODERS])
def test_disabled_adapter_is_the_base_model(family: str, task: str, method: str) -> None:
    """To the last bit, with the base's own head; PEFT crashes on models that do not generate."""
    base = make_base(family, task)
    size = {"token_dim": 16} if family == "electra" and method not in ("prefix", "projection") else {}
    ours = adapt(peft_fast, base, task, {"default": (method, size)})
    inputs = batch(task, "left")
    tasks = {"task_ids": torch.tensor([2, 0, 1])} if method == "multitask" else {}
    with torch.no_grad():
        expected = families.output_tensors(base(**inputs))
        before = families.output_tensors(ours(**without_labels(task, method, inputs), **tasks))
        with ours.disable_adapter():
            got = families.output_tensors(ours(**inputs))
            if task.endswith("LM"):
                tokens = generate(ours, inputs)[0]
        after = families.output_tensors(ours(**without_labels(task, method, inputs), **tasks))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in expected)
    assert all(torch.equal(before[key], after[key]) for key in before)
    if task.endswith("LM"):
        assert torch.equal(tokens, generate(base, inputs)[0])


def without_labels(task: str, method: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    if method == "multitask" and task == "FEATURE_EXTRACTION":
        return {key: value for key, value in inputs.items() if key != "labels"}
    return inputs


def test_returned_caches_hold_the_text_only() -> None:
    """A deliberate difference: the prefix is not in them, and is there again when the text goes on with them."""
    theirs, ours = make_pair("llama", "CAUSAL_LM")
    ids = batch("CAUSAL_LM")["input_ids"]
    with torch.no_grad():
        whole = ours(input_ids=ids).logits
        first = ours(input_ids=ids[:, :4], use_cache=True)
        assert first.past_key_values.get_seq_length() == 4
        assert theirs(input_ids=ids[:, :4], use_cache=True).past_key_values.get_seq_length() == 4 + TOKENS
        rest = ours(input_ids=ids[:, 4:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole, theirs(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "opt", "gpt_neox", "bloom", "gptj"])
def test_text_in_pieces(family: str) -> None:
    """A long text given in several forwards with one cache, padded on the left, is the text given at once."""
    theirs, ours = make_pair(family, "CAUSAL_LM")
    inputs = unlabelled(batch("CAUSAL_LM", "left"), "CAUSAL_LM")
    mask = inputs["attention_mask"]
    with torch.no_grad():
        whole = theirs(**inputs).logits
        cache, pieces = None, []
        for start, stop in ((0, 3), (3, 6), (6, 7)):
            output = ours(input_ids=inputs["input_ids"][:, start:stop], attention_mask=mask[:, :stop],
                          past_key_values=cache, use_cache=True)  # fmt: skip
            cache = output.past_key_values
            pieces.append(output.logits)
    visible = mask.bool()
    torch.testing.assert_close(torch.cat(pieces, 1)[visible], whole[visible], rtol=1e-4, atol=1e-4)

"""Prefix tuning beside the installed peft: losses, logits, gradients and generated tokens, family by family."""

import copy
import warnings
from typing import Any

import families
import peft
import pytest
import torch
import transformers
from prompt_models import (
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
    run,
)
from torch import Tensor

import peft_fast

FUSED = [
    *("llama", "qwen2", "qwen3", "mistral", "mixtral", "gemma", "gemma2", "gemma3", "phi", "phi3", "olmo2", "cohere"),
    *("granite", "starcoder2", "gpt_oss", "gpt2", "gpt_bigcode", "gpt_neox", "opt"),
]
CONCATENATED = ["bloom", "falcon", "gptj", "gpt_neo", "codegen"]
ENCODER_DECODERS = ["t5", "bart"]
HEADS = [
    *((family, task) for family in ("bert", "roberta", "electra") for task in families._SUFFIX if "LM" not in task),
    *(("xlm_roberta", "SEQ_CLS"), ("megatron_bert", "SEQ_CLS"), ("rembert", "TOKEN_CLS"), ("rembert", "QUESTION_ANS")),
    *((family, task) for family in ("llama", "gpt2") for task in families._SUFFIX if "LM" not in task),
    *(("qwen3", "SEQ_CLS"), ("opt", "SEQ_CLS"), ("opt", "QUESTION_ANS")),
]
CASES = [
    *((family, "CAUSAL_LM") for family in FUSED + CONCATENATED),
    *((family, "SEQ_2_SEQ_LM") for family in ENCODER_DECODERS),
    *HEADS,
]
GENERATING = [(family, task) for family, task in CASES if task.endswith("LM")]
FEW = [
    *(("llama", "CAUSAL_LM"), ("mistral", "CAUSAL_LM"), ("gpt2", "CAUSAL_LM"), ("opt", "CAUSAL_LM")),
    *(("bloom", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM"), ("bart", "SEQ_2_SEQ_LM"), ("bert", "SEQ_CLS")),
]


def cases(pairs: list[tuple[str, str]]) -> Any:
    return pytest.mark.parametrize(("family", "task"), pairs, ids=[f"{family}-{task}" for family, task in pairs])


def assert_same_runs(theirs: Any, ours: Any, inputs: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
    """Every output and gradient of ours has at most twice the error of peft's."""
    exact = in_fp64(theirs)
    inexact = [run(model, inputs, **kwargs) for model in (ours, theirs)]
    doubled = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    assert_runs_as_accurate(*inexact, run(exact, doubled, **kwargs))
    return inexact[0]


def assert_same_tokens(theirs: Any, ours: Any, inputs: dict[str, Tensor], **kwargs: Any) -> None:
    (tokens, logits), (expected, expected_logits) = (generate(model, inputs, **kwargs) for model in (ours, theirs))
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------- families and tasks
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@cases(CASES)
def test_outputs_and_gradients(family: str, task: str, padding: str) -> None:
    theirs, ours = make_pair(family, task)
    got = assert_same_runs(theirs, ours, batch(task, padding))
    assert got["grad of prompt_encoder.default.embedding.weight"].abs().max() > 0.01
    assert ("loss" in got) == (task != "FEATURE_EXTRACTION")


@pytest.mark.parametrize(
    ("padding", "how"),
    [("none", {}), ("left", {}), ("left", {"num_beams": 2}), ("left", {"do_sample": True, "num_return_sequences": 2})],
    ids=["none-greedy", "left-greedy", "beams", "sampling"],
)
@cases(GENERATING)
def test_generate(family: str, task: str, padding: str, how: dict[str, Any]) -> None:
    theirs, ours = make_pair(family, task)
    assert_same_tokens(theirs, ours, batch(task, padding), **how)


def test_generate_depends_on_the_prefix() -> None:
    """What the comparisons above rest on: the tokens are not the base model's."""
    different = 0
    for family, task in GENERATING:
        _, ours = make_pair(family, task)
        tokens = generate(ours, batch(task))[0]
        different += not torch.equal(tokens, generate(make_base(family, task), batch(task))[0])
    assert different > 0.8 * len(GENERATING)


# --------------------------------------------------------------------------------------------------- arguments of calls
@cases(FEW)
def test_projection(family: str, task: str) -> None:
    theirs, ours = make_pair(family, task, "projection")
    got = assert_same_runs(theirs, ours, batch(task, "left"))
    assert len([key for key in got if "prompt_encoder" in key]) == 5
    saved = [model.get_prompt_embedding_to_save("default") for model in (ours, theirs)]
    torch.testing.assert_close(saved[0], saved[1], rtol=1e-5, atol=1e-5)


@cases(FEW)
def test_positions_given(family: str, task: str) -> None:
    if task == "SEQ_2_SEQ_LM":
        pytest.skip("these models take no positions")
    if family == "bloom":
        pytest.skip("bloom takes no positions")
    theirs, ours = make_pair(family, task)
    inputs = batch(task, "left")
    mask = inputs["attention_mask"]
    for positions in ((mask.cumsum(-1) - 1).clamp(min=0), torch.arange(7).flip(0)[None].expand(3, 7)):
        assert_same_runs(theirs, ours, inputs, position_ids=positions)


@cases(FEW)
def test_embeddings_given(family: str, task: str) -> None:
    theirs, ours = make_pair(family, task)
    inputs = batch(task, "right")
    ids = inputs.pop("input_ids")
    inputs["inputs_embeds"] = make_base(family, task).get_input_embeddings()(ids).detach()
    assert_same_runs(theirs, ours, inputs)


@pytest.mark.parametrize("use_cache", [True, False])
@cases(FEW)
def test_hidden_states_and_tuples(family: str, task: str, use_cache: bool) -> None:
    theirs, ours = make_pair(family, task)
    inputs = batch(task, "left")
    cached = {} if task == "SEQ_CLS" else {"use_cache": use_cache}
    outputs = [model(**inputs, output_hidden_states=True, **cached) for model in (ours, theirs)]
    hidden = "decoder_hidden_states" if task == "SEQ_2_SEQ_LM" else "hidden_states"
    assert len(outputs[0][hidden]) == len(outputs[1][hidden])
    for got, expected in zip(outputs[0][hidden], outputs[1][hidden], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    without_caches = [output.keys() - {"past_key_values"} for output in outputs]  # PEFT's is there without being asked
    assert without_caches[0] == without_caches[1]
    tuples = [
        [value for value in model(**inputs, return_dict=False) if not isinstance(value, transformers.Cache)]
        for model in (ours, theirs)
    ]
    assert [type(value) for value in tuples[0]] == [type(value) for value in tuples[1]]
    torch.testing.assert_close(tuples[0][:2], tuples[1][:2], rtol=1e-4, atol=1e-4)


@cases(FEW)
def test_attentions(family: str, task: str) -> None:
    """Weights over prefix and text, from the same concatenation as PEFT's."""
    eager = {"attn_implementation": "eager"}
    theirs, ours = make_pair(family, task, base=eager)
    outputs = [model(**batch(task, "right"), output_attentions=True) for model in (ours, theirs)]
    name = "decoder_attentions" if task == "SEQ_2_SEQ_LM" else "attentions"
    assert len(outputs[1][name])
    assert outputs[1][name][0].shape[-1] == TOKENS + (5 if task == "SEQ_2_SEQ_LM" else 7)
    torch.testing.assert_close(outputs[0][name], outputs[1][name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_base_models_attention(implementation: str) -> None:
    for family in ("llama", "mistral", "bart"):
        task = "SEQ_2_SEQ_LM" if family == "bart" else "CAUSAL_LM"
        theirs, ours = make_pair(family, task, base={"attn_implementation": implementation})
        assert_same_runs(theirs, ours, batch(task, "left"))
        assert_same_tokens(theirs, ours, batch(task, "left"))


def test_one_token_one_row_and_a_long_prefix() -> None:
    for rows, length, tokens in ((1, 1, 1), (2, 1, 30), (5, 3, 1), (1, 20, 37)):
        theirs, ours = make_pair("llama", "CAUSAL_LM", num_virtual_tokens=tokens)
        inputs = batch("CAUSAL_LM", rows=rows, length=length + 2)
        assert_same_runs(theirs, ours, {"input_ids": inputs["input_ids"][:, :length]})
        assert_same_tokens(theirs, ours, {"input_ids": inputs["input_ids"][:, :length]})


@pytest.mark.parametrize("family", ["llama", "opt", "bert", "roberta", "t5"])
def test_rows_without_a_token(family: str) -> None:
    """A row of padding alone sees the prefix only."""
    task = {"t5": "SEQ_2_SEQ_LM", "bert": "TOKEN_CLS", "roberta": "TOKEN_CLS"}.get(family, "CAUSAL_LM")
    theirs, ours = make_pair(family, task)
    inputs = batch(task, "right")
    if task == "SEQ_2_SEQ_LM":
        inputs["decoder_attention_mask"] = torch.ones_like(inputs["labels"])
        inputs["decoder_attention_mask"][1] = 0
        inputs["decoder_attention_mask"][2, :2] = 0
    else:
        inputs["attention_mask"][1] = 0
    got = assert_same_runs(theirs, ours, inputs)
    assert all(value.isfinite().all() for value in got.values())


def test_padding_as_bool_and_float_masks() -> None:
    theirs, ours = make_pair("llama", "CAUSAL_LM")
    inputs = batch("CAUSAL_LM", "left")
    for dtype in (torch.bool, torch.float32, torch.int32):
        assert_same_runs(theirs, ours, inputs | {"attention_mask": inputs["attention_mask"].to(dtype)})


# ----------------------------------------------------------------------------------------------------- several adapters
@cases(FEW)
def test_several_adapters(family: str, task: str) -> None:
    adapters = {"a": ("prefix", {}), "b": ("prefix", {"num_virtual_tokens": 7}), "c": ("projection", {})}
    theirs, ours = make_pair(family, task, adapters=adapters)
    inputs = batch(task, "left")
    seen = []
    for name in ("a", "b", "c", "a"):
        for model in (theirs, ours):
            model.set_adapter(name)
        assert ours.active_adapter == name
        assert ours.active_adapters == theirs.active_adapters
        got = assert_same_runs(theirs, ours, inputs)
        assert {key for key in got if "prompt_encoder" in key} <= {
            key for key in got if f"prompt_encoder.{name}." in key
        }
        seen.append(got["logits"])
        if task.endswith("LM"):
            assert_same_tokens(theirs, ours, inputs)
    assert torch.equal(seen[0], seen[3])
    assert not any(torch.allclose(seen[0], other) for other in seen[1:3])


def test_inference_mode() -> None:
    for method in ("prefix", "projection"):
        base = make_base("llama", "CAUSAL_LM")
        theirs = adapt(peft, base, "CAUSAL_LM", {"default": ("prefix", {"inference_mode": True})})
        ours = adapt(peft_fast, base, "CAUSAL_LM", {"default": (method, {"inference_mode": True})})
        with torch.no_grad():
            if method == "projection":  # a projection is never run in inference: PEFT makes none then
                assert "transform" not in dict(ours.prompt_encoder["default"].named_children())
            prefix_of(ours).copy_(prefix_of(theirs))
        assert_same_runs(theirs, ours, batch("CAUSAL_LM", "left"))


@cases(FEW)
def test_same_seed_same_weights_and_names(family: str, task: str) -> None:
    base = make_base(family, task)
    for method in ("prefix", "projection"):
        made = []
        for library in (peft, peft_fast):
            torch.manual_seed(11)
            made.append(library.get_peft_model(copy.deepcopy(base), make_config(library, method, task)))
        theirs, ours = made
        expected, got = theirs.state_dict(), ours.state_dict()
        expected.pop("word_embeddings.weight")  # the base's embeddings a second time, which no file may have
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[key], expected[key]) for key in expected)
        assert families.trainable(ours) == families.trainable(theirs)
        assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
        assert ours.modules_to_save == theirs.modules_to_save
        assert type(ours).__name__ == type(theirs).__name__
        assert type(ours.base_model) is type(theirs.base_model)
        assert ours.word_embeddings.weight is ours.base_model.get_input_embeddings().weight
        assert ours.transformer_backbone_name == theirs.transformer_backbone_name
        assert torch.equal(ours.prompt_tokens["default"], theirs.prompt_tokens["default"])
        assert_same_config(ours, theirs)


def assert_same_config(ours: Any, theirs: Any) -> None:
    mine, their = ours.peft_config["default"].to_dict(), theirs.peft_config["default"].to_dict()
    for config in (mine, their):
        config["modules_to_save"] = set(config["modules_to_save"] or ())  # PEFT's names heads twice
    assert {key: value for key, value in mine.items() if key in their} == their


def test_zero_init() -> None:
    base = make_base("llama", "CAUSAL_LM")
    model = peft_fast.get_peft_model(base, make_config(peft_fast, "prefix", "CAUSAL_LM", init_weights="zero"))
    assert (prefix_of(model) == 0).all()


def test_half_of_an_encoder_decoders_prefix_is_unused() -> None:
    """PEFT's decoder layer i uses slot 2 i mod L: with an even number of layers the odd slots have no gradient."""
    four = {"num_layers": 4, "num_decoder_layers": 4}
    theirs, ours = make_pair("t5", "SEQ_2_SEQ_LM", base=four)
    got = assert_same_runs(theirs, ours, batch("SEQ_2_SEQ_LM", "right"))
    used = got["grad of prompt_encoder.default.embedding.weight"].view(TOKENS, 4, -1).abs().amax(dim=(0, 2)) > 0
    assert used.tolist() == [True, False, True, False]


# -------------------------------------------------------------------------------------- dtypes, training, documentation
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert"])
def test_half_precision_base(family: str) -> None:
    """The prefix stays in fp32 and its gradient with it; the outputs are as near to fp64 as PEFT's."""
    task = {"t5": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS"}.get(family, "CAUSAL_LM")
    base = make_base(family, task).to(torch.bfloat16)
    theirs, ours = (adapt(library, base, task, {"default": ("prefix", {})}) for library in (peft, peft_fast))
    copy_weights(theirs, ours)
    assert prefix_of(ours).dtype == prefix_of(theirs).dtype == torch.float32
    inputs = batch(task, "left")
    got, same, exact = run(ours, inputs), run(theirs, inputs), run(in_fp64(theirs), inputs)
    assert {key: value.dtype for key, value in got.items()} == {key: value.dtype for key, value in same.items()}
    assert_runs_as_accurate(got, same, exact)


def test_autocast() -> None:
    theirs, ours = make_pair("llama", "CAUSAL_LM")
    inputs = batch("CAUSAL_LM", "left")
    exact = run(in_fp64(theirs), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got, same = run(ours, inputs), run(theirs, inputs)
    assert_runs_as_accurate(got, same, exact)


def test_to_another_dtype() -> None:
    theirs, ours = make_pair("llama", "CAUSAL_LM")
    inputs = batch("CAUSAL_LM", "left")
    for model in (theirs, ours):
        model.to(torch.float64)
    assert_runs_as_accurate(run(ours, inputs), run(theirs, inputs), run(in_fp64(theirs), inputs))
    for model in (theirs, ours):
        model.to(torch.bfloat16)
    assert {key: value.dtype for key, value in run(ours, inputs).items()} == {
        key: value.dtype for key, value in run(theirs, inputs).items()
    }


@cases([("llama", "CAUSAL_LM"), ("bert", "SEQ_CLS"), ("t5", "SEQ_2_SEQ_LM")])
def test_training_steps(family: str, task: str) -> None:
    theirs, ours = make_pair(family, task, "projection")
    for model in (theirs, ours):
        model.train()
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1e-3)
        for seed in range(3):
            optimizer.zero_grad()
            model(**batch(task, "right", seed=seed)).loss.backward()
            optimizer.step()
    expected, got = dict(theirs.named_parameters()), dict(ours.named_parameters())
    for name in families.trainable(theirs):
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5)
    for name in expected.keys() - set(families.trainable(theirs)):
        assert torch.equal(got[name], expected[name]), name


def test_attention_dropout_in_training() -> None:
    """Another stream of random numbers than PEFT's, but dropout: unbiased, and switched off by eval."""
    theirs, ours = make_pair("gpt2", "CAUSAL_LM", base={"attn_pdrop": 0.5})
    inputs = {"input_ids": batch("CAUSAL_LM")["input_ids"]}
    with torch.no_grad():
        expected = ours(**inputs).logits
        torch.testing.assert_close(expected, theirs(**inputs).logits, rtol=1e-4, atol=1e-4)
        ours.train()
        first = ours(**inputs).logits
        assert not torch.allclose(first, ours(**inputs).logits)
        torch.manual_seed(4)
        again = ours(**inputs).logits
        torch.manual_seed(4)
        assert torch.equal(again, ours(**inputs).logits)
        ours.eval()
        assert torch.equal(expected, ours(**inputs).logits)


_PAGE = {
    "peft_type": "PREFIX_TUNING",
    "inference_mode": False,
    "num_virtual_tokens": 20,
    "token_dim": 768,
    "num_transformer_submodules": 1,
    "num_attention_heads": 12,
    "num_layers": 12,
    "encoder_hidden_size": 768,
    "prefix_projection": False,
}


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_page_example_bert(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    peft_config = peft_fast.get_peft_config(_PAGE | {"task_type": task})
    with torch.device("meta"):
        prefix, suffix = "transformers.Bert", families._SUFFIX[task]
        config = transformers.BertConfig(vocab_size=28996)
        model = getattr(transformers, prefix.split(".")[1] + suffix)(config)
    kind = {"SEQ_CLS": "PeftModelForSequenceClassification", "TOKEN_CLS": "PeftModelForTokenClassification"}[task]
    peft_model = getattr(peft_fast, kind)(model, peft_config)
    peft_model.print_trainable_parameters()
    total = {"SEQ_CLS": "108,681,988", "TOKEN_CLS": "108,091,396"}[task]
    assert f"trainable params: 370,178 || all params: {total} ||" in capsys.readouterr().out


def test_page_example_gpt2(capsys: pytest.CaptureFixture[str]) -> None:
    settings = _PAGE | {"task_type": "CAUSAL_LM", "token_dim": 1280, "num_attention_heads": 20, "num_layers": 36}
    del settings["encoder_hidden_size"]
    peft_config = peft_fast.get_peft_config(
        settings | {"encoder_hidden_size": 1280, "postprocess_past_key_value_function": None}
    )
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=1280, n_layer=36, n_head=20))
        model.tie_weights()
    peft_model = peft_fast.PeftModelForCausalLM(model, peft_config)
    peft_model.print_trainable_parameters()
    assert "trainable params: 1,843,200 || all params: 775,873,280 ||" in capsys.readouterr().out


def test_no_warnings() -> None:
    """Ordinary use warns of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = make_config(peft_fast, "prefix", "CAUSAL_LM")
        model = peft_fast.get_peft_model(make_base("llama", "CAUSAL_LM"), config).eval()
        model(**batch("CAUSAL_LM", "left"))
        model.generate(batch("CAUSAL_LM")["input_ids"], max_new_tokens=2, do_sample=False)

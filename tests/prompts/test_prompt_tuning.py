"""Prompt tuning, P-tuning and multitask prompt tuning beside the installed peft, for each task."""

import copy
import warnings
from typing import Any

import families
import peft
import pytest
import torch
import transformers
from prompt_models import (
    METHODS,
    VOCAB,
    batch,
    generate,
    make_base,
    make_config,
    make_pair,
    run,
)
from test_prefix_tuning import assert_same_config, assert_same_runs, assert_same_tokens
from torch import Tensor

import peft_fast

LEARNED = [method for method in METHODS if method not in ("prefix", "projection")]
CASES = [
    *((family, "CAUSAL_LM") for family in ("llama", "gemma3", "gpt2", "opt", "bloom")),
    *((family, "SEQ_2_SEQ_LM") for family in ("t5", "bart")),
    *(("bert", task) for task in families._SUFFIX if "LM" not in task),
    *(("llama", "SEQ_CLS"), ("roberta", "SEQ_CLS"), ("distilbert", "SEQ_CLS"), ("albert", "TOKEN_CLS")),
]
GENERATING = [(family, task) for family, task in CASES if task.endswith("LM")]
each_method = pytest.mark.parametrize("method", LEARNED)


def cases(pairs: list[tuple[str, str]]) -> Any:
    return pytest.mark.parametrize(("family", "task"), pairs, ids=[f"{family}-{task}" for family, task in pairs])


def tasks_of(method: str, rows: int = 3) -> dict[str, Any]:
    """What a call says besides its inputs: a task for each row."""
    return {"task_ids": torch.tensor([2, 0, 1])[:rows]} if method == "multitask" else {}


def supported(task: str, method: str) -> bool:
    """PEFT passes no task_ids on for these two, so that multitask prompt tuning fails."""
    return method != "multitask" or task not in ("QUESTION_ANS", "FEATURE_EXTRACTION")


def without_wrong_loss(task: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the labels whose loss PEFT gets wrong: see test_prefix_beyond_peft."""
    wrong = {"TOKEN_CLS": ("labels",), "QUESTION_ANS": ("start_positions", "end_positions")}.get(task, ())
    return {key: value for key, value in inputs.items() if key not in wrong}


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@each_method
@cases(CASES)
def test_outputs_and_gradients(family: str, task: str, method: str, padding: str) -> None:
    if not supported(task, method):
        pytest.skip("PEFT cannot")
    # sizes of tokens that PEFT does not find by itself
    size = {"distilbert": {"token_dim": 32, "num_attention_heads": 4}, "albert": {"token_dim": 16}}.get(family, {})
    theirs, ours = make_pair(family, task, method, **size)
    inputs = without_wrong_loss(task, batch(task, padding))
    if padding == "right" and family == "bert":
        inputs["token_type_ids"] = torch.tensor([0, 0, 1, 1, 0, 1, 1]).expand(3, 7)
        if task in ("FEATURE_EXTRACTION", "QUESTION_ANS"):
            del inputs["token_type_ids"]  # dropped by PEFT with and without a warning
    got = assert_same_runs(theirs, ours, inputs, **tasks_of(method))
    learned = [value for key, value in got.items() if "grad of prompt_encoder" in key]
    assert learned and all(value.abs().max() > 0 for value in learned)
    if task == "CAUSAL_LM":
        assert got["logits"].shape == (3, 7, VOCAB)


@pytest.mark.parametrize(
    ("padding", "how"),
    [("none", {}), ("left", {}), ("left", {"num_beams": 2}), ("left", {"do_sample": True, "num_return_sequences": 2})],
    ids=["none-greedy", "left-greedy", "beams", "sampling"],
)
@each_method
@cases(GENERATING)
def test_generate(family: str, task: str, method: str, padding: str, how: dict[str, Any]) -> None:
    theirs, ours = make_pair(family, task, method)
    assert_same_tokens(theirs, ours, batch(task, padding), **tasks_of(method), **how)


@each_method
def test_generate_depends_on_the_prompt(method: str) -> None:
    for family, task in (("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")):
        _, ours = make_pair(family, task, method)
        logits = generate(ours, batch(task), **tasks_of(method))[1]
        assert not torch.allclose(logits[0], generate(make_base(family, task), batch(task))[1][0], atol=1e-2)


@cases([("llama", "CAUSAL_LM"), ("bert", "SEQ_CLS"), ("t5", "SEQ_2_SEQ_LM"), ("bert", "FEATURE_EXTRACTION")])
def test_embeddings_given(family: str, task: str) -> None:
    theirs, ours = make_pair(family, task, "p-mlp")
    inputs = batch(task, "right")
    ids = inputs.pop("input_ids")
    inputs["inputs_embeds"] = make_base(family, task).get_input_embeddings()(ids).detach()
    assert_same_runs(theirs, ours, inputs)


@cases([("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM"), ("bert", "SEQ_CLS")])
def test_several_adapters(family: str, task: str) -> None:
    adapters = {"a": ("prompt", {}), "b": ("prompt", {"num_virtual_tokens": 7})}
    theirs, ours = make_pair(family, task, adapters=adapters)
    for name in ("a", "b", "a"):
        for model in (theirs, ours):
            model.set_adapter(name)
        got = assert_same_runs(theirs, ours, batch(task, "left"))
        assert [key for key in got if "prompt_encoder" in key] == [f"grad of prompt_encoder.{name}.embedding.weight"]
        if task.endswith("LM"):
            assert_same_tokens(theirs, ours, batch(task, "left"))


def test_positions_and_token_types_are_ignored_with_a_warning() -> None:
    theirs, ours = make_pair("llama", "CAUSAL_LM", "prompt")
    inputs = batch("CAUSAL_LM")
    expected = theirs(**inputs).logits
    with pytest.warns(UserWarning, match="Position ids are not supported"):
        got = ours(**inputs, position_ids=torch.arange(7).flip(0)[None]).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    with pytest.warns(UserWarning, match="Token type ids are not supported"):
        got = ours(**inputs, token_type_ids=torch.zeros(3, 7, dtype=torch.long)).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@each_method
def test_inference_mode(method: str) -> None:
    """In inference the learned embeddings stand as they are, without P-tuning's MLP."""
    if method == "multitask":
        pytest.skip("has no weight of its own for inference")
    theirs, ours = make_pair("llama", "CAUSAL_LM", method, inference_mode=True)
    assert not families.trainable(ours) or families.trainable(ours) == families.trainable(theirs)
    got, same = (model(**batch("CAUSAL_LM", "left")).logits for model in (ours, theirs))
    torch.testing.assert_close(got, same, rtol=1e-4, atol=1e-4)
    assert_same_tokens(theirs, ours, batch("CAUSAL_LM", "left"))


@each_method
@cases([("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM"), ("bert", "SEQ_CLS")])
def test_same_seed_same_weights_and_names(family: str, task: str, method: str) -> None:
    base = make_base(family, task)
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
    assert type(ours).__name__ == type(theirs).__name__
    assert torch.equal(ours.prompt_tokens["default"], theirs.prompt_tokens["default"])
    ids = tasks_of(method)
    prompts = [model.get_prompt(3, **ids) for model in (ours, theirs)]
    torch.testing.assert_close(prompts[0], prompts[1], rtol=1e-6, atol=1e-6)
    saved = [model.get_prompt_embedding_to_save("default") for model in (ours, theirs)]
    torch.testing.assert_close(saved[0], saved[1], rtol=1e-6, atol=1e-6)
    assert_same_config(ours, theirs)


def test_sampled_from_the_vocabulary() -> None:
    base = make_base("llama", "CAUSAL_LM")
    weights = []
    for library in (peft, peft_fast):
        torch.manual_seed(11)
        config = make_config(library, "prompt", "CAUSAL_LM", prompt_tuning_init="SAMPLE_VOCAB")
        model = library.get_peft_model(copy.deepcopy(base), config)
        weights.append(model.prompt_encoder["default"].embedding.weight)
    assert torch.equal(*weights)
    rows = base.get_input_embeddings().weight
    assert all((rows == row).all(dim=1).any() for row in weights[1])


class WordTokenizer:
    """As much of a tokenizer as the initial text needs."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [3 + len(word) for word in text.split()]}


@pytest.mark.parametrize("text", ["one two three four five six seven", "one seventeen"], ids=["cut", "repeated"])
def test_initial_text(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *args, **kwargs: WordTokenizer())
    base = make_base("llama", "CAUSAL_LM")
    settings = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": text, "tokenizer_name_or_path": "words"}
    weights = []
    for library in (peft, peft_fast):
        model = library.get_peft_model(copy.deepcopy(base), make_config(library, "prompt", "CAUSAL_LM", **settings))
        weights.append(model.prompt_encoder["default"].embedding.weight)
    assert torch.equal(*weights)
    assert weights[1].dtype == torch.float32 and weights[1].requires_grad
    with torch.no_grad():
        weights[1].add_(1.0)  # a copy: the base model's own embeddings stay
    assert torch.equal(base.get_input_embeddings().weight, model.base_model.get_input_embeddings().weight)


def test_initial_text_needs_a_tokenizer() -> None:
    for library in (peft, peft_fast):
        with pytest.raises(ValueError, match="tokenizer_name_or_path"):
            make_config(library, "prompt", "CAUSAL_LM", prompt_tuning_init="TEXT", prompt_tuning_init_text="a b")
        with pytest.raises(ValueError, match="prompt_tuning_init_text"):
            make_config(library, "prompt", "CAUSAL_LM", prompt_tuning_init="TEXT", tokenizer_name_or_path="words")


def test_layers_of_the_mlp_cannot_be_chosen() -> None:
    with pytest.warns(UserWarning, match="encoder_num_layers"):
        config = make_config(peft_fast, "p-mlp", "CAUSAL_LM", encoder_num_layers=5)
        peft_fast.get_peft_model(make_base("llama", "CAUSAL_LM"), config)


def test_dropout_of_the_lstm() -> None:
    theirs, ours = make_pair("llama", "CAUSAL_LM", "p-lstm", encoder_dropout=0.4)
    outputs = []
    for model in (theirs, ours):
        model.train()
        torch.manual_seed(3)
        outputs.append(model(**batch("CAUSAL_LM")).logits)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


@each_method
def test_half_precision_base(method: str) -> None:
    base = {"dtype": torch.bfloat16}
    theirs, ours = make_pair("llama", "CAUSAL_LM", method)
    for model in (theirs, ours):
        model.base_model.to(base["dtype"])
    inputs = batch("CAUSAL_LM", "left")
    got, same = (run(model, inputs, **tasks_of(method)) for model in (ours, theirs))
    assert {key: value.dtype for key, value in got.items()} == {key: value.dtype for key, value in same.items()}
    for key, value in same.items():
        torch.testing.assert_close(got[key], value, rtol=0.05, atol=0.05 * value.abs().max().item())


@each_method
@cases([("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM"), ("bert", "SEQ_CLS")])
def test_training_steps(family: str, task: str, method: str) -> None:
    theirs, ours = make_pair(family, task, method)
    for model in (theirs, ours):
        model.train()
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1e-3)
        for seed in range(2):
            optimizer.zero_grad()
            model(**batch(task, "right", seed=seed), **tasks_of(method)).loss.backward()
            optimizer.step()
    expected, got = dict(theirs.named_parameters()), dict(ours.named_parameters())
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-4)


def test_task_ids_missing() -> None:
    for task, family in (("CAUSAL_LM", "llama"), ("SEQ_CLS", "bert"), ("SEQ_2_SEQ_LM", "t5")):
        theirs, ours = make_pair(family, task, "multitask")
        for model in (theirs, ours):
            with pytest.raises(ValueError, match="task_ids cannot be None"):
                model(**batch(task))


@each_method
def test_no_warnings(method: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = make_config(peft_fast, method, "CAUSAL_LM")
        model = peft_fast.get_peft_model(make_base("llama", "CAUSAL_LM"), config).eval()
        model(**batch("CAUSAL_LM", "left"), **tasks_of(method))
        model.generate(**batch("CAUSAL_LM") | {"labels": None}, **tasks_of(method), max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("method", ["prompt", "p-mlp", "multitask"])
def test_answers_have_the_positions_of_the_text(method: str, return_dict: bool) -> None:
    """PEFT's start with those of the virtual tokens, while the targets are the text's."""
    _, ours = make_pair("bert", "QUESTION_ANS", method)
    inputs = batch("QUESTION_ANS", "right")
    output = ours(**inputs, **tasks_of(method), return_dict=return_dict)
    loss, start, end = output[:3]
    assert start.shape == end.shape == (3, 7)
    pairs = ((start, inputs["start_positions"]), (end, inputs["end_positions"]))
    expected = sum(torch.nn.functional.cross_entropy(logits, target) for logits, target in pairs) / 2
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("method", ["prompt", "multitask"])
def test_hidden_states_have_the_positions_of_the_text(method: str) -> None:
    _, ours = make_pair("llama", "CAUSAL_LM", method)
    output = ours(**batch("CAUSAL_LM"), **tasks_of(method), output_hidden_states=True, output_attentions=True)
    assert output.logits.shape[1] == 7 and {state.shape[1] for state in output.hidden_states} == {7}
    kept = ours(input_ids=batch("CAUSAL_LM")["input_ids"], **tasks_of(method), logits_to_keep=2)
    torch.testing.assert_close(kept.logits, output.logits[:, -2:])
    _, ours = make_pair("t5", "SEQ_2_SEQ_LM", method)
    inputs = batch("SEQ_2_SEQ_LM")
    output = ours(**inputs, **tasks_of(method), output_hidden_states=True)
    assert output.logits.shape[1] == inputs["labels"].shape[1]
    assert {state.shape[1] for state in output.encoder_hidden_states} == {inputs["input_ids"].shape[1]}
    assert {state.shape[1] for state in output.decoder_hidden_states} == {inputs["labels"].shape[1]}

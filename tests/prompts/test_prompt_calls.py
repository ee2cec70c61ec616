"""Other ways in which users call models with learned prompts: caches and masks of their own, decoding strategies,
wrappers around the model, a Trainer."""

import copy
import threading
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from prompt_models import (
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
from test_prefix_tuning import assert_same_runs, assert_same_tokens
from torch import Tensor
from torch.utils.data import Dataset

import peft_fast

DECODERS = ["llama", "gpt2", "opt", "mistral", "bloom"]
each_decoder = pytest.mark.parametrize("family", DECODERS)


def inputs_of(padding: str = "left", **kwargs: Any) -> dict[str, Tensor]:
    return {key: value for key, value in batch("CAUSAL_LM", padding, **kwargs).items() if key != "labels"}


# ----------------------------------------------------------------------------------------------------------- generating
@each_decoder
@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_a_conversation_with_one_cache(family: str, method: str) -> None:
    _, ours = make_pair(family, "CAUSAL_LM", method)
    ids = inputs_of("none")["input_ids"]
    greedy = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    first = ours.generate(ids, return_dict_in_generate=True, **greedy)
    text = torch.cat([first.sequences, ids[:, :3]], 1)
    if method == "prefix":
        assert torch.equal(
            ours.generate(text, past_key_values=first.past_key_values, **greedy), ours.generate(text, **greedy)
        )
    embeddings = ours.get_base_model().get_input_embeddings()(ids)
    assert torch.equal(ours.generate(inputs_embeds=embeddings, **greedy), first.sequences[:, 7:])


@each_decoder
@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_assisted_and_chunked_decoding(family: str, method: str) -> None:
    _, ours = make_pair(family, "CAUSAL_LM", method)
    inputs = inputs_of()
    assert torch.equal(generate(ours, inputs, prefill_chunk_size=3)[0], generate(ours, inputs)[0])
    ids = inputs_of("none")["input_ids"][:1].repeat(1, 2)
    greedy = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = ours.generate(ids, **greedy)
    assert torch.equal(ours.generate(ids, prompt_lookup_num_tokens=3, **greedy), expected)
    assert torch.equal(ours.generate(ids, assistant_model=make_base(family, "CAUSAL_LM"), **greedy), expected)
    assert torch.equal(ours.generate(ids, assistant_model=ours, **greedy), expected)


@pytest.mark.parametrize("first", ["sliding", "full"])
@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3", "gpt_oss", "starcoder2"])
def test_beyond_the_window(family: str, first: str) -> None:
    """Text and prefix longer than the window, in dynamic and static caches, the prefix of the batch or of its rows."""
    adapters = {"a": ("prefix", {}), "b": ("prefix", {"num_virtual_tokens": 13})}
    layers = {"layer_types": ["full_attention", "sliding_attention"]}  # the first layer's cache counts the tokens
    if first == "full" and family in ("mistral", "starcoder2"):
        pytest.skip("all layers have the window")
    theirs, ours = make_pair(family, "CAUSAL_LM", adapters=adapters, base=layers if first == "full" else {})
    inputs = inputs_of(length=11)
    rows = {}
    for name in adapters:
        for model in (theirs, ours):
            model.set_adapter(name)
        assert_same_runs(theirs, ours, batch("CAUSAL_LM", "left", length=11))
        rows[name], _ = generate(theirs, inputs, new=9)
        assert torch.equal(generate(ours, inputs, new=9)[0], rows[name])
        assert torch.equal(generate(ours, inputs, new=9, cache_implementation="static")[0], rows[name])
    expected = torch.stack([rows[name][row] for row, name in enumerate(["b", "a", "b"])])
    for more in ({}, {"cache_implementation": "static"}):
        assert torch.equal(generate(ours, inputs, new=9, adapter_names=["b", "a", "b"], **more)[0], expected)


def test_static_caches_one_after_another() -> None:
    """Of other adapters and other numbers of rows."""
    adapters = {"a": ("prefix", {}), "b": ("prefix", {"num_virtual_tokens": 9})}
    theirs, ours = make_pair("llama", "CAUSAL_LM", adapters=adapters)
    for name in ("a", "b", "a"):
        for model in (theirs, ours):
            model.set_adapter(name)
        for count in (3, 1, 2):
            inputs = {key: value[:count] for key, value in inputs_of().items()}
            tokens, _ = generate(ours, inputs, cache_implementation="static")
            assert torch.equal(tokens, generate(theirs, inputs)[0])


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_what_decoders_are_given(family: str) -> None:
    theirs, ours = make_pair(family, "SEQ_2_SEQ_LM")
    text = {key: value for key, value in batch("SEQ_2_SEQ_LM", "left").items() if key != "labels"}
    ids = batch("CAUSAL_LM", length=4)["input_ids"]
    mask = torch.ones_like(ids)
    mask[2, :2] = 0
    encoded = ours.get_base_model().get_encoder()(**text)
    embeddings = ours.get_base_model().get_input_embeddings()(ids).detach()
    for more in (
        {"decoder_input_ids": ids, "decoder_attention_mask": mask},
        {"decoder_inputs_embeds": embeddings},
        {"decoder_input_ids": ids, "encoder_outputs": encoded},
    ):
        got, expected = (model(**text, **more).logits for model in (ours, theirs))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert_same_tokens(theirs, ours, text, encoder_outputs=copy.deepcopy(encoded))
    assert_same_tokens(theirs, ours, text, decoder_input_ids=ids[:, :2])
    assert torch.equal(generate(ours, text, use_cache=False)[0], generate(theirs, text)[0])


# ---------------------------------------------------------------------------------------- masks, positions, token types
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_masks_of_four_dimensions(family: str, kind: str) -> None:
    """About the text alone; PEFT takes none."""
    theirs, ours = make_pair(family, "CAUSAL_LM")
    inputs = inputs_of()
    visible = inputs["attention_mask"].bool()
    mask = torch.ones(7, 7).tril().bool()[None, None] & visible[:, None, None, :]
    if kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    got = ours(input_ids=inputs["input_ids"], attention_mask=mask).logits
    torch.testing.assert_close(got[visible], theirs(**inputs).logits[visible], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["roberta", "xlm_roberta", "opt"])
def test_positions_that_count_padding(family: str) -> None:
    """These models compute positions from the ids or the mask; a padding id within the text too."""
    task = "CAUSAL_LM" if family == "opt" else "SEQ_CLS"
    theirs, ours = make_pair(family, task)
    inputs = batch(task)
    inputs["input_ids"][1, -3:] = 1
    inputs["input_ids"][2, 2] = 1
    assert_same_runs(theirs, ours, inputs)
    inputs["attention_mask"] = (inputs["input_ids"] != 1).long()
    assert_same_runs(theirs, ours, inputs)


def test_token_types() -> None:
    types = torch.tensor([0, 0, 1, 1, 0, 1, 1]).expand(3, 7)
    for task in ("SEQ_CLS", "TOKEN_CLS"):
        theirs, ours = make_pair("bert", task)
        assert_same_runs(theirs, ours, batch(task, "right"), token_type_ids=types)
    theirs, ours = make_pair("bert", "FEATURE_EXTRACTION")
    with pytest.warns(UserWarning, match="Token type ids are not supported"):
        got = ours(**batch("FEATURE_EXTRACTION"), token_type_ids=types).last_hidden_state
    expected = theirs(**batch("FEATURE_EXTRACTION")).last_hidden_state
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


SHAPES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("bart", {"encoder_layers": 4, "decoder_layers": 2}, {}),
    ("t5", {"num_layers": 4, "num_decoder_layers": 2}, {}),
    ("t5", {"d_kv": 16}, {"token_dim": 64}),
    ("llama", {"head_dim": 16}, {}),
    ("gpt2", {"add_cross_attention": True}, {}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}, {}),
    ("opt", {"do_layer_norm_before": False}, {}),
    ("opt", {"word_embed_proj_dim": 16}, {}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}, {}),
    ("gpt_neox", {"use_parallel_residual": False}, {}),
    ("falcon", {"alibi": True}, {}),
]


@pytest.mark.parametrize(("family", "base", "settings"), SHAPES)
def test_less_common_models(family: str, base: dict[str, Any], settings: dict[str, Any]) -> None:
    task = "SEQ_2_SEQ_LM" if family in ("bart", "t5") else "CAUSAL_LM"
    theirs, ours = make_pair(family, task, base=base, **settings)
    for padding in ("none", "left"):
        assert_same_runs(theirs, ours, batch(task, padding))
        assert_same_tokens(theirs, ours, batch(task, padding))


# ----------------------------------------------------------------------------------------------------- around the model
@each_decoder
@pytest.mark.parametrize("method", ["prefix", "projection", "p-mlp"])
def test_nothing_stale(family: str, method: str) -> None:
    """What calls without gradients computed of a prompt is not used after its weights have changed."""
    theirs, ours = make_pair(family, "CAUSAL_LM", method)
    for change in range(2):
        for context in (torch.inference_mode, torch.no_grad):
            with context():
                got, expected = (model(**inputs_of()).logits for model in (ours, theirs))
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        if change == 0:
            randomize(ours, seed=99)
        else:
            ours.load_state_dict(
                {key: 1.1 * value if "prompt" in key else value for key, value in ours.state_dict().items()}
            )
        copy_weights(ours, theirs)
    assert_same_runs(theirs, ours, batch("CAUSAL_LM", "left"))


def test_a_streamer_in_another_thread() -> None:
    _, ours = make_pair("llama", "CAUSAL_LM")
    ids = inputs_of("none")["input_ids"][:1]
    greedy = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    seen: list[int] = []

    class Streamer:
        def put(self, value: Tensor) -> None:
            seen.extend(value.flatten().tolist())

        def end(self) -> None:
            pass

    thread = threading.Thread(target=lambda: ours.generate(ids, streamer=Streamer(), **greedy))
    thread.start()
    thread.join()
    assert seen == ours.generate(ids, **greedy)[0].tolist()


def test_hooks_and_wrappers_of_accelerate() -> None:
    base = make_base("llama", "CAUSAL_LM")
    theirs = adapt(peft, base, "CAUSAL_LM", {"default": ("prefix", {})})
    for module in (base, *base.model.layers):
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    ours = peft_fast.get_peft_model(base, make_config(peft_fast, "prefix", "CAUSAL_LM")).eval()
    copy_weights(theirs, ours)
    assert_same_runs(theirs, ours, batch("CAUSAL_LM", "left"))
    assert_same_tokens(theirs, ours, batch("CAUSAL_LM", "left"))
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare(ours)
    ours.zero_grad()
    accelerator.backward(prepared(**batch("CAUSAL_LM", "left")).loss)
    assert prefix_of(ours).grad is not None and prefix_of(ours).grad.abs().max() > 0
    assert accelerator.unwrap_model(prepared) is ours


class Rows(Dataset[dict[str, Tensor]]):
    """A batch as a data set."""

    def __init__(self, task: str) -> None:
        self.inputs = batch(task, "right", rows=6)

    def __len__(self) -> int:
        return len(self.inputs["input_ids"])

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {key: value[row] for key, value in self.inputs.items()}


def trained(model: Any, task: str, directory: Path, **settings: Any) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(
        directory, max_steps=2, per_device_train_batch_size=3, learning_rate=1e-2, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, **settings,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Rows(task), eval_dataset=Rows(task))
    trainer.train()
    return trainer


@pytest.mark.parametrize("method", ["prefix", "projection", "p-mlp"])
@pytest.mark.parametrize(
    ("family", "task"), [("llama", "CAUSAL_LM"), ("bert", "SEQ_CLS"), ("t5", "SEQ_2_SEQ_LM"), ("bert", "QUESTION_ANS")]
)
def test_trainer(family: str, task: str, method: str, tmp_path: Path) -> None:
    """With gradient checkpointing, which changes nothing; PEFT trains prefixes without."""
    base = make_base(family, task)
    ours = adapt(peft_fast, base, task, {"default": (method, {})})
    before = {name: parameter.clone() for name, parameter in ours.named_parameters()}
    trainer = trained(ours, task, tmp_path, gradient_checkpointing=True)
    changed = {name for name, parameter in ours.named_parameters() if not torch.equal(parameter, before[name])}
    assert any("prompt_encoder" in name for name in changed)
    assert all("prompt_encoder" in name or "modules_to_save" in name for name in changed)
    if (task, method) != ("QUESTION_ANS", "p-mlp"):  # PEFT's loss is wrong there
        theirs = adapt(peft, base, task, {"default": (method, {})})
        expected = trained(theirs, task, tmp_path).evaluate()["eval_loss"]
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-4)
    assert trainer.predict(Rows(task)).predictions is not None


def test_trainer_saves(tmp_path: Path) -> None:
    """The whole state, as of any model, in a file that can be read again."""
    for method in ("prefix", "prompt"):
        _, ours = make_pair("llama", "CAUSAL_LM", method)
        arguments = transformers.TrainingArguments(tmp_path, use_cpu=True, report_to=[])
        transformers.Trainer(model=ours, args=arguments).save_model(str(tmp_path / method))
        assert list((tmp_path / method).glob("*.safetensors"))


def test_half_precision_with_checkpointing_and_autocast() -> None:
    base = make_base("llama", "CAUSAL_LM").to(torch.bfloat16)
    theirs = adapt(peft, base, "CAUSAL_LM", {"default": ("projection", {})})
    ours = adapt(peft_fast, base, "CAUSAL_LM", {"default": ("projection", {})})
    copy_weights(theirs, ours)
    ours.gradient_checkpointing_enable()
    ours.enable_input_require_grads()
    ours.train()
    exact = run(in_fp64(theirs), batch("CAUSAL_LM", "right"))
    with torch.autocast("cpu", torch.bfloat16):
        got, same = (run(model, batch("CAUSAL_LM", "right")) for model in (ours, theirs))
    assert all(value.dtype == torch.float32 for key, value in got.items() if key.startswith("grad"))
    assert_runs_as_accurate(got, same, exact)

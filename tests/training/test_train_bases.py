"""`peft-fast train` on kinds of base models: what each can learn, how long its rows are, and what loads the result."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from train_jobs import LABELS, TEXTS, Job, labelled, save_bert, save_llama, save_t5, texts
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    GemmaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
)

from peft_fast.cli.main import main
from peft_fast.training.fit import sees_what_follows

SIZES = {
    "vocab_size": 256,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


def save_roberta(directory: Path, **more: Any) -> Path:
    """Bytes as tokens; 66 rows of positions, of which the first two stand for padding and are not a token's."""
    torch.manual_seed(0)
    tokens = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    config = RobertaConfig(**SIZES, **tokens, max_position_embeddings=66, **more)
    RobertaForMaskedLM(config).save_pretrained(directory)
    return directory


def refused(job: Job, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """What is said before anything is written."""
    capsys.readouterr()
    try:
        code = job.run(*more)
    except SystemExit as stop:
        code = int(stop.code or 0)
    err = capsys.readouterr().err
    assert code == 2 and not job.out.exists(), err
    return err


# ------------------------------------------------------------------------------------------------ positions
def test_positions_begin_behind_that_of_padding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = Job(save_roberta(tmp_path / "roberta"), tmp_path)
    job.write([{"text": line["text"] * 20, "label": line["label"]} for line in labelled()])
    classify = ("--task", "seq-cls", "--max-steps", "2")
    assert "--max-length 65: the model has 64 positions" in refused(job, capsys, *classify, "--max-length", "65")
    assert job.run(*classify) == 0
    assert job.results()["max_length"] == 64 and job.results()["rows_cut"] > 0


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_positions_of_learned_tokens(method: str, tmp_path: Path) -> None:
    job = Job(save_roberta(tmp_path / "roberta"), tmp_path)
    job.write([{"text": line["text"] * 20, "label": line["label"]} for line in labelled()])
    more = ("--task", "seq-cls", "--max-steps", "2", "--method", method, "--num-virtual-tokens", "10")
    assert job.run(*more) == 0 and job.results()["max_length"] == 54


# ------------------------------------------------------------------------------------------------ who sees what
def test_an_encoder_does_not_learn_the_next_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = Job(save_bert(tmp_path / "bert"), tmp_path)
    job.write(texts())
    assert "bert is an encoder, its tokens see those behind them" in refused(job, capsys)
    job.model = save_roberta(tmp_path / "roberta")
    assert "roberta is an encoder" in refused(job, capsys)
    job.model = tmp_path / "xlnet"
    XLNetLMHeadModel(XLNetConfig(vocab_size=256, d_model=32, n_layer=1, n_head=4, d_inner=48)).save_pretrained(
        job.model
    )
    assert "xlnet is an encoder" in refused(job, capsys)


def test_an_encoder_made_a_decoder_does(tmp_path: Path) -> None:
    job = Job(save_roberta(tmp_path / "roberta", is_decoder=True), tmp_path)
    job.write(texts())
    assert job.run("--max-steps", "2") == 0


def test_a_decoder_whose_config_lets_tokens_see_all() -> None:
    assert not sees_what_follows(GemmaConfig())
    assert sees_what_follows(GemmaConfig(use_bidirectional_attention=True)) and sees_what_follows(
        GemmaConfig(is_causal=False)
    )


# ------------------------------------------------------------------------------------------------ classifiers
def test_the_line_that_loads_a_classifier_takes_batches_and_knows_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a base without a token that fills rows up."""
    model = LlamaForCausalLM.from_pretrained(save_llama(tmp_path / "llama"))
    model.config.pad_token_id = model.generation_config.pad_token_id = None
    model.save_pretrained(tmp_path / "unpadded")
    job = Job(tmp_path / "unpadded", tmp_path)
    job.write(labelled())
    assert job.run("--task", "seq-cls", "--max-steps", "3", "--eval-data", str(job.data)) == 0
    load = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("load it: "))
    namespace: dict[str, Any] = {}
    exec(load.removeprefix("load it: "), namespace)
    model = namespace["model"].eval()
    assert model.config.id2label == {0: "bad", 1: "good"} and model.config.label2id == {"bad": 0, "good": 1}
    rows = [[0, *text.encode()] for text in TEXTS]
    long, pad = max(map(len, rows)), model.config.pad_token_id
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor([row + [pad] * (long - len(row)) for row in rows]),
            attention_mask=torch.tensor([[1] * len(row) + [0] * (long - len(row)) for row in rows]),
        ).logits
    classes = torch.tensor([["bad", "good"].index(label) for label in LABELS])
    expected = job.results()["evaluations"][-1]["eval_loss"]
    assert float(torch.nn.functional.cross_entropy(logits, classes)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method", ["lora", "prefix"])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_classifier_with_encoder_and_decoder(kind: str, method: str, tmp_path: Path) -> None:
    """Every row has the end token once, behind a text that is cut too, although bytes write none."""
    model = save_t5(tmp_path / kind) if kind == "t5" else save_bart(tmp_path / kind)
    job = Job(model, tmp_path)
    job.write([*labelled(), {"text": "an end\x01 and\x02 within", "label": "bad"}])
    more = ("--task", "seq-cls", "--max-steps", "3", "--batch-size", "4", "--max-length", "12", "--method", method)
    assert job.run(*more) == 0
    assert job.results()["rows_cut"] > 0


def save_bart(directory: Path) -> Path:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=256, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
        pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2,
    )  # fmt: skip
    BartForSequenceClassification(config).save_pretrained(directory)
    return directory


def test_classifier_that_finds_no_end_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = Job(save_t5(tmp_path / "t5"), tmp_path)
    job.write(labelled())
    assert "finds its end token by its number" in refused(job, capsys, "--task", "seq-cls", "--method", "prompt")
    model = T5ForConditionalGeneration.from_pretrained(job.model)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.save_pretrained(job.model)
    assert "names no end token (eos_token_id)" in refused(job, capsys, "--task", "seq-cls")


# ------------------------------------------------------------------------------------------------ target modules, rates
def test_names_of_layers_with_commas(tmp_path: Path) -> None:
    job = Job(save_llama(tmp_path / "llama"), tmp_path)
    job.write(texts())
    assert job.run("--max-steps", "1", "--target-modules", "q_proj,v_proj", "up_proj,") == 0
    saved = json.loads((job.out / "adapter_config.json").read_text())
    assert sorted(saved["target_modules"]) == ["q_proj", "up_proj", "v_proj"]


def test_names_that_are_no_layers_for_lora(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = Job(save_llama(tmp_path / "llama"), tmp_path)
    job.write(texts())
    said = refused(job, capsys, "--target-modules", "q_prj")
    assert "did you mean q_proj?" in said and "layernorm" not in said and "v_proj" in said
    assert "norm: is LlamaRMSNorm, which LoRA cannot adapt" in refused(job, capsys, "--target-modules", "norm")
    assert "self_attn: is LlamaAttention" in refused(job, capsys, "--target-modules", "self_attn")


def test_an_unknown_option_names_the_help_of_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--model", "m", "--data", "d", "--out", "o", "--warmup-ratio", "1"])
    assert "unrecognized arguments: --warmup-ratio 1 (peft-fast train --help" in capsys.readouterr().err


def test_the_first_step_learns(tmp_path: Path) -> None:
    job = Job(save_llama(tmp_path / "llama"), tmp_path)
    job.write(texts())
    more = ("--max-steps", "1", "--learning-rate", "0.02", "--eval-data", str(job.data), "--lora-dropout", "0")
    assert job.run(*more) == 0
    first, last = (entry["eval_loss"] for entry in job.results()["evaluations"])
    assert last < first - 0.01


def test_no_numbers_in_what_the_last_step_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The loss of the only step is that of the base: only what comes after shows it."""
    for name, more in (("evaluated", ("--eval-split", "0.2")), ("not", ("--eval-split", "0"))):
        (tmp_path / name).mkdir()
        job = Job(save_llama(tmp_path / name / "llama"), tmp_path / name)
        job.write(texts())
        assert job.run("--max-steps", "1", "--lr", "1e39", *more) == 1, name
        assert "a smaller --lr may help" in capsys.readouterr().err
        assert not (job.out / "adapter_config.json").exists()

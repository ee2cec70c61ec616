"""`peft-fast train`: losses that are computed by hand, adapters that PEFT loads, every method and task."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from train_jobs import LABELS, PAIRS, TEXTS, Job, labelled, mean_loss, pairs, save_bert, save_llama, save_t5, texts
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaForCausalLM

import peft_fast
from peft_fast.training import loop as train_loop, model as train_model

ALL = ("--eval-split", "0", "--lora-dropout", "0", "--r", "4")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"))


# ------------------------------------------------------------------------------------------------ golden values
def text_rows(limit: int = 64) -> list[tuple[list[int], list[int]]]:
    return [([0], [*text.encode(), 0][: limit - 1]) for text in TEXTS]


def pair_rows() -> list[tuple[list[int], list[int]]]:
    return [([0, *prompt.encode()], [*completion.encode(), 0]) for prompt, completion in PAIRS]


@pytest.mark.parametrize(("lines", "rows"), [(texts(), text_rows()), (pairs(), pair_rows())], ids=["text", "pair"])
@pytest.mark.parametrize("batches", [("10", "1"), ("3", "4")], ids="x".join)
def test_first_loss_is_that_of_the_base(
    lines: Any, rows: Any, batches: tuple[str, str], llama: Path, tmp_path: Path
) -> None:
    """Of all tokens that are to be learned, each weighing the same, in training and in evaluation."""
    job = Job(llama, tmp_path)
    job.write(lines)
    size = ("--batch-size", batches[0], "--gradient-accumulation", batches[1])
    held_out = ("--eval-data", str(job.data))
    assert job.run("--max-steps", "1", *size, *held_out, *ALL[2:]) == 0
    expected = mean_loss(LlamaForCausalLM.from_pretrained(llama), rows)
    assert job.losses() == [pytest.approx(expected, rel=1e-5)]
    first = job.results()["evaluations"][0]
    assert first["step"] == 0 and first["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert first["eval_perplexity"] == pytest.approx(2.718281828**expected, rel=1e-4)
    assert not (
        expected == pytest.approx(mean_loss(LlamaForCausalLM.from_pretrained(llama), text_rows()[:9]), rel=1e-5)
    )


def test_steps_are_those_of_a_loop_written_by_hand(llama: Path, tmp_path: Path) -> None:
    """AdamW, gradients of a norm of 1 at most, a rate that goes up to --lr and down towards 0."""
    job = Job(llama, tmp_path)
    job.write(texts())
    assert job.run("--max-steps", "5", "--batch-size", "10", "--lr", "0.02", "--seed", "3", *ALL) == 0
    torch.manual_seed(3)
    config = peft_fast.LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft_fast.get_peft_model(LlamaForCausalLM.from_pretrained(llama), config).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.0)
    losses = []
    for step in range(5):
        rows = [torch.tensor([[*before, *after]]) for before, after in text_rows()]
        count = sum(row.shape[1] - 1 for row in rows)
        loss = sum(model(input_ids=row, labels=row).loss * (row.shape[1] - 1) for row in rows) / count
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (5 - step) / 5  # warmed up in one step
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert job.losses() == pytest.approx(losses, rel=1e-4)
    assert losses[-1] < losses[0] - 0.5


def test_what_is_too_long_is_cut_and_counted(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = Job(llama, tmp_path)
    job.write(texts())
    assert job.run("--max-steps", "1", "--batch-size", "10", "--max-length", "12", *ALL) == 0
    rows = [(before, after[:11]) for before, after in text_rows()]
    assert job.losses() == [pytest.approx(mean_loss(LlamaForCausalLM.from_pretrained(llama), rows), rel=1e-5)]
    longer = sum(len(after) > 11 for _, after in text_rows())
    assert f"{longer} of 10 rows that were read were cut to 12 tokens (--max-length)" in capsys.readouterr().out


def test_gradient_checkpointing_changes_no_loss(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, losses = [], []
    checkpoint = train_model._checkpoint
    monkeypatch.setattr(train_model, "_checkpoint", lambda base: (calls.append(1), checkpoint(base)))
    for i, more in enumerate([(), ("--gradient-checkpointing",)]):
        (tmp_path / str(i)).mkdir()
        job = Job(llama, tmp_path / str(i))
        job.write(texts(4))
        assert job.run("--max-steps", "3", "--lr", "0.02", *ALL, *more) == 0
        losses.append(job.losses())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and calls == [1]


def test_bf16(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base is in bfloat16, what is trained in float32."""
    seen: dict[str, set[torch.dtype]] = {}
    make = train_loop.make_trainer

    def spy(options: Any, model: Any, *more: Any, **named: Any) -> Any:
        for p in model.parameters():
            seen.setdefault("trained" if p.requires_grad else "base", set()).add(p.dtype)
        return make(options, model, *more, **named)

    monkeypatch.setattr(train_loop, "make_trainer", spy)
    job = Job(llama, tmp_path)
    job.write(texts())
    assert job.run("--max-steps", "6", "--batch-size", "10", "--lr", "0.02", "--bf16", *ALL) == 0
    assert seen == {"base": {torch.bfloat16}, "trained": {torch.float32}}
    losses = job.losses()
    expected = mean_loss(LlamaForCausalLM.from_pretrained(llama), text_rows())
    assert losses[0] == pytest.approx(expected, rel=0.01) and losses[0] != pytest.approx(expected, rel=1e-5)
    assert losses[-1] < losses[0] - 0.3


# ------------------------------------------------------------------------------------------------ methods and tasks
RATES = {"lora": "0.02", "prefix": "0.2", "prompt": "0.3", "p-tuning": "0.02"}


@pytest.mark.parametrize("method", RATES)
def test_each_method_learns_and_peft_has_the_same_loss(method: str, llama: Path, tmp_path: Path) -> None:
    job = Job(llama, tmp_path)
    job.write(pairs())
    more = ("--num-virtual-tokens", "5") if method != "lora" else ("--r", "4", "--target-modules", "q_proj", "up_proj")
    assert job.run(
        "--method", method, "--max-steps", "12", "--eval-data", str(job.data), "--lr", RATES[method],
        "--batch-size", "5", "--save-steps", "5", *more,
    ) == 0  # fmt: skip
    evaluations = job.results()["evaluations"]
    assert [entry["step"] for entry in evaluations] == [0, 5, 10, 12]
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"] - 0.1
    losses = []
    for library in (peft, peft_fast):
        model = library.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(llama), job.out)
        assert library.PeftConfig.from_pretrained(job.out).base_model_name_or_path == str(llama.resolve())
        losses.append(mean_loss(model.eval(), pair_rows()))
    assert losses == [pytest.approx(evaluations[-1]["eval_loss"], rel=1e-4)] * 2
    trainable = sum(t.numel() for t in peft_fast.load_peft_weights(str(job.out)).values())
    assert method == "p-tuning" or job.results()["trainable_parameters"] == trainable  # whose network is not saved


@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_classifier_on_a_decoder(method: str, llama: Path, tmp_path: Path) -> None:
    """Behind learned tokens padding does not show: rows of different lengths share no batch."""
    job = Job(llama, tmp_path)
    job.write(labelled())
    held_out, size = ("--eval-data", str(job.data)), ("--batch-size", "10")
    assert job.run("--task", "seq-cls", "--method", method, "--max-steps", "25", "--lr", "0.02", *held_out, *size) == 0
    found = job.results()
    assert job.losses()[0] == pytest.approx(found["evaluations"][0]["eval_loss"], rel=1e-4)
    assert found["labels"] == ["bad", "good"]
    losses = []
    for library in (peft, peft_fast):
        base = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=2)
        model = library.PeftModel.from_pretrained(base, job.out).eval()
        rows = [torch.tensor([[0, *text.encode()]]) for text in TEXTS]
        with torch.no_grad():
            logits = torch.cat([model(input_ids=row, attention_mask=torch.ones_like(row)).logits for row in rows])
        classes = torch.tensor([["bad", "good"].index(label) for label in LABELS])
        losses.append(float(torch.nn.functional.cross_entropy(logits, classes)))
        accuracy = float((logits.argmax(-1) == classes).float().mean())
        assert found["evaluations"][-1]["eval_accuracy"] == pytest.approx(accuracy)
    assert losses == [pytest.approx(found["evaluations"][-1]["eval_loss"], rel=1e-3)] * 2
    assert losses[0] < found["evaluations"][0]["eval_loss"] - 0.1 and accuracy > 0.65


def test_classifier_with_a_tokenizer(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = Job(bert, tmp_path)
    job.write([{"text": text, "label": i % 3, "id": "is not read"} for i, text in enumerate(TEXTS)])
    assert job.run("--task", "seq-cls", "--max-steps", "30", "--lr", "0.01", "--eval-data", str(job.data)) == 0
    found, printed = job.results(), capsys.readouterr().out
    base = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3, ignore_mismatched_sizes=True)
    model = peft.PeftModel.from_pretrained(base, job.out).eval()
    tokenizer = AutoTokenizer.from_pretrained(bert)
    with torch.no_grad():
        logits = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in TEXTS])
    loss = torch.nn.functional.cross_entropy(logits, torch.arange(10) % 3)
    assert found["evaluations"][-1]["eval_loss"] == pytest.approx(float(loss), rel=1e-3) and loss < 0.8
    assert found["labels"] == [0, 1, 2] and "ignore_mismatched_sizes=True)" in printed and "accuracy" in printed
    namespace: dict[str, Any] = {}
    exec(printed.splitlines()[-1].removeprefix("load it: "), namespace)
    assert type(namespace["model"]).__name__ == "PeftModelForSequenceClassification"


@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_encoder_decoder(method: str, t5: Path, tmp_path: Path) -> None:
    job = Job(t5, tmp_path)
    job.write(pairs())
    assert job.run(
        "--task", "seq2seq", "--method", method, "--max-steps", "10", "--lr", "0.05", "--eval-data", str(job.data),
        "--batch-size", "3", "--gradient-accumulation", "4",
    ) == 0  # fmt: skip
    evaluations = job.results()["evaluations"]
    model = peft.PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(t5), job.out).eval()
    total, count = 0.0, 0
    for prompt, completion in PAIRS:
        ids, labels = torch.tensor([list(prompt.encode())]), torch.tensor([[*completion.encode(), 1]])
        with torch.no_grad():
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        total, count = total + float(loss) * labels.shape[1], count + labels.shape[1]
    assert evaluations[-1]["eval_loss"] == pytest.approx(total / count, rel=1e-4)
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"] - 0.1
    assert job.losses()[0] == pytest.approx(evaluations[0]["eval_loss"], rel=1e-4), "a step of 4 batches is one mean"


# ------------------------------------------------------------------------------------------------ what is said and left
def test_what_a_run_leaves(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(llama.parent)
    job = Job(Path(llama.name), tmp_path)
    job.write(texts())
    more = ("--epochs", "2", "--batch-size", "4", "--eval-split", "0.2", "--r", "4")
    assert job.run(*more) == 0
    printed, bar = capsys.readouterr()
    assert "step 4 of 4: loss" in bar, "a line of each step"
    names = {path.name for path in job.out.iterdir()} - {".lock"}
    assert names == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "checkpoint-2", "checkpoint-4", "loss.png",
        "results.json", "run.json",
    }  # fmt: skip
    assert (job.out / "loss.png").read_bytes().startswith(b"\x89PNG") and (job.out / "loss.png").stat().st_size > 9000
    assert peft.PeftConfig.from_pretrained(job.out).base_model_name_or_path == str(llama.resolve())
    found = job.results()
    assert found["rows"] == 8 and found["rows_held_out"] == 2 and found["steps"] == 4 and found["seconds"] > 0
    for said in (f"trainable parameters: {found['trainable_parameters']:,} of", "steps: 4, ", "(step 1) -> ", "2 rows"):
        assert said in printed
    left = {path: path.stat().st_mtime_ns for path in job.out.rglob("*") if path.is_file()}
    assert job.run(*more) == 0
    assert "finished by an earlier run, kept" in capsys.readouterr().out
    assert left == {path: path.stat().st_mtime_ns for path in job.out.rglob("*") if path.is_file()}


def test_without_matplotlib(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    job = Job(llama, tmp_path)
    job.write(texts(1))
    assert job.run("--max-steps", "1") == 0
    assert "no picture: matplotlib is not installed" in capsys.readouterr().out
    assert not (job.out / "loss.png").exists() and job.results()["evaluations"] == [], "one line: nothing to hold out"


def test_a_loss_that_is_no_number_ends_the_run(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = Job(llama, tmp_path)
    job.write(texts())
    assert job.run("--max-steps", "9", "--lr", "1e38", *ALL) == 1
    assert "a smaller --lr may help" in capsys.readouterr().err
    assert not (job.out / "adapter_config.json").exists()
    assert job.run("--max-steps", "2", *ALL) == 0, "there was nothing to lose: OUT can be used with other settings"

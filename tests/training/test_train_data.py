"""`peft-fast train`: an option or line that cannot be used ends in one line, before anything is loaded or written."""

import json
from array import array
from pathlib import Path
from typing import Any

import pytest
from train_jobs import TEXTS, Job, labelled, pairs, save_bert, save_llama, save_t5, texts

from peft_fast.cli.main import main
from peft_fast.generation.model import ByteCodec
from peft_fast.jobs.errors import JobError
from peft_fast.training import model as train_model
from peft_fast.training.data import check
from peft_fast.training.rows import ByteText, Collator, Rows, TokenizerText, split


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def job(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A job that must not come as far as reading weights."""
    monkeypatch.setattr(train_model, "build", lambda *_: pytest.fail("weights are read"))
    return Job(llama, tmp_path)


def error(job: Job, capsys: pytest.CaptureFixture[str], *more: str, code: int = 2) -> str:
    """What the command says of it: one line, the exit code, and nothing in --out."""
    capsys.readouterr()
    try:
        found = main(job.arguments(*more))
    except SystemExit as stop:  # argparse
        found = int(stop.code or 0)
    out, err = capsys.readouterr()
    assert found == code and not out and not job.out.exists(), err
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("peft-fast"), err
    return lines[0]


# ------------------------------------------------------------------------------------------------ lines
GOOD = b'{"text": "good"}'


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "bad', "not JSON: Unterminated string"),
        (b'{"text": "gr\xf6\xdfer"}', "not UTF-8, byte 13 of the line is 0xf6"),
        (b'["text"]', "expected a JSON object, got ['text']"),
        (b"[" * 100_000, "not JSON"),
        (b'{"txt": "x"}', 'got "txt"; --task causal-lm expects "text" or "prompt" and "completion"'),
        (b"{}", 'got no keys; --task causal-lm expects "text"'),
        (b'{"text": "x", "label": 1}', '"text" and "label"; --task causal-lm expects "text" or "prompt" and'),
        (b'{"text": "x", "label": 1}', "(such lines are for --task seq-cls)"),
        (b'{"text": "x", "prompt": "y", "completion": "z"}', 'got "text" and "prompt" and "completion"'),
        (b'{"prompt": "x"}', 'got "prompt"; --task causal-lm'),
        (b'{"prompt": "x", "completion": "y"}', 'has "prompt" and "completion", the lines before "text"'),
        (b'{"text": 5}', '"text" must be a text, got 5'),
        (b'{"text": null}', '"text" must be a text, got None'),
        (b'{"text": ""}', '"text" is empty'),
        (b'{"text": " \\n"}', '"text" is empty'),
        (b'{"text": "\\ud800"}', '"text" has half of a surrogate pair'),
    ],
)  # fmt: skip
def test_a_line_that_is_wrong(line: bytes, said: str, job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.write([GOOD, b"", GOOD, line, GOOD])
    message = error(job, capsys)
    assert f"{job.data}, line 4: " in message and said in message and len(message) < 400


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (True, '"label" must be a text or a whole number, got True'), (1.5, "got 1.5"), (None, "got None"),
        ("", '"label" must be a text'), (["a"], "must be a text"), (3, "\"label\" is 3, lines before have 'bad'"),
    ],
)  # fmt: skip
def test_a_label_that_is_wrong(label: Any, said: str, job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.write([labelled()[0], {"text": "x", "label": label}])
    message = error(job, capsys, "--task", "seq-cls")
    assert f"{job.data}, line 2: " in message and said in message


def test_pairs_need_both_texts(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.write([{"prompt": "x", "completion": " "}])
    assert 'line 1: "completion" is empty' in error(job, capsys)


def test_labels_of_the_whole_file(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.write([{"text": "x", "label": "same"}] * 3)
    assert "every line has the label 'same'" in error(job, capsys, "--task", "seq-cls")
    job.write(labelled())
    other = job.write([{"text": "x", "label": "new"}], job.data.with_name("other.jsonl"))
    message = error(job, capsys, "--task", "seq-cls", "--eval-data", str(other))
    assert f"--eval-data {other}: the label 'new' is not in {job.data}" in message


def test_files(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"--data {job.data}: there is no such file" in error(job, capsys)
    job.write([])
    assert 'the file has no lines; expected "text"' in error(job, capsys)
    job.write([b"", b"  "])
    assert "the file has no lines" in error(job, capsys)
    job.write(texts())
    assert "--eval-data" in error(job, capsys, "--eval-data", str(job.data.parent / "none"))
    assert "this is a directory" in error(job, capsys, "--eval-data", str(job.data.parent))


# ------------------------------------------------------------------------------------------------ options
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "prefix", "--r", "4"], "--r is for --method lora, not for prefix"),
        (["--num-virtual-tokens", "4"], "is for --method prefix or prompt or p-tuning, not for lora"),
        (["--target-modules", "q_proj", "qproj"], "modules qproj: the model has no such module; it has down_proj"),
        (["--target-modules", "all-linear", "v_proj"], "--target-modules all-linear: the model has no such module"),
        (["--max-length", "65"], "--max-length 65: the model has 64 positions"),
        (["--max-length", "60", "--method", "prompt", "--num-virtual-tokens", "5"], "5 of them for the learned tokens"),
        (["--method", "prefix", "--num-virtual-tokens", "63"], "none is left for a text"),
        (["--task", "seq2seq"], 'got "text"; --task seq2seq expects "prompt" and "completion" (such lines are for'),
        (["--task", "token-cls"], "invalid choice: 'token-cls'"),
        (["--method", "dora"], "invalid choice: 'dora'"),
        (["--quantize", "int4"], "invalid choice: 'int4'"),
        (["--epochs", "2", "--max-steps", "3"], "not allowed with argument"),
        (["--eval-split", "1"], "must be a fraction from 0 (no evaluation) to below 1, got '1'"),
        (["--lr", "nan"], "must be a number above 0, got 'nan'"),
        (["--lora-dropout", "1.0"], "must be a number from 0 to below 1"),
        (["--r", "0"], "must be a whole number, 1 or more, got '0'"),
        (["--device", "cuda:7"], "--device cuda:7"),
        (["--resume"], "--resume: there is no run in"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_an_option_that_cannot_be_used(
    options: list[str], said: str, job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    job.write(texts())
    assert said in error(job, capsys, *options)


def test_a_model_that_cannot_be_used(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job.write(texts())
    llama = job.model
    job.model = tmp_path / "nowhere"
    assert "nowhere: expected the directory of a model, with config.json" in error(job, capsys)
    job.model.mkdir()
    (job.model / "config.json").write_text("{")
    assert "nowhere: no model that transformers can read: " in error(job, capsys)
    (job.model / "config.json").write_text('{"model_type": "unheard-of"}')
    assert "no model that transformers can read: " in error(job, capsys)
    config = json.loads((llama / "config.json").read_text())
    (job.model / "config.json").write_text(json.dumps(config))
    assert "nowhere: there are no weights in it" in error(job, capsys)
    (job.model / "model.safetensors").write_bytes(b"")
    (job.model / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    assert "there is no tokenizer in it, and bytes are tokens only where the vocabulary is 256" in error(job, capsys)


def test_models_have_their_tasks(
    job: Job, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    job.write(pairs())
    assert "llama has no model for --task seq2seq" in error(job, capsys, "--task", "seq2seq")
    job.model = save_t5(tmp_path_factory.mktemp("t5"))
    assert "t5 has no model for --task causal-lm" in error(job, capsys)
    job.model = save_bert(tmp_path_factory.mktemp("bert"))
    assert "bert has no model for --task seq2seq" in error(job, capsys, "--task", "seq2seq")


def test_packages_that_are_missing(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job.write(texts())
    found = train_model.find_spec
    monkeypatch.setattr(train_model, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    assert "--quantize nf4 needs bitsandbytes" in error(job, capsys, "--quantize", "nf4")
    monkeypatch.setattr(train_model, "find_spec", lambda name: None if name == "accelerate" else found(name))
    assert 'pip install "peft_fast[train]"' in error(job, capsys)


def test_out_that_is_something_else(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.write(texts())
    job.out.write_text("precious")
    assert main(job.arguments()) == 2 and "expected a directory, this is a file" in capsys.readouterr().err
    job.out.unlink()
    job.out.mkdir()
    (job.out / "thesis.txt").write_text("precious")
    assert main(job.arguments()) == 2
    assert "has other files in it (thesis.txt); name a new directory" in capsys.readouterr().err
    assert [path.name for path in job.out.iterdir()] == ["thesis.txt"]


# ------------------------------------------------------------------------------------------------ rows
def rows_of(job: Job, task: str, text: Any, limit: int, classes: Any = ()) -> Rows:
    lines = check(job.data, task, "--data")
    return Rows(lines, range(len(lines.offsets)), task, text, limit, classes)


BYTES = ByteText(ByteCodec(0, frozenset()), 9)


def test_only_the_completion_is_learned(job: Job) -> None:
    job.write([{"prompt": "ab", "completion": "cd"}, {"prompt": "abcdef", "completion": "gh"}])
    rows = rows_of(job, "causal-lm", BYTES, 6)
    assert rows[0] == {"input_ids": [0, *b"abcd", 9], "labels": [-100, -100, -100, *b"cd", 9]}
    assert rows[1] == {"input_ids": [0, *b"efgh", 9], "labels": [-100, -100, -100, *b"gh", 9]}, "its begin and its end"
    assert (rows.asked, rows.cut) == (2, 1)
    short = rows_of(job, "causal-lm", BYTES, 3)
    assert short[1] == {"input_ids": [0, *b"gh"], "labels": [-100, *b"gh"]}


def test_all_of_a_text_is_learned(job: Job) -> None:
    job.write(["\ufeff".encode() + b'{"text": "ab", "id": 7}', b"", b'{"text": "abcdef"}'])
    rows = rows_of(job, "causal-lm", BYTES, 5)
    assert rows[0] == {"input_ids": [0, *b"ab", 9], "labels": [-100, *b"ab", 9]}
    assert rows[1] == {"input_ids": [0, *b"abcd"], "labels": [-100, *b"abcd"]} and rows.cut == 1
    batch = Collator(3)([rows[0], rows[1]])
    assert batch["input_ids"].tolist() == [[0, *b"ab", 9, 3], [0, *b"abcd"]]
    assert batch["labels"].tolist() == [[-100, *b"ab", 9, -100], [-100, *b"abcd"]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1] * 5]


def test_other_tasks(job: Job) -> None:
    job.write(pairs(1))
    row = rows_of(job, "seq2seq", BYTES, 4)[0]
    assert row == {"input_ids": [0, *TEXTS[0][:3].encode()], "labels": list(TEXTS[0][5:9].encode())}
    job.write(labelled())
    rows = rows_of(job, "seq-cls", BYTES, 64, ["bad", "good"])
    assert [row["labels"] for row in (rows[0], rows[1])] == [0, 1]
    assert Collator(0)([rows[0], rows[1]])["labels"].tolist() == [0, 1]


def test_tokenizer(job: Job, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(save_bert(tmp_path / "bert"))
    a, b, c, d = tokenizer("a b c d", add_special_tokens=False).input_ids
    job.write([{"prompt": "a b", "completion": "c d"}])
    row = rows_of(job, "causal-lm", TokenizerText(tokenizer, 2), 64)[0]
    assert row == {"input_ids": [1, a, b, 2, c, d, 2], "labels": [-100] * 4 + [c, d, 2]}
    job.write([{"text": "a b c d", "label": 1}])
    assert rows_of(job, "seq-cls", TokenizerText(tokenizer, None), 4, [1])[0]["input_ids"] == [1, a, b, 2]


def test_a_text_in_which_nothing_is_predicted(job: Job) -> None:
    job.write([{"text": "ab"}, {"text": "a"}])
    rows = rows_of(job, "causal-lm", ByteText(ByteCodec(None, frozenset()), None), 64)
    with pytest.raises(JobError, match="line 2: a single token, which nothing predicts"):
        rows.check_each_has_something_to_learn()


def test_split() -> None:
    train, held_out = split(100, 0.1, 0)
    assert len(held_out) == 10 and sorted(train + held_out) == list(range(100))
    assert train == sorted(train) and held_out != split(100, 0.1, 1)[1] and held_out == split(100, 0.1, 0)[1]
    assert [len(split(n, f, 0)[1]) for n, f in ((1, 0.5), (2, 0.99), (3, 0.01), (9, 0.0))] == [0, 1, 1, 0]


def test_lines_are_not_kept_in_memory(job: Job) -> None:
    job.write([{"text": "x" * 1000 + str(i)} for i in range(50)])
    lines = check(job.data, "causal-lm", "--data")
    assert isinstance(lines.offsets, array) and lines.read(49)["text"].endswith("x49") and len(lines.offsets) == 50

"""`peft-fast demo`: wins, fails when it should, stops and goes on, and leaves files that peft reads."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peft_fast.cli.main import main
from peft_fast.demo import batch as demo_batch, data as demo_data, report as demo_report, run as demo
from peft_fast.jobs.errors import JobError

NAMES = list(demo_data.NAMES)
PREFIX = demo_data.CODE
FILES = ["adapter_config.json", "adapter_model.safetensors"]
WINNING = {
    "base": {"a": 2.0, "b": 2.0},
    "a": {"a": 1.5, "b": 2.1},
    "b": {"a": 1.9, "b": 1.4},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that succeeded; tests that change it take a copy."""
    out = tmp_path_factory.mktemp("demo") / "out"
    assert main(["--debug", "demo", "--quick", "--out", str(out)]) == 0
    return out


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def test_every_adapter_wins(finished: Path) -> None:
    losses = json.loads((finished / "results.json").read_text(encoding="utf-8"))["losses"]
    assert list(losses) == ["base", *NAMES]
    for name in NAMES:
        assert losses[name][name] < losses["base"][name]
        assert losses[name][name] == min(losses[row][name] for row in losses)
    assert losses["base"][PREFIX] - losses[PREFIX][PREFIX] > 0.03, "the prefix has learned something"
    assert (finished / "results.png").read_bytes().startswith(b"\x89PNG")
    assert not [path for path in finished.rglob("*") if path.name.startswith(".")], "left-over parts of atomic writes"


def test_peft_reads_the_adapters(finished: Path) -> None:
    import peft

    device = torch.device("cpu")
    ours = demo.load_adapters(finished / "base", finished / "adapters", NAMES, device)
    rows = demo_data.windows(demo_data.to_ids(demo_data.package_docstrings("email")), 64)[:2]
    for name in NAMES:
        theirs = peft.PeftModel.from_pretrained(demo.load_base(finished / "base", device), finished / "adapters" / name)
        ours.set_adapter(name)
        with torch.no_grad():
            torch.testing.assert_close(ours(input_ids=rows).logits, theirs.eval()(input_ids=rows).logits)


def test_one_batch_for_all_adapters(finished: Path) -> None:
    """Its tokens are those of each adapter alone, here to the last one; the check sees a row with another adapter."""
    model = demo.load_adapters(finished / "base", finished / "adapters", NAMES, torch.device("cpu"))
    rows = demo_batch.rows_for({name: demo_data.split(demo_data.texts_of(name))[1] for name in NAMES})
    assert [row.adapter for row in rows] == [*NAMES, None] and len({len(row.ids) for row in rows}) > 1
    tokens = demo_batch.together(model, rows, 24)
    assert tokens.tolist() == torch.cat(demo_batch.one_by_one(model, rows, 24)).tolist()
    for i, row in enumerate(rows):
        demo_batch.check(model, row, tokens[i])
        with pytest.raises(JobError, match=f"mixed batch, {NAMES[i - 1]}: token .* is not the one"):
            demo_batch.check(model, row._replace(adapter=NAMES[i - 1]), tokens[i])
    model.get_input_embeddings().weight.data.fill_(torch.nan)
    with pytest.raises(JobError, match="nan below"):
        demo_batch.check(model, rows[0], tokens[0])


def test_what_is_said_of_the_batch(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixed = json.loads((finished / "results.json").read_text(encoding="utf-8"))["mixed_batch"]
    assert (mixed["rows"], mixed["tokens"]) == (6, 144) and mixed["seconds"] > 0
    assert mixed["times_faster"] == pytest.approx(mixed["seconds_one_by_one"] / mixed["seconds"], rel=0.02)
    made_up = {"rows": 5, "tokens": 240, "seconds": 0.5, "seconds_one_by_one": 2.0, "times_faster": 4.0}
    text = " ".join(demo_batch.report(made_up).split())
    assert "4 adapters and the base" in text and "240 tokens in 0.50 s, 4.0 times faster" in text and "(2.00 s)" in text


def test_a_wrong_batch_fails_the_demo(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    together = demo_batch.together
    monkeypatch.setattr(demo_batch, "together", lambda model, rows, length: together(model, rows, length).flip(0))
    assert main(["demo", "--quick", "--out", str(copy)]) == 1
    assert "is not the one that it chooses alone" in capsys.readouterr().err.strip().splitlines()[-1]


def test_requests_for_generate(copy: Path) -> None:
    """The command that the demo names at its end."""
    command = ["generate", "--model", str(copy / "base"), "--adapters-dir", str(copy / "adapters")]
    assert main([*command, "--in", str(copy / "requests.jsonl"), "--out", str(copy / "answers.jsonl")]) == 0
    answers = [json.loads(line) for line in (copy / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [answer["adapter"] for answer in answers] == [*NAMES, None] and all(answer["text"] for answer in answers)


def test_a_second_run_trains_nothing_and_finds_the_same(
    copy: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(*args: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(demo, "train", train)
    assert main(["--debug", "demo", "--quick", "--out", str(copy)]) == 0
    both = [json.loads((out / "results.json").read_text(encoding="utf-8"))["losses"] for out in (copy, finished)]
    assert both[0] == both[1]
    text = capsys.readouterr().out
    assert "What to try next" in text and str(copy / "results.png") in text
    with pytest.raises(AssertionError, match="trained again"):  # other settings, other adapters
        main(["--debug", "demo", "--quick", "--seed", "1", "--out", str(copy)])
    with pytest.raises(AssertionError, match="trained again"):
        main(["--debug", "demo", "--quick", "--fresh", "--out", str(copy)])


def test_swapped_adapters_lose(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapters = copy / "adapters"
    (adapters / "decimal").rename(adapters / "spare")
    (adapters / "email").rename(adapters / "decimal")
    (adapters / "spare").rename(adapters / "email")
    assert main(["demo", "--quick", "--out", str(copy)]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "adapter decimal does not win" in error and "adapter email does not win" in error
    assert "logging" not in error


def test_broken_adapter_is_one_line(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = copy / "adapters" / "email" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert main(["demo", "--quick", "--out", str(copy)]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("peft-fast: error:") and "email" in error and "safetensors" in error


def test_damaged_base_is_copied_again(copy: Path) -> None:
    file = copy / "base" / "model.safetensors"
    file.write_bytes(b"x" * 100)
    demo.copy_base(copy)
    assert file.read_bytes() == (demo.BASE / "model.safetensors").read_bytes()


def test_missing_base_and_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "BASE", tmp_path / "nowhere")
    assert main(["demo", "--out", str(tmp_path / "out")]) == 1
    assert "the base model is missing" in capsys.readouterr().err
    monkeypatch.setattr(demo_data, "_library", lambda: tmp_path)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 1
    assert "no sources for 'asyncio'" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send to another process")
def test_ctrl_c_and_going_on(tmp_path: Path) -> None:
    """Stopped after the first adapter; the second run keeps that one and starts with the next."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "peft_fast", "demo", "--quick", "--steps", "8", "--out", str(out)]

    def stop_when(started: str) -> tuple[int, str]:
        log = tmp_path / "log"
        with log.open("w") as stderr:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr)
            limit = time.monotonic() + 240
            while started not in log.read_text() and process.poll() is None and time.monotonic() < limit:
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=120)
        return process.returncode, log.read_text()

    code, text = stop_when("training decimal")
    assert code == 130 and "Traceback" not in text and "goes on from there" in text
    assert list(json.loads((out / "adapters" / "done.json").read_text())) == ["asyncio"]
    code, text = stop_when("training email")
    assert code == 130 and "training asyncio" not in text and "training decimal" in text
    assert list(json.loads((out / "adapters" / "done.json").read_text())) == ["asyncio", "decimal"]


def test_the_prefix_is_one_of_peft(finished: Path) -> None:
    """Trained beside nothing, saved in PEFT's format, in the mixed batch; said in the report with its true size."""
    directory = finished / "adapters" / PREFIX
    config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["peft_type"] == "PREFIX_TUNING" and sorted(path.name for path in directory.iterdir()) == FILES
    kinds = json.loads((finished / "results.json").read_text(encoding="utf-8"))["adapters"]
    shape = load_file(directory / "adapter_model.safetensors")["prompt_embeddings"].shape
    assert kinds[PREFIX] == {"method": "PREFIX_TUNING", "virtual_tokens": shape[0], "numbers": shape.numel()}
    assert list(kinds) == NAMES and all(kinds[name]["method"] == "LORA" for name in demo_data.DOMAINS)
    assert demo_report.said_of(kinds).splitlines() == [
        f"LoRA of rank 16, {kinds['email']['numbers']:,} numbers: asyncio, decimal, email, logging",
        f"prefix of 16 virtual tokens, 8,192 numbers: {PREFIX}",
    ]


@pytest.mark.parametrize(
    ("row", "package", "loss", "lost"),
    [("a", "a", 2.0, ["a"]), ("b", "a", 1.5, ["a"]), ("a", "a", float("nan"), ["a"]), ("b", "b", 1.9, [])],
    ids=["base as good", "another adapter as good", "nan", "still wins"],
)
def test_losers(row: str, package: str, loss: float, lost: list[str]) -> None:
    assert demo_report.losers(WINNING, "base") == []
    changed = {name: {**line, package: loss} if name == row else line for name, line in WINNING.items()}
    assert [sentence.split()[1] for sentence in demo_report.losers(changed, "base")] == lost


def test_table() -> None:
    lines = demo_report.table(WINNING, "base").splitlines()
    assert lines[4].split() == ["a", "1.500", "2.000", "+0.500", "|", "1.500*", "2.100"]


def test_picture_needs_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "matplotlib is not installed" in demo_report.draw(WINNING, "base", tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_text_is_split_by_docstring() -> None:
    """Nothing of a held-out docstring was trained on, the base has seen no domain, and bytes survive."""
    general = set(demo_data.general_text())
    for name in NAMES:
        texts = demo_data.texts_of(name)
        train, held_out = demo_data.split(texts)
        assert len(held_out) > 30 and not set(train) & set(held_out) and len(train) + len(held_out) == len(texts)
        common = general & set(texts)
        assert len(common) < 0.05 * len(texts), "a few one-line docstrings stand in several packages"
    ids = demo_data.to_ids(["größe", "b"])
    assert bytes(ids.tolist()) == "größe\0b\0".encode()
    assert demo_data.windows(torch.arange(10), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_base_model_is_what_its_script_makes() -> None:
    config = json.loads((demo.BASE / "config.json").read_text(encoding="utf-8"))
    scope: dict[str, object] = {"__name__": "train_base"}
    script = Path(__file__).resolve().parents[2] / "examples" / "train_base.py"
    exec(compile(script.read_text(encoding="utf-8"), str(script), "exec"), scope)
    assert {name: config[name] for name in scope["CONFIG"]} == scope["CONFIG"]


def test_examples_of_the_pages(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """README's Python, one block after the other, and the first of docs/prompts.md, where the demo has run.

    What they do not define is made up here.
    """
    root = Path(__file__).resolve().parents[2]
    readme, prompts = (
        re.findall(r"```python\n(.*?)```", (root / page).read_text(encoding="utf-8"), flags=re.S)
        for page in ("README.md", "docs/prompts.md")
    )
    assert len(readme) == 2
    monkeypatch.chdir(copy.parent)
    copy.rename("peft_fast_demo")
    rows = demo_data.windows(demo_data.to_ids(demo_data.texts_of(PREFIX)), 64)
    ids = rows[:4, :16]
    scope: dict[str, Any] = {
        "batches": rows[:32].split(8),
        "inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 8},
    }
    exec(readme[0], scope)
    assert set(scope["model"].peft_config) == {"email", "logging"}
    exec(readme[1], scope)
    scope["model"].train()(input_ids=ids, labels=ids).loss.backward()
    quantized = [type(module).__name__ for module in scope["model"].modules()]
    assert "Linear4bit" in quantized and all(p.grad is not None for p in scope["model"].parameters() if p.requires_grad)
    exec(prompts[0], scope)
    assert (copy.parent / "my_prefix" / "adapter_model.safetensors").is_file()

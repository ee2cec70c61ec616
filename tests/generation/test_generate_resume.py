"""`peft-fast generate`: killed or stopped, the same command goes on; what belongs to something else is refused."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from generate_jobs import Job, Json, save_llama, spy_on_batches, varied

from peft_fast.generation import (
    batches as generate_batches,
    model as generate_model,
    results as generate_results,
    run as generate,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("generate"))


@pytest.fixture
def job(saved: Path, tmp_path: Path) -> Job:
    return Job(saved, tmp_path)


# ------------------------------------------------------------------------------------------------ going on
def mixed_requests() -> list[Json | str]:
    """Greedy, sampled, with beams, wrong: 26 lines."""
    lines: list[Json | str] = list(varied(24))
    for i in range(0, 24, 3):
        lines[i] |= {"do_sample": True, "temperature": 1.5}
    lines[5] |= {"num_beams": 2}
    return [*lines[:9], "{broken", *lines[9:], {"prompt": "", "id": 7}]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_killed_twice_and_gone_on(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL in the middle of writing a line; nothing is lost or doubled, and the file is that of one run."""
    monkeypatch.setattr(generate, "WINDOW", 3)
    job.write(*mixed_requests())
    assert job.run("--batch-size", "3") == 1
    expected = job.out.read_bytes()
    job.out.unlink()
    code = """if True:
        import os, signal, sys
        from peft_fast.generation import results as generate_results, run as generate
        from peft_fast.cli.main import main
        generate.WINDOW = 3
        add = generate_results.Results.add
        def killed(self, records):
            count = add(self, records)
            if self.next_index >= int(sys.argv[1]):
                self._file.write(b'{"index": 99, "adap')
                self._file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return count
        generate_results.Results.add = killed
        main(sys.argv[2:])
    """
    kept = 0
    for at in (4, 15):
        command = [sys.executable, "-c", code, str(at), *job.arguments("--batch-size", "3")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert done.returncode == -signal.SIGKILL, done.stderr
        left = job.out.read_bytes()
        whole, _, torn = left.rpartition(b"\n")
        assert expected.startswith(whole + b"\n") and torn.startswith(b'{"index": 99')
        assert kept < at <= (kept := whole.count(b"\n") + 1) < 26
    assert job.run("--batch-size", "3") == 1
    assert job.out.read_bytes() == expected


@pytest.mark.parametrize("at", [0, 1, 3, 7, 8])
def test_stopped_with_ctrl_c_and_gone_on(
    at: int, job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generate, "WINDOW", 4)
    batches = spy_on_batches(monkeypatch)
    job.write(*mixed_requests())
    assert job.run("--batch-size", "3") == 1
    expected, whole = job.out.read_bytes(), [[row.line for row in batch] for batch in batches]
    job.out.unlink()
    run = generate_batches.run
    batches.clear()

    def stopped(generator: Any, batch: Any, seed: int) -> Any:
        if len(batches) == at:
            raise KeyboardInterrupt
        return run(generator, batch, seed)

    with monkeypatch.context() as patch:
        patch.setattr(generate_batches, "run", stopped)
        assert job.run("--batch-size", "3") == 130
    assert "goes on from there" in capsys.readouterr().err
    assert expected.startswith(job.out.read_bytes())
    kept, windows, read = len(job.results()), [], generate._read
    batches.clear()
    monkeypatch.setattr(
        generate, "_read", lambda reader, first, lines: windows.append(first) or read(reader, first, lines)
    )
    assert job.run("--batch-size", "3") == 1
    assert job.out.read_bytes() == expected
    assert windows == [first for first in (0, 12, 24) if kept < first + 12]
    left = [lines for lines in whole if max(lines) >= kept]
    assert [[row.line for row in batch] for batch in batches] == left, (
        "the same batches, without those that are finished"
    )
    assert len(left) < len(whole) or kept == 0
    out = capsys.readouterr()
    assert (f"{kept} of them by an earlier run" in out.out) is bool(kept) and "2 of 26 requests" in out.err


def test_a_finished_file_is_left_alone(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job.write(*varied(3))
    assert job.run() == 0
    before = job.out.read_bytes()
    text = capsys.readouterr().out
    assert "3 requests, 0 with an error" in text and "(no adapter) 2, de 1" in text
    with monkeypatch.context() as patch:
        patch.setattr(generate_model, "load", None)
        assert job.run() == 0 and job.out.read_bytes() == before
    job.out.write_bytes(before[:-5])
    assert job.run() == 0 and job.out.read_bytes() == before, "the last line was torn: made again"
    assert "2 of them by an earlier run" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    ["requests", "adapter", "base", "--seed", "--batch-size", "--settings", "no meta", "gap", "text", "torn meta"],
)
def test_results_of_something_else_are_refused(
    change: str, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(job.saved, tmp_path / "own")
    job.saved = tmp_path / "own"
    requests = varied(4)
    job.write(*requests)
    assert job.run() == 0
    more, words, meta = [], "", generate_results.meta_path(job.out)
    lines = job.out.read_bytes().splitlines(keepends=True)
    if change == "requests":
        job.write(*requests[:3], {**requests[3], "max_new_tokens": 7})
        words = "another --in"
    elif change in ("adapter", "base"):
        path = (
            job.saved / {"adapter": "adapters/fr/adapter_model.safetensors", "base": "base/model.safetensors"}[change]
        )
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")
        words = {"adapter": "another --adapters", "base": "another --model"}[change]
    elif change.startswith("--"):
        more, words = (
            [change, '{"top_k": 3, "do_sample": true}' if change == "--settings" else "7"],
            f"another {change}",
        )
    elif change == "no meta":
        meta.unlink()
        words = f"{meta.name}, which says what it was made from, is missing"
    elif change == "torn meta":
        meta.write_bytes(meta.read_bytes()[:20])
        words = "missing or unreadable"
    else:
        lines[1] = lines[2] if change == "gap" else b"text\n"
        job.out.write_bytes(b"".join(lines))
        words = "line 2 is not the result of request 1"
    before = job.out.read_bytes()
    capsys.readouterr()
    assert job.run(*more) == 2
    error = capsys.readouterr().err
    assert words in error and "--overwrite" in error and str(job.out) in error
    assert job.out.read_bytes() == before
    if change != "base":
        assert job.run("--overwrite", *more) == 0 and len(job.results()) == 4


def test_results_are_on_the_disk_before_anything_is_said(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    sync = os.fsync
    with generate_results.Results(job.out, {}) as results:
        monkeypatch.setattr(os, "fsync", lambda fd: (sizes.append(os.fstat(fd).st_size), sync(fd)))
        record = {"new_tokens": 1, "adapter": None}
        assert results.add({1: {"index": 1, **record}}) == 0 and sizes == []
        assert results.add({0: {"index": 0, **record}, 3: {"index": 3, **record}}) == 2
        assert sizes == [job.out.stat().st_size] and [r["index"] for r in job.results()] == [0, 1]
        assert results.add({0: {"index": 0, **record}}) == 0, "it is there already"
    assert job.out.read_bytes().count(b"\n") == 2


def test_digests(tmp_path: Path) -> None:
    """What counts: names, sizes, both ends of large files; readmes and hidden files do not."""
    weights, readme, requests = tmp_path / "m.safetensors", tmp_path / "README.md", tmp_path / "requests"
    content = bytearray(5 << 19)  # 2.5 megabytes
    weights.write_bytes(content)
    seen = [generate_results.digest_of_directory(tmp_path)]
    readme.write_text("text")
    assert generate_results.digest_of_directory(tmp_path) == seen[0]
    for place in (0, len(content) - 1, len(content) - (1 << 20)):
        content[place] ^= 1
        weights.write_bytes(content)
        seen.append(generate_results.digest_of_directory(tmp_path))
    weights.rename(tmp_path / "n.safetensors")
    seen.append(generate_results.digest_of_directory(tmp_path))
    assert len(set(seen)) == 5
    for text, lines in (("", 0), ("a", 1), ("a\n", 1), ("a\nb", 2), ("\n\n", 2)):
        requests.write_text(text)
        digest, found = generate_results.digest_of_input(requests)
        assert found == lines and digest not in seen
        seen.append(digest)


def test_two_runs_do_not_write_one_file(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fcntl")
    with generate_results.Results(job.out, {}):
        job.write(*varied(1))
        assert job.run("--overwrite") == 1
        assert "another run is writing it" in capsys.readouterr().err
    assert job.run() == 0

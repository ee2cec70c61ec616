"""A save that is killed at any step leaves the old adapter or the new one, and no file of the user's is touched."""

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from peft_fast.checkpoint import atomic, locate, open_weights, read_config, recover, save_adapter, write

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills are made in forked processes")

KILLED = 77
NAME = "x.lora_A.weight"
STEPS = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "chmod")


def save(directory: Path, tag: int, **kwargs) -> None:
    """Save an adapter whose config and weights both carry `tag`."""
    save_adapter(
        directory, {"peft_type": "LORA", "r": 2, "tag": tag}, {NAME: torch.full((2, 300), float(tag))}, **kwargs
    )


def load(directory: Path) -> int:
    """The tag of a directory; fails if config and weights are of different saves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the .bin format warns
        weights = open_weights(directory).load()[NAME]
    tags = {read_config(directory)["tag"], *weights.unique().tolist()}
    assert len(tags) == 1, f"config and weights of different saves: {tags}"
    return int(tags.pop())


def raw_tag(directory: Path) -> int:
    """What a reader that knows no journal sees."""
    tag = json.loads((directory / "adapter_config.json").read_text())["tag"]
    assert f"{float(tag)}" in str(open_weights(directory).load()[NAME][0, 0].item())
    return tag


def run_killed(step: int, action: Callable[[], None]) -> tuple[bool, list[str]]:
    """Run `action` in a process that dies before its step number `step`. Returns (died, the steps it made)."""
    report, child_end = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            made: list[str] = []

            def before(name: str) -> None:
                if len(made) == step:
                    os._exit(KILLED)
                made.append(name)
                os.write(child_end, f"{name}\n".encode())

            for name in STEPS:
                original = getattr(os, name)
                setattr(os, name, lambda *a, _f=original, _n=name, **k: (before(_n), _f(*a, **k))[1])
            exchange = atomic._exchange
            atomic._exchange = lambda a, b: (before("exchange"), exchange(a, b))[1]
            save_file = write.save_file

            def torn_save_file(tensors, path, **kwargs) -> None:
                save_file(tensors, path, **kwargs)
                if len(made) == step:  # the process dies with half of the file written
                    os.truncate(path, os.path.getsize(path) // 2)
                before("write")

            write.save_file = torn_save_file
            action()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(child_end)
    with os.fdopen(report) as lines:
        made = lines.read().split()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, KILLED), f"the save failed by itself: {status}"
    return status == KILLED, made


def prepared(kind: str, directory: Path) -> None:
    """What the directory holds before the save that is killed."""
    if kind == "missing":
        return
    directory.mkdir(parents=True)
    if kind != "empty":
        save(directory, 1, safe_serialization=not kind.startswith("bin"), extra_files={"README.md": b"card 1"})
    if kind.endswith("others"):
        (directory / "optimizer.pt").write_bytes(b"state of a Trainer")
        save(directory / "second", 1)


CASES = {
    "missing": {},
    "empty": {},
    "exchange": {"extra_files": {"README.md": b"card 2"}},
    "others": {"extra_files": {"README.md": b"card 2"}},
    "bin_others": {"safe_serialization": False},
    "to_bin_others": {"safe_serialization": False},  # the safetensors file, which readers prefer, has to go
    "to_bin_exchange": {"safe_serialization": False, "extra_files": {"README.md": b"card 2"}},
    "no_exchange": {"extra_files": {"README.md": b"card 2"}},
}


@pytest.mark.parametrize("kind", CASES)
def test_killed_at_every_step(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "no_exchange":
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    seen, step, killed = [], 0, True
    while killed:
        directory = tmp_path / f"{step}" / "adapter"
        directory.parent.mkdir()
        prepared(kind, directory)
        killed, _ = run_killed(step, lambda directory=directory: save(directory, 2, **CASES[kind]))
        if kind == "exchange" or (kind == "missing" and (directory / "adapter_config.json").exists()):
            raw_tag(directory)  # other readers see a whole adapter at every moment
        if directory.exists() and locate(directory, "adapter_config.json") is not None:
            seen.append(load(directory))
        else:
            assert kind in ("missing", "empty")
            seen.append(0)
        check_bystanders(kind, directory)
        save(directory, 3, **CASES[kind])  # the next save works and cleans up
        assert load(directory) == 3
        check_clean(kind, directory)
        step += 1
    assert len(seen) > 6
    assert seen[-1] == 2
    assert set(seen) == ({0, 2} if kind in ("missing", "empty") else {1, 2})
    assert seen == sorted(seen), "once the new adapter is there it stays"


def check_bystanders(kind: str, directory: Path) -> None:
    if kind.endswith("others"):
        assert (directory / "optimizer.pt").read_bytes() == b"state of a Trainer"
        assert load(directory / "second") == 1


def check_clean(kind: str, directory: Path) -> None:
    assert os.listdir(directory.parent) == ["adapter"]
    weights = "adapter_model.safetensors" if CASES[kind].get("safe_serialization", True) else "adapter_model.bin"
    expected = {"adapter_config.json", weights}
    if "extra_files" in CASES[kind] or kind.endswith("others"):
        expected.add("README.md")
    if kind.endswith("others"):
        expected |= {"optimizer.pt", "second"}
    assert set(os.listdir(directory)) == expected


def test_a_failing_disk_leaves_the_old_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("exchange", "others"):
        directory = tmp_path / kind / "adapter"
        prepared(kind, directory)
        before = sorted(os.listdir(directory))

        def full_disk(tensors, path, **kwargs) -> None:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(write, "save_file", full_disk)
            with pytest.raises(OSError, match="No space left"):
                save(directory, 2)
        assert load(directory) == 1
        assert sorted(os.listdir(directory)) == before
        assert os.listdir(directory.parent) == ["adapter"]


def test_everything_is_synced_before_the_commit(tmp_path: Path) -> None:
    """A power cut keeps the order of syncs and renames, nothing else."""
    for kind, commit in (("missing", "rename"), ("exchange", "exchange"), ("others", "rename")):
        directory = tmp_path / kind / "adapter"
        prepared(kind, directory)
        killed, made = run_killed(10**6, lambda directory=directory, kind=kind: save(directory, 2, **CASES[kind]))
        assert not killed
        files = 2 + len(CASES[kind].get("extra_files", ()))
        at = made.index(commit)
        assert made[:at].count("fsync") >= files + 1, (kind, made)  # each file and the folder that holds them
        assert made[at + 1] == "fsync", (kind, made)  # the directory in which the commit happened
        if commit == "rename" and kind == "others":
            moved = max(i for i, name in enumerate(made) if name == "replace")
            forgotten = made.index("rmdir", moved)
            assert "fsync" in made[moved:forgotten], (kind, made)  # files in place before the journal goes


def committed_but_not_moved(directory: Path) -> None:
    """A directory whose save was killed right after the commit."""
    prepared("others", directory)
    _, made = run_killed(10**6, lambda: save(directory, 1))
    run_killed(made.index("rename") + 1, lambda: save(directory, 2))
    assert (directory / atomic.JOURNAL).is_dir()
    assert json.loads((directory / "adapter_config.json").read_text())["tag"] == 1


def test_a_read_only_directory_is_read_through_its_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "adapter"
    committed_but_not_moved(directory)

    def refuse(target: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "_roll_forward", refuse)
        assert recover(directory) is False
        assert load(directory) == 2
    assert (directory / atomic.JOURNAL).is_dir()
    assert recover(directory) is True
    assert not (directory / atomic.JOURNAL).exists()
    assert load(directory) == 2


def test_a_journal_that_no_save_wrote_is_refused(tmp_path: Path) -> None:
    """A link in a journal could move files from elsewhere into the directory."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("s")
    for make in (
        lambda journal: journal.symlink_to(outside),
        lambda journal: (journal.mkdir(), (journal / "adapter_config.json").symlink_to(outside / "secret")),
        lambda journal: (journal.mkdir(), (journal / "folder").mkdir()),
        lambda journal: journal.write_text("a file"),
    ):
        directory = tmp_path / "adapter"
        save(directory, 1)
        make(directory / atomic.JOURNAL)
        with pytest.raises(ValueError, match="not the journal of an interrupted save"):
            read_config(directory)
        with pytest.raises(ValueError, match="not the journal of an interrupted save"):
            save(directory, 2)
        assert (outside / "secret").exists()
        shutil.rmtree(directory)


def test_a_running_save_is_not_cleaned_away(tmp_path: Path) -> None:
    """Staging folders of a save that still runs, and other people's files, are left alone."""
    directory = tmp_path / "adapter"
    save(directory, 1)
    with atomic._staged(tmp_path, f"{atomic._STAGING}adapter-", directory, {}, ()) as running:
        (running / "adapter_config.json").write_text("being written")
        save(directory, 2)
        assert (running / "adapter_config.json").exists()
    foreign = tmp_path / f"{atomic._STAGING}adapter-foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    save(directory, 3)
    assert (foreign / "thesis.txt").read_text() == "mine"


def test_a_file_that_arrives_during_the_exchange_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "adapter"
    save(directory, 1)
    exchange = atomic._exchange

    def late(first: Path, second: Path) -> bool:
        (directory / "late.txt").write_text("mine")
        return exchange(first, second)

    monkeypatch.setattr(atomic, "_exchange", late)
    save(directory, 2)
    assert load(directory) == 2
    assert (directory / "late.txt").read_text() == "mine"
    assert os.listdir(tmp_path) == ["adapter"]


def test_modes_links_and_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "adapter"
    old_umask = os.umask(0o027)
    try:
        save(directory, 1)
    finally:
        os.umask(old_umask)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (directory, *directory.iterdir())}
    assert modes == {"adapter": 0o750, "adapter_config.json": 0o640, "adapter_model.safetensors": 0o640}
    (directory / "adapter_config.json").chmod(0o600)
    save(directory, 2)  # keeps the modes of what it replaces
    modes["adapter_config.json"] = 0o600
    assert modes == {p.name: stat.S_IMODE(p.stat().st_mode) for p in (directory, *directory.iterdir())}

    link = tmp_path / "link"
    link.symlink_to(directory)
    save(link, 3)
    assert link.is_symlink() and load(directory) == 3

    monkeypatch.chdir(directory)
    save(Path("."), 4)
    assert load(Path(".")) == 4 == load(directory)
    with pytest.raises(ValueError, match="should be a directory"):
        save(directory / "adapter_config.json", 5)
    with pytest.raises(ValueError, match="not the name of a file"):
        save(directory, 5, extra_files={"../evil": b""})
    assert load(directory) == 4


@pytest.mark.parametrize("kind", ["missing", "exchange", "others"])
def test_saves_of_several_processes(kind: str, tmp_path: Path) -> None:
    """The last one wins, none fails, nothing is left behind."""
    for repeat in range(3):
        directory = tmp_path / str(repeat) / "adapter"
        directory.parent.mkdir()
        prepared(kind, directory)
        if kind == "exchange":
            (directory / "README.md").unlink()
        children = []
        for first in (10, 20, 30):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    for tag in range(first, first + 5):
                        save(directory, tag)
                    status = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(status)
            children.append(child)
        assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
        assert load(directory) in (14, 24, 34)
        check_bystanders(kind, directory)
        save(directory, 1)
        assert os.listdir(directory.parent) == ["adapter"]


SAVE_FOREVER = """
import sys, torch
from pathlib import Path
from peft_fast.checkpoint import save_adapter
tag = 2
while True:
    weights = {"x.lora_A.weight": torch.full((2, 300), float(tag))}
    save_adapter(Path(sys.argv[1]), {"peft_type": "LORA", "r": 2, "tag": tag}, weights)
    print(tag, flush=True)
    tag += 1
"""


@pytest.mark.parametrize("kind", ["exchange", "others"])
def test_killed_at_random_moments(kind: str, tmp_path: Path) -> None:
    directory = tmp_path / "adapter"
    prepared(kind, directory)
    if kind == "exchange":
        (directory / "README.md").unlink()
    process = subprocess.Popen(
        [sys.executable, "-c", SAVE_FOREVER, str(directory)], stdout=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert process.stdout is not None
    process.stdout.readline()  # torch is loaded, saves follow each other now
    for pause in (0.003, 0.011, 0.002, 0.017, 0.007):
        time.sleep(pause)
        snapshot_before = time.monotonic()
        process.send_signal(signal.SIGSTOP)  # frozen at an arbitrary instruction: the same as killed, for a reader
        time.sleep(0.02)
        copy = tmp_path / "copy"
        shutil.copytree(directory, copy)
        assert load(copy) >= 2
        check_bystanders(kind, copy)
        shutil.rmtree(copy)
        process.send_signal(signal.SIGCONT)
        assert time.monotonic() - snapshot_before < 60
    process.kill()
    process.wait()
    assert load(directory) >= 2
    check_bystanders(kind, directory)
    save(directory, 1)
    assert load(directory) == 1
    assert os.listdir(tmp_path) == ["adapter"]

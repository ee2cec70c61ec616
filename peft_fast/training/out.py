"""The directory of a run of `peft-fast train`.

    run.json          what decides the result: options, digests of data and model; another run is refused by it
    checkpoint-STEP/  the adapter with the state of optimizer and random numbers: where the same command goes on
    adapter_*         the adapter, in PEFT's format, written at the end, atomically; loss.png
    results.json      written last: it is there when the run is finished

A checkpoint's trainer_state.json is written last: one without it, or with half of it, was being written when the
process was killed, and the one before it counts.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..demo.report import write_json
from ..generation.results import digest_of_directory
from ..jobs.errors import JobError, UsageError
from .data import Lines
from .options import Options

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FORMAT = 2  # of the run: a run does not go on with another version's
STATE = "trainer_state.json"
_LOCK, _RUN, RESULTS = ".lock", "run.json", "results.json"
Json = dict[str, Any]


def origin(options: Options, lines: Lines, held_out: Lines) -> Json:
    """What decides the result, as run.json has it."""
    return {
        "format": FORMAT,
        "--model": digest_of_directory(options.model),
        "--data": lines.digest,
        "--eval-data": held_out.digest if options.eval_data else None,
        "--adapter": digest_of_directory(options.adapter) if options.adapter else None,
        **options.of_the_result(),
    }


def check_is_directory(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: expected a directory, this is a file")


def check(options: Options, origin: Json) -> Json | None:
    """The results of a run that is finished, None for one that is not, or has not begun.

    Raises: UsageError for a directory with something else in it, or the run of other settings.
    """
    out = options.out
    content = [path.name for path in out.iterdir() if path.name != _LOCK] if out.is_dir() else []
    if not (out / _RUN).is_file():
        if content:
            raise UsageError(f"--out {out}: has other files in it ({min(content)}); name a new directory")
        if options.resume:
            raise UsageError(f"--resume: there is no run in {out}; leave --resume out to begin one")
        return None
    try:
        left = json.loads((out / _RUN).read_text(encoding="utf-8"))
        different = [key for key in {**left, **origin} if left.get(key) != origin.get(key)]
        finished: Json | None = None
        if (out / RESULTS).is_file():
            finished = json.loads((out / RESULTS).read_text(encoding="utf-8"))
    except (ValueError, TypeError) as error:
        raise UsageError(f"--out {out}: cannot be gone on with, {_RUN} or {RESULTS} is broken: {error}") from None
    if different and (finished is not None or _checkpoints(out)[0]):  # else there is nothing to lose
        further = f"; to train what is there further, add --adapter {out}" if finished is not None else ""
        said = "; ".join(_difference(key, left.get(key), origin.get(key)) for key in different)
        raise UsageError(f"--out {out}: holds a run with other settings: {said}. Name another directory{further}")
    return finished


def begin(out: Path, origin: Json) -> Path | None:
    """Say in OUT what it is of. Returns the last whole checkpoint; what a kill left of others is removed."""
    write_json(out / _RUN, origin)
    whole, torn = _checkpoints(out)
    for path in torn:
        shutil.rmtree(path)
    return whole[max(whole)] if whole else None


def _checkpoints(out: Path) -> tuple[dict[int, Path], list[Path]]:
    """(step -> whole checkpoint, those that are not whole)."""
    whole, torn = {}, []
    for path in out.glob("checkpoint-*"):
        try:
            whole[int(json.loads((path / STATE).read_text(encoding="utf-8"))["global_step"])] = path
        except (OSError, ValueError, TypeError, KeyError):
            torn.append(path)
    return whole, torn


def _difference(key: str, then: Any, now: Any) -> str:
    if key in ("--model", "--data", "--eval-data", "--adapter") and then and now:
        return f"{key} has other content now"
    if key in ("--eval-data", "--adapter"):
        return f"{key} was {'given' if then else 'not given'} then"
    return f"{key} was {json.dumps(then)}, is {json.dumps(now)}"


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """OUT, made if need be, for this process alone; its end, however it comes, releases the lock."""
    out.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JobError(f"{out}: another run is writing it; wait for it, or name another --out") from None
        except OSError:  # a file system without locks
            pass
        yield

"""The results file of `peft-fast generate`: one line per request in the input's order, never torn, and gone on with.

OUT        a line is final once it is there: it was synced before anything was said about it. A run that starts with an
           OUT checks its lines (their "index" counts 0, 1, 2, ...), cuts a torn last one off, and goes on after them.
OUT.meta.json    what OUT was made from: digests of input, model and adapters, and the options that change results.
           It is there before OUT has a line; a run with anything else refuses to add to OUT.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from ..demo.report import write_json
from ..jobs.errors import JobError, UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

BASE_LABEL = "(no adapter)"
_BLOCK = 1 << 20


class Tally:
    """Counts over result lines."""

    def __init__(self) -> None:
        self.lines = self.errors = self.new_tokens = 0
        self.by_adapter: Counter[str] = Counter()

    def add(self, record: Mapping[str, Any]) -> None:
        """Count one result."""
        self.lines += 1
        if "error" in record:
            self.errors += 1
            return
        tokens = record["new_tokens"]
        self.new_tokens += sum(tokens) if isinstance(tokens, list) else tokens
        self.by_adapter[record["adapter"] or BASE_LABEL] += 1


class Results:
    """OUT, open for adding results in any order; they are written in the input's."""

    def __init__(self, path: Path, origin: Mapping[str, Any], *, overwrite: bool = False) -> None:
        """Open OUT, make it if need be, and read what an earlier run left.

        Args:
            origin: what the results are made from: option -> its value or a digest of what it names; plain JSON.
        Raises: UsageError if the directory is not there or OUT is none that a run with this origin has left (then it
            is untouched); JobError if another run is writing it; OSError from the file system.
        """
        self.path, self.tally = path, Tally()
        self._waiting: dict[int, Mapping[str, Any]] = {}
        if path.is_dir() or not path.parent.is_dir():
            found = "it is a directory" if path.is_dir() else f"there is no directory {path.parent}"
            raise UsageError(f"--out {path}: expected a file to write, {found}")
        self._file: BinaryIO = open(path, "a+b")
        try:
            self._lock()
            if overwrite:
                self._file.truncate(0)
            if os.fstat(self._file.fileno()).st_size == 0:
                write_json(meta_path(path), origin)
                _sync(meta_path(path))
                _sync(path.parent)
            else:
                self._check_origin(origin)
                self._keep_finished_lines()
        except BaseException:
            self._file.close()
            raise

    @property
    def next_index(self) -> int:
        """The first line that has no result in OUT."""
        return self.tally.lines

    def add(self, records: Mapping[int, Mapping[str, Any]]) -> int:
        """Take results (index -> record); write those that are next, synced. Returns how many were written.

        Those of lines that OUT has already change nothing.
        """
        self._waiting.update(records)
        ready = []
        while (record := self._waiting.pop(self.next_index, None)) is not None:
            ready.append(_line(record))
            self.tally.add(record)
        if ready:
            self._file.write(b"".join(ready))
            self._file.flush()
            os.fsync(self._file.fileno())
        return len(ready)

    def close(self) -> None:
        """Close OUT; results that wait for one before them are dropped."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _lock(self) -> None:
        """Refuse to write what another process writes; its end, however it comes, releases the lock."""
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JobError(f"{self.path}: another run is writing it; wait for it, or name another --out") from None
        except OSError:  # a file system without locks
            return

    def _check_origin(self, origin: Mapping[str, Any]) -> None:
        meta = meta_path(self.path)
        try:
            left = json.loads(meta.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            left = None
        if not isinstance(left, dict):
            raise self._foreign(f"{meta.name}, which says what it was made from, is missing or unreadable")
        if different := [key for key in origin if left.get(key) != json.loads(json.dumps(origin[key]))]:
            raise self._foreign(f"it was made with another {' and '.join(different)}")

    def _keep_finished_lines(self) -> None:
        """Count OUT's lines, each checked; what follows the last line end is cut off."""
        end = 0
        self._file.seek(0)
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
                if record["index"] != self.next_index:
                    raise ValueError
                self.tally.add(record)
            except (ValueError, TypeError, KeyError):
                raise self._foreign(
                    f"line {self.next_index + 1} is not the result of request {self.next_index}"
                ) from None
            end += len(line)
        self._file.truncate(end)

    def _foreign(self, reason: str) -> UsageError:
        return UsageError(
            f"--out {self.path}: cannot go on with this file, {reason}; name another file, or give --overwrite to "
            "write it anew"
        )


def meta_path(out: Path) -> Path:
    """The file beside OUT that says what it was made from."""
    return out.with_name(f"{out.name}.meta.json")


def digest_of_input(path: Path) -> tuple[str, int]:
    """(digest, number of lines) of the requests; the file is read as a stream."""
    digest, lines, last = hashlib.sha256(), 0, b"\n"
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            lines += block.count(b"\n")
            last = block[-1:]
    return digest.hexdigest()[:32], lines + (last != b"\n")


def digest_of_directory(directory: Path) -> str:
    """Of the files of a model or an adapter: names, sizes, the first and the last megabyte. Readmes do not count."""
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if not path.is_file() or path.name.startswith(".") or path.suffix == ".md":
            continue
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        for block in _ends(path):
            digest.update(block)
    return digest.hexdigest()[:32]


def _sync(path: Path) -> None:
    """Bring a file, or the names in a directory, to the disk."""
    if os.name == "nt":  # directories cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _ends(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield file.read(_BLOCK)
        if path.stat().st_size > _BLOCK:
            file.seek(max(_BLOCK, path.stat().st_size - _BLOCK))
            yield file.read()


def _line(record: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(record, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half a surrogate pair in a request's "id"
        return (json.dumps(record) + "\n").encode()

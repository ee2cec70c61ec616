"""Rows that were measured, and which of them speaks for a call. Needs no triton.

``choice.json`` has the implementation of an operator, ``configs.json`` the configuration of a kernel:

    {"op", "dtype", "dropout", "M", "N", "K", "R", "implementation", "gain", ...provenance}
    {"kernel", "dtype", "M", "N", "K", "R", "config", "gain", ...provenance}

M is the largest M that a row speaks for; gain is how many times faster it was than what runs without it (1.0: that was
not beaten). Provenance is "arch" ("sm_90", "gfx942"), "gpu" (its name), "torch", "triton", "date" and "commit".

A row speaks for its architecture, its dtype, and sizes N, K and R (as kernels round it up) within a factor of two of
its own; the nearest row counts. The user's own rows (``peft_fast.tune``) come first, on the GPU that they were measured
on. Those that come with the library count on every GPU of the architecture, where they won by ``SHIPPED_GAIN``: another
GPU of it has other clocks, other memory, and as much noise.
"""

import functools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

CHOICES, CONFIGS = "choice.json", "configs.json"
SHIPPED = Path(__file__).parent
SHIPPED_GAIN = 1.1
VARIABLE = "PEFT_FAST_CACHE"

Row = dict[str, Any]
_instead: list[Path] = []  # see using


class Gpu(NamedTuple):
    """arch: "sm_89", "gfx942".    name: as the driver has it."""

    arch: str
    name: str


class Sizes(NamedTuple):
    """Of one call. 0 for a size that the kernel does not have."""

    M: int
    N: int
    K: int
    R: int


def gpu_of(device: torch.device) -> Gpu:
    """The GPU of a device of torch."""
    name = torch.cuda.get_device_name(device)
    if torch.version.hip:
        properties: Any = torch.cuda.get_device_properties(device)
        return Gpu(properties.gcnArchName.split(":")[0], name)
    major, minor = torch.cuda.get_device_capability(device)
    return Gpu(f"sm_{major}{minor}", name)


def user_folder() -> Path:
    """Where the user's own rows are: $PEFT_FAST_CACHE/tables, by default in ~/.cache/peft_fast ($XDG_CACHE_HOME)."""
    if _instead:
        return _instead[0]
    if own := os.environ.get(VARIABLE):
        return Path(own).expanduser() / "tables"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "peft_fast" / "tables"


@contextmanager
def using(folder: Path) -> Iterator[None]:
    """Inside, the user's own rows are those of ``folder``. For the tuner; it holds for all threads."""
    _instead.insert(0, folder)
    try:
        yield
    finally:
        _instead.remove(folder)


def find(file: str, what: Mapping[str, Any], gpu: Gpu, sizes: Sizes) -> Row | None:
    """The row that speaks for a call, or None.

    Args:
        file: CHOICES or CONFIGS.    what: fields that have to be the row's: "op" or "kernel", "dtype", "dropout".
    """
    own = (row for row in read(user_folder() / file) if row["gpu"] == gpu.name and row["arch"] == gpu.arch)
    row = nearest(own, what, sizes)
    if row is None:
        row = nearest((row for row in read(SHIPPED / file) if row["arch"] == gpu.arch), what, sizes)
        if row is not None and row["gain"] < SHIPPED_GAIN:
            return None
    return row


def nearest(rows: Iterable[Row], what: Mapping[str, Any], sizes: Sizes) -> Row | None:
    """The row of the nearest N, K and R, and of these the one of the smallest M that is enough."""
    best: tuple[float, int, int] | None = None
    found = None
    for row in rows:
        if row["M"] < sizes.M or any(row.get(name) != value for name, value in what.items()):
            continue
        pairs = (row["N"], sizes.N), (row["K"], sizes.K), (_bucket(row["R"]), _bucket(sizes.R))
        away = [_octaves(*pair) for pair in pairs]
        if max(away) > 1:
            continue
        order = (round(sum(away), 6), row["M"], -row["R"])  # of two ranks as near the larger: its tiles hold both
        if best is None or order < best:
            best, found = order, row
    return found


def read(path: Path) -> tuple[Row, ...]:
    """The rows of a file, () where there is none; ``forget`` after the file has changed.

    Raises: ValueError on a file that holds no rows.
    """
    return _read(str(path))


def forget() -> None:
    """Files have changed."""
    _read.cache_clear()


@functools.cache
def _read(path: str) -> tuple[Row, ...]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        return ()
    try:
        rows = json.loads(text)
        if not isinstance(rows, list) or not all(_is_row(row) for row in rows):
            raise ValueError("expected a list of rows")
    except ValueError as error:
        instead = "remove it, and measure again with peft-fast tune"
        raise ValueError(f"{path} is no table of peft_fast: {error}: {instead}") from None
    return tuple(rows)


def _is_row(row: Any) -> bool:
    sizes = ("M", "N", "K", "R")
    names = ("arch", "gpu", "dtype", "gain", *sizes)
    return (
        isinstance(row, dict)
        and all(name in row for name in names)
        and all(isinstance(row[name], int) and row[name] >= 0 for name in sizes)
        and ("implementation" in row or "config" in row)
    )


def _bucket(R: int) -> int:
    """The power of two that kernels round a rank up to, at least 16."""
    return max(16, 1 << (R - 1).bit_length()) if R else 0


def _octaves(a: int, b: int) -> float:
    """How many times a is twice b, or b twice a."""
    if a == 0 or b == 0:
        return 0.0 if a == b else math.inf
    return abs(math.log2(a / b))

"""The tables that the tuner fills. A finished row is on disk at once, and the file is always whole."""

import datetime
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .shapes import rank_bucket

Row = dict[str, Any]
# What a row speaks for, on one GPU and triton. R counts by the power of two that kernels round it up to.
_KEY = ("kernel", "op", "dtype", "dropout", "M", "N", "K")


@dataclass(frozen=True)
class Provenance:
    """Where rows are measured: the GPU, versions (of triton such as "3.9") and the library's commit or version."""

    arch: str
    gpu: str
    torch: str
    triton: str
    commit: str


@dataclass
class Table:
    """The rows of one file, those of other GPUs and versions among them, which are left alone."""

    path: Path
    provenance: Provenance
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.path.exists():
            self.rows = json.loads(self.path.read_text())

    def find(self, key: Row) -> Row | None:
        """The row that was measured here for ``key``: kernel or op, dtype, M, N, K, R, and dropout for an op."""
        return next((row for row in self.rows if self._is_here(row) and _identity(row) == _identity(key)), None)

    def put(self, key: Row, values: Row) -> None:
        """Write a row with today's date in place of what was there for ``key``."""
        old = self.find(key)
        where = self.provenance
        date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
        source = dict(
            arch=where.arch, gpu=where.gpu, torch=where.torch, triton=where.triton, date=date, commit=where.commit
        )
        self.rows = sorted([*(row for row in self.rows if row is not old), key | values | source], key=_order)
        text = "[\n" + ",\n".join(json.dumps(row) for row in self.rows) + "\n]\n"
        write_whole(self.path, text)

    def _is_here(self, row: Row) -> bool:
        return bool(row["gpu"] == self.provenance.gpu and row["triton"] == self.provenance.triton)


def write_whole(path: Path, text: str) -> None:
    """Write a file so that at every moment it is the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _identity(row: Row) -> tuple[Any, ...]:
    return *(row.get(name) for name in _KEY), rank_bucket(row["R"])


def _order(row: Row) -> tuple[Any, ...]:
    """As people look for it: one GPU's rows of one kernel together, M ascending last."""
    name, dropout = row.get("kernel") or row.get("op"), bool(row.get("dropout"))
    return row["gpu"], row["triton"], name, row["dtype"], dropout, row["N"], row["K"], row["R"], row["M"]

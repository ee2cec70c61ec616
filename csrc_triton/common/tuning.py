"""Which configuration a kernel runs with: a measured row's (``csrc_triton.tables``), else a documented default.

Each kernel module lists its candidates: every configuration that tuning may choose, all of them compiled ahead of
time and free of spills (``python -m bench aot``). A measured row counts as long as its configuration is one of them.
``trying`` is what the tuner (``peft_fast.tuning``) needs here.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import tables

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
CUDA = ARCHS[:3]
AMPERE = ARCHS[:1]
HOPPER = ARCHS[1:3]
SMALL = ("sm_80", "gfx942")  # at most 64 KB of shared memory: AMD, and NVIDIA's chips with 99 KB (sm_86, sm_89, sm_120)


@dataclass(frozen=True)
class Candidate:
    """A configuration tuning may choose.

    blocks: the kernel's BLOCK_*, and what its launcher reads besides.
    archs: where it is offered.    itemsize: of x; 4 means fp32 products without tensor cores.
    max_rank: largest R, rounded up to a power of two, that it is for.
    default_to: the default up to this M where nothing was measured (the first candidate that fits); 0: never a default.
    """

    blocks: dict[str, int]
    num_warps: int
    num_stages: int
    archs: tuple[str, ...] = ARCHS
    itemsize: int = 2
    max_rank: int = 1 << 30
    default_to: int = 0

    @property
    def config(self) -> dict[str, int]:
        """All of it, as a row of the table has it."""
        return self.blocks | dict(num_warps=self.num_warps, num_stages=self.num_stages)

    @property
    def label(self) -> str:
        """Such as 128x256x64-w8-s3."""
        sizes = "x".join(str(size) for name, size in self.blocks.items() if name.startswith("BLOCK_"))
        return f"{sizes}-w{self.num_warps}-s{self.num_stages}"


ALWAYS = 1 << 62
CANDIDATES: dict[str, list[Candidate]] = {}
_tried: dict[str, tuple[dict[str, int], set[tuple[str, int, int, int, int]]]] = {}  # see trying


def candidates(kernel: str, rows: list[Candidate]) -> list[Candidate]:
    """Name a kernel's candidates, for ``config_for``, the tuner and the ahead-of-time check."""
    CANDIDATES[kernel] = rows
    return rows


def candidates_for(kernel: str, arch: str, itemsize: int = 2) -> Iterator[Candidate]:
    """The candidates of ``kernel`` on one architecture."""
    return (c for c in CANDIDATES[kernel] if arch in c.archs and itemsize == c.itemsize)


def config_for(kernel: str, x: Tensor, M: int, N: int, K: int, R: int) -> dict[str, int]:
    """The configuration for one launch on x's device: measured if there is a row, else the default. To be read only."""
    if kernel in _tried:
        config, asked = _tried[kernel]
        asked.add((str(x.dtype).removeprefix("torch."), M, N, K, R))
        return config
    return _lookup(kernel, x.device, x.dtype, power_of_2(M), N, K, block_r(R))


@contextmanager
def trying(kernel: str, config: dict[str, int]) -> Iterator[set[tuple[str, int, int, int, int]]]:
    """Inside, launches of ``kernel`` run with ``config``; yields the (dtype, M, N, K, R) they ask for as they come.

    For the tuner: it holds for all threads of the process.
    """
    asked: set[tuple[str, int, int, int, int]] = set()
    _tried[kernel] = (config, asked)
    try:
        yield asked
    finally:
        del _tried[kernel]


def default_config(kernel: str, arch: str, dtype: torch.dtype, M: int, R: int) -> dict[str, int]:
    """What runs where nothing was measured; M and R as powers of two.    Raises: LookupError if nothing fits."""
    for candidate in candidates_for(kernel, arch, _itemsize(dtype)):
        if M <= candidate.default_to and R <= candidate.max_rank:
            return candidate.config
    raise LookupError(f"{kernel}: no default configuration for {dtype}, M={M}, R={R} on {arch}")


def forget() -> None:
    """Look measured rows up again, after they have changed."""
    tables.forget()
    _lookup.cache_clear()


def block_r(R: int, largest: int = 1 << 30) -> int:
    """BLOCK_R for a rank: a power of two, at least the 16 that tl.dot needs."""
    return min(largest, max(16, power_of_2(R)))


# triton.cdiv and triton.next_power_of_2 are for kernels: called from Python they take 3 us each
def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, and at least 1."""
    return 1 << max(0, n - 1).bit_length()


@functools.lru_cache(maxsize=4096)
def _lookup(kernel: str, device: torch.device, dtype: torch.dtype, M: int, N: int, K: int, R: int) -> dict[str, int]:
    arch = arch_of(device)
    if device.type == "cuda":
        what = dict(kernel=kernel, dtype=str(dtype).removeprefix("torch."))
        row = tables.find(tables.CONFIGS, what, tables.gpu_of(device), tables.Sizes(M, N, K, R))
        known = (c.config for c in candidates_for(kernel, arch, _itemsize(dtype)) if R <= c.max_rank)
        if row is not None and row["config"] in known:
            config: dict[str, int] = row["config"]
            return config
    return default_config(kernel, arch, dtype, M, R)


def _itemsize(dtype: torch.dtype) -> int:
    """Of the candidates for x in ``dtype``; int8 has those of 16 bits."""
    return 4 if dtype == torch.float32 else 2


@functools.cache
def arch_of(device: torch.device) -> str:
    """The class of architecture whose candidates fit the device. Unknown chips take those of least shared memory."""
    if device.type != "cuda":
        return "sm_90"  # the interpreter: any will do
    if torch.version.hip:
        return "gfx942"
    capability = torch.cuda.get_device_capability(device)
    return {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}.get(capability, "gfx942")

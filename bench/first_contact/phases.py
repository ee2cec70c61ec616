"""The phases of first contact and their cases, in the order of their value: a run that is cut has done the best first.

Data only, but for a few lines that make lists.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from ..cases.kinds import MixedOpCase, OpCase, PrefixSiteCase
from . import attention, layers, machine, models, quantized, races, second
from .here import Here, Row
from .quantized import QuantCase
from .runner import Phase

# Their seconds are those of a run of 580; "check" compiles the kernels of all that follow, in every core.
PHASES = (
    Phase("machine", 30),
    Phase("check", 100, case_seconds=60, workers=0, timed=False),
    Phase("races", 25, case_seconds=20),
    Phase("lora", 100, case_seconds=30),
    Phase("decode", 75, case_seconds=60),
    Phase("mixed", 45, case_seconds=30),
    Phase("prefix", 45, case_seconds=30),
    Phase("tests", 95, case_seconds=600),
    Phase("quantized", 35, case_seconds=25),
    Phase("training", 30, case_seconds=30),
)
SECOND = (Phase("profile", 85, case_seconds=25), Phase("failed tests", 60, case_seconds=600))


class Case(NamedTuple):
    """What is done at once; ``rows`` is called in a child."""

    name: str
    op: str
    rows: Callable[[Here], Iterator[Row]]


def _site(name: str, M: int, R: int = 16, **more: Any) -> OpCase:
    K, N = layers.SITES[name]
    return OpCase(name, K, N, M, R, **more)


TIMED_LORA = (
    *(_site(site, M) for M in (1, 16, 2048, 64, 256, 8192) for site in layers.SITES),
    *(_site(site, M, 64) for M in (1, 2048) for site in layers.SITES),
    *(
        _site(site, M, mode="train", dropout=0.05, adapters=adapters)
        for M in (2048, 8192)
        for adapters in ("bf16", "fp32")
        for site in layers.SITES
    ),
)
CHECKED_LORA = (
    *(_site(site, M, adapters="fp32") for M in (1, 5, 64, 2048) for site in layers.SITES),
    *(_site(site, M, dtype="fp16", adapters="fp16") for M in (1, 300) for site in ("q", "k")),
    *(_site(site, M, dtype="fp32", adapters="fp32", mode="train") for M in (5, 300) for site in ("q", "k")),
    *(_site(site, M, mode="train") for M in (1, 300) for site in layers.SITES),
)
DROPPED_LORA = tuple(
    _site(site, M, mode="train", dropout=0.05, adapters=adapters)
    for site in ("q", "up")
    for M in (16, 300)
    for adapters in ("bf16", "fp32")
)
TIMED_MIXED = tuple(
    layers.MixedRank16(site, *layers.SITES[site], 32, count) for count in (32, 8, 1) for site in layers.SITES
)
CHECKED_MIXED = tuple(
    MixedOpCase(site, *layers.SITES[site], M, count)
    for site in layers.SITES
    for M, count in ((1, 1), (33, 8), (300, 7))
)
_HEADS: dict[str, Any] = dict(dtype="bf16", heads=32, kv_heads=8, head_size=128)
TIMED_PREFIX = (
    PrefixSiteCase("train", 8, 512, 128, **_HEADS),
    PrefixSiteCase("decode", 64, 512, 128, **_HEADS),
    PrefixSiteCase("decode", 64, 512, 1024, **_HEADS),
    PrefixSiteCase("decode", 1, 512, 128, **_HEADS),
    PrefixSiteCase("fwd", 8, 512, 128, **_HEADS),
    PrefixSiteCase("train", 4, 2048, 128, **_HEADS),
)
CHECKED_PREFIX = (
    PrefixSiteCase("train", 2, 300, 20, **{**_HEADS, "head_size": 64}),
    PrefixSiteCase("decode", 7, 100, 20, **{**_HEADS, "head_size": 64}),
    PrefixSiteCase("train", 2, 100, 20, **{**_HEADS, "dtype": "fp32"}),
)
TIMED_QUANT = (
    *(QuantCase("lora_linear_4bit", *layers.SITES[site], M) for M in (1, 16) for site in layers.SITES),
    *(QuantCase("dequantize_4bit", *layers.SITES[site]) for site in ("q", "up")),
    *(QuantCase("lora_linear_int8", *layers.SITES["q"], M) for M in (1, 2048)),
)


def _cases_of(kind: Callable[[Any, Here], Iterator[Row]], op: str, sizes: Any, here: Here) -> list[Case]:
    """In a rehearsal one small case for each that is of another kind than those before it."""
    if here.rehearse:
        sizes = list({_kind_of(case): replace(case.tiny(), **_odd(case)) for case in reversed(sizes)}.values())[:3]
    return [Case(f"{op} {case}", op, partial(kind, case)) for case in sizes]


def _kind_of(case: Any) -> tuple[Any, ...]:
    return getattr(case, "mode", ""), getattr(case, "op", "")


def _odd(case: Any) -> dict[str, int]:
    if isinstance(case, PrefixSiteCase):
        return dict(rows=1, tokens=9, heads=2, kv_heads=1)
    return dict(N=33, K=64, M=3) if isinstance(case, OpCase) else {}


def cases_of(phase: str, here: Here) -> list[Case]:
    """The cases of a phase, in a list that is the same in every process."""
    lora, mixed, prefix, quant = (
        _cases_of(kind, op, sizes, here)
        for kind, op, sizes in (
            (layers.lora_rows, "lora", TIMED_LORA),
            (layers.mixed_rows, "mixed", TIMED_MIXED),
            (attention.prefix_rows, "prefix", TIMED_PREFIX),
            (quantized.quant_rows, "quantized", TIMED_QUANT),
        )
    )
    checks = [
        *_cases_of(layers.lora_rows, "lora", CHECKED_LORA, here),
        *_cases_of(layers.dropout_rows, "dropout", DROPPED_LORA, here),
        *_cases_of(layers.mixed_rows, "mixed", CHECKED_MIXED, here),
        *_cases_of(attention.prefix_rows, "prefix", CHECKED_PREFIX, here),
        Case("graphs replayed with other adapters", "lora_mixed", races.graph_rows),
    ]
    found: dict[str, list[Case]] = {
        "machine": [
            Case("machine", "machine", machine.machine_rows),
            Case("ceilings", "ceilings", machine.ceiling_rows),
            Case("host", "host", machine.host_rows),
        ],
        "check": [*prefix, *lora, *checks, *mixed, *quant],
        "races": [
            Case(name, op, partial(races.race_rows, op, N))
            for name, (op, N) in races.RACES.items()
            if N > 4096 or not here.rehearse
        ],
        "lora": lora,
        "decode": [
            Case("decode, 1 row", "decode step", partial(models.decode_rows, 1, 1)),
            Case("decode, 32 rows, 8 adapters", "decode step", partial(models.decode_rows, 32, 8)),
        ],
        "mixed": mixed,
        "prefix": prefix,
        "tests": [Case("tests/interpreter", "tests", machine.pytest_rows)],
        "quantized": quant,
        "training": [
            Case(f"training step, {dtype} adapters", "training step", partial(models.training_rows, dtype))
            for dtype in ("float32", "bfloat16")
        ],
        "profile": [
            Case(f"profile of {kernel}", "profile", partial(second.profile_rows, kernel)) for kernel in second.PROFILED
        ],
        "failed tests": [Case("failed tests", "tests", second.failed_rows)],
    }
    return found[phase]

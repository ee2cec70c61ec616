"""What is measured: the cases of each suite, on a CPU and on a GPU, the campaign's steps, and what grows with what."""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from .kinds import (  # fmt: skip
    GenerateCase,
    HostCase,
    ManageCase,
    MixedCase,
    MixedDecodeCase,
    MixedOpCase,
    ModelCase,
    OpCase,
    PrefixDecodeCase,
    PrefixModelCase,
    PrefixPromptCase,
    PrefixSiteCase,
    QuantModelCase,
    QuantSiteCase,
    QuantWeightCase,
)

DTYPES = ("bf16", "fp32")  # measured everywhere; fp16 only where a case asks for it
SUITES = ("lora", "mixed", "prefix", "quant", "train", "generate", "host")
MANAGEMENT = ("add_adapter", "load_adapter", "set_adapter", "delete_adapter")

# Llama-3-8B: (site, K, N); qkv and gate_up as one matrix each
LLAMA_8B = (("qkv", 4096, 6144), ("o", 4096, 4096), ("gate_up", 4096, 28672), ("down", 14336, 4096))
# the same as quantized models have them: q, k and v, gate and up are layers of their own
LLAMA_8B_LAYERS = (("q", 4096, 4096), ("k", 4096, 1024), ("up", 4096, 14336), ("down", 14336, 4096))
# a quarter of its sizes: what one CPU core can take
LLAMA_QUARTER = (("qkv", 1024, 1536), ("o", 1024, 1024), ("gate_up", 1024, 7168), ("down", 3584, 1024))
HEADS_8B: dict[str, Any] = dict(dtype="bf16", heads=32, kv_heads=8, head_size=128)


@dataclass(frozen=True)
class Sweep:
    """A curve: how cost grows. points: x -> case; they differ in ``axis`` only, and are measured like all others."""

    title: str
    axis: str
    points: dict[float, Any]


# ---------------------------------------------------------------------------------------------------- on one CPU core
def cpu_sweeps(suite: str, quick: bool) -> list[Sweep]:
    """The curves of a suite. In quick runs there are some with three points, so that everything is drawn."""
    return {
        "lora": _lora_sweeps, "mixed": _mixed_sweeps, "prefix": _prefix_sweeps, "quant": _quant_sweeps,
        "train": _train_sweeps, "generate": _generate_sweeps, "host": lambda quick: [],
    }[suite](quick)  # fmt: skip


def _lora_sweeps(quick: bool) -> list[Sweep]:
    site, compiled = LLAMA_QUARTER[1], (1, 256)
    tokens = (1, 16, 128) if quick else (1, 4, 16, 64, 256, 1024, 4096)
    sweeps = [Sweep("one layer, 1024 x 1024, r = 16, bf16", "tokens",
                    {M: OpCase(*site, M, 16, compiled=not quick and M in compiled) for M in tokens})]  # fmt: skip
    if not quick:
        ranks = {R: OpCase(*site, 256, R, compiled=R == 16) for R in (4, 8, 16, 32, 64, 128)}
        sweeps.append(Sweep("one layer, 1024 x 1024, 256 tokens, bf16", "rank", ranks))
    return sweeps


def _mixed_sweeps(quick: bool) -> list[Sweep]:
    site = LLAMA_QUARTER[1]
    rows, used = (4, (1, 2, 4)) if quick else (32, (1, 2, 4, 8, 16, 32))
    loaded = (2, 4, 6) if quick else (4, 10, 100)
    rounds = {nth: 2 if quick else 5 if nth == 100 else 7 for nth in ((2, 3, 4) if quick else (2, 10, 100))}
    return [
        Sweep(f"one layer, 1024 x 1024, {rows} rows, bf16", "adapters used",
              {n: MixedOpCase(*site, rows, n) for n in used}),
        Sweep("model, 8 rows, 4 of them used, fp32" if not quick else "model, 4 rows, 2 of them used, fp32",
              "adapters loaded", {n: MixedCase(4 if quick else 8, 1, 2 if quick else 4, n) for n in loaded}),
        *(Sweep(f"{operation}, 224 layers", "adapters loaded",
                {nth: ManageCase(operation, nth, n) for nth, n in rounds.items()}) for operation in MANAGEMENT),
    ]  # fmt: skip


def _prefix_sweeps(quick: bool) -> list[Sweep]:
    sweeps = []
    for mode, tokens in (("fwd", 128), ("train", 128), ("decode", 256)):
        if quick:
            points = {P: PrefixSiteCase(mode, 4, 24, P) for P in (8, 20, 64)}
        else:
            points = {P: PrefixSiteCase(mode, 8, tokens, P) for P in (20, 128, 512, 1024)}
        words = next(iter(points.values())).words.split(", P")[0]
        sweeps.append(Sweep(f"{words}, fp32", "prefix length", points))
    return sweeps


def _quant_sweeps(quick: bool) -> list[Sweep]:
    site, tokens = (("o", 256, 128), (1, 4, 16)) if quick else (LLAMA_QUARTER[1], (1, 16, 64, 512, 2048))
    return [Sweep(f"NF4 layer, {site[1]} x {site[2]}, bf16", "tokens", {M: QuantSiteCase(*site, M) for M in tokens})]


def _train_sweeps(quick: bool) -> list[Sweep]:
    rows, tokens = ((1, 2, 4), 16) if quick else ((1, 2, 4, 8), 128)
    return [Sweep(f"LoRA, training step, rows of {tokens} tokens, bf16, dropout 0.05", "batch",
                  {n: ModelCase("train", "bf16", n, tokens, dropout=0.05) for n in rows})]  # fmt: skip


def _generate_sweeps(quick: bool) -> list[Sweep]:
    if quick:
        points = {n: GenerateCase(n, 8, new=4) for n in (1, 2, 4)}
        return [Sweep("LoRA, generating 4 tokens, fp32", "batch", points)]
    return [
        Sweep("LoRA, generating 32 tokens, fp32", "batch", {n: GenerateCase(n, 32) for n in (1, 4, 16)}),
        Sweep("LoRA, generating 32 tokens, 16 rows, fp32", "adapters used",
              {n: GenerateCase(16, 32, n) for n in (1, 4, 16)}),
    ]  # fmt: skip


def _lora(quick: bool) -> Iterator[Any]:
    for site in LLAMA_QUARTER[1:2] if quick else LLAMA_QUARTER:
        for M in () if quick else (1, 16, 256):
            yield OpCase(*site, M, 16)
        yield OpCase(*site, 128, 16, "train", adapters="fp32", dropout=0.05, compiled=site[0] == "o")
    if not quick:
        for M in (1, 256):
            yield OpCase(*LLAMA_QUARTER[1], M, 16, dtype="fp32", adapters="fp32")
    rows, tokens = (2, 32) if quick else (8, 128)
    for dtype in ("bf16",) if quick else DTYPES:
        yield ModelCase("fwd", dtype, rows, tokens)
        yield ModelCase("fwd", dtype, 1, 1, compiled=not quick and dtype == "bf16")


def _mixed(quick: bool) -> Iterator[Any]:
    """In an order in which adapters are only ever added: see ``mixed_cases.Loaded``."""
    if quick:
        yield MixedCase(4, 1, 3, 6)
        yield MixedCase(4, 2, 3, 6, dtype="bf16", together=True)
        return
    yield MixedCase(8, 1, 1, 100, aim=1.4, must=6.0)
    yield MixedCase(32, 1, 32, 32, aim=2.0, must=3.0)
    yield MixedCase(32, 1, 8, 32, aim=1.6, must=2.0)
    yield MixedCase(32, 1, 1, 32, aim=1.4)
    yield MixedCase(32, 1, 8, 32, together=True, aim=1.6, must=2.0)
    for distinct in (32, 8, 1):
        yield MixedCase(32, 64, distinct, 32)
    for adapters in ("default", "same"):
        for distinct in (32, 8, 1):
            yield MixedCase(32, 1, distinct, 32, "bf16", adapters)
        yield MixedCase(32, 64, 8, 32, "bf16", adapters)


def _prefix(quick: bool) -> Iterator[Any]:
    if quick:
        yield PrefixSiteCase("train", 4, 24, 20, "bf16", prefixes=2)
        yield PrefixPromptCase("train", 4, 20)
        return
    for mode, tokens in (("fwd", 128), ("train", 128), ("decode", 256)):
        yield PrefixSiteCase(mode, 8, tokens, 128, "bf16")
        yield PrefixSiteCase(mode, 8, tokens, 128, prefixes=4)
    for mode in ("fwd", "train"):
        yield PrefixPromptCase(mode, 16, 128)


def _quant(quick: bool) -> Iterator[Any]:
    if quick:
        for dtype in DTYPES:
            yield QuantWeightCase(128, 256, dtype)
        yield QuantSiteCase("o", 256, 128, 32, "train", "int8", dropout=0.05)
        yield QuantModelCase("fwd", 1, 1, prepared=False)
        return
    for size in (1024, 4096):
        for dtype in DTYPES:
            yield QuantWeightCase(size, size, dtype)
    site = LLAMA_QUARTER[1]
    for M in (512, 2048):
        yield QuantSiteCase(*site, M, "train", dropout=0.05)
    yield QuantSiteCase(*site, 1, dtype="fp32")
    yield QuantSiteCase(*site, 512, "train", dtype="fp32")
    for M in (1, 512):
        yield QuantSiteCase(*site, M, kind="int8")
    yield QuantSiteCase(*site, 512, "train", "int8", dropout=0.05)
    yield QuantModelCase("fwd", 1, 1, prepared=False)
    yield QuantModelCase("fwd", 8, 128, prepared=False)
    yield QuantModelCase("fwd", 8, 128)
    yield QuantModelCase("fwd", 1, 1, "int8", prepared=False)


def _train(quick: bool) -> Iterator[Any]:
    if quick:
        yield PrefixModelCase("train", 4, 16, 20, must=1.0)
        yield QuantModelCase("train", 2, 16, dropout=0.05, must=1.0)
        return
    yield ModelCase("train", "bf16", 8, 128, adapters="same", compiled=True)
    yield ModelCase("train", "fp32", 8, 128, dropout=0.05)
    yield PrefixModelCase("train", 16, 64, 128, must=1.0)
    yield PrefixModelCase("train", 16, 64, 512)
    yield PrefixModelCase("train", 16, 64, 128, "bf16")
    yield QuantModelCase("train", 8, 128, dropout=0.05, must=1.0)
    yield QuantModelCase("train", 8, 128, dtype="fp32", must=1.0)
    yield QuantModelCase("train", 8, 128, "int8", dropout=0.05, must=1.0)


def _generate(quick: bool) -> Iterator[Any]:
    if quick:
        yield PrefixModelCase("generate", 4, 8, 20, new=4, must=1.0)
        yield PrefixModelCase("generate", 4, 8, 20, new=4, prefixes=2, padded=True)
        yield GenerateCase(4, 8, 2, new=4)
        return
    yield GenerateCase(16, 32, 4, "bf16")
    yield GenerateCase(4, 32, dtype="bf16", kind="nf4")
    yield PrefixModelCase("generate", 16, 32, 128, must=1.0)
    yield PrefixModelCase("generate", 16, 32, 128, padded=True)
    yield PrefixModelCase("generate", 16, 32, 128, prefixes=4)


def _host(quick: bool) -> Iterator[Any]:
    for adapters in ("fp32",) if quick else ("bf16", "fp32"):
        yield HostCase(adapters=adapters)


_CPU: dict[str, Callable[[bool], Iterator[Any]]] = {
    "lora": _lora, "mixed": _mixed, "prefix": _prefix, "quant": _quant, "train": _train, "generate": _generate,
    "host": _host,
}  # fmt: skip


@functools.cache
def cpu_cases(suite: str, quick: bool) -> tuple[Any, ...]:
    """All cases of a suite, those of its curves first."""
    swept = [case for sweep in cpu_sweeps(suite, quick) for case in sweep.points.values()]
    return tuple(_distinct([*swept, *_CPU[suite](quick)]))


# ------------------------------------------------------------------------------------------------------------ on a GPU
def _forward(site: tuple[str, int, int]) -> Iterator[OpCase]:
    for M in (1, 16, 64, 256, 1024, 2048, 8192, 16384):
        for R in (8, 16, 64):
            yield OpCase(*site, M, R, compiled=R == 16 and M in (1, 2048))


def _backward() -> Iterator[OpCase]:
    for site in LLAMA_8B:
        for adapters in DTYPES:
            compiled = site[0] == "o"
            yield OpCase(*site, 8192, 16, "train", adapters=adapters, dropout=0.05, compiled=compiled)


def _mixed_layers() -> Iterator[MixedOpCase]:
    for site in LLAMA_8B:
        for M in (1, 8, 32, 64):
            for adapters in sorted({a for a in (1, 8, 32, 128) if a <= M} | {128}):
                yield MixedOpCase(*site, M, adapters)


def _attention(mode: str) -> Iterator[PrefixSiteCase]:
    if mode == "decode":
        for rows in (16, 64, 256):
            for P in (20, 128, 512, 1024):
                yield PrefixSiteCase(mode, rows, 512, P, **HEADS_8B)
        yield PrefixSiteCase(mode, 64, 128, 1024, **HEADS_8B)
        yield PrefixSiteCase(mode, 64, 512, 128, prefixes=8, **HEADS_8B)
        return
    for P in (20, 128, 512, 1024):
        yield PrefixSiteCase(mode, 8, 512, P, **HEADS_8B)
    yield PrefixSiteCase(mode, 4, 2048, 128, **HEADS_8B)
    yield PrefixSiteCase(mode, 8, 512, 128, prefixes=8, **HEADS_8B)


def _quantized_layers() -> Iterator[QuantSiteCase]:
    for site in LLAMA_8B_LAYERS:
        for M in (1, 4, 16, 64, 2048, 8192, 16384):
            yield QuantSiteCase(*site, M)
        for M in (2048, 8192, 16384):
            yield QuantSiteCase(*site, M, "train", dropout=0.05)
    for M in (1, 2048):
        yield QuantSiteCase(*LLAMA_8B_LAYERS[0], M, kind="int8")
    yield QuantSiteCase(*LLAMA_8B_LAYERS[0], 2048, "train", "int8", dropout=0.05)


# step of the campaign -> (suite, its cases); each takes less than ten minutes
GPU_STEPS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "ceilings": ("lora", ()),
    **{f"forward-{site[0]}": ("lora", tuple(_forward(site))) for site in LLAMA_8B},
    "backward": ("lora", tuple(_backward())),
    "mixed": ("mixed", tuple(_mixed_layers())),
    **{f"prefix-{mode}": ("prefix", tuple(_attention(mode))) for mode in ("fwd", "train", "decode")},
    "quant-dequant": ("quant", tuple(QuantWeightCase(N, K, dtype) for _, K, N in LLAMA_8B_LAYERS for dtype in DTYPES)),
    "quant-linear": ("quant", tuple(_quantized_layers())),
    "train-lora": ("train", tuple(
        ModelCase("train", "bf16", 8, 512, dropout=0.05, adapters=a, size="8b") for a in ("default", "same"))),
    "train-prefix": ("train", tuple(PrefixModelCase("train", 8, 512, P, "bf16", size="8b") for P in (128, 512))),
    "train-quant": ("train", tuple(
        QuantModelCase("train", 8, 512, kind, dropout=0.05, must=1.0, size="8b") for kind in ("nf4", "int8"))),
    "decode-mixed": ("generate", (*(MixedDecodeCase(32, n, 128) for n in (1, 8, 32)), MixedDecodeCase(128, 128, 128))),
    "decode-prefix": ("generate", (*(PrefixDecodeCase(rows, P) for rows, P in ((16, 128), (64, 128), (64, 512),
                                                                              (64, 1024))),
                                   PrefixDecodeCase(64, 128, prefixes=8))),
    "decode-quant": ("generate", (*(QuantModelCase("fwd", 1, 1, k, prepared=False, size="8b") for k in ("nf4", "int8")),
                                  QuantModelCase("fwd", 8, 512, prepared=False, size="8b"))),
}  # fmt: skip


def gpu_sweeps(suite: str) -> list[Sweep]:
    """The curves of a suite, of the cases that the steps measure anyway."""
    o = LLAMA_8B[1]
    found = {
        "lora": [
            Sweep("one layer, 4096 x 4096, r = 16, bf16", "tokens",
                  {c.M: c for c in GPU_STEPS["forward-o"][1] if c.R == 16}),
            Sweep("one layer, 4096 x 4096, 2048 tokens, bf16", "rank",
                  {c.R: c for c in GPU_STEPS["forward-o"][1] if c.M == 2048}),
        ],
        "mixed": [Sweep("one layer, 4096 x 4096, 64 rows, bf16", "adapters used",
                        {n: MixedOpCase(*o, 64, n) for n in (1, 8, 32, 128)})],
        "prefix": [Sweep(f"attention, {mode}, bf16", "prefix length",
                         {P: PrefixSiteCase(mode, 64 if mode == "decode" else 8, 512, P, **HEADS_8B)
                          for P in (20, 128, 512, 1024)}) for mode in ("fwd", "train", "decode")],
        "quant": [Sweep("NF4 layer, 4096 x 4096, bf16", "tokens",
                        {c.M: c for c in _quantized_layers()
                         if c.site == "q" and c.mode == "fwd" and c.kind == "nf4"})],
        "generate": [Sweep("decode step of an 8B, 32 rows, bf16", "adapters used",
                           {n: MixedDecodeCase(32, n, 128) for n in (1, 8, 32)})],
    }  # fmt: skip
    return found.get(suite, [])


def gpu_cases(suite: str, quick: bool) -> tuple[Any, ...]:
    """All cases of a suite's steps; quick: three of each step."""
    steps = [cases for of, cases in GPU_STEPS.values() if of == suite]
    return tuple(_distinct(case for cases in steps for case in (cases[:: max(1, len(cases) // 3)] if quick else cases)))


def _distinct(cases: Iterable[Any]) -> list[Any]:
    """Each once, by its name, the first of those that have it."""
    found: dict[str, Any] = {}
    for case in cases:
        found.setdefault(str(case), case)
    return list(found.values())

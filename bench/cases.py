"""What is measured, as data: LoRA at single sites and in models, mixed batches, prefixes, quantized bases.

Nothing here runs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

BYTES = {"bf16": 2, "fp32": 4}
MIXED_RANKS = (16, 4, 64, 8, 32)  # of the adapters in mixed batches, in turn


@dataclass(frozen=True)
class OpCase:
    """One linear site (N, K) with a LoRA of rank R, at M tokens.

    mode: "fwd" without gradients, "graph" the same in a CUDA graph, "train" forward and backward (to x, a and b).
    dtype: of x and w.    adapters: dtype of a and b; PEFT's default for a bf16 model is fp32.    dropout: in training.
    """

    site: str
    K: int
    N: int
    M: int
    R: int
    mode: str = "fwd"
    dtype: str = "bf16"
    adapters: str = "bf16"
    dropout: float = 0.0

    def __str__(self) -> str:
        more = f"-p{self.dropout}" if self.dropout else ""
        return f"{self.site}-M{self.M}-r{self.R}-{self.mode}-{self.dtype}-{self.adapters}{more}"

    def flops(self, lora: bool) -> float:
        """Multiplications and additions; training has no gradient of w."""
        passes, low_rank_passes = (2, 3) if self.mode == "train" else (1, 1)
        low_rank = 2 * self.M * self.R * (self.K + self.N) * low_rank_passes * lora
        return 2 * self.M * self.N * self.K * passes + low_rank

    def bytes(self, lora: bool) -> float:
        """The least that has to move: every tensor once per pass that needs it."""
        M, N, K, e = self.M, self.N, self.K, BYTES[self.dtype]
        forward = (M * K + N * K + M * N) * e + self.R * (K + N) * BYTES[self.adapters] * lora
        if self.mode != "train":
            return forward
        backward = (M * N + N * K + M * K + M * K * lora) * e + 2 * self.R * (K + N) * BYTES[self.adapters] * lora
        return forward + backward


@dataclass(frozen=True)
class ModelCase:
    """A Llama with all-linear LoRA of rank 16. mode: "fwd" without gradients, or "train": forward, loss, backward.

    adapters: "default" is what get_peft_model makes (fp32), "same" the model's dtype (autocast_adapter_dtype=False).
    """

    name: str
    mode: str
    dtype: str
    batch: int
    tokens: int
    dropout: float = 0.0
    adapters: str = "default"

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class MixedCase:
    """A Llama with ``loaded`` all-linear LoRA adapters; each row of a batch takes one of ``distinct``, in turn.

    together: the rows of an adapter follow each other.    dtype, adapters: as in ``ModelCase``.
    group: "mixed", or "flat": the same batch while more and more adapters are loaded.
    aim: peft_fast's time over the base's should not be more.    faster: peft's over peft_fast's must not be less.
    """

    rows: int
    tokens: int
    distinct: int
    loaded: int
    dtype: str = "fp32"
    adapters: str = "default"
    together: bool = False
    group: str = "mixed"
    aim: float | None = None
    faster: float = 1.0

    def __str__(self) -> str:
        dtype = self.dtype + ("-adapters" if self.adapters == "same" else "")
        more = "-together" if self.together else ""
        return f"{self.group}-{self.rows}x{self.tokens}-{self.distinct}of{self.loaded}-{dtype}{more}"

    @property
    def names(self) -> list[str]:
        """The adapter of each row."""
        of_row = (i * self.distinct // self.rows if self.together else i % self.distinct for i in range(self.rows))
        return [f"a{i}" for i in of_row]


@dataclass(frozen=True)
class ManageCase:
    """A Llama with 32 small layers, 224 linear ones: adding, loading, setting and deleting adapter number ``nth``."""

    nth: int
    rounds: int

    def __str__(self) -> str:
        return f"as-number-{self.nth}"


@dataclass(frozen=True)
class MixedOpCase:
    """One linear site (N, K) and M rows that take ``adapters`` LoRA adapters of ``MIXED_RANKS``, in turn.

    mode: "fwd" or "graph".    x, w and adapters are bf16. Not counted: the plan, made once for all sites of a model.
    """

    site: str
    K: int
    N: int
    M: int
    adapters: int
    mode: str = "fwd"

    def __str__(self) -> str:
        return f"{self.site}-M{self.M}-{self.adapters}adapters-{self.mode}"

    @property
    def slots(self) -> list[int]:
        """The adapter of each row."""
        return [i % self.adapters for i in range(self.M)]

    @property
    def ranks(self) -> list[int]:
        return [MIXED_RANKS[i % len(MIXED_RANKS)] for i in range(self.adapters)]

    def flops(self, lora: bool) -> float:
        low_rank = sum(2 * self.ranks[slot] * (self.K + self.N) for slot in self.slots) * lora
        return 2 * self.M * self.N * self.K + low_rank

    def bytes(self, lora: bool) -> float:
        """The least that has to move: the adapters in use once."""
        used = sum(self.ranks[slot] for slot in set(self.slots)) * (self.K + self.N) * lora
        return BYTES["bf16"] * (self.M * self.K + self.N * self.K + self.M * self.N + used)


@dataclass(frozen=True)
class MixedDecodeCase:
    """A decode step of a Llama with the sizes of the 8B: ``rows`` sequences, ``distinct`` adapters of ``loaded``."""

    rows: int
    distinct: int
    loaded: int

    def __str__(self) -> str:
        return f"decode-{self.rows}rows-{self.distinct}of{self.loaded}"

    @property
    def names(self) -> list[str]:
        """The adapter of each row."""
        return [f"a{i % self.distinct}" for i in range(self.rows)]


@dataclass(frozen=True)
class PrefixSiteCase:
    """Attention of one layer whose rows have ``prefix`` learned tokens before ``tokens`` of text.

    mode: "fwd" (all tokens, causal), "train" (forward and backward, to q, k, v and the prefix), "decode" (the last
    token, the others are cached), "graph" (the same in a CUDA graph).
    prefixes: how many different ones there are; rows take them in turn.
    """

    mode: str
    rows: int
    tokens: int
    prefix: int
    dtype: str = "fp32"
    heads: int = 8
    kv_heads: int = 2
    head_size: int = 64
    prefixes: int = 1

    def __str__(self) -> str:
        more = f"-{self.prefixes}prefixes" if self.prefixes > 1 else ""
        return f"{self.mode}-{self.rows}x{self.tokens}-P{self.prefix}-{self.dtype}{more}"

    @property
    def queries(self) -> int:
        """Of a row."""
        return 1 if self.mode in ("decode", "graph") else self.tokens

    def flops(self, prefix: bool) -> float:
        """Two products of each query with each key that it sees; five more in the backward."""
        own = self.tokens if self.queries == 1 else self.tokens * (self.tokens + 1) // 2
        pairs = self.rows * self.heads * (own + self.queries * self.prefix * prefix)
        return 2 * self.head_size * pairs * (7 if self.mode == "train" else 2)

    def bytes(self, prefix: bool) -> float:
        """The least that has to move: the prefix once, not once per row."""
        element = BYTES[self.dtype] * self.head_size
        queries = self.rows * self.heads * self.queries
        own = 2 * self.rows * self.kv_heads * self.tokens
        slots = 2 * self.kv_heads * self.prefix * self.prefixes * prefix
        if self.mode == "train":  # backward: all of it again, the output's gradient, and those of what was read
            return element * (2 * queries + own + slots + 4 * queries + 2 * own + 2 * slots)
        return element * (2 * queries + own + slots)


@dataclass(frozen=True)
class PrefixPromptCase:
    """From an encoder with a projection to the keys and values of all layers. mode: "fwd" or "train"."""

    mode: str
    rows: int
    prefix: int

    def __str__(self) -> str:
        return f"prompt-{self.mode}-{self.rows}rows-P{self.prefix}"


@dataclass(frozen=True)
class PrefixModelCase:
    """A Llama with a prefix of ``prefix`` learned tokens.

    mode: "train" (forward, loss, backward, a step of AdamW), "generate" (``new`` tokens after ``tokens`` of prompt).
    padded: prompts are from half as long to ``tokens``, padded on the left.
    prefixes: how many different ones there are; rows take them in turn.
    must: peft's time over peft_fast's must not be less.
    size: "small", or "8b": four layers of Llama-3-8B's sizes.
    """

    mode: str
    rows: int
    tokens: int
    prefix: int
    dtype: str = "fp32"
    prefixes: int = 1
    padded: bool = False
    new: int = 32
    must: float | None = None
    size: str = "small"

    def __str__(self) -> str:
        more = (f"-{self.prefixes}prefixes" if self.prefixes > 1 else "") + "-padded" * self.padded
        return f"{self.mode}-{self.rows}x{self.tokens}-P{self.prefix}-{self.dtype}{more}"

    @property
    def names(self) -> list[str]:
        """The adapter of each row."""
        return [f"a{i % self.prefixes}" for i in range(self.rows)]


@dataclass(frozen=True)
class PrefixDecodeCase:
    """A decode step of a Llama with the sizes of the 8B: ``rows`` sequences with 128 tokens behind them."""

    rows: int
    prefix: int
    prefixes: int = 1

    def __str__(self) -> str:
        more = f"-{self.prefixes}prefixes" if self.prefixes > 1 else ""
        return f"decode-{self.rows}rows-P{self.prefix}{more}"

    @property
    def names(self) -> list[str]:
        """The adapter of each row."""
        return [f"a{i % self.prefixes}" for i in range(self.rows)]


PrefixCase = PrefixSiteCase | PrefixPromptCase | PrefixModelCase | PrefixDecodeCase


def quantized_bytes(kind: str, N: int, K: int) -> float:
    """Of a weight (N, K). NF4: half a byte, a byte per block of 64, 4 bytes per 256 blocks. int8: 4 bytes per row."""
    return N * K * (1 / 2 + 1 / 64 + 4 / (64 * 256)) if kind == "nf4" else N * K + 4 * N


@dataclass(frozen=True)
class QuantWeightCase:
    """Dequantizing a weight (N, K) of NF4 with double quantization to ``dtype``."""

    N: int
    K: int
    dtype: str

    def __str__(self) -> str:
        return f"dequantize-{self.N}x{self.K}-{self.dtype}"

    def bytes(self) -> float:
        """The codes and factors, and what is made of them."""
        return quantized_bytes("nf4", self.N, self.K) + self.N * self.K * BYTES[self.dtype]


@dataclass(frozen=True)
class QuantSiteCase:
    """One quantized linear site (N, K) with a LoRA of rank 16, at M tokens.

    mode: "fwd" (evaluation, no gradient), "graph" (the same in a CUDA graph), "train" (forward and backward, to x, a
    and b; of bf16 under autocast).
    kind: "nf4" (with double quantization) or "int8".    dtype: of x; a and b are fp32.    dropout: in training.
    """

    site: str
    K: int
    N: int
    M: int
    mode: str = "fwd"
    kind: str = "nf4"
    dtype: str = "bf16"
    dropout: float = 0.0
    R: int = 16

    def __str__(self) -> str:
        more = f"-p{self.dropout}" if self.dropout else ""
        return f"{self.site}-M{self.M}-{self.kind}-{self.mode}-{self.dtype}{more}"

    def flops(self, lora: bool) -> float:
        """As ``OpCase.flops``: what dequantizing takes is not work of the product."""
        passes, low_rank_passes = (2, 3) if self.mode == "train" else (1, 1)
        low_rank = 2 * self.M * self.R * (self.K + self.N) * low_rank_passes * lora
        return 2 * self.M * self.N * self.K * passes + low_rank

    def bytes(self, lora: bool) -> float:
        """The least that has to move: every tensor once per pass that needs it, the weight as it is stored."""
        M, N, K, e = self.M, self.N, self.K, BYTES[self.dtype]
        w, adapters = quantized_bytes(self.kind, N, K), self.R * (K + N) * BYTES["fp32"] * lora
        forward = (M * K + M * N) * e + w + adapters
        if self.mode != "train":
            return forward
        return forward + (M * N + M * K + M * K * lora) * e + w + 2 * adapters


@dataclass(frozen=True)
class QuantModelCase:
    """A quantized Llama with all-linear LoRA of rank 16.

    mode: "train" (forward, loss, backward) or "fwd" without gradients.    kind: as in ``QuantSiteCase``.
    prepared: by ``prepare_model_for_kbit_training``; of bf16 it runs under autocast then, as trainers run it, for
    evaluation too. Without it the model is as it was loaded, as for serving.
    must: peft's time over peft_fast's must not be less.
    size: "small", or "8b": four layers of Llama-3-8B's sizes.
    """

    mode: str
    rows: int
    tokens: int
    kind: str = "nf4"
    dtype: str = "bf16"
    prepared: bool = True
    dropout: float = 0.0
    must: float | None = None
    size: str = "small"

    def __str__(self) -> str:
        more = ("-autocast" if self.autocast else "") + (f"-p{self.dropout}" if self.dropout else "")
        return f"{self.mode}-{self.rows}x{self.tokens}-{self.kind}-{self.dtype}{more}"

    @property
    def autocast(self) -> bool:
        return self.prepared and self.dtype == "bf16"


QuantCase = QuantWeightCase | QuantSiteCase | QuantModelCase

# Llama-3-8B; qkv and gate_up as one matrix each
LLAMA_8B = (("qkv", 4096, 6144), ("o", 4096, 4096), ("gate_up", 4096, 28672), ("down", 14336, 4096))
# the same as quantized models have them: q, k and v, gate and up are layers of their own
LLAMA_8B_LAYERS = (("q", 4096, 4096), ("k", 4096, 1024), ("up", 4096, 14336), ("down", 14336, 4096))
# a quarter of its sizes: what one CPU core can take
LLAMA_QUARTER = (("qkv", 1024, 1536), ("o", 1024, 1024), ("gate_up", 1024, 7168), ("down", 3584, 1024))


def cpu_ops(quick: bool) -> Iterator[OpCase]:
    """Sizes that fit one core."""
    sites = LLAMA_QUARTER[1:2] if quick else LLAMA_QUARTER
    for site, K, N in sites:
        for M in (1, 128) if quick else (1, 16, 256):
            yield OpCase(site, K, N, M, 16)
        yield OpCase(site, K, N, 128, 16, "train", adapters="fp32", dropout=0.05)
    if not quick:
        for R in (8, 64):
            yield OpCase("o", 1024, 1024, 256, R)
        yield OpCase("o", 1024, 1024, 1, 16, dtype="fp32", adapters="fp32")
        yield OpCase("o", 1024, 1024, 256, 16, dtype="fp32", adapters="fp32")


def cpu_models(quick: bool) -> Iterator[ModelCase]:
    """The cases whose targets the project states, and their fp32 variants."""
    rows, tokens = (2, 32) if quick else (8, 128)
    yield ModelCase("forward-bf16", "fwd", "bf16", rows, tokens)
    yield ModelCase("one-token-bf16", "fwd", "bf16", 1, 1)
    yield ModelCase("train-bf16-dropout", "train", "bf16", rows, tokens, dropout=0.05)
    if not quick:
        yield ModelCase("train-bf16-adapters", "train", "bf16", rows, tokens, adapters="same")
        yield ModelCase("forward-fp32", "fwd", "fp32", rows, tokens)
        yield ModelCase("one-token-fp32", "fwd", "fp32", 1, 1)
        yield ModelCase("train-fp32-dropout", "train", "fp32", rows, tokens, dropout=0.05)


def cpu_mixed(quick: bool) -> Iterator[MixedCase]:
    """Batches that mix adapters. In an order in which adapters are only ever added: see ``mixed_cases.Loaded``."""
    if quick:
        yield MixedCase(4, 1, 2, 2, group="flat")
        yield MixedCase(4, 1, 3, 3)
        yield MixedCase(4, 1, 2, 6, group="flat")
        yield MixedCase(4, 2, 3, 6, dtype="bf16", together=True)
        return
    yield MixedCase(8, 1, 4, 4, group="flat")
    yield MixedCase(8, 1, 4, 10, group="flat")
    yield MixedCase(32, 1, 32, 32, aim=2.0, faster=3.0)
    yield MixedCase(32, 1, 8, 32, aim=1.6, faster=2.0)
    yield MixedCase(32, 1, 1, 32, aim=1.4)
    yield MixedCase(32, 1, 8, 32, together=True, aim=1.6, faster=2.0)
    for distinct in (32, 8, 1):
        yield MixedCase(32, 64, distinct, 32)
    yield MixedCase(8, 1, 1, 100, aim=1.4, faster=6.0)
    yield MixedCase(8, 1, 4, 100, group="flat")
    for adapters in ("default", "same"):
        for distinct in (32, 8, 1):
            yield MixedCase(32, 1, distinct, 32, "bf16", adapters)
        yield MixedCase(32, 64, 8, 32, "bf16", adapters)


def cpu_manage(quick: bool) -> Iterator[ManageCase]:
    """What adapters cost to come, to be switched to and to go, the more there are."""
    for nth, rounds in ((2, 2), (4, 2)) if quick else ((2, 7), (10, 7), (100, 5)):
        yield ManageCase(nth, rounds)


def cpu_prefix(quick: bool) -> Iterator[PrefixCase]:
    """Attention, the way from the encoder to it, and whole models, in sizes that fit one core."""
    if quick:
        for mode in ("fwd", "train", "decode"):
            yield PrefixSiteCase(mode, 4, 24, 20)
        yield PrefixSiteCase("train", 4, 24, 20, "bf16", prefixes=2)
        yield PrefixPromptCase("train", 4, 20)
        yield PrefixModelCase("train", 4, 16, 20, must=1.0)
        yield PrefixModelCase("generate", 4, 8, 20, new=4, must=1.0)
        yield PrefixModelCase("generate", 4, 8, 20, new=4, prefixes=2, padded=True)
        return
    for mode, tokens in (("fwd", 128), ("train", 128), ("decode", 256)):
        for prefix in (20, 128, 512, 1024):
            yield PrefixSiteCase(mode, 8, tokens, prefix)
        yield PrefixSiteCase(mode, 8, tokens, 128, "bf16")
        yield PrefixSiteCase(mode, 8, tokens, 128, prefixes=4)
    for mode in ("fwd", "train"):
        yield PrefixPromptCase(mode, 16, 128)
    yield PrefixModelCase("train", 16, 64, 128, must=1.0)
    yield PrefixModelCase("train", 16, 64, 512)
    yield PrefixModelCase("train", 16, 64, 128, "bf16")
    yield PrefixModelCase("generate", 16, 32, 128, must=1.0)
    yield PrefixModelCase("generate", 16, 32, 128, padded=True)
    yield PrefixModelCase("generate", 16, 32, 128, prefixes=4)


def cpu_quant(quick: bool) -> Iterator[QuantCase]:
    """Dequantizing, single layers and models, in sizes that fit one core."""
    if quick:
        for dtype in BYTES:
            yield QuantWeightCase(128, 256, dtype)
        for kind in ("nf4", "int8"):
            yield QuantSiteCase("o", 256, 128, 4, kind=kind)
            yield QuantSiteCase("o", 256, 128, 32, "train", kind, dropout=0.05)
        yield QuantModelCase("train", 2, 16, dropout=0.05, must=1.0)
        yield QuantModelCase("train", 2, 16, "int8", "fp32", must=1.0)
        yield QuantModelCase("fwd", 1, 1, prepared=False)
        return
    for size in (1024, 4096):
        for dtype in BYTES:
            yield QuantWeightCase(size, size, dtype)
    for M in (1, 16, 64, 512, 2048):
        yield QuantSiteCase("o", 1024, 1024, M)
    for M in (512, 2048):
        yield QuantSiteCase("o", 1024, 1024, M, "train", dropout=0.05)
    yield QuantSiteCase("o", 1024, 1024, 1, dtype="fp32")
    yield QuantSiteCase("o", 1024, 1024, 512, "train", dtype="fp32")
    yield QuantSiteCase("o", 1024, 1024, 1, kind="int8")
    yield QuantSiteCase("o", 1024, 1024, 512, kind="int8")
    yield QuantSiteCase("o", 1024, 1024, 512, "train", "int8", dropout=0.05)
    yield QuantModelCase("train", 8, 128, dropout=0.05, must=1.0)
    yield QuantModelCase("train", 8, 128, dtype="fp32", must=1.0)
    yield QuantModelCase("train", 8, 128, "int8", dropout=0.05, must=1.0)
    yield QuantModelCase("fwd", 1, 1, prepared=False)
    yield QuantModelCase("fwd", 8, 128, prepared=False)
    yield QuantModelCase("fwd", 8, 128)
    yield QuantModelCase("fwd", 1, 1, "int8", prepared=False)


def gpu_ops(step: str) -> Iterator[OpCase]:
    """Steps of the GPU campaign: "forward" (sites, sizes, ranks), "decode" (eager, graphs), "backward" (beside peft).

    Each stays under ten minutes on its own; "forward" is cut by site: "forward-o" and so on.
    """
    if step.startswith("forward-"):
        site, K, N = next(row for row in LLAMA_8B if row[0] == step.removeprefix("forward-"))
        for M in (1, 16, 64, 256, 1024, 2048, 8192, 16384):
            for R in (8, 16, 64):
                yield OpCase(site, K, N, M, R)
    elif step == "decode":
        for site, K, N in LLAMA_8B:
            for M in (1, 16):
                for mode in ("fwd", "graph"):
                    yield OpCase(site, K, N, M, 16, mode)
    elif step == "backward":
        for site, K, N in LLAMA_8B:
            for adapters in ("bf16", "fp32"):
                yield OpCase(site, K, N, 8192, 16, "train", adapters=adapters, dropout=0.05)


def gpu_mixed(step: str) -> Iterator[MixedOpCase | MixedDecodeCase]:
    """Steps of the GPU campaign with mixed batches: "mixed" (decode at the sites), "mixed-model" (end to end)."""
    if step == "mixed":
        for site, K, N in LLAMA_8B:
            for M in (1, 8, 32, 64):
                for adapters in sorted({a for a in (1, 8, 32, 128) if a <= M} | {128}):
                    for mode in ("fwd", "graph"):
                        yield MixedOpCase(site, K, N, M, adapters, mode)
    elif step == "mixed-model":
        for distinct in (1, 8, 32):
            yield MixedDecodeCase(32, distinct, 128)
        yield MixedDecodeCase(128, 128, 128)


def gpu_prefix(step: str) -> Iterator[PrefixCase]:
    """Steps of the GPU campaign with prefixes: attention forward, with backward, decode; models end to end."""
    sizes: dict[str, Any] = dict(dtype="bf16", heads=32, kv_heads=8, head_size=128)
    if step in ("prefix-fwd", "prefix-train"):
        for prefix in (20, 128, 512, 1024):
            yield PrefixSiteCase(step.removeprefix("prefix-"), 8, 512, prefix, **sizes)
        yield PrefixSiteCase(step.removeprefix("prefix-"), 4, 2048, 128, **sizes)
        yield PrefixSiteCase(step.removeprefix("prefix-"), 8, 512, 128, prefixes=8, **sizes)
    elif step == "prefix-decode":
        for rows in (16, 64, 256):
            for prefix in (20, 128, 512, 1024):
                yield PrefixSiteCase("graph", rows, 512, prefix, **sizes)
        yield PrefixSiteCase("decode", 64, 512, 128, **sizes)
        yield PrefixSiteCase("graph", 64, 128, 1024, **sizes)
        yield PrefixSiteCase("graph", 64, 512, 128, prefixes=8, **sizes)
    elif step == "prefix-model":
        for prefix in (128, 512):
            yield PrefixModelCase("train", 8, 512, prefix, "bf16", size="8b")
        for rows, prefix in ((16, 128), (64, 128), (64, 512), (64, 1024)):
            yield PrefixDecodeCase(rows, prefix)
        yield PrefixDecodeCase(64, 128, prefixes=8)


def gpu_quant(step: str) -> Iterator[QuantCase]:
    """Steps of the GPU campaign with quantized bases: dequantizing, single layers, models of four layers."""
    if step == "quant-dequant":
        for _, K, N in LLAMA_8B_LAYERS:
            for dtype in BYTES:
                yield QuantWeightCase(N, K, dtype)
    elif step == "quant-linear":
        for site, K, N in LLAMA_8B_LAYERS:
            for M in (1, 4, 16, 64):
                for mode in ("fwd", "graph"):
                    yield QuantSiteCase(site, K, N, M, mode)
            for M in (2048, 8192, 16384):
                yield QuantSiteCase(site, K, N, M)
                yield QuantSiteCase(site, K, N, M, "train", dropout=0.05)
        for M in (1, 2048):
            yield QuantSiteCase("q", 4096, 4096, M, kind="int8")
        yield QuantSiteCase("q", 4096, 4096, 2048, "train", "int8", dropout=0.05)
    elif step == "quant-step":
        for kind in ("nf4", "int8"):
            yield QuantModelCase("train", 8, 512, kind, dropout=0.05, must=1.0, size="8b")
            yield QuantModelCase("fwd", 1, 1, kind, prepared=False, size="8b")
        yield QuantModelCase("fwd", 8, 512, prepared=False, size="8b")


LORA_STEPS = ("ceilings", *(f"forward-{site}" for site, _, _ in LLAMA_8B), "decode", "backward")
MIXED_STEPS = ("mixed", "mixed-model")
PREFIX_STEPS = ("prefix-fwd", "prefix-train", "prefix-decode", "prefix-model")
QUANT_STEPS = ("quant-dequant", "quant-linear", "quant-step")
GPU_STEPS = (*LORA_STEPS, *MIXED_STEPS, *PREFIX_STEPS, *QUANT_STEPS)

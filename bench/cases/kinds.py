"""Kinds of cases: LoRA at single sites and in models, mixed batches, prefixes, quantized bases, generation.

Data only; ``suites`` lists what is measured. ``str(case)`` is its name, ``words`` the same for people, ``tiny()`` one
of the kind that a CPU can try in a second.
"""

from dataclasses import dataclass, replace

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
MIXED_RANKS = (16, 4, 64, 8, 32)  # of the adapters in mixed batches, in turn


@dataclass(frozen=True)
class OpCase:
    """One linear site (N, K) with a LoRA of rank R, at M tokens.

    mode: "fwd" without gradients, "train" forward and backward (to x, a and b).
    dtype: of x and w.    adapters: dtype of a and b; PEFT's default for a bf16 model is fp32.    dropout: in training.
    compiled: plain torch and peft take part under torch.compile too.
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
    compiled: bool = False

    def __str__(self) -> str:
        more = f"-p{self.dropout}" if self.dropout else ""
        return f"{self.site}-M{self.M}-r{self.R}-{self.mode}-{self.dtype}-{self.adapters}{more}"

    @property
    def words(self) -> str:
        what = "forward and backward" if self.mode == "train" else "forward"
        adapters = f", {self.adapters} adapter" if self.adapters != self.dtype else ""
        return (
            f"{self.site} {self.K} to {self.N}, {_tokens(self.M)}, r = {self.R}, {what}, {self.dtype}{adapters}"
            f"{_dropout(self.dropout)}"
        )

    def tiny(self) -> "OpCase":
        return replace(self, K=self.K // 64, N=self.N // 64, M=min(self.M, 64), R=min(self.R, 16))

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
class HostCase(OpCase):
    """One token in one small bf16 layer, by the steps that a GPU's path takes: the time of the host alone.

    must: peft's time over peft_fast's must not be less.
    """

    site: str = "layer"
    K: int = 64
    N: int = 64
    M: int = 1
    R: int = 16
    must: float = 1.18

    def __str__(self) -> str:
        return f"host-{self.adapters}"

    @property
    def words(self) -> str:
        return f"host time of one layer on a GPU, one token, bf16, {self.adapters} adapter"

    def tiny(self) -> "HostCase":
        return self


@dataclass(frozen=True)
class ModelCase:
    """A Llama with all-linear LoRA of rank 16. mode: "fwd" without gradients, or "train": forward, loss, backward.

    adapters: "default" is what get_peft_model makes (fp32), "same" the model's dtype (autocast_adapter_dtype=False).
    compiled: the libraries take part under torch.compile too; of training steps only those without dropout can be.
    size: "small", or "8b": four layers of Llama-3-8B's sizes.
    """

    mode: str
    dtype: str
    rows: int
    tokens: int
    dropout: float = 0.0
    adapters: str = "default"
    compiled: bool = False
    size: str = "small"

    def __str__(self) -> str:
        more = "-adapters" * (self.adapters == "same") + (f"-p{self.dropout}" if self.dropout else "")
        return f"lora-{self.mode}-{self.rows}x{self.tokens}-{self.dtype}{more}"

    @property
    def words(self) -> str:
        what = "training step" if self.mode == "train" else "forward"
        adapters = f", {self.dtype} adapter" if self.adapters == "same" else ""
        return f"LoRA, {what}, {_batch(self.rows, self.tokens)}, {self.dtype}{adapters}{_dropout(self.dropout)}"

    def tiny(self) -> "ModelCase":
        return replace(self, rows=min(self.rows, 2), tokens=min(self.tokens, 16))


@dataclass(frozen=True)
class MixedCase:
    """A Llama with ``loaded`` all-linear LoRA adapters; each row of a batch takes one of ``distinct``, in turn.

    together: the rows of an adapter follow each other.    dtype, adapters: as in ``ModelCase``.
    aim: peft_fast's time over the base's should not be more.    must: peft's over peft_fast's must not be less.
    """

    rows: int
    tokens: int
    distinct: int
    loaded: int
    dtype: str = "fp32"
    adapters: str = "default"
    together: bool = False
    aim: float | None = None
    must: float = 1.0

    def __str__(self) -> str:
        dtype = self.dtype + ("-adapters" if self.adapters == "same" else "")
        more = "-together" if self.together else ""
        return f"mixed-{self.rows}x{self.tokens}-{self.distinct}of{self.loaded}-{dtype}{more}"

    @property
    def words(self) -> str:
        of = f"{self.distinct} of {_adapters(self.loaded)}"
        more = ", rows of an adapter together" if self.together else ""
        adapters = f", {self.dtype} adapters" if self.adapters == "same" else ""
        return f"{_batch(self.rows, self.tokens)}, {of}, {self.dtype}{adapters}{more}"

    def tiny(self) -> "MixedCase":
        return replace(self, rows=min(self.rows, 4), distinct=min(self.distinct, 3), loaded=min(self.loaded, 6))

    @property
    def names(self) -> list[str]:
        """The adapter of each row."""
        of_row = (i * self.distinct // self.rows if self.together else i % self.distinct for i in range(self.rows))
        return [f"a{i}" for i in of_row]


@dataclass(frozen=True)
class ManageCase:
    """A Llama with 32 small layers, 224 linear ones: an operation on adapter number ``nth``, ``rounds`` times.

    operation: "add_adapter", "load_adapter", "set_adapter" or "delete_adapter".
    """

    operation: str
    nth: int
    rounds: int

    def __str__(self) -> str:
        return f"{self.operation}-as-number-{self.nth}"

    @property
    def words(self) -> str:
        return f"{self.operation} as adapter number {self.nth}, 224 layers"

    def tiny(self) -> "ManageCase":
        return replace(self, nth=min(self.nth, 4), rounds=2)


@dataclass(frozen=True)
class MixedOpCase:
    """One linear site (N, K) and M rows that take ``adapters`` LoRA adapters of ``MIXED_RANKS``, in turn.

    x, w and adapters are bf16. Not counted: the plan, made once for all sites of a model.
    """

    site: str
    K: int
    N: int
    M: int
    adapters: int

    def __str__(self) -> str:
        return f"mixed-{self.site}-M{self.M}-{self.adapters}adapters"

    @property
    def words(self) -> str:
        return f"{self.site} {self.K} to {self.N}, {_tokens(self.M)}, {_adapters(self.adapters)}, bf16"

    def tiny(self) -> "MixedOpCase":
        return replace(self, K=self.K // 64, N=self.N // 64, M=min(self.M, 8), adapters=min(self.adapters, 4))

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
    def words(self) -> str:
        return f"8B, {self.rows} rows, {self.distinct} of {_adapters(self.loaded)}, bf16"

    def tiny(self) -> "MixedDecodeCase":
        return replace(self, rows=min(self.rows, 8), distinct=min(self.distinct, 4), loaded=6)

    @property
    def names(self) -> list[str]:
        """The adapter of each row."""
        return [f"a{i % self.distinct}" for i in range(self.rows)]


@dataclass(frozen=True)
class PrefixSiteCase:
    """Attention of one layer whose rows have ``prefix`` learned tokens before ``tokens`` of text.

    mode: "fwd" (all tokens, causal), "train" (forward and backward, to q, k, v and the prefix), "decode" (the last
    token, the others are cached).
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
    def words(self) -> str:
        what = {"fwd": "forward", "train": "forward and backward", "decode": "of a decode step"}[self.mode]
        return f"attention {what}, {_batch(self.rows, self.tokens)}{_prefix(self.prefix, self.prefixes)}, {self.dtype}"

    def tiny(self) -> "PrefixSiteCase":
        return replace(self, rows=min(self.rows, 8), tokens=24, prefix=20, heads=4, kv_heads=2, head_size=16)

    @property
    def queries(self) -> int:
        """Of a row."""
        return 1 if self.mode == "decode" else self.tokens

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

    @property
    def words(self) -> str:
        what = "forward and backward" if self.mode == "train" else "forward"
        return f"from a projection to keys and values, {what}, {self.rows} rows, P = {self.prefix}"

    def tiny(self) -> "PrefixPromptCase":
        return replace(self, rows=min(self.rows, 4), prefix=20)


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
        return f"prefix-{self.mode}-{self.rows}x{self.tokens}-P{self.prefix}-{self.dtype}{more}"

    @property
    def words(self) -> str:
        what = "training step" if self.mode == "train" else f"generating {self.new} tokens"
        prompt = "" if self.mode == "train" else " of prompt, padded" if self.padded else " of prompt"
        batch = _batch(self.rows, self.tokens) + prompt
        return f"prefix, {what}, {batch}{_prefix(self.prefix, self.prefixes)}, {self.dtype}"

    def tiny(self) -> "PrefixModelCase":
        return replace(self, rows=min(self.rows, 4), tokens=min(self.tokens, 8), prefix=20, new=min(self.new, 4))

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
    def words(self) -> str:
        return f"8B, {self.rows} rows{_prefix(self.prefix, self.prefixes)}, bf16"

    def tiny(self) -> "PrefixDecodeCase":
        return replace(self, rows=min(self.rows, 8), prefix=20)

    @property
    def names(self) -> list[str]:
        """The adapter of each row."""
        return [f"a{i % self.prefixes}" for i in range(self.rows)]


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

    @property
    def words(self) -> str:
        return f"dequantizing NF4, {self.N} x {self.K}, to {self.dtype}"

    def tiny(self) -> "QuantWeightCase":
        return replace(self, **_whole_blocks(self.N, self.K))

    def bytes(self) -> float:
        """The codes and factors, and what is made of them."""
        return quantized_bytes("nf4", self.N, self.K) + self.N * self.K * BYTES[self.dtype]


@dataclass(frozen=True)
class QuantSiteCase:
    """One quantized linear site (N, K) with a LoRA of rank 16, at M tokens.

    mode: "fwd" (evaluation, no gradient), "train" (forward and backward, to x, a and b; of bf16 under autocast).
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

    @property
    def words(self) -> str:
        what = "forward and backward" if self.mode == "train" else "forward"
        site = f"{self.site} {self.K} to {self.N}, {self.kind.upper()}"
        return f"{site}, {_tokens(self.M)}, r = {self.R}, {what}, {self.dtype}{_dropout(self.dropout)}"

    def tiny(self) -> "QuantSiteCase":
        return replace(self, M=min(self.M, 64), **_whole_blocks(self.N, self.K))

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
        return f"quant-{self.mode}-{self.rows}x{self.tokens}-{self.kind}-{self.dtype}{more}"

    @property
    def words(self) -> str:
        what = "training step" if self.mode == "train" else "forward"
        dtype = self.dtype + " autocast" * self.autocast + _dropout(self.dropout)
        return f"{self.kind.upper()}, {what}, {_batch(self.rows, self.tokens)}, {dtype}"

    def tiny(self) -> "QuantModelCase":
        return replace(self, rows=min(self.rows, 2), tokens=min(self.tokens, 16))

    @property
    def autocast(self) -> bool:
        return self.prepared and self.dtype == "bf16"


@dataclass(frozen=True)
class GenerateCase:
    """A Llama generates ``new`` tokens greedily after ``tokens`` of prompt, its cache a dynamic one.

    adapters: how many different all-linear LoRA adapters of rank 16 the rows take in turn; one is the active adapter,
    several are ``adapter_names``.    kind: "dense", or "nf4": quantized by bitsandbytes.
    """

    rows: int
    tokens: int
    adapters: int = 1
    dtype: str = "fp32"
    kind: str = "dense"
    new: int = 32

    def __str__(self) -> str:
        kind = "" if self.kind == "dense" else f"-{self.kind}"
        return f"lora-generate-{self.rows}x{self.tokens}-{self.adapters}adapters-{self.dtype}{kind}"

    @property
    def words(self) -> str:
        adapters = f", {self.adapters} adapters" if self.adapters > 1 else ""
        kind = "" if self.kind == "dense" else f"{self.kind.upper()}, "
        batch = f"{_batch(self.rows, self.tokens)} of prompt"
        return f"LoRA, {kind}generating {self.new} tokens, {batch}{adapters}, {self.dtype}"

    def tiny(self) -> "GenerateCase":
        few = min(self.adapters, 2)
        return replace(self, rows=min(self.rows, 4), tokens=min(self.tokens, 8), adapters=few, new=min(self.new, 4))

    @property
    def names(self) -> list[str]:
        """The adapter of each row."""
        return [f"a{i % self.adapters}" for i in range(self.rows)]


def _tokens(M: int) -> str:
    return f"{M} token{'s' * (M > 1)}"


def _adapters(count: int) -> str:
    return f"{count} adapter{'s' * (count > 1)}"


def _batch(rows: int, tokens: int) -> str:
    return "one token" if rows == tokens == 1 else f"{rows} x {_tokens(tokens)}"


def _dropout(p: float) -> str:
    return f", dropout {p}" if p else ""


def _prefix(length: int, count: int) -> str:
    return f", P = {length}" + (f", {count} prefixes" if count > 1 else "")


def _whole_blocks(N: int, K: int) -> dict[str, int]:
    return dict(N=max(32, N // 32), K=max(64, K // 32))

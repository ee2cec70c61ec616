"""What is measured, as data: LoRA at single linear sites, and whole models. Nothing here runs anything."""

from collections.abc import Iterator
from dataclasses import dataclass

BYTES = {"bf16": 2, "fp32": 4}


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


# Llama-3-8B; qkv and gate_up as one matrix each
LLAMA_8B = (("qkv", 4096, 6144), ("o", 4096, 4096), ("gate_up", 4096, 28672), ("down", 14336, 4096))
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


GPU_STEPS = ("ceilings", *(f"forward-{site}" for site, _, _ in LLAMA_8B), "decode", "backward")

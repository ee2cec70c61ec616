"""What a step of a Llama with LoRA adapters costs on GPUs, by arithmetic: bytes, flops, launches, memory.

Every operation takes the longer of its bytes / bandwidth and its flops / rate (``predicted_seconds``); launches and the
exchange between GPUs come on top. docs/plan.md has what is counted and what is left out.

Units: bytes, seconds, flops (a multiplication and an addition are two), GB = 1e9 bytes. K and N are a linear layer's
in_features and out_features, R the rank, M the rows of a product: rows of the batch x tokens of a row. No torch here.
The whole model in one file, to be read from top to bottom: machine, model, workload, memory, operations, step, plan.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..ops.operators import MIXED_ONE_LAUNCH_MAX_M, ONE_LAUNCH_MAX_RANK

BOUNDS = ("memory", "compute", "launches", "communication")  # what a step's time is spent on
USABLE = 0.9  # of a GPU's memory; the rest is the context, the allocator's and the libraries'
SITES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS = {"all-linear": SITES, "attention": SITES[:4], "mlp": SITES[4:]}
DTYPE_BYTES = {"bf16": 2, "fp32": 4}
# Bytes of a weight: 4 bits, and an absmax for 64 of them, in fp32, or (dq) in 8 bits with one fp32 for 256 of those.
WEIGHT_BYTES = {"none": 2.0, "nf4": 0.5 + 4 / 64, "nf4-dq": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
LORA_LAUNCHES = {"grouped": 2, "one_launch": 0}  # at each site, beside the base product
POINTWISE_LAUNCHES = {True: 4, False: 32}  # of a layer, fused in a graph or as transformers has them: norms, rope, ...
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Machine:
    """A GPU, or any device: what it can do in a second.

    flops_per_second: by dtype, "bf16" and "fp32".    memory_bytes: of one GPU.    gpus_per_node: that share links.
    link_bytes_per_second: per direction, to all GPUs of the same box together; 0: there are none.
    mesh: it is the sum of one link for each other GPU, so that few GPUs reach a part of it only.
    launch_seconds: between two dependent kernels of a CUDA graph.    exchange_seconds: latency of an all-reduce.
    eager_launch_seconds: of the host; it runs ahead of the device, so the longer of the two counts.
    """

    name: str
    bytes_per_second: float
    flops_per_second: Mapping[str, float]
    memory_bytes: float = math.inf
    link_bytes_per_second: float = 0.0
    launch_seconds: float = 2e-6
    eager_launch_seconds: float = 8e-6
    exchange_seconds: float = 10e-6
    gpus_per_node: int = 8
    mesh: bool = False

    @classmethod
    def measured(cls, name: str, ceilings: Mapping[str, float], like: "Machine | None" = None) -> "Machine":
        """A machine whose ceilings were measured: {"bytes": B/s, "bf16": flop/s, "fp32": flop/s}, as a result has them.

        "call", where it is there: seconds of a tiny operator, which is what a launch costs.
        like: a machine that gives the rest: memory, links, launches.
        Raises: ValueError for a ceiling that is missing or not positive.
        """
        if "bytes" not in ceilings or not all(value > 0 for value in ceilings.values()):
            raise ValueError(f'{name}: ceilings must have "bytes" and be positive, got {dict(ceilings)}')
        rates = {dtype: rate for dtype, rate in ceilings.items() if dtype in DTYPE_BYTES}
        found = replace(
            like or cls(name, 1.0, {}), name=name, bytes_per_second=ceilings["bytes"], flops_per_second=rates
        )
        if "call" not in ceilings:
            return found
        return replace(found, launch_seconds=ceilings["call"], eager_launch_seconds=ceilings["call"])


def _data_sheet(
    name: str, memory: float, bandwidth: float, bf16: float, fp32: float, link: float, mesh: bool = False
) -> Machine:
    """In GB, TB/s, Tflop/s (dense), GB/s. ASSUMED to be reachable: 0.8 of the products' peak, 0.9 of the rest."""
    rates = {"bf16": 0.8 * bf16 * 1e12, "fp32": 0.8 * fp32 * 1e12}
    return Machine(name, 0.9 * bandwidth * 1e12, rates, memory * 1e9, 0.9 * link * 1e9, mesh=mesh)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _data_sheet("H100", 80, 3.35, 989, 67, 450),  # SXM
        _data_sheet("H200", 141, 4.8, 989, 67, 450),
        _data_sheet("A100", 80, 2.039, 312, 19.5, 300),  # SXM
        _data_sheet("MI300X", 192, 5.3, 1307, 163.4, 448, mesh=True),
    )
}


def predicted_seconds(
    flops: float, bytes: float, machine: Machine, dtype: str = "bf16", launches: float = 0
) -> tuple[float, str]:
    """Return (seconds, bound) of one operation: the longer of moving and computing, and its launches on top.

    bound: the longest of the three, "memory", "compute" or "launches".
    Raises: ValueError for a dtype whose rate the machine does not have.
    """
    if dtype not in machine.flops_per_second:
        raise ValueError(f"{machine.name}: no rate for {dtype!r}, only for {', '.join(machine.flops_per_second)}")
    moving, computing = bytes / machine.bytes_per_second, flops / machine.flops_per_second[dtype]
    launching = launches * machine.launch_seconds
    bound = max(zip((moving, computing, launching), BOUNDS, strict=False), key=lambda pair: pair[0])[1]
    return max(moving, computing) + launching, bound


class Site(NamedTuple):
    """A linear layer."""

    name: str
    K: int
    N: int


@dataclass(frozen=True)
class Model:
    """The sizes of a Llama-shaped model. small: norms and biases of a layer, in parameters."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    small: int

    @classmethod
    def read(cls, path: Path) -> "Model":
        """From a config.json or a directory that has one. Raises: ValueError, OSError."""
        file = path / "config.json" if path.is_dir() else path
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is not JSON: {error}") from error
        try:
            return cls.from_config(config)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    @classmethod
    def from_config(cls, config: Any) -> "Model":
        """From the fields of a Hugging Face config. Raises: ValueError naming the field that is missing or odd."""
        kind = config.get("model_type") if isinstance(config, dict) else None
        if kind not in MODEL_TYPES:
            raise ValueError(f"model_type must be one of {', '.join(MODEL_TYPES)} (Llama-shaped), got {kind!r}")

        def size(name: str, default: int | None = None) -> int:
            value = config.get(name)
            value = default if value is None else value
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number, 1 or more, got {config.get(name)!r}")
            return value

        hidden, heads = size("hidden_size"), size("num_attention_heads")
        kv_heads = size("num_key_value_heads", heads)
        if heads % kv_heads:
            raise ValueError(f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
        if config.get("head_dim") is None and hidden % heads:
            raise ValueError(f"hidden_size {hidden} is no multiple of num_attention_heads {heads}, and no head_dim")
        head_dim, intermediate = size("head_dim", hidden // heads), size("intermediate_size")
        small = 2 * hidden + (2 * head_dim if kind == "qwen3" else 0)
        if config.get("attention_bias") or kind == "qwen2":
            small += (heads + 2 * kv_heads) * head_dim + (0 if kind == "qwen2" else hidden)
        if config.get("mlp_bias"):
            small += 2 * intermediate + hidden
        tied = bool(config.get("tie_word_embeddings", False))
        layers, vocab = size("num_hidden_layers"), size("vocab_size")
        return cls(hidden, intermediate, layers, heads, kv_heads, head_dim, vocab, tied, small)

    def widths(self, gpus: int = 1) -> tuple[int, int, int]:
        """(queries, keys, MLP) on one of ``gpus``, in elements; heads of keys are repeated where there are too few."""
        heads, kv_heads = self.heads // gpus, max(1, self.kv_heads // gpus)
        return heads * self.head_dim, kv_heads * self.head_dim, self.intermediate // gpus

    def sites(self, gpus: int = 1) -> tuple[Site, ...]:
        """A layer's linear layers, as one of ``gpus`` has them: N is split, in o_proj and down_proj K."""
        h, (q, kv, f) = self.hidden, self.widths(gpus)
        sizes = ((h, q), (h, kv), (h, kv), (q, h), (h, f), (h, f), (f, h))
        return tuple(Site(name, K, N) for name, (K, N) in zip(SITES, sizes, strict=True))

    @property
    def linear_parameters(self) -> int:
        return self.layers * sum(site.K * site.N for site in self.sites())

    @property
    def parameters(self) -> int:
        tables = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.linear_parameters + tables + self.layers * self.small + self.hidden

    def check_parallel(self, gpus: int, machine: Machine) -> None:
        """Raises: ValueError if the model cannot be split over that many of these GPUs."""
        if gpus > machine.gpus_per_node:
            raise ValueError(
                f"{gpus} GPUs are more than the {machine.gpus_per_node} of a box of {machine.name}: several boxes "
                "(pipeline parallelism, replicas) are not modelled"
            )
        if gpus > 1 and not machine.link_bytes_per_second:
            raise ValueError(f"{machine.name} has no links to other GPUs, so {gpus} cannot share a model")
        for name, size in (("num_attention_heads", self.heads), ("intermediate_size", self.intermediate)):
            if size % gpus:
                raise ValueError(f"{name} {size} cannot be split over {gpus} GPUs")
        if self.kv_heads % gpus and gpus % self.kv_heads:
            raise ValueError(
                f"num_key_value_heads {self.kv_heads} can neither be split over nor repeated on {gpus} GPUs"
            )


@dataclass(frozen=True)
class Workload:
    """What one step does: ``batch`` rows of ``tokens`` new tokens, after ``context`` tokens that are in the cache.

    adapters: loaded, all of rank ``rank`` on ``targets``.
    used: different ones in the step (default: as many as there are rows or adapters, one in training).
    kernels: "grouped" (two at each site, what the library does unless a measured table says otherwise) or "one_launch".
    train: forward and backward, base weights are frozen.
    graph: the step is a CUDA graph with fused norms and activations; otherwise eager, as transformers has it.
    Raises: ValueError naming the field.
    """

    batch: int
    tokens: int = 1
    context: int = 0
    adapters: int = 0
    rank: int = 16
    used: int | None = None
    targets: tuple[str, ...] = SITES
    adapter_dtype: str = "bf16"
    quantize: str = "none"
    kernels: str = "grouped"
    train: bool = False
    graph: bool = True

    def __post_init__(self) -> None:
        lows = {"batch": 1, "tokens": 1, "context": 0, "adapters": 0, "rank": 1}
        for name, low in lows.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be {low} or more, got {getattr(self, name)}")
        most = min(self.batch, self.adapters)
        if self.used is not None and not 0 <= self.used <= most:
            raise ValueError(f"used adapters must be from 0 to {most} (of {self.adapters}, in {self.batch} rows)")
        if self.train and self.context:
            raise ValueError(f"a training step has no cache: context must be 0, got {self.context}")
        choices: dict[str, Any] = {
            "adapter_dtype": DTYPE_BYTES, "quantize": WEIGHT_BYTES, "kernels": LORA_LAUNCHES,
        }  # fmt: skip
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not self.targets or not set(self.targets) <= set(SITES):
            raise ValueError(f"targets must be some of {', '.join(SITES)}, got {', '.join(self.targets) or 'none'}")
        if self.kernels == "one_launch" and (
            self.train or self.M > MIXED_ONE_LAUNCH_MAX_M or self.rank > ONE_LAUNCH_MAX_RANK
        ):
            raise ValueError(
                f"the one_launch kernel is for inference, up to {MIXED_ONE_LAUNCH_MAX_M} rows and rank "
                f"{ONE_LAUNCH_MAX_RANK}"
            )

    @property
    def M(self) -> int:
        return self.batch * self.tokens

    @property
    def in_use(self) -> int:
        """Different adapters in the step."""
        most = min(self.batch, self.adapters)
        return self.used if self.used is not None else min(most, 1) if self.train else most

    def adapter_bytes(self, model: Model, gpus: int = 1) -> float:
        """Of one adapter, on one of ``gpus``: at a site A (R, K) or B (N, R) is split, the other one is whole."""
        sizes = sum(site.K + site.N for site in model.sites(gpus) if site.name in self.targets)
        return model.layers * sizes * self.rank * DTYPE_BYTES[self.adapter_dtype]


def memory(model: Model, work: Workload, gpus: int = 1) -> dict[str, float]:
    """Bytes on one of ``gpus``, by what they are for. Activations are an estimate (docs/plan.md)."""
    h, (q, kv, f), vocab = model.hidden, model.widths(gpus), math.ceil(model.vocab / gpus)
    linear = model.layers * sum(_weight_bytes(site, work.quantize) for site in model.sites(gpus))
    weights = linear + 2 * ((1 if model.tied else 2) * vocab * h + model.layers * model.small + h)
    adapter = work.adapter_bytes(model, gpus)
    parts = {"weights": weights, "adapters": work.adapters * adapter}
    if work.train:
        kept = 2 * work.M * model.layers * (4 * h + 2 * q + 2 * kv + 4 * f)  # what the backward needs, in bf16
        parts["gradients, AdamW"] = 3 * work.in_use * adapter
        parts["activations"] = kept + 10 * work.M * vocab  # logits in bf16, in fp32 for the loss, their gradient
    else:
        parts["KV cache"] = 2 * 2 * model.layers * kv * work.batch * (work.context + work.tokens)
        parts["activations"] = 2 * work.M * (2 * h + max(2 * q + 2 * kv, 3 * f)) + 6 * work.batch * vocab
    return parts


def _weight_bytes(site: Site, quantize: str) -> float:
    return site.K * site.N * WEIGHT_BYTES[quantize] + (4 * site.N if quantize == "int8" else 0)


class Operation(NamedTuple):
    """``times`` times in a step."""

    times: int
    flops: float
    bytes: float
    launches: int


def _linear_operations(model: Model, work: Workload, gpus: int) -> list[Operation]:
    """Of the linear layers and their adapters."""
    M, L, R = work.M, model.layers, work.rank
    passes, low_rank_passes = (2, 3) if work.train else (1, 1)  # no gradient of base weights
    found = []
    for site in model.sites(gpus):
        flops, moved = 2.0 * M * site.N * site.K, _weight_bytes(site, work.quantize) + 2 * M * (site.K + site.N)
        if not (work.in_use and site.name in work.targets):
            found.append(Operation(L, passes * flops, passes * moved, passes))
            continue
        low_rank = 2.0 * M * R * (site.K + site.N) * low_rank_passes
        adapters = work.in_use * R * (site.K + site.N) * DTYPE_BYTES[work.adapter_dtype] * low_rank_passes
        if work.kernels == "one_launch":
            found.append(Operation(L, flops + low_rank, moved + adapters, 1))
            continue
        # x is read again, y read and written; backward: dy and x are read again, dx read and written
        again = 2 * M * (site.K + 2 * site.N + ((3 * site.K + site.N) if work.train else 0))
        found.append(Operation(L, passes * flops, passes * moved, passes))
        found.append(Operation(L, low_rank, adapters + again, LORA_LAUNCHES[work.kernels] * low_rank_passes))
    return found


def operations(model: Model, work: Workload, gpus: int = 1) -> list[Operation]:
    """What one of ``gpus`` does in a step, apart from the exchange between them. Every tensor moves once per pass."""
    h, (q, kv, f), vocab = model.hidden, model.widths(gpus), math.ceil(model.vocab / gpus)
    L, M = model.layers, work.M
    passes, repeated = (2, 3) if work.train else (1, 1)
    logits = M if work.train else work.batch  # rows of
    pairs = work.tokens * work.context + work.tokens * (work.tokens + 1) // 2  # of a query and a key that it sees
    attention_bytes = 2 * work.batch * (2 * kv * (work.context + work.tokens) + 2 * q * work.tokens)
    pointwise = 2 * M * (8 * h + 2 * (q + 2 * kv) + 3 * f)  # norms with residuals, rope and cache, gate times up
    return [
        *_linear_operations(model, work, gpus),
        Operation(L, 4.0 * work.batch * q * pairs * (3.5 if work.train else 1), repeated * attention_bytes, repeated),
        Operation(L, 0.0, repeated * pointwise, repeated * POINTWISE_LAUNCHES[work.graph]),
        Operation(1, 0.0, repeated * 8 * M * h, 2 * repeated),  # embedding, last norm
        Operation(1, passes * 2.0 * logits * vocab * h, passes * 2 * (vocab * h + logits * (vocab + h)), passes),
    ]


@dataclass(frozen=True)
class Step:
    """What a step takes on each GPU. seconds: by bound, which add up to the step's time."""

    seconds: dict[str, float]
    flops: float
    bytes: float
    launches: int

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def bound(self) -> str:
        """What most of the time goes to."""
        return max(self.seconds, key=lambda bound: self.seconds[bound])


def step(model: Model, work: Workload, machine: Machine, gpus: int = 1) -> Step:
    """The time of a step on ``gpus`` with tensor parallelism, operation after operation.

    Raises: ValueError if the model cannot be split over them.
    """
    model.check_parallel(gpus, machine)
    seconds, every = dict.fromkeys(BOUNDS, 0.0), operations(model, work, gpus)
    for operation in every:
        taken, bound = predicted_seconds(operation.flops, operation.bytes, machine)
        seconds[bound] += operation.times * taken
    exchanges = 2 * model.layers * (2 if work.train else 1) if gpus > 1 else 0  # after o_proj and down_proj
    launches = sum(operation.times * operation.launches for operation in every) + exchanges
    if exchanges:
        moved = 2 * (gpus - 1) / gpus * 2 * work.M * model.hidden
        reached = (gpus - 1) / (machine.gpus_per_node - 1) if machine.mesh else 1.0
        link = machine.link_bytes_per_second * reached
        seconds["communication"] = exchanges * (moved / link + machine.exchange_seconds)
    seconds["launches"] = launches * machine.launch_seconds
    if not work.graph:
        host = launches * machine.eager_launch_seconds
        seconds["launches"] += max(0.0, host - sum(seconds.values()))
    flops, moved = (sum(op.times * getattr(op, what) for op in every) for what in ("flops", "bytes"))
    return Step(seconds, flops, moved, launches)


def fewest_gpus(model: Model, work: Workload, machine: Machine) -> int:
    """The smallest power of two that splits the model and has the memory for it, at most a box.

    Raises: ValueError saying how much memory is missing and what to do.
    """
    short, largest = math.inf, 1
    for gpus in (1 << i for i in range(machine.gpus_per_node.bit_length())):
        try:
            model.check_parallel(gpus, machine)
        except ValueError:
            continue
        short, largest = sum(memory(model, work, gpus).values()) - USABLE * machine.memory_bytes, gpus
        if short <= 0:
            return gpus
    raise ValueError(
        f"does not fit {largest} x {machine.name}: {short / 1e9:.1f} GB too much on each for {USABLE:g} of its "
        f"{machine.memory_bytes / 1e9:.0f} GB. Quantize the base, take fewer rows, tokens or adapters, or a GPU with "
        "more memory; several boxes (pipeline parallelism, replicas) are not modelled"
    )


@dataclass(frozen=True)
class Plan:
    """A step with its adapters, the same step of the base alone, and the memory of each GPU."""

    model: Model
    work: Workload
    machine: Machine
    gpus: int
    memory: dict[str, float]
    base: Step
    step: Step

    @property
    def missing_bytes(self) -> float:
        """On each GPU; 0 if it fits."""
        return max(0.0, sum(self.memory.values()) - USABLE * self.machine.memory_bytes)


def plan(model: Model, work: Workload, machine: Machine, gpus: int | None = None) -> Plan:
    """Memory and time of ``work`` on ``gpus`` (default: the fewest that have the memory).

    Raises: ValueError if the model cannot be split over them, or by default if no number of them has the memory.
    """
    gpus = fewest_gpus(model, work, machine) if gpus is None else gpus
    base = replace(work, adapters=0, used=0, kernels="grouped")
    return Plan(
        model, work, machine, gpus, memory(model, work, gpus),
        step(model, base, machine, gpus), step(model, work, machine, gpus),
    )  # fmt: skip

"""`peft-fast plan`: will it fit, how long does a step take, what do the adapters cost. Arithmetic only, no torch."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from ..jobs.errors import JobError, UsageError
from ..planning.plan import (
    DTYPE_BYTES,
    GPUS,
    LORA_LAUNCHES,
    SITES,
    TARGETS,
    USABLE,
    WEIGHT_BYTES,
    Model,
    Plan,
    Workload,
    plan,
)
from .arguments import whole

HELP = "will it fit, how long is a step, what do the adapters cost: calculated, no GPU needed"
DESCRIPTION = """Memory and time of one step of a Llama-shaped model with LoRA adapters on H100, H200, A100 or
MI300X, by arithmetic: bytes, flops, launches, exchange between GPUs. docs/plan.md has the formulas."""
EPILOG = "example:\n  peft-fast plan --model-config DIR --adapters 100 --batch 32 --context 1024 --gpu H100"
ASSUMPTIONS = (
    "not measured; assumed: 0.8 of data sheet flops, 0.9 of bandwidths, 2 us a launch (eager 8), 10 an all-reduce"
)
_ALIASES = {"MI300": "MI300X"}


class Options(NamedTuple):
    """What the command line says; the options' help has the meaning."""

    model_config: Path
    adapters: int
    rank: int
    batch: int
    gpu: str
    context: int
    tokens: int
    tensor_parallel: int | None
    quantize: str
    adapters_used: int | None
    targets: str
    adapter_dtype: str
    kernels: str
    train: bool
    eager: bool
    json: bool


def add_to(parser: argparse.ArgumentParser) -> None:
    """Give the parser of `peft-fast plan` its options."""
    add, positive, not_negative = parser.add_argument, whole(1), whole(0)
    add("--model-config", type=Path, required=True, metavar="FILE", help="config.json, or a directory that has one")
    add("--adapters", type=not_negative, required=True, metavar="N", help="loaded; 0: the base model alone")
    add("--rank", type=positive, default=16, metavar="R", help="of every adapter (default: 16)")
    add("--batch", type=positive, required=True, metavar="N", help="rows of a step")
    add("--gpu", required=True, metavar="NAME", help=", ".join(GPUS))
    add("--context", type=not_negative, default=0, metavar="T", help="tokens of a row in the cache (default: 0)")
    add("--tokens", type=positive, default=1, metavar="T", help="new tokens of a row (default: 1, a decode step)")
    add("--tensor-parallel", type=positive, metavar="N", help="GPUs (default: the fewest with the memory)")
    add(
        "--quantize",
        choices=WEIGHT_BYTES,
        default="none",
        help="linear layers of the base; embedding and lm_head stay in bf16 (default: none)",
    )
    add("--adapters-used", type=not_negative, metavar="N", help="in a step (default: one for each row, 1 in training)")
    add(
        "--targets",
        default="all-linear",
        metavar="NAMES",
        help="all-linear, attention, mlp, or layers as q,v (default: all-linear)",
    )
    add("--adapter-dtype", choices=DTYPE_BYTES, default="bf16", help="default: bf16; in training peft's is fp32")
    add(
        "--kernels",
        choices=LORA_LAUNCHES,
        default="grouped",
        help="of the adapters: two at each layer, or in the base product's own launch (default: grouped)",
    )
    add("--train", action="store_true", help="forward and backward of the adapters' training")
    add("--eager", action="store_true", help="no CUDA graph, transformers' own norms and activations")
    add("--json", action="store_true", help="the same as JSON, in bytes and seconds")


def run(args: argparse.Namespace) -> int:
    """Print the plan. Returns 0."""
    options = Options(**{name: getattr(args, name) for name in Options._fields})
    result = planned(options)
    print(json.dumps(as_dict(result), indent=2) if options.json else table(result))
    return 0


def planned(options: Options) -> Plan:
    """The plan. Raises: UsageError for an option's value, JobError if nothing has the memory."""
    gpu = _ALIASES.get(options.gpu.upper(), options.gpu.upper())
    if gpu not in GPUS:
        raise UsageError(f"--gpu {options.gpu}: not known, only {', '.join(GPUS)}")
    try:
        model = Model.read(options.model_config)
    except OSError as error:
        raise UsageError(f"--model-config {error.filename}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"--model-config {error}") from error
    try:
        work = Workload(
            batch=options.batch,
            tokens=options.tokens,
            context=options.context,
            adapters=options.adapters,
            rank=options.rank,
            used=options.adapters_used,
            targets=targets(options.targets),
            adapter_dtype=options.adapter_dtype,
            quantize=options.quantize,
            kernels=options.kernels,
            train=options.train,
            graph=not options.eager,
        )
        if options.tensor_parallel is not None:
            model.check_parallel(options.tensor_parallel, GPUS[gpu])
    except ValueError as error:
        raise UsageError(str(error)) from error
    try:
        return plan(model, work, GPUS[gpu], options.tensor_parallel)
    except ValueError as error:
        raise JobError(str(error)) from error


def targets(text: str) -> tuple[str, ...]:
    """The layers that "all-linear", "attention", "mlp" or "q,v_proj" mean. Raises: ValueError naming the wrong one."""
    if text in TARGETS:
        return TARGETS[text]
    names = [name if name.endswith("_proj") else f"{name}_proj" for name in text.split(",")]
    for name in names:
        if name not in SITES:
            known = ", ".join((*TARGETS, *(site.removesuffix("_proj") for site in SITES)))
            raise ValueError(f"--targets {text}: {name.removesuffix('_proj')!r} is none of {known}")
    return tuple(site for site in SITES if site in names)


def as_dict(result: Plan) -> dict[str, Any]:
    """Plain data: what the table has, in bytes and seconds, and all that it was made from."""
    steps = {
        name: asdict(taken)
        | {"total_seconds": taken.total, "bound": taken.bound, "tokens_per_second": result.work.M / taken.total}
        for name, taken in (("base", result.base), ("with_adapters", result.step))
    }
    cost = result.step.total - result.base.total
    return {
        "model": asdict(result.model) | {"parameters": result.model.parameters},
        "workload": asdict(result.work) | {"used": result.work.in_use},
        "machine": asdict(result.machine),
        "gpus": result.gpus,
        "fits": not result.missing_bytes,
        "missing_bytes": result.missing_bytes,
        "memory_bytes": result.memory | {"total": sum(result.memory.values())},
        **steps,
        "adapters_cost": {"seconds": cost, "of_base": cost / result.base.total},
        "assumptions": ASSUMPTIONS,
    }


def table(result: Plan) -> str:
    """For people: memory, time with its bound, cost of the adapters, tokens per second."""
    work, gpu, base, step = result.work, result.machine, result.base, result.step
    available = USABLE * gpu.memory_bytes
    fits = f"does not fit: {result.missing_bytes / 1e9:.2f} GB too much" if result.missing_bytes else "fits"
    boxes = "" if result.gpus == 1 else ", tensor parallel"
    cost = f"   {step.total / base.total - 1:+.1%} for the adapters" if work.in_use else ""
    lines = [
        f"model      {result.model.parameters / 1e9:.2f} billion parameters, quantize: {work.quantize}",
        f"adapters   {_adapters(work)}",
        f"step       {_kind(work)}, {work.batch} x {work.tokens} tokens, {work.context} in the cache",
        f"GPUs       {result.gpus} x {gpu.name}{boxes}",
        "",
        f"{'memory of each GPU':<22}{'GB':>12}",
        *(f"  {name:<20}{value / 1e9:>12.2f}" for name, value in result.memory.items()),
        f"  {'together':<20}{sum(result.memory.values()) / 1e9:>12.2f}   of {available / 1e9:.2f}: {fits}",
        "",
        f"{'time of a step, ms':<22}{'base':>12}{'adapters':>12}{'together':>12}",
        *(
            f"  {name:<20}{_row(base.seconds[name], step.seconds[name])}"
            for name in base.seconds
            if base.seconds[name] or step.seconds[name]
        ),
        f"  {'together':<20}{_row(base.total, step.total)}{cost}",
        f"  {'bound':<20}{base.bound:>12}{'':>12}{step.bound:>12}",
        "",
        f"{'number of launches':<22}{base.launches:>12,}{step.launches - base.launches:>12,}{step.launches:>12,}",
        f"{'tokens per second':<22}{work.M / base.total:>12,.0f}{'':>12}{work.M / step.total:>12,.0f}",
        "",
        ASSUMPTIONS,
    ]
    return "\n".join(lines)


def _row(base: float, step: float) -> str:
    return f"{base * 1e3:>12.3f}{(step - base) * 1e3:>12.3f}{step * 1e3:>12.3f}"


def _kind(work: Workload) -> str:
    kind = "training" if work.train else "decode" if work.tokens == 1 else "prefill"
    return f"{kind} in a CUDA graph" if work.graph else f"{kind}, eager"


def _adapters(work: Workload) -> str:
    if not work.adapters:
        return "none"
    names = [name for name, group in TARGETS.items() if group == work.targets]
    where = names[0] if names else ",".join(site.removesuffix("_proj") for site in work.targets)
    return f"{work.adapters} of rank {work.rank} in {work.adapter_dtype} on {where}, {work.in_use} in the step"

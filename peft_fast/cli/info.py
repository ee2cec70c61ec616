"""`peft-fast info`: versions, devices, folders, and for each op the implementation that will be used, and why."""

import argparse
import importlib.metadata
import os
import platform

from ..jobs.errors import UsageError
from . import model_options

PACKAGES = (
    "peft_fast",
    "torch",
    "triton",
    "transformers",
    "safetensors",
    "bitsandbytes",
    "accelerate",
    "matplotlib",
    "peft",
)

HELP = "versions, devices, and the implementation that each op will use, and why"
DESCRIPTION = """Print versions, devices, and for each op the implementation that will be used, and why; with --model
for the model's own layers, without reading its weights."""
EPILOG = "example: peft-fast info --model peft_fast_demo/base"


def add_to(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    model_options.add_to(parser, required=False)


def run(args: argparse.Namespace) -> int:
    """Print what there is to say. Returns 0."""
    if args.model is None and args.adapter is not None:
        raise UsageError("--adapter needs --model, the base model that it is for")
    print(report() if args.model is None else report_of_model(args))
    return 0


def report() -> str:
    """All sections as text; imports torch, and nothing of the other packages."""
    sections = {
        "versions": _versions(),
        "devices": _devices(),
        "folders": _folders(),
        "implementation of each op": _implementations(),
    }
    return _text(sections)


def report_of_model(args: argparse.Namespace) -> str:
    """What would run for the layers of --model, and why; its weights are not read."""
    import torch

    from ..jobs.device import pick_device
    from ..tuning.explain import explain

    device = pick_device(args.device)
    model = model_options.load(args, torch.device("meta"))
    found = explain(model, args.tokens, device)
    name = f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
    what = f"{args.model} with {args.adapter or f'LoRA of rank {args.r} on all linear layers'}, on {name}"
    lines = {title: [situation.in_site() for situation in situations] for title, situations in found.items()}
    sections = lines or {"nothing to show": ["no linear layer with LoRA and no prefix"]}
    return f"{what}\n\n{_text({**sections, 'folders': _tables()})}"


def _text(sections: dict[str, list[str]]) -> str:
    return "\n\n".join(f"{title}\n" + "\n".join(f"  {line}" for line in lines) for title, lines in sections.items())


def _tables() -> list[str]:
    from csrc_triton import tables

    own, shipped = (
        sum(len(tables.read(folder / name)) for name in (tables.CHOICES, tables.CONFIGS))
        for folder in (tables.user_folder(), tables.SHIPPED)
    )
    return [f"measured rows: {own} of your own in {tables.user_folder()} (peft-fast tune), {shipped} with the library"]


def _versions() -> list[str]:
    lines = [f"{'python':<14}{platform.python_version()} on {platform.system()} {platform.machine()}"]
    for name in PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        lines.append(f"{name:<14}{version}")
    return lines


def _devices() -> list[str]:
    import torch

    from ..reference import cpu

    lines = [f"cpu: {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads; {cpu.describe()}"]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        memory = properties.total_memory / 2**30
        lines.append(f"cuda:{i}: {properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB")
    if len(lines) == 1:
        lines.append("no GPU that torch can see")
    return lines


def _folders() -> list[str]:
    from huggingface_hub.constants import HF_HUB_CACHE

    from ..demo.run import BASE

    return [f"models and adapters from the hub: {HF_HUB_CACHE}", f"base model of the demo: {BASE}", *_tables()]


def _implementations() -> list[str]:
    from ..ops.operators import OPERATORS
    from ..ops.situations import typical

    variables = dict.fromkeys(op.variable for op in OPERATORS.values())
    lines = [f"{name}={os.environ[name]}: forced, nothing falls back" for name in variables if os.environ.get(name)]
    return [*lines, *map(str, typical())]

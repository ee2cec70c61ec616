"""`peft-fast info`: versions, devices, folders, and for each op the implementation that will be used, and why."""

import importlib.metadata
import os
import platform

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


def report() -> str:
    """All sections as text; imports torch, and nothing of the other packages."""
    sections = {
        "versions": _versions(),
        "devices": _devices(),
        "folders": _folders(),
        "implementation of each op": _implementations(),
    }
    return "\n\n".join(f"{title}\n" + "\n".join(f"  {line}" for line in lines) for title, lines in sections.items())


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

    from .. import cpu

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

    from .demo import BASE

    return [f"models and adapters from the hub: {HF_HUB_CACHE}", f"base model of the demo: {BASE}"]


def _implementations() -> list[str]:
    from ..ops import choice

    variables = (choice.VARIABLE, choice.PREFIX_VARIABLE)
    lines = [f"{name}={os.environ[name]}: forced, nothing falls back" for name in variables if os.environ.get(name)]
    return [*lines, *map(str, choice.describe())]

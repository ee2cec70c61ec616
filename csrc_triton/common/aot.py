"""What the ahead-of-time check compiles: each kernel module's ``aot_cases()`` yields all that tuning may choose.

Integers and pointers are compiled as divisible by 16, as they are at the sites of real models; a stride of 1 and an
absent tensor (None) are constants, as Triton makes them at a launch.
"""

import importlib
import pkgutil
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import csrc_triton

RANKS = (16, 64, 128)


@dataclass(frozen=True)
class AotCase:
    """One compilation.

    kernel: the jit function.    name: the kernel's name in tables.    label: configuration and variant.
    archs: where to compile it.  signature: type of each argument ("*bf16", "i32", "fp32", "constexpr").
    constexprs: values of the arguments that are constants.
    options: num_warps, num_stages.    matmul: False only where no tensor cores are used by design.
    """

    kernel: Any
    name: str
    label: str
    archs: tuple[str, ...]
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, int]
    matmul: bool = True


def kernel_modules() -> list[ModuleType]:
    """The modules that have kernels, found by looking, so that none is forgotten."""
    names = [m.name for m in pkgutil.walk_packages(csrc_triton.__path__, "csrc_triton.") if not m.ispkg]
    return [module for module in map(importlib.import_module, names) if hasattr(module, "aot_cases")]


def case(kernel: Any, name: str, label: str, candidate: Any, types: dict[str, str], **constants: Any) -> AotCase:
    """A case from a candidate: its configuration and ``constants`` are constants, other arguments have ``types``."""
    config = {k: v for k, v in candidate.config.items() if k in kernel.arg_names}
    values = config | constants
    return AotCase(
        kernel=kernel,
        name=name,
        label=f"{candidate.label}-{label}",
        archs=candidate.archs,
        signature={arg: "constexpr" if arg in values else types[arg] for arg in kernel.arg_names},
        constexprs=values,
        options=dict(num_warps=candidate.num_warps, num_stages=candidate.num_stages),
        matmul=candidate.itemsize == 2,
    )


def ranks(candidate: Any) -> list[int]:
    """The values of BLOCK_R a candidate is compiled with."""
    largest = candidate.blocks.get("LARGEST_R", candidate.max_rank)
    return sorted({min(R, largest) for R in RANKS if R <= candidate.max_rank})


def x_type(candidate: Any) -> str:
    """bf16 stands for fp16 too."""
    return "*bf16" if candidate.itemsize == 2 else "*fp32"

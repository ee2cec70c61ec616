"""The operators that have several implementations: of each all that is known of them, in one place.

``choice`` takes one in each call, `peft-fast info` shows which, `peft-fast tune` measures them, and docs/dispatch.md
says what each name is. A new operator is an entry here and a ``register`` in its own module. Pure Python: what a plan
of costs asks as well.

    torch       plain torch: the vendor's GEMMs, addmm into the base's output; of a quantized weight bitsandbytes'
                library
    addmm       the same GEMMs, but s = x @ a.T and dropout's mask from a kernel
    one_launch  base and update in one kernel, for few rows
    split       s by one kernel, base and update by a second one
    grouped     of batches that mix adapters: the vendor's base GEMM, then s and the update by two kernels over blocks
                of rows of one adapter
    peft        PEFT's own order of casts, in plain torch
    kernel      of a quantized weight: it is decoded inside of the product. Of attention with a learned prefix: one
                softmax over prefix and keys
    flash       torch's flash attention of the prefix and of the keys, merged
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

ONE_LAUNCH_MAX_RANK = 128  # s of a program's rows stays in registers
ONE_LAUNCH_MAX_MR = 16384  # every program computes s: beyond this, that costs more than a second launch
MIXED_ONE_LAUNCH_MAX_M = 64  # every program holds all rows of x


@dataclass(frozen=True)
class Implementation:
    """One way to run an operator.

    Args:
        kernel: it needs Triton, and fp16, bf16 or fp32.
        measured: a row of the tables may name it.
        cpu_only: why it does not run on other devices, or "".
        bound: which M and R it is for, in words; ``holds`` says whether some are. "": all.
    """

    name: str
    kernel: bool = False
    measured: bool = True
    cpu_only: str = ""
    bound: str = ""
    holds: Callable[[int, int], bool] = lambda M, R: True


class Default(NamedTuple):
    """What runs where nothing is forced and no measured row speaks, and why that."""

    implementation: str
    reason: str


@dataclass(frozen=True)
class Operator:
    """Args:
    variable: of the environment, to force an implementation.
    gpu, gpu_dropout: on a GPU, without and with dropout. Other devices take "torch".
    instead: what to force in place of an implementation that is beyond its bound.
    typical: the lines of `peft-fast info`: words and further arguments of ``choice.choose``.
    """

    name: str
    variable: str
    implementations: tuple[Implementation, ...]
    gpu: Default
    gpu_dropout: Default | None = None
    elsewhere: str = "take plain torch"
    instead: str = ""
    typical: tuple[tuple[str, dict[str, Any]], ...] = field(default=(), hash=False)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """What may be asked for."""
        return ("auto", *(it.name for it in self.implementations))

    @cached_property
    def measured(self) -> tuple[str, ...]:
        """What a row of the tables may name."""
        return tuple(it.name for it in self.implementations if it.measured)

    def __getitem__(self, name: str) -> Implementation:
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, Implementation]:
        return {it.name: it for it in self.implementations}


LORA_VARIABLE, PREFIX_VARIABLE, QUANT_VARIABLE = "PEFT_FAST_LORA", "PEFT_FAST_PREFIX", "PEFT_FAST_QUANT"
_FEW, _MANY = ("one token", dict(M=1)), ("2048 tokens", dict(M=2048))
_VENDOR = "the vendor's GEMMs"


def _quantized(name: str, typical: bool = False) -> Operator:
    return Operator(
        name,
        QUANT_VARIABLE,
        (Implementation("torch"), Implementation("kernel", kernel=True)),
        gpu=Default("torch", "bitsandbytes' library"),
        elsewhere="take bitsandbytes' library where it is right, else plain torch",
        typical=(_FEW,) if typical else (),
    )


_ALL = (
    Operator(
        "lora_linear",
        LORA_VARIABLE,
        (
            Implementation("torch"),
            Implementation("addmm", kernel=True),
            Implementation(
                "one_launch",
                kernel=True,
                bound=f"R <= {ONE_LAUNCH_MAX_RANK} and M * R <= {ONE_LAUNCH_MAX_MR}",
                holds=lambda M, R: R <= ONE_LAUNCH_MAX_RANK and M * R <= ONE_LAUNCH_MAX_MR,
            ),
            Implementation("split", kernel=True),
            Implementation("peft", measured=False),
        ),
        gpu=Default("torch", _VENDOR),
        gpu_dropout=Default("addmm", f"{_VENDOR}, the mask from a kernel"),
        instead="split",
        typical=(_FEW, _MANY, ("2048 tokens, dropout", dict(M=2048, p=0.05))),
    ),
    Operator(
        "lora_mixed",
        LORA_VARIABLE,
        (
            Implementation("torch", measured=False, cpu_only="would read every row's slot back from"),
            Implementation("grouped", kernel=True),
            Implementation(
                "one_launch",
                kernel=True,
                bound=f"M <= {MIXED_ONE_LAUNCH_MAX_M} and ranks <= {ONE_LAUNCH_MAX_RANK}",
                holds=lambda M, R: M <= MIXED_ONE_LAUNCH_MAX_M and R <= ONE_LAUNCH_MAX_RANK,
            ),
            Implementation("split", kernel=True),
        ),
        gpu=Default("grouped", "the vendor's base GEMM"),
        instead="grouped",
        typical=(("32 rows", dict(M=32)), _MANY),
    ),
    # which of these runs depends on other things than sizes: prefix_choice.py
    Operator(
        "prefix_attention",
        PREFIX_VARIABLE,
        (
            Implementation("torch", measured=False),
            Implementation("kernel", kernel=True, measured=False),
            Implementation("flash", measured=False),
        ),
        gpu=Default("kernel", "reads a prefix once for all rows that share it"),
    ),
    _quantized("dequantize_4bit"),
    _quantized("lora_linear_4bit", typical=True),
    _quantized("lora_linear_mixed_4bit"),
    _quantized("lora_linear_int8"),
)
OPERATORS = {op.name: op for op in _ALL}

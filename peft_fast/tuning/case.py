"""One thing to measure: random inputs, the call, its formula; a check against fp64 that comes before any timing."""

import gc
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .clock import graphed, interleaved

Size = tuple[int, int, int, int]  # M, N, K, R
SCALING = 2.0
_MAX_COPIES = 256
Outputs = Tensor | Sequence[Tensor]
Times = dict[str, list[float]]


@dataclass(frozen=True)
class Setting:
    """Where and how to measure.

    gpu: its name, "interpreter" in a dry run.    dtype: of the inputs.    arch: whose candidates are offered.
    cache_bytes: of L2; inputs rotate through copies that overflow it twice.
    seconds, min_rounds: of ``interleaved``.    dry: Triton's interpreter on the CPU, tiny sizes.
    heads: of queries, and of keys and values.    adapter_dtype: of A and B, dtype if None.
    own: weights (N, K) and quantized layers of the model in question, in turn, by (kind of its base, N, K).
    """

    gpu: str
    device: torch.device
    dtype: torch.dtype
    arch: str
    cache_bytes: int
    seconds: float
    min_rounds: int
    dry: bool
    heads: tuple[int, int] = (32, 8)
    adapter_dtype: torch.dtype | None = None
    own: Mapping[tuple[str, int, int], Iterator[Any]] = field(default_factory=dict)

    @property
    def dtype_name(self) -> str:
        """As tables have it."""
        return str(self.dtype).removeprefix("torch.")

    def draw(self, *shape: int, std: float = 1.0) -> Tensor:
        """Random numbers, on the device, in the dtype."""
        return (torch.randn(shape, device=self.device) * std).to(self.dtype)

    def weight(self, N: int, K: int) -> Tensor:
        """A base's weight (N, K): the model's next one of that shape, or a random one."""
        own = self.own.get(("plain", N, K))
        return self.draw(N, K, std=K**-0.5) if own is None else next(own)

    def factors(self, N: int, K: int, R: int) -> tuple[Tensor, Tensor]:
        """A (R, K) and B (N, R), random ones: a fresh adapter's B is zero, with which nothing could be checked."""
        dtype = self.adapter_dtype or self.dtype
        return self.draw(R, K, std=K**-0.5).to(dtype), self.draw(N, R, std=R**-0.5).to(dtype)


@dataclass(frozen=True)
class Case:
    """inputs(): arguments of a call, drawn anew.    run(*inputs): the call; it may write to them.

    formula(dtype, *inputs): what comes out, computed by plain torch in ``dtype``.
    shown(outputs): what of the outputs the formula gives, if not all.
    """

    inputs: Callable[[], tuple[Any, ...]]
    run: Callable[..., Any]
    formula: Callable[..., Outputs]
    shown: Callable[[Any], Outputs] = lambda outputs: outputs


class Checker:
    """Compares calls on the same inputs with fp64: more than twice plain torch's error plus one rounding is wrong."""

    def __init__(self, case: Case, inputs: tuple[Any, ...], dtype: torch.dtype) -> None:
        self._inputs = inputs
        self._same, self._exact = (_listed(case.formula(d, *cloned(inputs))) for d in (dtype, torch.float64))

    def fault(self, case: Case, run: Callable[..., Any], trusted: bool) -> str | None:
        """What is wrong with run's outputs (or what it raised), in one line; None: nothing.

        trusted: that it runs is enough.
        """
        try:
            with _poisoned():
                outputs = _listed(case.shown(run(*cloned(self._inputs))))
        except Exception as error:  # whatever a compiler or a launch raises is this candidate's fault
            return in_one_line(error)
        shares = [_share_of_budget(*tensors) for tensors in zip(outputs, self._same, self._exact, strict=True)]
        return None if trusted or max(shares) <= 1 else f"wrong: {max(shares):.3g} times the allowed error"


def in_one_line(error: Exception) -> str:
    """For people. Raises where the GPU is lost with it: nothing can be measured any more."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:200]


def _share_of_budget(out: Tensor, same: Tensor, exact: Tensor) -> float:
    if out.shape != exact.shape:
        return float("inf")
    if not out.is_floating_point():
        return 0.0 if torch.equal(out.double(), exact.double()) else float("inf")
    error, plain = ((t.double() - exact).abs().max().item() for t in (out, same))
    share = error / (2 * plain + torch.finfo(out.dtype).eps * exact.abs().max().item() or 1.0)
    return share if math.isfinite(share) else float("inf")


def copies(case: Case, setting: Setting) -> list[tuple[Any, ...]]:
    """Inputs that overflow L2 twice, as a model's do."""
    first = case.inputs()
    nbytes = sum(t.nbytes for t in first if isinstance(t, Tensor))
    count = min(_MAX_COPIES, 1 + 2 * setting.cache_bytes // max(nbytes, 1))
    return [first, *(case.inputs() for _ in range(count - 1))]


def timings(calls: dict[str, Callable[[int], Any]], count: int, setting: Setting, graph: bool) -> Times:
    """Seconds per call of each, by round; call i uses copy i of ``count``. graph: without what the host costs."""
    if setting.device.type != "cuda" or not graph:
        rounds = interleaved(calls, setting.device, setting.seconds, setting.min_rounds)
    else:
        replays = {name: graphed(call, count) for name, call in calls.items()}
        rounds = interleaved(replays, setting.device, setting.seconds, setting.min_rounds)
        rounds = {name: [seconds / count for seconds in times] for name, times in rounds.items()}
        del replays
    if setting.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()  # graphs hold their outputs
    return rounds


def beats(times: Times, name: str, other: str) -> bool:
    """Whether name is faster beyond noise: its upper quartile is below the other's lower one."""
    return _quartiles(times[name])[2] < _quartiles(times[other])[0]


def median(times: Times, name: str) -> float:
    """Seconds."""
    return statistics.median(times[name])


def _quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


@contextmanager
def _poisoned() -> Iterator[None]:
    """Fresh memory holds NaN (or 127): a call that leaves elements out does not find a former call's right ones."""
    places = ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty"))
    makers = [getattr(owner, name) for owner, name in places]

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            out = make(*args, **kwargs)
            return out.fill_(float("nan") if out.is_floating_point() else 127)

        return made

    for (owner, name), make in zip(places, makers, strict=True):
        setattr(owner, name, poisoned(make))
    try:
        yield
    finally:
        for (owner, name), make in zip(places, makers, strict=True):
            setattr(owner, name, make)


def _listed(outputs: Outputs) -> list[Tensor]:
    return [outputs.detach()] if isinstance(outputs, Tensor) else [t.detach() for t in outputs]


def cloned(inputs: tuple[Any, ...]) -> list[Any]:
    return [t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t for t in inputs]

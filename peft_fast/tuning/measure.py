"""One row: the fastest right configuration of a kernel, or implementation of an operator, on this GPU."""

from collections.abc import Callable, Sequence, Set
from typing import Any, NamedTuple

from . import case as cases
from .case import Case, Checker, Setting, Size, Times
from .kernels import Job
from .operators import Choice
from .table import Row

Calls = dict[str, Callable[..., Any]]


class Outcome(NamedTuple):
    """values: what the row gets beside its key, None where there is none to write.    text: for the line.

    faults: what was wrong, one line each.    default_won: nothing was faster beyond noise.
    """

    values: Row | None
    text: str
    faults: list[str]
    default_won: bool = True


def measure_configs(on: Setting, job: Job, size: Size) -> Outcome:
    """The fastest right configuration of a kernel at a size: the default unless another is faster beyond noise."""
    from csrc_triton.common import tuning

    case, offered = job.case(on, size), offered_configs(on, job, size)
    inputs = cases.copies(case, on)
    with tuning.trying(job.kernel, offered[0]) as asked:
        case.run(*cases.cloned(inputs[0]))
    if asked != {(on.dtype_name, *size)}:
        expected = (on.dtype_name, *size)
        return Outcome(None, "no row", [f"the launcher asks for {sorted(asked)}, and the job is of {{{expected}}}"])
    calls: Calls = {str(i): trying(job.kernel, config, case.run) for i, config in enumerate(offered)}
    labels = {name: _label(offered[int(name)]) for name in calls}
    right, faults = _right(case, inputs[0], on, calls, labels)
    if "0" not in right:
        return Outcome(None, "no row", faults)
    times = _times(inputs, right, on, graph=True)
    best = _best(times, "0")
    text = f"{labels[best]} {_us(times, best)}, default {labels['0']} {_us(times, '0')}, {_ratio(times, best, '0')}"
    return Outcome(dict(config=offered[int(best)], gain=_gain(times, best, "0")), text, faults, best == "0")


def offered_configs(on: Setting, job: Job, size: Size) -> list[dict[str, int]]:
    """All that a kernel may run with at a size, the default first; in a dry run two of them."""
    from csrc_triton.common import tuning

    M, _, _, R = size
    default = tuning.default_config(job.kernel, on.arch, on.dtype, M, tuning.block_r(R))
    others = [
        candidate.config
        for candidate in tuning.candidates_for(job.kernel, on.arch, on.dtype.itemsize)
        if tuning.block_r(R) <= candidate.max_rank and (not job.all_rows or candidate.blocks["BLOCK_M"] >= M)
    ]
    return [default, *(config for config in others if config != default)][: 2 if on.dry else None]


def trying(kernel: str, config: dict[str, int], run: Callable[..., Any]) -> Callable[..., Any]:
    """``run``, in which ``kernel`` runs with ``config``."""
    from csrc_triton.common import tuning

    def tried(*inputs: Any) -> Any:
        with tuning.trying(kernel, config):
            return run(*inputs)

    return tried


def measure_choice(on: Setting, choice: Choice) -> Outcome:
    """The implementation that wins in an operator's first use and loses in none, else the safe path."""
    safe, *others = choice.names
    results: list[Times] = []
    faults: list[str] = []
    for use in choice.uses(on):
        made = {name: use.case(name) for name in (safe, *others)}
        inputs = cases.copies(made[safe], on)
        calls = {name: case.run for name, case in made.items()}
        trusted = {safe} if choice.library else set()
        right, found = _right(made[safe], inputs[0], on, calls, {name: name for name in calls}, trusted)
        faults += [f"{use.what}: {fault}" for fault in found]
        others = [name for name in others if name in right]
        if safe not in right:
            return Outcome(None, "no row", faults)
        results.append(_times(inputs, {name: right[name] for name in (safe, *others)}, on, use.graph))
    first = results[0]
    best = decide(results, safe, others)
    rest = ", ".join(f"{name} {_us(first, name)}" for name in (safe, *others) if name != best)
    text = f"{best} {_us(first, best)}, safe path {safe} {_us(first, safe)}, {_ratio(first, best, safe)} ({rest})"
    return Outcome(dict(implementation=best, gain=_gain(first, best, safe)), text, faults, best == safe)


def decide(results: Sequence[Times], safe: str, others: Sequence[str]) -> str:
    """The fastest in the first of the results among those that win there and lose in none, beyond noise; or safe."""
    first = results[0]
    wins = [
        name
        for name in others
        if cases.beats(first, name, safe) and not any(cases.beats(times, safe, name) for times in results)
    ]
    return min(wins, key=lambda name: cases.median(first, name), default=safe)


def _right(
    case: Case, inputs: tuple[Any, ...], on: Setting, calls: Calls, labels: dict[str, str],
    trusted: Set[str] = frozenset(),
) -> tuple[Calls, list[str]]:  # fmt: skip
    """The calls whose results are right, and what was wrong with the others."""
    checker = Checker(case, inputs, on.dtype)
    found = {name: checker.fault(case, call, name in trusted) for name, call in calls.items()}
    right = {name: call for name, call in calls.items() if found[name] is None}
    return right, [f"{labels[name]} {fault}" for name, fault in found.items() if fault is not None]


def _times(inputs: list[tuple[Any, ...]], calls: Calls, on: Setting, graph: bool) -> Times:
    count = len(inputs)

    def rotating(call: Callable[..., Any]) -> Callable[[int], Any]:
        return lambda i: call(*inputs[i % count])

    return cases.timings({name: rotating(call) for name, call in calls.items()}, count, on, graph)


def _best(times: Times, default: str) -> str:
    faster = [name for name in times if cases.beats(times, name, default)]
    return min(faster, key=lambda name: cases.median(times, name), default=default)


def _label(config: dict[str, int]) -> str:
    from csrc_triton.common.tuning import Candidate

    blocks = {name: value for name, value in config.items() if name not in ("num_warps", "num_stages")}
    label: str = Candidate(blocks, config["num_warps"], config["num_stages"]).label
    return label


def _gain(times: Times, name: str, to: str) -> float:
    """How many times faster than what runs without the row."""
    return round(cases.median(times, to) / cases.median(times, name), 3)


def _us(times: Times, name: str) -> str:
    return f"{1e6 * cases.median(times, name):.1f} us"


def _ratio(times: Times, name: str, to: str) -> str:
    return f"ratio {cases.median(times, name) / cases.median(times, to):.3f}"

"""The measurements, for pytest-benchmark (``python -m bench run``, ``peft-fast bench``).

All providers of a case are measured together, once (``subject.measure_case``); each test then hands the samples of its
provider to pytest-benchmark, which makes the statistics and the file.
"""

import itertools
from typing import Any

import pytest

from .session import Session


class ReplayClock:
    """A clock by which the n-th thing timed took the n-th of the samples loaded."""

    def load(self, samples: list[float]) -> None:
        self._times = itertools.accumulate(itertools.chain.from_iterable((0.0, s) for s in samples))

    def __call__(self) -> float:
        return next(self._times)


CLOCK = ReplayClock()


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("what", ["bytes", "bf16", "fp32"])
def test_ceiling(what: str, session: Session, benchmark: Any) -> None:
    """The best of a copy and of square products: what every share of the roofline refers to."""
    rate = session.ceilings()[what]
    benchmark.group, benchmark.name = "ceilings", f"1e9 {what}"
    about = {"group": "ceilings", "provider": "torch", "case": what, "words": what, "per_second": rate}
    benchmark.extra_info.update(about)
    CLOCK.load([1e9 / rate])
    benchmark.pedantic(lambda: None, rounds=1, iterations=1)


@pytest.mark.benchmark(timer=CLOCK)
def test_case(case: Any, provider: str, session: Session, benchmark: Any) -> None:
    """One provider's samples of a case."""
    measured = session.measured(case)
    if provider in measured.absent:
        pytest.skip(f"{provider}: {measured.absent[provider]}")
    info = measured.info[provider]
    if provider not in measured.samples:
        error, share = info["error"], info["error_over_budget"]
        pytest.fail(f"{provider} is wrong: error {error:.2e}, {share:.1f} times its budget {info.get('why', '')}")
    samples = measured.samples[provider]
    benchmark.group, benchmark.name = f"{info['group']}: {info['words']}", f"{case} [{provider}]"
    benchmark.extra_info.update(info)
    CLOCK.load(samples)
    benchmark.pedantic(lambda: None, rounds=len(samples), iterations=1)

"""Options of the measurements, their cases, and what every result file says about where it was made."""

import json
from typing import Any

import pytest

from .cases import suites
from .session import Session
from .subjects.registry import SUBJECTS

_SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("peft_fast measurements")
    group.addoption("--suite", choices=suites.SUITES, default="lora", help="which one")
    group.addoption("--quick", action="store_true", help="few cases, small models, few rounds")
    group.addoption("--gpu-step", choices=suites.GPU_STEPS, help="one step of the GPU campaign instead of a suite")
    group.addoption("--on", choices=("cpu", "cuda"), default="cpu", help="the device")
    group.addoption("--dry", action="store_true", help="tiny sizes on the CPU: does everything work?")


def pytest_configure(config: pytest.Config) -> None:
    options = (config.getoption(name) for name in ("--suite", "--gpu-step", "--on", "--quick", "--dry"))
    config.stash[_SESSION] = Session(*options)


@pytest.fixture(scope="session")
def session(pytestconfig: pytest.Config) -> Session:
    return pytestconfig.stash[_SESSION]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Cases are data: the options say which."""
    if "case" in metafunc.fixturenames:
        session = metafunc.config.stash[_SESSION]
        pairs = [
            (case, provider)
            for case in session.cases
            for provider in SUBJECTS[type(case)].providers(case, session.device)
        ]
        metafunc.parametrize(("case", "provider"), pairs, ids=[f"{case}-{provider}" for case, provider in pairs])


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Add what pytest-benchmark cannot know: ceilings, versions, commit, results that were wrong and so not timed."""
    session = config.stash[_SESSION]
    output_json["peft_fast"] = session.describe()
    output_json["wrong"] = session.wrong
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)  # the ratios per round are in extra_info
    json.dumps(output_json["peft_fast"])

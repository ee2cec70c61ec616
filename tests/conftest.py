"""Set-up of every test process: two threads at most, no network, `gpu` tests skipped where there is no GPU."""

import os

# Set before a test module imports torch or transformers. The suite stays on the machine: asking a hub fails at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Start with the interpreter's tests, the longest, so that a worker is not left alone with them at the end. Skip
    `gpu` tests where torch sees no GPU; -ra shows each with its reason.
    """
    items.sort(key=lambda item: not item.nodeid.startswith("tests/kernels/test_interpreter.py"))
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="needs a GPU, and torch sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(no_gpu)


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Each test starts from the same generator state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_forced_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's PEFT_FAST_LORA or PEFT_FAST_PREFIX must not decide what the tests test."""
    monkeypatch.delenv("PEFT_FAST_LORA", raising=False)
    monkeypatch.delenv("PEFT_FAST_PREFIX", raising=False)

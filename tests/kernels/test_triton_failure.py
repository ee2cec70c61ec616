"""Where Triton cannot launch a kernel nothing stops: plain torch runs, one warning says why."""

import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from absent_driver import run

from csrc_triton import tables
from peft_fast.ops import choice

GPU = torch.device("cuda", 0)

# The launcher is made with the C compiler, as Triton up to 3.8 does on a GPU.
WITHOUT_COMPILER = """
import json, warnings
import torch
from absent_driver import install
from triton.runtime import build

install(launcher=lambda source, metadata: build.compile_module_from_src(src="int x;", name="launcher"))
from csrc_triton import tables
from peft_fast.ops import choice

choice.gpu_name = lambda device: "Test GPU"
tables.gpu_of = lambda device: tables.Gpu("sm_90", "Test GPU")
gpu = torch.device("cuda", 0)
probe = choice._triton_failure
choice._triton_failure = lambda device: probe(torch.device("cpu"))  # there is no memory of a GPU here
choice.torch.cuda.is_current_stream_capturing = lambda: False
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    chosen = [choice.choose("lora_linear", gpu, torch.bfloat16, 64, 64, 64, 8, p=p) for p in (0.0, 0.1, 0.1)]
print(json.dumps([[tuple(c) for c in chosen], [str(w.message) for w in seen if "peft_fast" in str(w.message)]]))
"""


def test_without_a_c_compiler(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    printed = run(WITHOUT_COMPILER, PATH=str(tmp_path), TRITON_CACHE_DIR=str(tmp_path / "cache"))
    chosen, said = json.loads(printed.splitlines()[-1])
    assert [name for name, _ in chosen] == ["torch", "torch", "torch"]
    assert "no measured entry" in chosen[0][1] and "ompiler" in chosen[1][1]
    assert len(said) == 1 and "Plain torch runs in their place" in said[0] and "TRITON_CACHE_DIR" in said[0]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "gpu_name", lambda device: "Test GPU")
    monkeypatch.setattr(tables, "gpu_of", lambda device: tables.Gpu("sm_90", "Test GPU"))
    monkeypatch.setattr(choice, "has_triton", lambda: True)
    monkeypatch.setattr(choice, "triton_failure", lambda device: "Triton cannot run kernels on cuda:0 (X: why)")
    choice.forget()


def test_a_kernel_that_was_measured_is_not_taken_either(failing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_measured", lambda *key: choice.Choice("split", "measured"))
    choice._automatic.cache_clear()
    name, reason = choice.choose("lora_linear", GPU, torch.bfloat16, 64, 64, 64, 8)
    assert name == "torch" and reason.endswith("(X: why)")
    choice._automatic.cache_clear()


def test_without_any_gpu_the_probe_fails_and_warns() -> None:
    """The real probe, on a machine without a driver: no mock."""
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton works here")
    pytest.importorskip("triton")
    choice._triton_failure.cache_clear()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert choice._triton_failure(torch.device("cpu")) == choice._triton_failure(torch.device("cpu")) != ""
    assert sum("Plain torch runs in their place" in str(w.message) for w in seen) == 1
    choice._triton_failure.cache_clear()

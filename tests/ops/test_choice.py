"""The choice of an implementation: order of precedence, errors that name what to do, and the table's rows."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from csrc_triton import tables
from peft_fast.ops import choice, situations
from peft_fast.ops.choice import choose
from peft_fast.ops.operators import OPERATORS

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ROW = {
    "op": "lora_linear", "dtype": "bfloat16", "dropout": False, "M": 64, "N": 512, "K": 256, "R": 16,
    "implementation": "one_launch", "gain": 1.5, "arch": "sm_90", "gpu": "Test GPU", "torch": "2.13.0", "triton": "3.9",
    "date": "2026-01-02", "commit": "abc",
}  # fmt: skip


@pytest.fixture
def table(monkeypatch):
    """A GPU that is not there, and a table to fill."""
    rows = []
    monkeypatch.setattr(tables, "read", lambda path: rows if path.parent == tables.SHIPPED else ())
    monkeypatch.setattr(tables, "gpu_of", lambda device: tables.Gpu("sm_90", "Test GPU"))
    monkeypatch.setattr(choice, "has_triton", lambda: True)
    monkeypatch.setattr(choice, "triton_failure", lambda device: "")
    forget()
    yield rows
    forget()


def forget():
    choice.forget()


def pick(device=GPU, dtype=torch.bfloat16, M=64, N=512, K=256, R=16, **options):
    return choose("lora_linear", device, dtype, M, N, K, R, **options)


def test_cpu_takes_plain_torch_whatever_the_table_says(table):
    table.append(ROW)
    assert pick(CPU) == ("torch", "cpu tensors take plain torch")


def test_nothing_measured_is_the_safe_path_and_says_so(table):
    assert pick().name == "torch"
    assert pick().reason.startswith("no measured entry for Test GPU at bfloat16 M=64 N=512 K=256 R=16")


def test_dropout_on_a_gpu_takes_the_mask_from_a_kernel(table):
    name, reason = pick(p=0.1)
    assert name == "addmm" and "mask from a kernel" in reason


@pytest.mark.parametrize(
    "change, expected",
    [
        ({}, "one_launch"),
        ({"M": 1}, "one_launch"),
        ({"R": 9}, "one_launch"),
        ({"M": 65}, "torch"),
        ({"R": 32}, "one_launch"),
        ({"R": 33}, "torch"),
        ({"N": 1024}, "one_launch"),
        ({"N": 256}, "one_launch"),
        ({"N": 1025}, "torch"),
        ({"K": 127}, "torch"),
        ({"dtype": torch.float16}, "torch"),
        ({"p": 0.1}, "addmm"),
    ],
    ids=str,
)
def test_a_measured_row_speaks_for_what_is_near(table, change, expected):
    table.append(ROW)
    result = pick(**change)
    assert result.name == expected
    if expected == "one_launch":
        assert result.reason == (
            "measured on Test GPU with triton 3.9, 2026-01-02, abc, for M up to 64, N near 512, K near 256, R near 16: "
            "1.50 times as fast as without"
        )


@pytest.mark.parametrize("change", [{"arch": "sm_80"}, {"gain": 1.09}, {"op": "lora_update"}], ids=str)
def test_a_row_of_another_architecture_or_little_gain_is_not_used(table, change):
    table.append(ROW | change)
    assert pick().name == "torch"


@pytest.mark.parametrize("change", [{"gpu": "Another of its kind"}, {"triton": "3.6"}, {"gain": 1.1}], ids=str)
def test_a_row_of_another_gpu_of_the_architecture_is_used(table, change):
    table.append(ROW | change)
    assert pick().name == "one_launch"


def test_a_row_is_not_stretched_beyond_the_bound_of_its_implementation(table):
    table.append(ROW | {"M": 1024, "R": 16})
    assert pick(M=1024, R=16).name == "one_launch"
    assert pick(M=1024, R=32).name == "torch", "M * R <= 16384"


def test_the_row_of_the_smallest_sufficient_M_wins(table):
    table += [ROW | {"M": 4096, "implementation": "split"}, ROW, ROW | {"M": 8, "implementation": "torch"}]
    assert [pick(M=M).name for M in (1, 8, 9, 64, 65, 4096)] == [
        "torch",
        "torch",
        "one_launch",
        "one_launch",
        "split",
        "split",
    ]


def test_without_kernels_for_it(table, monkeypatch):
    assert pick(dtype=torch.float64) == ("torch", "no kernels for float64")
    monkeypatch.setattr(choice, "has_triton", lambda: False)
    forget()
    assert pick(p=0.5) == ("torch", "triton is not installed")


def test_the_argument_wins_over_the_variable_and_that_over_the_table(table, monkeypatch):
    table.append(ROW)
    monkeypatch.setenv("PEFT_FAST_LORA", "split")
    assert pick() == ("split", "forced by PEFT_FAST_LORA")
    assert pick(implementation="torch") == ("torch", "forced by the argument")
    assert pick(CPU, implementation="peft").name == "peft"
    assert pick(implementation="auto").name == "one_launch"


@pytest.mark.parametrize("name", ["addmm", "one_launch", "split"])
def test_a_forced_kernel_never_falls_back(table, monkeypatch, name):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        RuntimeError, match=rf"lora_linear: implementation '{name}' is a GPU kernel and x is on cpu: move x"
    ):
        pick(CPU, implementation=name)
    with pytest.raises(TypeError, match="no kernel for float64"):
        pick(dtype=torch.float64, implementation=name)
    monkeypatch.setattr(choice, "has_triton", lambda: False)
    with pytest.raises(RuntimeError, match="pip install triton"):
        pick(implementation=name)


def test_one_launch_has_a_bound(table):
    assert pick(M=128, R=128, implementation="one_launch").name == "one_launch"
    with pytest.raises(ValueError, match=r"R <= 128 and M \* R <= 16384, got M = 129 and R = 128: force 'split'"):
        pick(M=129, R=128, implementation="one_launch")
    with pytest.raises(ValueError, match="R = 129"):
        pick(M=1, R=129, implementation="one_launch")


def test_an_unknown_name_lists_the_names(monkeypatch):
    with pytest.raises(ValueError, match=r"must be one of \('auto', 'torch', 'addmm', .*got 'fastest'"):
        pick(CPU, implementation="fastest")
    monkeypatch.setenv("PEFT_FAST_LORA", "quick")
    with pytest.raises(ValueError, match="got 'quick'"):
        pick(CPU)


def test_describe_has_a_line_per_situation_and_never_raises(monkeypatch):
    rows = situations.typical()
    assert {"cpu, 4096x4096 bf16 r16, one token"} <= {row.situation for row in rows}
    assert {row.op for row in rows} == {"lora_linear", "lora_mixed", "prefix_attention", "lora_linear_4bit"}
    assert all(row.reason for row in rows)
    assert f"{rows[0]}".startswith("lora_linear      cpu, 4096x4096 bf16 r16, one token")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("PEFT_FAST_LORA", "split")
    assert situations.typical()[0].choice == "an error"


def test_committed_rows_are_complete():
    tables = Path(choice.importlib.util.find_spec("csrc_triton").origin).parent / "tables"
    provenance = {"arch", "gain", "gpu", "torch", "triton", "date", "commit", "M", "N", "K", "R", "dtype"}
    for name, own in (("choice.json", {"op", "dropout", "implementation"}), ("configs.json", {"kernel", "config"})):
        for row in json.loads((tables / name).read_text()):
            assert provenance | own <= set(row), f"{name}: {row}"


def test_choosing_imports_no_triton():
    code = """
import sys
from peft_fast.ops import situations
situations.typical()
print({"triton"} & set(sys.modules))
"""
    root = Path(__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert out.stdout.strip() == "set()"


def mixed(device=GPU, dtype=torch.bfloat16, M=64, R=16, implementation=None):
    return choose("lora_mixed", device, dtype, M, 512, 256, R, implementation=implementation)


def test_a_mixed_batch_on_a_gpu_never_takes_plain_torch(table):
    """That would read every row's slot back to the host."""
    assert mixed(CPU) == ("torch", "cpu tensors take plain torch")
    assert mixed(CPU, implementation="torch").name == "torch"
    name, reason = mixed()
    assert name == "grouped" and reason.startswith("no measured entry for Test GPU at bfloat16 M=64")
    table.append(ROW)
    assert mixed().name == "grouped", "a row of another op"
    forget()
    table.append(ROW | {"op": "lora_mixed"})
    assert [mixed(M=M).name for M in (1, 64, 65)] == ["one_launch", "one_launch", "grouped"]
    with pytest.raises(RuntimeError, match="row's slot back from cuda:0: leave the argument"):
        mixed(implementation="torch")


def test_a_mixed_batch_that_nothing_can_run(table, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(TypeError, match="'grouped' has no kernel for float64"):
        mixed(dtype=torch.float64)
    with pytest.raises(RuntimeError, match="'grouped' is a GPU kernel and x is on mps"):
        mixed(torch.device("mps"))
    with pytest.raises(RuntimeError, match="'split' is a GPU kernel and x is on cpu"):
        mixed(CPU, implementation="split")
    with pytest.raises(ValueError, match="M <= 64 and ranks <= 128, got M = 64 and R = 256: force 'grouped'"):
        mixed(R=256, implementation="one_launch")
    with pytest.raises(ValueError, match=r"must be one of \('auto', 'torch', 'grouped'"):
        mixed(implementation="addmm")
    monkeypatch.setattr(choice, "has_triton", lambda: False)
    with pytest.raises(RuntimeError, match="pip install triton"):
        mixed()


def test_the_page_has_every_name_and_no_other():
    """docs/dispatch.md: the names of implementations, and the variables that force them."""
    page = (Path(__file__).parents[2] / "docs" / "dispatch.md").read_text()
    lines = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    names = {name for op in OPERATORS.values() for name in op.names} - {"auto"}
    assert names == set(lines)
    assert all(f"`{op.variable}`" in page for op in OPERATORS.values())


@pytest.mark.parametrize("op", OPERATORS)
def test_defaults_are_implementations_that_can_run(op):
    known = OPERATORS[op]
    defaults = [known.gpu, known.gpu_dropout or known.gpu]
    assert {default.implementation for default in defaults} <= set(known.names)
    assert not known["torch"].kernel, "what takes over where Triton cannot run"
    assert bool(known["torch"].cpu_only) == (known.instead == "grouped")

"""The ahead-of-time check: bad kernels give a non-zero exit, good ones do not, only what changed is compiled again.

The kernels below are also what the check is pointed at, by this module's name.
"""

import importlib.util
import json
import linecache
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton", reason="the check compiles with triton")

import triton
import triton.language as tl

from bench.__main__ import main
from bench.aot import command as aot
from bench.aot.measure import source_hash


@triton.jit
def _scaled(x, factor):
    return x * factor


@triton.jit
def _good_matmul(x_ptr, w_ptr, y_ptr, K, BLOCK: tl.constexpr):
    offs, offs_k = tl.arange(0, BLOCK), tl.arange(0, 32)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, K, 32):
        x = tl.load(x_ptr + offs[:, None] * K + (k + offs_k)[None, :])
        w = tl.load(w_ptr + offs[None, :] * K + (k + offs_k)[:, None])
        acc = tl.dot(x, w, acc)
    tl.store(y_ptr + offs[:, None] * BLOCK + offs[None, :], _scaled(acc, 2.0).to(tl.bfloat16))


@triton.jit
def _no_tensor_cores(x_ptr, w_ptr, y_ptr, K, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for k in range(0, K):
        acc += tl.load(x_ptr + offs * K + k).to(tl.float32) * tl.load(w_ptr + offs * K + k).to(tl.float32)
    tl.store(y_ptr + offs, acc.to(tl.bfloat16))


@triton.jit
def _stub(x_ptr, w_ptr, y_ptr, K, BLOCK: tl.constexpr):
    pass


def _case(kernel: Any, name: str, **changes: Any) -> SimpleNamespace:
    signature = dict(x_ptr="*bf16", w_ptr="*bf16", y_ptr="*bf16", K="i32", BLOCK="constexpr")
    case = dict(
        kernel=kernel, name=name, label="64", archs=("sm_80", "sm_90", "gfx942"), signature=signature,
        constexprs=dict(BLOCK=64), options=dict(num_warps=4, num_stages=2), matmul=True,
    )  # fmt: skip
    return SimpleNamespace(**(case | changes))


def aot_cases() -> list[SimpleNamespace]:
    """What ``python -m bench aot --module test_aot`` checks."""
    return [
        _case(_good_matmul, "good"),
        _case(_good_matmul, "spilling", options=dict(num_warps=1, maxnreg=64), archs=("sm_80", "sm_90")),
        _case(_good_matmul, "spilling", constexprs=dict(BLOCK=128), options=dict(num_warps=1), archs=("gfx942",)),
        _case(_good_matmul, "shared", options=dict(num_warps=4, num_stages=32), archs=("sm_90",)),
        _case(_no_tensor_cores, "no-mma"),
        _case(_no_tensor_cores, "no-mma-by-design", matmul=False),
        _case(_stub, "stub", matmul=False),
        _case(_good_matmul, "broken", signature=dict(x_ptr="*bf16", w_ptr="i32", y_ptr="*bf16", K="i32")),
    ]


def run_aot(tmp_path: Path, kernel: str, arch: str = "sm_90", *more: str) -> tuple[int, list[dict[str, Any]]]:
    sys.modules.setdefault("test_aot", sys.modules[__name__])
    rows = tmp_path / "rows.json"
    arguments = [
        "--module",
        "test_aot",
        "--kernel",
        kernel,
        "--arch",
        arch,
        "--rows",
        str(tmp_path),
        "--json",
        str(rows),
    ]
    status = main(["aot", *arguments, "--jobs", "1", *more])
    return status, json.loads(rows.read_text()) if rows.exists() else []


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_a_good_kernel_passes(tmp_path: Path, arch: str) -> None:
    status, rows = run_aot(tmp_path, "good", arch)
    assert status == 0
    assert set(rows[0]) == set(aot.COLUMNS)
    assert rows[0]["mma_count"] > 0 and rows[0]["spill_bytes"] == 0 and rows[0]["registers"] > 16


@pytest.mark.parametrize(
    ("kernel", "arch", "message"),
    [
        ("spilling", "sm_90", "spills"),
        ("spilling", "gfx942", "spills"),
        ("shared", "sm_90", "shared memory"),
        ("no-mma", "sm_90", "without tensor-core instructions"),
        ("no-mma", "gfx942", "without tensor-core instructions"),
        ("stub", "sm_80", "a stub"),
        ("stub", "sm_90", "a stub"),
        ("stub", "gfx942", "a stub"),
        ("broken", "sm_90", "does not compile"),
    ],
)
def test_a_bad_kernel_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kernel: str, arch: str, message: str
) -> None:
    status, _ = run_aot(tmp_path, kernel, arch)
    assert status == 1
    assert message in capsys.readouterr().out


def test_a_kept_row_fails_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_aot(tmp_path, "stub")[0] == 1
    assert run_aot(tmp_path, "stub")[0] == 1
    assert "0 compiled" in capsys.readouterr().out.splitlines()[-1]


def test_only_what_changed_is_compiled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_aot(tmp_path, "by-design")[0] == 0
    assert "1 compiled" in capsys.readouterr().out.splitlines()[-1]
    assert run_aot(tmp_path, "by-design")[0] == 0
    assert "0 compiled" in capsys.readouterr().out.splitlines()[-1]
    assert run_aot(tmp_path, "by-design", "sm_90", "--all")[0] == 0
    assert "1 compiled" in capsys.readouterr().out.splitlines()[-1]
    assert len(aot.read_rows(next(tmp_path.glob("triton-*.json")))) == 1


def test_the_key_covers_called_functions_configuration_and_version(monkeypatch: pytest.MonkeyPatch) -> None:
    case = aot_cases()[0]
    keys = {aot.row_key(case, "sm_90"), aot.row_key(case, "sm_80")}
    keys.add(aot.row_key(_case(_good_matmul, "good", constexprs=dict(BLOCK=32)), "sm_90"))
    keys.add(aot.row_key(_case(_good_matmul, "good", options=dict(num_warps=8, num_stages=2)), "sm_90"))
    before = source_hash(_good_matmul)
    with monkeypatch.context() as patch:
        patch.setitem(_good_matmul.fn.__globals__, "_scaled", _stub)
        assert source_hash(_good_matmul) != before
        keys.add(aot.row_key(case, "sm_90"))
    with monkeypatch.context() as patch:
        patch.setattr(triton, "__version__", "0.0.0")
        keys.add(aot.row_key(case, "sm_90"))
    assert len(keys) == 6
    assert source_hash(_good_matmul) == before


def test_the_hash_follows_the_text_and_not_where_it_stands(tmp_path: Path) -> None:
    text = "import triton\n\n\n@triton.jit\ndef kernel(x_ptr):\n    tl.store(x_ptr, 1.0)\n"

    def hashed(text: str) -> str:
        path = tmp_path / "kernel_module.py"
        path.write_text(text)
        linecache.checkcache(str(path))
        spec = importlib.util.spec_from_file_location("kernel_module", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return source_hash(module.kernel)

    assert hashed(text) == hashed(text.replace("triton\n\n\n", "triton\n\nX = 1\n\n\n"))
    assert hashed(text) != hashed(text.replace("1.0", "2.00"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"spill_bytes": 8}, "spills 8 bytes"),
        ({"shared_bytes": 228 * 1024}, "shared memory"),
        ({"mma_count": 0}, "tensor-core"),
        ({"mma_count": 0, "matmul": False}, None),
        ({"registers": 4, "sass_lines": 16}, "stub"),
        ({"registers": 168, "threads": 512}, "registers x"),
        ({"error": "X: y"}, "does not compile"),
        ({"note": "wgmma serialized", "kernel": "lora_gemm"}, "wgmma serialized"),
        ({"note": "wgmma serialized", "kernel": "lora_grad"}, None),
    ],
)
def test_what_a_row_must_not_show(change: dict[str, Any], message: str | None) -> None:
    row = dict(
        kernel="k", arch="sm_90", config="c", registers=128, spill_bytes=0, shared_bytes=1024, mma_count=4,
        sass_lines=400, threads=256, matmul=True,
    )  # fmt: skip
    found = aot.problems({**row, **change})
    assert (found == []) if message is None else (len(found) == 1 and message in found[0])


def test_nothing_to_check_is_an_error(tmp_path: Path) -> None:
    assert run_aot(tmp_path, "no such kernel")[0] == 2
    assert run_aot(tmp_path, "good", "sm_75")[0] == 2


def test_two_processes_side_by_side(tmp_path: Path) -> None:
    status, rows = run_aot(tmp_path, "no-mma-by-design", "sm_80,sm_90", "--jobs", "2")
    assert status == 0 and [row["arch"] for row in rows] == ["sm_80", "sm_90"]

"""Which measured row speaks for a call: the user's own, near sizes, and what comes with the library and won clearly."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from csrc_triton import tables
from csrc_triton.tables import Gpu, Sizes

HERE = Gpu("sm_90", "Test GPU")
WHAT = {"op": "lora_linear", "dtype": "bfloat16", "dropout": False}
ROW: dict[str, Any] = {
    **WHAT, "M": 64, "N": 4096, "K": 4096, "R": 16, "implementation": "split", "gain": 1.5,
    "arch": "sm_90", "gpu": "Test GPU", "torch": "2.13.0", "triton": "3.9", "date": "2026-01-02", "commit": "abc",
}  # fmt: skip


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """put(own=[...], shipped=[...]) writes both tables of choices."""
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv(tables.VARIABLE, str(tmp_path / "user"))

    def put(own: list[dict[str, Any]] | None = None, shipped: list[dict[str, Any]] | None = None) -> None:
        for folder, rows in ((tables.user_folder(), own), (tables.SHIPPED, shipped)):
            folder.mkdir(parents=True, exist_ok=True)
            if rows is not None:
                (folder / tables.CHOICES).write_text(json.dumps(rows))
        tables.forget()

    yield put
    tables.forget()


def found(M: int = 64, N: int = 4096, K: int = 4096, R: int = 16, gpu: Gpu = HERE, **what: Any) -> Any:
    row = tables.find(tables.CHOICES, WHAT | what, gpu, Sizes(M, N, K, R))
    return row and row["implementation"]


def test_no_tables_at_all(folders: Any) -> None:
    assert found() is None


def test_the_users_own_row_comes_first_whatever_it_won_by(folders: Any) -> None:
    folders(own=[ROW | {"implementation": "torch", "gain": 1.0}], shipped=[ROW])
    assert found() == "torch"
    assert found(gpu=Gpu("sm_90", "Another of its kind")) == "split", "that one was not measured by the user"


def test_a_shipped_row_counts_on_its_architecture_where_it_won_clearly(folders: Any) -> None:
    folders(shipped=[ROW])
    assert found(gpu=Gpu("sm_90", "Another of its kind")) == "split"
    assert found(gpu=Gpu("sm_80", "Test GPU")) is None
    folders(shipped=[ROW | {"gain": 1.09}])
    assert found() is None


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        (dict(N=2048), "split"), (dict(N=8192, K=2048), "split"), (dict(N=8193), None), (dict(K=2047), None),
        (dict(R=32), "split"), (dict(R=33), None), (dict(R=1), "split"), (dict(M=1), "split"), (dict(M=65), None),
        (dict(dtype="float16"), None), (dict(dropout=True), None),
    ],
    ids=str,
)  # fmt: skip
def test_a_row_speaks_for_what_is_within_a_factor_of_two(folders: Any, sizes: Any, expected: str | None) -> None:
    folders(own=[ROW])
    assert found(**sizes) == expected


def test_the_nearest_row_counts_then_the_smallest_sufficient_M(folders: Any) -> None:
    near = ROW | {"N": 5000, "implementation": "one_launch"}
    larger = near | {"M": 1024, "implementation": "addmm"}
    folders(own=[larger, ROW, near])
    assert [found(N=N) for N in (4096, 4500, 4600, 6000)] == ["split", "split", "one_launch", "one_launch"]
    assert found(M=65) == "addmm", "farther, but the only one for so many rows"


def test_between_two_ranks_the_larger(folders: Any) -> None:
    folders(own=[ROW, ROW | {"R": 64, "implementation": "one_launch"}])
    assert [found(R=R) for R in (16, 32, 64)] == ["split", "one_launch", "one_launch"]


def test_a_size_that_a_kernel_does_not_have(folders: Any) -> None:
    folders(own=[ROW | {"K": 0}])
    assert found(K=0) == "split" and found(K=4096) is None


@pytest.mark.parametrize("text", ["{", "{}", '[{"op": "lora_linear"}]', json.dumps([ROW | {"M": "64"}])])
def test_a_file_that_is_no_table_is_named(folders: Any, text: str) -> None:
    folders(own=[])
    (tables.user_folder() / tables.CHOICES).write_text(text)
    tables.forget()
    with pytest.raises(ValueError, match=r"choice\.json is no table of peft_fast: .*remove it, and measure again with"):
        found()


def test_where_the_users_own_rows_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (tables.VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tables.user_folder() == tmp_path / ".cache/peft_fast/tables"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert tables.user_folder() == tmp_path / "x/peft_fast/tables"
    monkeypatch.setenv(tables.VARIABLE, "~/mine")
    assert tables.user_folder() == tmp_path / "mine/tables"
    with tables.using(tmp_path / "now"):
        assert tables.user_folder() == tmp_path / "now"
    assert tables.user_folder() == tmp_path / "mine/tables"


@pytest.mark.parametrize(("capability", "arch"), [((8, 9), "sm_89"), ((12, 0), "sm_120"), ((9, 0), "sm_90")])
def test_the_name_of_an_architecture(monkeypatch: pytest.MonkeyPatch, capability: Any, arch: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Test GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert tables.gpu_of(torch.device("cuda", 0)) == Gpu(arch, "Test GPU")

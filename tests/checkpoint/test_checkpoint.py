"""Names, files and headers of adapter directories, without any model."""

import errno
import json
import os
import struct
import warnings
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peft_fast.checkpoint import (
    TensorInfo,
    adapter_directory,
    check_adapter_name,
    config_json,
    find_adapter,
    open_weights,
    read_config,
    save_adapter,
    validate,
)

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": {"q"}}
WEIGHTS = "adapter_model.safetensors"


def tensors() -> dict[str, torch.Tensor]:
    return {"m.q.lora_A.weight": torch.randn(4, 8), "m.q.lora_B.weight": torch.randn(16, 4, dtype=torch.bfloat16)}


# ------------------------------------------------------------------------------------------------ names
@pytest.mark.parametrize("name", ["default", "my-adapter_2", "Größe", "a b", "x" * 200])
def test_names_that_are_fine(name: str) -> None:
    assert check_adapter_name(name) == name


BAD_NAMES = [
    "",
    ".",
    "..",
    "../x",
    "a/b",
    "/etc",
    "a\\b",
    "C:x",
    ".hidden",
    "v1.0",
    "~",
    "~root",
    "a\0b",
    "a\nb",
    " a",
    "a ",
]
BAD_NAMES += ["nul", "COM1", "lpt9", "a*", "a?", 'a"', "a<", "a|", "\ud800", "x" * 201, "ü" * 101, "\x7f"]


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_names_that_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        check_adapter_name(name)
    assert repr(name) in str(error.value)
    with pytest.raises(ValueError):
        adapter_directory(tmp_path, name)


def test_a_name_is_a_string() -> None:
    with pytest.raises(TypeError, match="must be a string, got int: 3"):
        check_adapter_name(3)  # type: ignore[arg-type]


def test_the_folder_of_an_adapter(tmp_path: Path) -> None:
    assert adapter_directory(tmp_path, "default") == tmp_path
    assert adapter_directory(tmp_path, "other") == tmp_path / "other"
    assert adapter_directory("out", "other") == Path("out/other")
    (tmp_path / "root").symlink_to(tmp_path)
    assert adapter_directory(tmp_path / "root", "other") == tmp_path / "root" / "other"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "save").mkdir()
    for target in (tmp_path / "elsewhere", tmp_path / "save", tmp_path / "not_there"):
        (tmp_path / "save" / "other").symlink_to(target)
        with pytest.raises(ValueError, match=r"adapter 'other'.*is a link to"):
            adapter_directory(tmp_path / "save", "other")
        (tmp_path / "save" / "other").unlink()


# ------------------------------------------------------------------------------------------------ writing and reading
def test_what_is_written_is_read(tmp_path: Path) -> None:
    saved = tensors()
    save_adapter(tmp_path / "new" / "folder", CONFIG, saved, extra_files={"README.md": b"card"})
    directory = tmp_path / "new" / "folder"
    assert sorted(os.listdir(directory)) == ["README.md", "adapter_config.json", WEIGHTS]
    assert (directory / "adapter_config.json").read_text() == json.dumps(
        {**CONFIG, "target_modules": ["q"]}, indent=2, sort_keys=True
    )
    assert read_config(directory) == {**CONFIG, "target_modules": ["q"]}
    with safe_open(directory / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    save_file(saved, tmp_path / "direct.safetensors", metadata={"format": "pt"})
    assert (directory / WEIGHTS).read_bytes() == (tmp_path / "direct.safetensors").read_bytes()
    opened = open_weights(directory, adapter_name="a")
    assert opened.tensors["m.q.lora_A.weight"] == TensorInfo((4, 8), "F32", "float")
    assert opened.tensors["m.q.lora_B.weight"] == TensorInfo((16, 4), "BF16", "float")
    assert opened.where == f"adapter 'a', file {directory / WEIGHTS}"
    assert all(torch.equal(saved[name], tensor) for name, tensor in opened.load().items())
    assert list(opened.load(names=["m.q.lora_B.weight"])) == ["m.q.lora_B.weight"]


def test_bin_is_written_and_read_with_a_word(tmp_path: Path) -> None:
    saved = tensors()
    save_adapter(tmp_path, CONFIG, saved)
    save_adapter(tmp_path, CONFIG, {name: t + 1 for name, t in saved.items()}, safe_serialization=False)
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.bin"]  # or the old one would be read
    with pytest.warns(UserWarning, match=r"is a pickle; adapter_model.safetensors is the format to use"):
        opened = open_weights(tmp_path)
    assert opened.tensors["m.q.lora_B.weight"] == TensorInfo((16, 4), "bfloat16", "float")
    assert all(torch.equal(saved[name] + 1, tensor) for name, tensor in opened.load().items())
    save_adapter(tmp_path, CONFIG, saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # safetensors comes first
        assert torch.equal(open_weights(tmp_path).load()["m.q.lora_A.weight"], saved["m.q.lora_A.weight"])


def test_the_oldest_pickle_format(tmp_path: Path) -> None:
    saved = tensors()
    torch.save(saved, tmp_path / "adapter_model.bin", _use_new_zipfile_serialization=False)
    with pytest.warns(UserWarning, match="is a pickle"):
        loaded = open_weights(tmp_path).load()
    assert all(torch.equal(saved[name], tensor) for name, tensor in loaded.items())


@pytest.mark.parametrize("safe", [True, False])
def test_views_and_shared_tensors(safe: bool, tmp_path: Path) -> None:
    """A view of a large pool is written alone, not with the pool; two names of one tensor are both written."""
    pool = torch.randn(1000, 1000)
    shared = torch.nn.Parameter(torch.randn(4, 4))
    saved = {"view": pool[3:5, 7:9], "row": pool[9], "transposed": pool[:4, :4].t(), "one": shared, "two": shared}
    saved |= {"part": shared[1:3], "empty": torch.empty(0, 4), "scalar": pool[1, 1]}
    save_adapter(tmp_path, CONFIG, saved, safe_serialization=safe)
    weights = tmp_path / (WEIGHTS if safe else "adapter_model.bin")
    assert weights.stat().st_size < 20_000
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = open_weights(tmp_path).load()
    assert set(loaded) == set(saved)
    assert all(torch.equal(saved[name], tensor) for name, tensor in loaded.items())


def test_what_was_loaded_does_not_change_with_the_file(tmp_path: Path) -> None:
    saved = tensors()
    save_adapter(tmp_path, CONFIG, saved)
    loaded = open_weights(tmp_path).load()
    size = (tmp_path / WEIGHTS).stat().st_size
    with open(tmp_path / WEIGHTS, "r+b") as file:  # another program overwrites it in place
        file.seek(size - 300)
        file.write(bytes(300))
    assert all(torch.equal(saved[name], tensor) for name, tensor in loaded.items())


@pytest.mark.parametrize(
    ("config", "saved", "message"),
    [
        (CONFIG, {}, "there is no tensor to save"),
        (CONFIG, {"a": torch.empty(2, device="meta")}, "'a' is on the meta device"),
        (CONFIG, {"a": "text"}, "'a' is no tensor but str"),
        ({**CONFIG, "lora_alpha": float("nan")}, {"a": torch.ones(1)}, "its config is not JSON"),
        ({**CONFIG, "r": torch.nn.Linear}, {"a": torch.ones(1)}, "its config is not JSON"),
    ],
)
def test_what_cannot_be_saved(config, saved, message: str, tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", CONFIG, tensors())
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    with pytest.raises(ValueError, match=f"adapter 'x' cannot be saved to .*{message}"):
        save_adapter(tmp_path / "a", config, saved, adapter_name="x")
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}


def test_config_json_is_peft_s() -> None:
    assert config_json({"b": None, "a": {"y": 1, "x": [True]}, "c": "ü"}) == (
        '{\n  "a": {\n    "x": [\n      true\n    ],\n    "y": 1\n  },\n  "b": null,\n  "c": "\\u00fc"\n}'
    )


# ------------------------------------------------------------------------------------------------ configs
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected JSON in UTF-8"),
        (b"{", "expected JSON in UTF-8"),
        (b"\xff\xfe", "expected JSON in UTF-8"),
        (b"[" * 200_000, "expected JSON in UTF-8, got RecursionError"),
        (b'{"peft_type": "LORA", "r": ' + b"9" * 5000 + b"}", "expected JSON in UTF-8"),
        (b"[]", "expected a JSON object, got list"),
        (b"{}", 'expected "peft_type" to name a method, got None'),
        (b'{"peft_type": 3}', 'expected "peft_type" to name a method, got 3'),
        (b'{"peft_type": "LORA", "lora_alpha": NaN}', "expected finite numbers, got lora_alpha = nan"),
        (b'{"peft_type": "LORA", "lora_alpha": 1e999}', "expected finite numbers, got lora_alpha = inf"),
        (b'{"peft_type": "LORA", "p": {"a": [1, -Infinity]}}', "expected finite numbers, got p.a.1 = -inf"),
        (b" " * (16 * 2**20 + 1), "at most 16777216 bytes"),
    ],
    ids=range(12),
)
def test_bad_configs(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_config(tmp_path, adapter_name="x")
    assert f"adapter 'x', file {tmp_path / 'adapter_config.json'}: " in str(error.value)
    assert message in str(error.value)


def test_pipes_do_not_block_the_reader(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json' at"):
        read_config(tmp_path)
    with pytest.raises(ValueError, match=r"expected adapter_model.safetensors or adapter_model.bin, got neither"):
        open_weights(tmp_path)
    for name in ("adapter_config.json", WEIGHTS):
        os.mkfifo(tmp_path / name)
        with pytest.raises(ValueError, match="expected a regular file"):
            (read_config if name.endswith("json") else open_weights)(tmp_path)
    (tmp_path / "d" / WEIGHTS).mkdir(parents=True)
    with pytest.raises(ValueError, match="expected a regular file"):
        open_weights(tmp_path / "d")


# ------------------------------------------------------------------------------------------------ broken weight files
def header(entries: dict, data: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list, offsets: list, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BROKEN = {
    "empty": b"",
    "short": b"\0\0",
    "zeros": bytes(100),
    "header_longer_than_file": header({}, length=10**6),
    "header_length_2**63": header({}, length=2**63),
    "truncated_data": header({"a": entry([2, 2], [0, 16])}, bytes(12)),
    "data_left_over": header({"a": entry([2, 2], [0, 16])}, bytes(20)),
    "overlapping": header({"a": entry([2, 2], [0, 16]), "b": entry([2, 2], [8, 24])}, bytes(24)),
    "a_hole": header({"a": entry([2, 2], [0, 16]), "b": entry([2], [24, 32])}, bytes(32)),
    "shape_does_not_fit": header({"a": entry([3, 3], [0, 16])}, bytes(16)),
    "huge_shape": header({"a": entry([2**40, 2**40], [0, 16])}, bytes(16)),
    "negative": header({"a": entry([-2, 2], [0, 16])}, bytes(16)),
    "backwards": header({"a": entry([2, 2], [16, 0])}, bytes(16)),
    "unknown_dtype": header({"a": entry([2, 2], [0, 16], "F31")}, bytes(16)),
    "no_json": struct.pack("<Q", 5) + b"hello",
    "pickle": b"\x80\x04\x95",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_safetensors(kind: str, tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(BROKEN[kind])
    with pytest.raises(ValueError, match=r"adapter 'x', file .*expected a complete safetensors file, got"):
        open_weights(tmp_path, adapter_name="x")


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil_was_here",)


@pytest.mark.filterwarnings("ignore:.*is a pickle")
@pytest.mark.parametrize(
    "content", [Evil(), {"a": Evil()}, {"a": 1}, {3: torch.ones(1)}, [torch.ones(1)], torch.ones(1)]
)
def test_bin_files_that_are_no_dictionary_of_tensors(content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter 'x', file .*expected"):
        open_weights(tmp_path, adapter_name="x")
    assert not (tmp_path / "evil_was_here").exists()


@pytest.mark.filterwarnings("ignore:.*is a pickle")
def test_damaged_bin_files(tmp_path: Path) -> None:
    """Every way of damage is a ValueError that names the file, or goes unnoticed inside the numbers."""
    path = tmp_path / "adapter_model.bin"
    generator = torch.Generator().manual_seed(0)
    for new_format in (True, False):
        torch.save(tensors(), path, _use_new_zipfile_serialization=new_format)
        whole = path.read_bytes()
        for _ in range(150):
            broken = bytearray(whole)
            for _ in range(3):
                broken[int(torch.randint(len(broken), (), generator=generator))] ^= 1 << 3
            path.write_bytes(broken[: int(torch.randint(len(broken), (), generator=generator))] if _ % 2 else broken)
            try:
                open_weights(tmp_path, adapter_name="x").load()
            except ValueError as error:
                assert "adapter 'x', file" in str(error)


# ------------------------------------------------------------------------------------------------ numbers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_finite(dtype: torch.dtype) -> None:
    fine = {
        "a": torch.randn(33, 65).to(dtype),
        "count": torch.tensor(3),
        "flag": torch.tensor(True),
        "none": torch.empty(0),
    }
    validate.check_finite(fine, "here")
    if dtype != torch.float8_e4m3fn:
        largest = torch.full((4, 300), torch.finfo(dtype).max, dtype=dtype)  # its sum overflows
        validate.check_finite({"a": largest}, "here")
    for value in (float("nan"), float("inf"), -float("inf")):
        bad = torch.randn(33, 65)
        bad[-1, -1] = value
        if dtype == torch.float8_e4m3fn:
            bad[-1, -1] = float("nan")  # it has no infinity
        with pytest.raises(ValueError, match="here: tensor 'b': expected finite values"):
            validate.check_finite({**fine, "b": bad.to(dtype)}, "here")
    both = torch.zeros(4)
    both[0], both[1] = float("inf"), -float("inf")
    if dtype == torch.float8_e4m3fn:
        return
    with pytest.raises(ValueError, match="tensor 'b'"):
        validate.check_finite({"b": both.to(dtype)}, "here")


@pytest.mark.parametrize(
    ("field", "value"),
    [("r", v) for v in (0, -1, 2.0, True, "8", None)]
    + [("rank_pattern", v) for v in ({"a": 0}, {"a": 1.5}, {"a": None}, [1])]
    + [("lora_alpha", v) for v in (float("nan"), float("inf"), "8", None, True, 10**400)]
    + [("alpha_pattern", v) for v in ({"a": float("-inf")}, {"a": "x"}, 3)]
    + [("lora_dropout", v) for v in (float("nan"), -0.1, 1.1, None)],
)
def test_bad_numbers_in_a_config(field: str, value) -> None:
    validate.check_config({**CONFIG, "rank_pattern": {"a": 3}, "alpha_pattern": {"a": 3}, "lora_dropout": 1}, "here")
    validate.check_config({"peft_type": "LORA"}, "here")
    validate.check_config({"peft_type": "PREFIX_TUNING", field: value}, "here")  # not LoRA's
    with pytest.raises(ValueError, match=f"here: expected {field}"):
        validate.check_config({**CONFIG, field: value}, "here")


# ------------------------------------------------------------------------------------------------ hub or path
def test_local_directories_are_not_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args, **kwargs):
        raise AssertionError("asked the Hub")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_network)
    save_adapter(tmp_path / "a", CONFIG, tensors())
    save_adapter(tmp_path / "a" / "sub", CONFIG, tensors())
    assert find_adapter(tmp_path / "a") == tmp_path / "a"
    assert find_adapter(tmp_path / "a", "sub") == tmp_path / "a" / "sub"
    monkeypatch.chdir(tmp_path)
    assert find_adapter("a") == Path("a")
    (tmp_path / "plain").mkdir()
    for missing, reason in ((tmp_path / "nowhere", "no such directory"), (tmp_path / "plain", "no such file")):
        with pytest.raises(ValueError, match=f"Can't find 'adapter_config.json' at '{missing}'.*{reason}"):
            find_adapter(missing)
    for path in ("./nowhere", "../nowhere", "~/nowhere", "a/b/c", "a\\b", ""):
        with pytest.raises(ValueError, match="Can't find"):
            find_adapter(path)


def test_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "snapshots" / "abc"
    torch_file = snapshot / "adapter_model.bin"
    asked = []

    def download(repo: str, name: str, subfolder: str | None = None, **kwargs) -> str:
        asked.append((repo, name, subfolder, kwargs))
        path = snapshot / (subfolder or "") / name
        if not path.exists():
            raise (
                LocalEntryNotFoundError("no")
                if kwargs.get("local_files_only")
                else huggingface_hub.errors.EntryNotFoundError("404")
            )
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    save_adapter(snapshot, CONFIG, tensors(), safe_serialization=False)
    assert find_adapter("owner/name", revision="main") == snapshot
    assert asked[-1] == ("owner/name", "adapter_model.bin", None, {"revision": "main"})
    save_adapter(snapshot, CONFIG, tensors())
    assert find_adapter("owner/name") == snapshot and asked[-1][1] == WEIGHTS
    save_adapter(snapshot / "sub", CONFIG, tensors())
    assert find_adapter("owner/name", "sub") == snapshot / "sub"
    with pytest.raises(
        ValueError, match=r"Can't find 'adapter_config.json' at 'owner/name', folder 'x'.*EntryNotFound"
    ):
        find_adapter("owner/name", "x")
    with pytest.raises(ValueError, match="not in the local cache and the Hub cannot be reached"):
        find_adapter("owner/name", "x", local_files_only=True)
    (snapshot / WEIGHTS).unlink()
    torch_file.unlink()
    with pytest.raises(
        ValueError, match=r"Can't find 'adapter_model.safetensors' or 'adapter_model.bin' at 'owner/name'"
    ):
        find_adapter("owner/name", config_needed=False)


def test_offline_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json' at 'nobody/nothing'.*cannot be reached"):
        find_adapter("nobody/nothing", cache_dir=tmp_path)


def test_a_locked_file_system_does_not_stop_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*args) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    (tmp_path / "other").write_text("mine")
    saved = tensors()
    for _ in range(2):
        save_adapter(tmp_path, CONFIG, saved)
    assert torch.equal(load_file(tmp_path / WEIGHTS)["m.q.lora_A.weight"], saved["m.q.lora_A.weight"])
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", WEIGHTS, "other"]


def test_check_tensors_needs_one_own_tensor(tmp_path: Path) -> None:
    """For every method: base weights alone are no adapter, and leftovers of many names give a short error."""
    info = TensorInfo((2,), "F32", "float")
    save_file({"base.bias": torch.ones(2)}, tmp_path / WEIGHTS)
    weights = open_weights(tmp_path, adapter_name="x")
    with pytest.raises(
        ValueError, match=r"adapter 'x', file .*none of the adapter's 2 weights .*'own1', got 'base.bias'"
    ):
        validate.check_tensors(weights, {"own1": info, "own2": info}, {"base.bias": info})
    checked = validate.check_tensors(weights, {}, {"base.bias": info})
    assert (checked.accepted, checked.missing, checked.mismatched) == (["base.bias"], [], [])
    save_file({f"name{i}": torch.ones(1) for i in range(1000)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="and 995 more does not belong") as error:
        validate.check_tensors(open_weights(tmp_path), {"own": info}, {})
    assert len(str(error.value)) < 1000

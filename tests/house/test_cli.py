"""The peft-fast command: options, exit codes, one-line errors, info, check."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import peft_fast
from peft_fast.cli import info
from peft_fast.cli.main import main
from peft_fast.jobs import check


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(adapter, base): a saved adapter with random weights, and the saved model it is for."""
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("cli")
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(root / "base")
    lora = peft_fast.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    base = LlamaForCausalLM.from_pretrained(root / "base")
    peft_fast.get_peft_model(base, lora).save_pretrained(root / "adapter")
    return root / "adapter", root / "base"


def changed(adapter: Path, tmp_path: Path, change: object, **fields: object) -> Path:
    """A copy of the adapter directory with other weights, or other fields in its config."""
    copy = tmp_path / "copy"
    copy.mkdir()
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(change(weights) if callable(change) else weights, copy / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    (copy / "adapter_config.json").write_text(json.dumps({**config, **fields}), encoding="utf-8")
    return copy


def one_line_error(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("peft-fast"), captured.err
    return lines[0]


def test_version_and_help_do_not_import_torch() -> None:
    code = (
        "import sys; from peft_fast.cli.main import build_parser; build_parser().format_help(); "
        "raise SystemExit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
    done = subprocess.run([sys.executable, "-m", "peft_fast", "--version"], capture_output=True, text=True, timeout=120)
    assert done.stdout == f"peft-fast {peft_fast.__version__}\n" and done.returncode == 0


def test_no_command_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "demo" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo", "--steps", "0"], "1 or more"),
        (["demo", "--steps", "many"], "whole number"),
        (["demo", "--seed", "-1"], "whole number"),
        (["demo", "--stpes", "3"], "unrecognized"),
        (["dmeo"], "invalid choice"),
        (["check"], "ADAPTER_DIR"),
        (["generate", "--model", "m"], "--in, --out"),
    ],
    ids=" ".join,
)
def test_wrong_options(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert words in one_line_error(capsys)


def test_wrong_device_and_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert main(["demo", "--device", "abacus", *out]) == 2
    assert "--device abacus" in one_line_error(capsys)
    assert main(["demo", "--device", "meta", *out]) == 2
    assert "holds no numbers" in one_line_error(capsys)
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / "file")]) == 2
    assert "expected a directory" in one_line_error(capsys)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("")
    assert main(["demo", "--out", str(tmp_path / "full"), "--fresh"]) == 2
    assert "other files" in one_line_error(capsys)
    assert (tmp_path / "full" / "thesis.txt").exists() and not (tmp_path / "out").exists()


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "run", stopped)
    assert main(["info"]) == 130
    assert "stopped" in one_line_error(capsys)


def test_library_error_is_one_line_and_debug_shows_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(args: object) -> int:
        raise ValueError("adapter 'a':\n  something is wrong")

    monkeypatch.setattr(info, "run", broken)
    assert main(["info"]) == 1
    assert one_line_error(capsys).endswith("adapter 'a': something is wrong")
    with pytest.raises(ValueError, match="something is wrong"):
        main(["--debug", "info"])


def test_info_names_versions_devices_and_choices(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in text and "transformers" in text and "cpu: " in text
    assert "lora_linear" in text and "prefix_attention" in text and "forced" not in text
    for variable in ("PEFT_FAST_LORA", "PEFT_FAST_PREFIX"):
        monkeypatch.setenv(variable, "torch")
        assert f"{variable}=torch: forced, nothing falls back" in info.report()


def test_check_passes_a_good_directory(directories: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    adapter, base = directories
    assert main(["check", str(adapter), "--base", str(base)]) == 0
    text = capsys.readouterr().out
    assert "LORA" in text and "8 tensors" in text and "every weight has its place" in text
    assert "--base" in check.report(adapter)


@pytest.fixture(scope="module")
def prompts(directories: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved adapter of each method of prompt learning, for the base of `directories`."""
    from transformers import LlamaForCausalLM

    found = {}
    for method, fields in {
        "PrefixTuning": {"prefix_projection": True, "encoder_hidden_size": 8},
        "PromptTuning": {},
        "PromptEncoder": {"encoder_hidden_size": 8},
        "MultitaskPromptTuning": {"num_tasks": 3},
    }.items():
        config = getattr(peft_fast, f"{method}Config")(num_virtual_tokens=5, task_type="CAUSAL_LM", **fields)
        found[method] = tmp_path_factory.mktemp("prompts") / method
        base = LlamaForCausalLM.from_pretrained(directories[1])
        peft_fast.get_peft_model(base, config).save_pretrained(found[method])
    return found


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("PrefixTuning", "prompt_embeddings: 5 x 64, tokens x (keys and values of 2 layers, 2 heads of 8)"),
        ("PromptTuning", "prompt_embeddings: 5 x 32, tokens x width of the embeddings"),
        ("PromptEncoder", "prompt_embeddings: 5 x 32, tokens x width of the embeddings"),
        ("MultitaskPromptTuning", "5 virtual tokens, 3 tasks; prompt_embeddings: 5 x 32"),
    ],
)
def test_check_says_what_a_prompt_is(
    method: str,
    words: str,
    prompts: dict[str, Path],
    directories: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["check", str(prompts[method]), "--base", str(directories[1])]) == 0
    text = capsys.readouterr().out
    assert json.loads((prompts[method] / "adapter_config.json").read_text())["peft_type"] in text
    assert "5 virtual tokens" in text and words in text and "every weight has its place" in text


@pytest.mark.parametrize(
    ("change", "fields", "words"),
    [
        (lambda w: {"prompt_embeddings": w["prompt_embeddings"] * float("inf")}, {}, "infinity"),
        (None, {"num_virtual_tokens": 6}, "size mismatch"),
        (None, {"num_virtual_tokens": 10**12}, "size mismatch"),
        (None, {"num_layers": 0}, "num_layers"),
        (None, {"num_layers": 3}, "size mismatch"),
        (None, {"token_dim": 8}, "size mismatch"),
        (None, {"num_attention_heads": 5}, "token_dim=16 is no multiple of num_attention_heads=5"),
        (None, {"num_attention_heads": 32}, "token_dim=16 is no multiple of num_attention_heads=32"),
        (lambda w: {"other": w["prompt_embeddings"]}, {}, "'prompt_embeddings' is not in the file"),
    ],
    ids=[
        "infinity",
        "tokens",
        "far too many",
        "no layers",
        "layers",
        "width",
        "heads",
        "more heads than numbers",
        "another tensor",
    ],
)
def test_check_finds_in_prompts(
    change: object,
    fields: dict[str, object],
    words: str,
    prompts: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["check", str(changed(prompts["PrefixTuning"], tmp_path, change, **fields))]) == 1
    assert words in one_line_error(capsys)


def test_check_describes_a_prefix_whose_heads_are_not_known(prompts: dict[str, Path], tmp_path: Path) -> None:
    assert "2 layers, 16 wide" in check.report(
        changed(prompts["PrefixTuning"], tmp_path, None, num_attention_heads=None)
    )


def test_check_names_a_base_of_another_kind(
    prompts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import T5Config

    T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4).save_pretrained(tmp_path)
    assert main(["check", str(prompts["PrefixTuning"]), "--base", str(tmp_path)]) == 1
    error = one_line_error(capsys)
    assert "no AutoModelForCausalLM for 't5'" in error and "CAUSAL_LM" in error and len(error) < 300


@pytest.mark.parametrize("with_base", [False, True], ids=["alone", "with base"])
@pytest.mark.parametrize("kind", ["nan", "rank", "alpha"])
def test_check_finds(
    kind: str, with_base: bool, directories: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, base = directories
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    changes = {
        "nan": (lambda w: {**w, name: w[name] * float("nan")}, {}, "NaN"),
        "rank": (None, {"r": 8}, "size mismatch"),
        "alpha": (None, {"lora_alpha": float("inf")}, "lora_alpha"),
    }
    change, fields, words = changes[kind]
    broken = changed(adapter, tmp_path, change, **fields)
    assert main(["check", str(broken), *(["--base", str(base)] if with_base else [])]) == 1
    assert words in one_line_error(capsys)


@pytest.mark.parametrize("kind", ["missing", "extra", "shape", "integers"])
def test_check_against_the_base_finds(
    kind: str, directories: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, base = directories
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    changes = {
        "missing": (lambda w: {k: v for k, v in w.items() if k != name}, "missing"),
        "extra": (lambda w: {**w, name.replace("q_proj", "o_proj"): w[name].clone()}, "o_proj"),
        "shape": (lambda w: {**w, name: torch.zeros(4, 31)}, "size mismatch"),
        "integers": (lambda w: {**w, name: w[name].to(torch.int8)}, "I8"),
    }
    change, words = changes[kind]
    broken = changed(adapter, tmp_path, change)
    assert main(["check", str(broken), "--base", str(base)]) == 1
    assert words in one_line_error(capsys)


def test_check_needs_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tmp_path / "nothing")]) == 1
    assert "found nothing" in one_line_error(capsys)
    assert main(["check", str(tmp_path)]) == 1
    assert "adapter_config.json" in one_line_error(capsys)


def test_installed_command_is_this_one() -> None:
    from importlib.metadata import entry_points

    (entry,) = [e for e in entry_points(group="console_scripts") if e.name == "peft-fast"]
    assert entry.value == "peft_fast.cli.main:main"
    assert os.access(Path(sys.executable).parent / "peft-fast", os.X_OK)

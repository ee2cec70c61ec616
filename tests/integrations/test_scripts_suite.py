"""More programs written for peft, unchanged: TRL, and training on several processes. Takes minutes and packages of the
extra "scripts", so it runs where PEFT_FAST_SCRIPTS=1 asks for it.
"""

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
from run_scripts import SCRIPTS, python, same, script

pytestmark = pytest.mark.skipif(
    os.environ.get("PEFT_FAST_SCRIPTS") != "1", reason="takes minutes; PEFT_FAST_SCRIPTS=1 runs it (extra: scripts)"
)
PEFT = importlib.util.find_spec("peft") is not None


def like_peft(name: str, tmp_path: Path, *arguments: str) -> Any:
    """What the script gives with peft_fast; the same as with peft, where that is installed."""
    ours = script(name, tmp_path / "peft_fast", *arguments)
    if PEFT:
        same(ours, script(name, tmp_path / "peft", *arguments, peft=True), name)
    return ours


def test_sentence_transformers(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers", reason="comes with the extra: scripts")
    result = like_peft("sentence", tmp_path)
    assert result["loaded"] == result["after"] != result["before"]


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_trl(name: str, tmp_path: Path) -> None:
    """SFTTrainer with peft_config=; DPOTrainer whose reference is the model without its adapter."""
    pytest.importorskip("trl", reason="comes with the extra: scripts")
    pytest.importorskip("datasets", reason="comes with the extra: scripts")
    result = like_peft(name, tmp_path)
    if name == "sft":
        assert result["files"] == ["adapter_config.json", "adapter_model.safetensors"]
        assert result["loaded_equals_trained"]
    assert result["losses"][-1] < result["losses"][0]


def test_resuming_with_dropout(tmp_path: Path) -> None:
    """Dropout's masks are others than peft's; a run that goes on from a checkpoint draws the same ones again."""
    result = script("trainer", tmp_path / "out", "0.1")
    assert result["resumed"] == result["losses"]


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(name: str, tmp_path: Path) -> None:
    """Losses, and what the saved adapter gives: data parallel with the Trainer; fully_shard in a loop, saved by all."""
    one, two = like_peft(name, tmp_path), script(name, tmp_path / "two", processes=2)
    for key in ("losses", "logits", "files"):
        same(two[key], one[key], f"{name}: {key}")
    assert two["files"] == sorted({*two["files"], "adapter_config.json", "adapter_model.safetensors"})
    if name == "ddp":
        assert two["processes"] == 2
    else:
        assert two["sharded"] > 0 and two["difference"] < 1e-6


def test_one_rank_alone_is_told(tmp_path: Path) -> None:
    """Saving a sharded model on one rank: an error that names the others, in place of a wait for ever, and no file."""
    out = tmp_path / "alone"
    command = ["-m", "peft_fast", "run", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    text = python(*command, str(SCRIPTS / "fsdp2.py"), str(out), "alone", code=1, env={"PEFT_FAST_GATHER_TIMEOUT": "4"})
    assert "sharded over ranks [0, 1], and rank 0 waited 4 s for [1]: call this on all ranks" in text
    assert not (out / "adapter_model.safetensors").exists()


def test_tensor_parallel_is_one_process(tmp_path: Path) -> None:
    """Loaded adapters on a model split over two processes: logits, training, a mixed batch, and the file."""
    one, two = script("tp", tmp_path / "one"), script("tp", tmp_path / "two", processes=2)
    same(two["logits"], one["logits"], "logits")
    same(two["losses"], one["losses"], "losses")
    assert two["difference"] < 1e-6
    split = {name.split("layers.0.")[1] for name, size in two["sizes"].items() if size != one["sizes"][name]}
    for layer in ("self_attn.q_proj", "mlp.up_proj"):
        assert f"{layer}.lora_B.default.weight" in split and f"{layer}.lora_A.default.weight" not in split
    for layer in ("self_attn.o_proj", "mlp.down_proj"):
        assert f"{layer}.lora_A.default.weight" in split and f"{layer}.lora_B.default.weight" not in split
    assert "self_attn.o_proj.lora_A.two.weight" in split
    if PEFT:  # its results on one process; on two it fails with a second adapter
        theirs = script("tp", tmp_path / "peft", peft=True)
        same(one["logits"], theirs["logits"], "logits of peft")
        same(one["losses"], theirs["losses"], "losses of peft")

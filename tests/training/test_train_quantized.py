"""`peft-fast train --quantize`: adapters on bases in 4 and 8 bits, on a CPU, through bitsandbytes."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from train_jobs import TEXTS, Job, mean_loss, save_llama, texts
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from peft_fast.training import loop as train_loop

pytest.importorskip("bitsandbytes")
CONFIGS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
ROWS = [([0], [*text.encode(), 0]) for text in TEXTS]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


def quantized(llama: Path, name: str) -> Any:
    """The base as transformers quantizes it, in training mode: otherwise bitsandbytes rounds what it packs on a CPU."""
    config = BitsAndBytesConfig(
        **CONFIGS[name], **({} if name == "int8" else {"bnb_4bit_compute_dtype": torch.float32})
    )
    arguments = {"quantization_config": config, "dtype": torch.float32, "device_map": {"": "cpu"}}
    return LlamaForCausalLM.from_pretrained(llama, **arguments).train()


@pytest.mark.parametrize("name", CONFIGS)
def test_lora_on_a_quantized_base(name: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: list[tuple[str, torch.dtype, bool]] = []
    make = train_loop.make_trainer

    def spy(options: Any, model: Any, *more: Any, **named: Any) -> Any:
        weight = model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight
        kinds.append((type(weight).__name__, weight.dtype, weight.requires_grad))
        assert name == "int8" or weight.quant_state.nested is (name == "nf4-dq")
        return make(options, model, *more, **named)

    monkeypatch.setattr(train_loop, "make_trainer", spy)
    job = Job(llama, tmp_path)
    job.write(texts())
    more = ("--gradient-checkpointing",) if name == "nf4" else ()
    assert job.run(
        "--quantize", name, "--max-steps", "6", "--batch-size", "10", "--lr", "0.02", "--r", "4", "--lora-dropout", "0",
        "--eval-data", str(job.data), *more, *(("--target-modules", "q_proj", "up_proj") if name == "fp4" else ()),
    ) == 0  # fmt: skip
    kind = ("Int8Params", torch.int8) if name == "int8" else ("Params4bit", torch.uint8)
    assert kinds == [(*kind, False)]
    base = quantized(llama, name)
    expected, plain = mean_loss(base, ROWS), mean_loss(LlamaForCausalLM.from_pretrained(llama), ROWS)
    evaluations = job.results()["evaluations"]
    # int8 quantizes activations too, by row, so that rows of other lengths beside do not matter
    assert evaluations[0]["eval_loss"] == pytest.approx(expected, rel=1e-3)
    assert job.losses()[0] == pytest.approx(expected, rel=1e-3)
    exact = abs(evaluations[0]["eval_loss"] - expected)
    assert name == "int8" or abs(expected - plain) > 3 * exact, "it is that of the quantized base"
    model = peft.PeftModel.from_pretrained(base, job.out).train()
    assert evaluations[-1]["eval_loss"] == pytest.approx(mean_loss(model, ROWS), rel=1e-3)
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"] - 0.3


@pytest.mark.parametrize(("name", "method"), [("nf4-dq", "prefix"), ("int8", "prompt")])
def test_learned_tokens_on_a_quantized_base(name: str, method: str, llama: Path, tmp_path: Path) -> None:
    job = Job(llama, tmp_path)
    job.write(texts())
    more = ("--quantize", name, "--method", method, "--num-virtual-tokens", "4", "--lr", "0.2", "--bf16")
    assert job.run(*more, "--max-steps", "8", "--batch-size", "10", "--eval-data", str(job.data)) == 0
    evaluations = job.results()["evaluations"]
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"] - 0.1
    model = peft.PeftModel.from_pretrained(quantized(llama, name), job.out).train()
    assert evaluations[-1]["eval_loss"] == pytest.approx(mean_loss(model, ROWS), rel=0.02)

"""transformers' Trainer and TRL as they come, after `import peft_fast` alone: with peft installed, and without."""

import json
from pathlib import Path
from typing import Any

import pytest
from absent_packages import ABSENT
from run_scripts import SCRIPTS, python, same, script

NO_PEFT = ABSENT.replace("{names}", repr({"peft"}))
PREFIX_AND_QUANTIZED = """
import json, os, sys
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed
TRAINER_FIRST = Trainer.__name__  # transformers looks the class up at its first use
import torch
from peft_fast import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model, prepare_model_for_kbit_training

out = sys.argv[1]
set_seed(0)
LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
                             num_attention_heads=4)).save_pretrained(out + "/base")
data = [{"input_ids": row, "labels": row} for row in torch.randint(0, 64, (8, 12))]

def train(name, base, config):
    model = get_peft_model(base, config)
    args = TrainingArguments(output_dir=out + "/" + name, max_steps=2, save_steps=1, learning_rate=1e-2, eval_steps=1,
                             eval_strategy="steps", load_best_model_at_end=True, report_to=[], use_cpu=True,
                             disable_tqdm=True)
    trainer = Trainer(model=model, args=args, train_dataset=data, eval_dataset=data)
    trainer.train()
    trainer.train(resume_from_checkpoint=out + "/" + name + "/checkpoint-1")
    trainer.save_model(out + "/" + name + "/saved")
    plain = LlamaForCausalLM.from_pretrained(out + "/base", dtype=torch.float32)
    again = PeftModel.from_pretrained(plain, out + "/" + name + "/saved")
    first, = (config for config in again.peft_config.values())
    return {"files": sorted(os.listdir(out + "/" + name + "/saved")), "peft_type": first.peft_type}

quantized = LlamaForCausalLM.from_pretrained(
    out + "/base", quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
print("RESULT", json.dumps({
    "prefix": train("prefix", LlamaForCausalLM.from_pretrained(out + "/base"),
                    PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")),
    "quantized": train("quantized", prepare_model_for_kbit_training(quantized), LoraConfig(task_type="CAUSAL_LM")),
    "peft": "peft" in sys.modules,
}))
"""


def run(program: str, tmp_path: Path, peft_is_there: bool) -> Any:
    """What a program prints as its result, in a process that finds peft or does not."""
    path = tmp_path / "program.py"
    path.write_text(("" if peft_is_there else NO_PEFT) + program, encoding="utf-8")
    (tmp_path / "out").mkdir()
    printed = python(str(path), str(tmp_path / "out"))
    (result,) = [line.partition("RESULT ")[2] for line in printed.splitlines() if "RESULT " in line]
    return json.loads(result)


def of_peft_fast(name: str) -> str:
    """A program of tests/scripts with peft_fast's name where it has peft's."""
    return (SCRIPTS / f"{name}.py").read_text(encoding="utf-8").replace("from peft import", "from peft_fast import")


def test_trainer_saves_resumes_and_loads_the_best(tmp_path: Path) -> None:
    """Losses, files, the best model at the end: as a program has them with peft."""
    pytest.importorskip("accelerate")
    with_peft = script("trainer", tmp_path / "peft", peft=True)
    for there in (True, False):
        folder = tmp_path / f"peft_is_there_{there}"
        folder.mkdir()
        same(run(of_peft_fast("trainer"), folder, there), with_peft, f"peft is there: {there}")


@pytest.mark.parametrize("there", [True, False], ids=["peft", "no_peft"])
def test_prefix_and_quantized_base(there: bool, tmp_path: Path) -> None:
    """With the Trainer imported before peft_fast."""
    pytest.importorskip("accelerate")
    pytest.importorskip("bitsandbytes")
    result = run(PREFIX_AND_QUANTIZED, tmp_path, there)
    for name, kind in (("prefix", "PREFIX_TUNING"), ("quantized", "LORA")):
        assert {"adapter_config.json", "adapter_model.safetensors"} <= set(result[name]["files"])
        assert "model.safetensors" not in result[name]["files"]
        assert result[name]["peft_type"] == kind
    assert result["peft"] == there


def test_pefts_own_models_stay_what_they_are(tmp_path: Path) -> None:
    """In one process: the Trainer's question, and what is no adapter model; the classes of peft are not touched."""
    program = """
import json, peft, peft_fast
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.trainer_utils import _is_peft_model, unwrap_peft_model
from accelerate.utils import is_peft_model
def base():
    return LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                        num_attention_heads=2))
models = [it.get_peft_model(base(), it.LoraConfig(target_modules=["q_proj"])) for it in (peft, peft_fast)]
answers = [[_is_peft_model(model), is_peft_model(model), type(unwrap_peft_model(model)).__name__]
           for model in [*models, base()]]
print("RESULT", json.dumps([answers, isinstance(models[1], peft.PeftModel), type(peft.PeftModel).__name__]))
"""
    ours = [True, True, "LlamaForCausalLM"]
    assert run(program, tmp_path, True) == [[ours, ours, [False, False, "LlamaForCausalLM"]], False, "type"]


def test_without_peft_nothing_pretends_that_there_is_one(tmp_path: Path) -> None:
    program = """
import json, peft_fast, transformers.trainer
from transformers.utils import is_peft_available
try:
    import peft
except ImportError as error:
    found = str(error)
print("RESULT", json.dumps([found, is_peft_available()]))
"""
    assert run(program, tmp_path, False) == ["No module named 'peft'", False]

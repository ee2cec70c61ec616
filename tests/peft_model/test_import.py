"""`import peft_fast`: light, lazy, and complete on a machine with no triton, no bitsandbytes and no GPU."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
from absent_packages import ABSENT

import peft_fast

# the public names for LoRA, as people import them from peft
LORA_NAMES = """
LoraConfig LoraModel PeftConfig PeftType TaskType get_peft_config get_peft_model PeftModel PeftMixedModel
PeftModelForSequenceClassification PeftModelForTokenClassification PeftModelForCausalLM PeftModelForSeq2SeqLM
PeftModelForQuestionAnswering PeftModelForFeatureExtraction AutoPeftModel AutoPeftModelForSequenceClassification
AutoPeftModelForTokenClassification AutoPeftModelForCausalLM AutoPeftModelForSeq2SeqLM AutoPeftModelForQuestionAnswering
AutoPeftModelForFeatureExtraction inject_adapter_in_model get_peft_model_state_dict set_peft_model_state_dict
load_peft_weights PEFT_TYPE_TO_CONFIG_MAPPING get_layer_status get_model_status
""".split()


def run_python(code: str, **environment: str) -> str:
    """Standard output of `code` in a fresh interpreter; what it wrote to stderr is in the failure."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_public_names_are_pefts() -> None:
    assert set(LORA_NAMES) <= set(peft_fast.__all__)
    assert set(peft_fast.__all__) - {"__version__", *peft_fast._OWN} <= set(peft.__all__)
    assert set(peft_fast.__all__) <= set(dir(peft_fast))


@pytest.mark.parametrize("name", sorted(peft_fast._MODULE_OF))
def test_public_name_resolves(name: str) -> None:
    value = getattr(peft_fast, name)
    assert isinstance(value, type) == isinstance(getattr(peft, name), type)
    assert getattr(value, "__name__", name) == name


def test_type_checkers_see_the_same_names() -> None:
    """The names under TYPE_CHECKING, which no test imports, are those of the table, from the same modules."""
    tree = ast.parse(Path(peft_fast.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    assert seen == peft_fast._MODULE_OF | peft_fast._OWN


def test_submodules_are_reachable_and_strangers_are_not() -> None:
    assert peft_fast.utils.__name__ == "peft_fast.utils"
    with pytest.raises(AttributeError, match="no attribute 'LoraConfg'"):
        _ = peft_fast.LoraConfg


def test_import_is_light() -> None:
    """What is loaded is the real check; the budget is in CPU time, which a busy machine does not change."""
    code = """
import json, sys, time
import torch
before, start = set(sys.modules), time.process_time()
import peft_fast
seconds = time.process_time() - start
from peft_fast import LoraConfig, get_peft_model, PeftModel, AutoPeftModelForCausalLM
with_names = time.process_time() - start
print(json.dumps([seconds, with_names, sorted(set(sys.modules) - before)]))
"""
    runs = [json.loads(run_python(code)) for _ in range(3)]
    assert min(seconds for seconds, _, _ in runs) < 0.3
    assert min(with_names for _, with_names, _ in runs) < 1.0
    loaded = set(runs[0][2])
    heavy = {"triton", "bitsandbytes", "peft", "csrc_triton", "accelerate", "matplotlib", "transformers.modeling_utils"}
    assert not heavy & loaded
    assert not [name for name in loaded if name.startswith("transformers.models.")]


def test_works_without_triton_and_bitsandbytes(tmp_path: Path) -> None:
    """LoRA forward, backward, optimizer step, save and load on a CPU, as on a machine that has neither."""
    code = (
        ABSENT.replace("{names}", repr({"triton", "bitsandbytes", "peft", "accelerate", "matplotlib"}))
        + """
import importlib.util
import torch
if importlib.util.find_spec("triton") or importlib.util.find_spec("bitsandbytes"): raise SystemExit("not blocked")
from transformers import LlamaConfig, LlamaForCausalLM
from peft_fast import LoraConfig, PeftModel, get_peft_model
torch.manual_seed(0)
def base():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                        num_attention_heads=4, num_key_value_heads=2))
config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM",
                    init_lora_weights=False)
model = get_peft_model(base(), config)
ids = torch.randint(0, 64, (2, 9))
model.train()
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
model(input_ids=ids, labels=ids).loss.backward()
missing = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0)]
if missing: raise SystemExit(f"no gradient: {missing}")
optimizer.step()
model.eval()
with torch.no_grad():
    expected = model(input_ids=ids).logits
    plain = base()(input_ids=ids).logits
model.save_pretrained(OUT)
again = PeftModel.from_pretrained(base(), OUT)
with torch.no_grad():
    got = again(input_ids=ids).logits
if not torch.equal(got, expected): raise SystemExit("loaded adapter gives other logits")
if torch.equal(plain, expected): raise SystemExit("the adapter changes nothing")
import sys
loaded = [name for name in ("triton", "bitsandbytes", "peft", "csrc_triton") if name in sys.modules]
print("loaded:", loaded)
""".replace("OUT", repr(str(tmp_path)))
    )
    assert run_python(code).splitlines()[-1] == "loaded: []"

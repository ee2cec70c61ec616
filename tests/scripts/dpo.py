"""Direct preference optimization with TRL, the base model as the reference. Usage: dpo.py OUT_DIR"""

import json
import sys

from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import DPOConfig, DPOTrainer

out = sys.argv[1]
words = {f"w{i}": i for i in range(64)}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w1", eos_token="w2")
set_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(config)


def text(start, step):
    return " ".join(f"w{(start + step * k) % 61 + 3}" for k in range(6))


rows = [{"prompt": text(i, 1), "chosen": " " + text(i, 2), "rejected": " " + text(i, 5)} for i in range(16)]
trainer = DPOTrainer(
    model=model,
    args=DPOConfig(
        output_dir=out,
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    ),
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
log = [entry for entry in trainer.state.log_history if "loss" in entry]
result = {
    "losses": [entry["loss"] for entry in log],
    "margins": [entry["rewards/margins"] for entry in log],
    "adapters": sorted(trainer.model.peft_config),
}
print("RESULT", json.dumps(result))

"""Supervised fine-tuning with TRL and a LoRA configuration. Usage: sft.py OUT_DIR"""

import json
import os
import sys

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

out = sys.argv[1]
words = {f"w{i}": i for i in range(64)}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w1", eos_token="w2")


def base_model():
    set_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config)


texts = [{"text": " ".join(f"w{(i * k) % 61 + 3}" for k in range(1, 12))} for i in range(1, 17)]
trainer = SFTTrainer(
    model=base_model(),
    args=SFTConfig(
        output_dir=out,
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        max_length=16,
    ),
    train_dataset=Dataset.from_list(texts),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model()
loaded = PeftModel.from_pretrained(base_model(), out).eval()
ids = torch.arange(12)[None]
with torch.no_grad():
    difference = (loaded(input_ids=ids).logits - trainer.model.eval()(input_ids=ids).logits).abs().max().item()
result = {
    "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    "files": sorted(name for name in os.listdir(out) if "model" in name or "adapter" in name),
    "trainable": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    "loaded_equals_trained": difference < 1e-6,
}
print("RESULT", json.dumps(result))

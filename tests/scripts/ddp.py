"""LoRA with transformers' Trainer on one process or several. Usage: [torchrun] distributed.py OUT_DIR"""

import json
import os
import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

out = sys.argv[1]
processes = int(os.environ.get("WORLD_SIZE", 1))


def base_model():
    set_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, use_cache=False
    )
    return LlamaForCausalLM(config)


args = TrainingArguments(
    output_dir=out,
    max_steps=4,
    per_device_train_batch_size=4 // processes,
    learning_rate=1e-2,
    lr_scheduler_type="constant",
    logging_steps=1,
    save_steps=2,
    report_to=[],
    use_cpu=True,
    disable_tqdm=True,
)
peft_config = LoraConfig(
    task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules="all-linear", modules_to_save=["lm_head"]
)
rows = torch.randint(0, 64, (24, 12), generator=torch.Generator().manual_seed(0))
trainer = Trainer(
    model=get_peft_model(base_model(), peft_config),
    args=args,
    train_dataset=[{"input_ids": row, "labels": row} for row in rows],
)
trainer.train()
trainer.save_model(os.path.join(out, "saved"))
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
if args.process_index == 0:
    loaded = PeftModel.from_pretrained(base_model(), os.path.join(out, "saved")).eval()
    with torch.no_grad():
        logits = loaded(input_ids=torch.arange(12)[None]).logits[0, -1, :6].tolist()
    result = {
        "losses": losses,
        "processes": processes,
        "files": sorted(os.listdir(os.path.join(out, "saved"))),
        "logits": logits,
    }
    print("RESULT", json.dumps(result), flush=True)
if processes > 1:
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()

"""LoRA with transformers' Trainer: train, save, resume, load the best model. Usage: trainer.py OUT_DIR [DROPOUT]"""

import json
import os
import sys

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

out = sys.argv[1]
dropout = float(sys.argv[2]) if len(sys.argv) > 2 else 0.0


def base_model():
    set_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, use_cache=False
    )
    return LlamaForCausalLM(config)


def trainer(steps, **more):
    model = base_model()
    peft_config = LoraConfig(
        task_type=TaskType.CAUSAL_LM, r=4, lora_alpha=16, lora_dropout=dropout, target_modules="all-linear"
    )
    model = get_peft_model(model, peft_config)
    args = TrainingArguments(
        output_dir=out,
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=1,
        **more,
    )
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 64, (24, 12), generator=generator)
    data = [{"input_ids": row, "labels": row} for row in rows]
    return Trainer(model=model, args=args, train_dataset=data, eval_dataset=data[:8])


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


first = trainer(6, load_best_model_at_end=True, metric_for_best_model="eval_loss")
first.train()
evaluated = [entry["eval_loss"] for entry in first.state.log_history if "eval_loss" in entry]
best = first.evaluate()["eval_loss"]
best_directory = first.state.best_model_checkpoint

second = trainer(6)
second.train(resume_from_checkpoint=os.path.join(out, "checkpoint-2"))

loaded = PeftModel.from_pretrained(base_model(), best_directory).eval()
ids = torch.arange(12)[None]
with torch.no_grad():
    difference = (loaded(input_ids=ids).logits - first.model.eval()(input_ids=ids).logits).abs().max().item()

print(
    "RESULT",
    json.dumps(
        {
            "losses": losses(first),
            "eval": evaluated,
            "best": best,
            "best_is_loaded": abs(best - min(evaluated)) < 1e-6,
            "resumed": losses(second),
            "files": sorted(os.listdir(os.path.join(out, "checkpoint-2"))),
            "loaded_equals_trained": difference < 1e-6,
            "model_is": type(first.model).__name__,
        }
    ),
)

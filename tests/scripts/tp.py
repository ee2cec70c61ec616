"""A loaded LoRA adapter on a model that is split over processes. Usage: [torchrun] tp.py OUT_DIR"""

import json
import os
import sys

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

out = sys.argv[1]
processes = int(os.environ.get("WORLD_SIZE", 1))
rank = int(os.environ.get("RANK", 0))


def path(name):
    return os.path.join(out, name)


if processes > 1:
    dist.init_process_group("gloo")
set_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, use_cache=False
)
if rank == 0:
    plain = LlamaForCausalLM(config)
    plain.save_pretrained(path("base"))
    for name, target in (("one", "all-linear"), ("two", ["q_proj", "o_proj"])):
        adapter = LoraConfig(r=4, lora_alpha=16, target_modules=target, init_lora_weights=False, task_type="CAUSAL_LM")
        plain = get_peft_model(LlamaForCausalLM.from_pretrained(path("base")), adapter)
        plain.save_pretrained(path(name))
if processes > 1:
    dist.barrier()

base = LlamaForCausalLM.from_pretrained(path("base"), **({"tp_plan": "auto"} if processes > 1 else {}))
model = PeftModel.from_pretrained(base, path("one"), is_trainable=True)
model.load_adapter(path("two"), adapter_name="two")
ids = torch.arange(24).reshape(2, 12)
sizes = {name: list(getattr(p, "_local_tensor", p).shape) for name, p in model.named_parameters() if "layers.0" in name}
with torch.no_grad():
    logits = {}
    for name in ("default", "two"):
        model.set_adapter(name)
        logits[name] = model(input_ids=ids).logits[:, -1, :6].tolist()
    mixed = model.eval()(input_ids=ids, adapter_names=["two", "__base__"]).logits[:, -1, :6].tolist()
    logits["mixed"] = mixed
    model.train()
    with model.disable_adapter():
        logits["base"] = model(input_ids=ids).logits[:, -1, :6].tolist()

model.set_adapter("default")
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5, foreach=False)
losses = []
for _ in range(4):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
model.save_pretrained(path("trained"), is_main_process=rank == 0)
with torch.no_grad():
    trained = model.eval()(input_ids=ids).logits[:, -1, :6]
if rank == 0:
    whole = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(path("base")), path("trained"))
    with torch.no_grad():
        difference = (whole(input_ids=ids).logits[:, -1, :6] - trained).abs().max().item()
    result = {"logits": logits, "losses": losses, "difference": difference, "sizes": sizes}
    print("RESULT", json.dumps(result), flush=True)
if processes > 1:
    dist.barrier()
    dist.destroy_process_group()

"""LoRA in a loop of one's own with torch's fully_shard. Usage: [torchrun] fsdp2.py OUT_DIR [alone]

With "alone", the first rank saves what all of them have a part of, the mistake that people make.
"""

import json
import os
import sys

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

out = sys.argv[1]
alone = sys.argv[2:] == ["alone"]
processes = int(os.environ.get("WORLD_SIZE", 1))
rank = int(os.environ.get("RANK", 0))


def base_model():
    set_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, use_cache=False
    )
    return LlamaForCausalLM(config)


model = get_peft_model(
    base_model(),
    LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules="all-linear", modules_to_save=["lm_head"]),
)
if processes > 1:
    mesh = init_device_mesh("cpu", (processes,))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
rows = torch.randint(0, 64, (4, 4, 12), generator=torch.Generator().manual_seed(0))
losses = []
for batch in rows:
    mine = batch.chunk(processes)[rank]
    loss = model(input_ids=mine, labels=mine).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    loss = loss.detach()
    if processes > 1:
        dist.all_reduce(loss)
    losses.append(loss.item() / processes)

if alone:
    if rank == 0:
        model.save_pretrained(out)
    dist.barrier()
    sys.exit(0)

model.save_pretrained(out, is_main_process=rank == 0)
state = get_peft_model_state_dict(model)
sharded = sum(hasattr(p, "full_tensor") for p in model.parameters() if p.requires_grad)
# back into the sharded model: everything as before
set_peft_model_state_dict(model, state)
again = model(input_ids=rows[0].chunk(processes)[rank]).logits.detach()
if rank == 0:
    loaded = PeftModel.from_pretrained(base_model(), out).eval()
    with torch.no_grad():
        first = loaded(input_ids=rows[0].chunk(processes)[0]).logits
    result = {
        "losses": losses,
        "sharded": sharded,
        "files": sorted(os.listdir(out)),
        "logits": loaded(input_ids=torch.arange(12)[None]).logits[0, -1, :6].tolist(),
        "difference": (first - again).abs().max().item(),
    }
    print("RESULT", json.dumps(result), flush=True)
if processes > 1:
    dist.barrier()
    dist.destroy_process_group()

"""Adapters through transformers' own methods, without get_peft_model, and a pipeline. Usage: mixin.py OUT_DIR"""

import json
import os
import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, pipeline, set_seed

out = sys.argv[1]
ids = torch.arange(10)[None]


def base_model():
    set_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config).eval()


def logits(model):
    with torch.no_grad():
        return [round(value, 5) for value in model(input_ids=ids).logits[0, -1, :6].tolist()]


def train(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


result = {}
model = base_model()
result["base"] = logits(model)
model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False), adapter_name="one")
result["trainable"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
result["loss"] = train(model)
result["one"] = logits(model)
model.save_pretrained(os.path.join(out, "one"))
result["files"] = sorted(os.listdir(os.path.join(out, "one")))

# the file into a fresh model, beside another adapter with a module that is trained whole
model = base_model()
model.load_adapter(os.path.join(out, "one"), adapter_name="again")
result["again"] = logits(model)
model.add_adapter(LoraConfig(r=2, target_modules=["up_proj"]), adapter_name="two")
result["active"] = model.active_adapters()
train(model)
result["two"] = logits(model)
model.set_adapter("again")
result["set_adapter"] = logits(model)
model.disable_adapters()
result["disabled"] = logits(model)
model.enable_adapters()
result["enabled"] = logits(model)
result["state_dict"] = sorted(model.get_adapter_state_dict("again"))[:3]
model.delete_adapter("again")
result["left"] = sorted(model.peft_config)

# with a module that is trained whole
model = base_model()
model.add_adapter(LoraConfig(r=2, target_modules=["up_proj"], modules_to_save=["lm_head"]))
train(model)
result["head"] = logits(model)
model.save_pretrained(os.path.join(out, "head"))
model = base_model()
model.load_adapter(os.path.join(out, "head"), adapter_name="head", is_trainable=True)
result["head_again"] = logits(model)
result["head_trains"] = sum(p.numel() for p in model.parameters() if p.requires_grad)

# from_pretrained on a directory that has an adapter only
base_model().save_pretrained(os.path.join(out, "base"))
config = json.load(open(os.path.join(out, "one", "adapter_config.json")))
config["base_model_name_or_path"] = os.path.join(out, "base")
json.dump(config, open(os.path.join(out, "one", "adapter_config.json"), "w"))
result["from_pretrained"] = logits(LlamaForCausalLM.from_pretrained(os.path.join(out, "one")))

# a PeftModel reads what the methods of transformers wrote
result["peft_model"] = logits(PeftModel.from_pretrained(base_model(), os.path.join(out, "one")))

# text generation with a model that has an adapter
words = {f"w{i}": i for i in range(64)}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w1", eos_token="w2")
config = LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM")
set_seed(3)
generate = pipeline("text-generation", model=get_peft_model(base_model(), config), tokenizer=tokenizer)
result["text"] = generate("w5 w6 w7", max_new_tokens=6, do_sample=False)[0]["generated_text"]

print("RESULT", json.dumps(result))

"""An adapter on a sentence encoder, with sentence-transformers. Usage: sentence.py OUT_DIR"""

import json
import os
import sys

import torch
from peft import LoraConfig, TaskType
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, set_seed

out = sys.argv[1]
set_seed(0)
BertModel(
    BertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
).save_pretrained(os.path.join(out, "bert"))
words = {f"w{i}": i for i in range(64)}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    pad_token="w1",
    cls_token="w2",
    sep_token="w3",
    model_input_names=["input_ids", "attention_mask"],
).save_pretrained(os.path.join(out, "bert"))

encoder = Transformer(os.path.join(out, "bert"))
model = SentenceTransformer(modules=[encoder, Pooling(32)], device="cpu")
texts = ["w5 w6 w7", "w8 w9"]
result = {"before": model.encode(texts)[:, :3].tolist()}
set_seed(1)
model.add_adapter(
    LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, r=4, lora_alpha=8, target_modules=["query", "value"])
)
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
model.train()
losses = []
for _ in range(4):
    features = model.preprocess(texts) if hasattr(model, "preprocess") else model.tokenize(texts)
    one, two = model(features)["sentence_embedding"]
    loss = torch.cosine_similarity(one, two, dim=0)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
model.eval()
result["losses"] = losses
result["after"] = model.encode(texts)[:, :3].tolist()
model.save_pretrained(os.path.join(out, "saved"))
result["files"] = sorted(name for name in os.listdir(os.path.join(out, "saved")) if "adapter" in name)
result["loaded"] = SentenceTransformer(os.path.join(out, "saved"), device="cpu").encode(texts)[:, :3].tolist()
print("RESULT", json.dumps(result))

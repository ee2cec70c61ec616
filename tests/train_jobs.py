"""Tiny models and data, and jobs of `peft-fast train` on them, for the tests of that command."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from peft_fast.cli.main import main

Json = dict[str, Any]
TEXTS = [
    "Return the name.", "Set a flag", "größer", "Raise an error when x is 0.", "def f(x): return x", "a b c d e f g",
    "Return None", "Yield rows, one by one.", "if not x:", "Close the file and go on",
]  # fmt: skip
PAIRS = [(text[:5], text[5:]) for text in TEXTS]
LABELS = ["good" if i % 3 else "bad" for i in range(len(TEXTS))]


def save_llama(directory: Path) -> Path:
    """A Llama whose tokens are bytes, its sizes multiples of 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def save_t5(directory: Path) -> Path:
    """A T5 whose tokens are bytes."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=256, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=1, dropout_rate=0.0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(directory)
    return directory


def save_bert(directory: Path) -> Path:
    """A Bert with a tokenizer of whole words between [CLS] and [SEP]."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *sorted({word for text in TEXTS for word in text.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=32, pad_token_id=0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(directory)
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(directory)
    return directory


def texts(count: int = len(TEXTS)) -> list[Json]:
    return [{"text": text} for text in TEXTS[:count]]


def pairs(count: int = len(TEXTS)) -> list[Json]:
    return [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS[:count]]


def labelled() -> list[Json]:
    return [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)]


class Job:
    """A model, a file of lines and a directory for the result."""

    def __init__(self, model: Path, directory: Path) -> None:
        self.model, self.data, self.out = model, directory / "data.jsonl", directory / "out"

    def write(self, lines: Sequence[Json | bytes], path: Path | None = None) -> Path:
        encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        target = path or self.data
        target.write_bytes(b"".join(line + b"\n" for line in encoded))
        return target

    def arguments(self, *more: str) -> list[str]:
        return [
            "train", "--model", str(self.model), "--data", str(self.data), "--out", str(self.out), "--device", "cpu",
            *more,
        ]  # fmt: skip

    def run(self, *more: str) -> int:
        return main(self.arguments(*more))

    def results(self) -> Json:
        found: Json = json.loads((self.out / "results.json").read_text(encoding="utf-8"))
        return found

    def losses(self) -> list[float]:
        return [loss for _, loss in self.results()["losses"]]


def mean_loss(model: Any, rows: Sequence[tuple[list[int], list[int]]]) -> float:
    """Over all rows of (tokens before, tokens to learn), one row at a time, in nats per token that is learned."""
    total, count = 0.0, 0
    for before, after in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*before, *after]])).logits[0].float()
        logits = logits[-len(before) - len(after) :]
        chosen = logits[len(before) - 1 : -1].log_softmax(-1)[range(len(after)), after]
        total, count = total - float(chosen.sum()), count + len(after)
    return total / count

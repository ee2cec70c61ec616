"""Tiny models and LoRA configurations that between them use every kind of entry an adapter's file can have."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


def llama(tie: bool = False, **changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=40)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "num_key_value_heads": 1, "tie_word_embeddings": tie, **changes}))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=40)
    return BertForSequenceClassification(BertConfig(**sizes))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    special = dict(bos_token_id=0, eos_token_id=1)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=40, n_positions=32, **special))


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = dict(d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, vocab_size=40, decoder_start_token_id=0)
    return T5ForConditionalGeneration(T5Config(**sizes))


class ConvNet(nn.Module):
    """A custom model: convolution, batch norm (integer buffer) and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(image)).relu().mean((2, 3)))


@dataclass
class Case:
    """A base model, the fields of a LoraConfig, and what to feed the model."""

    base: Callable[[], nn.Module]
    config: dict[str, Any] = field(default_factory=dict)
    save: dict[str, Any] = field(default_factory=dict)

    def model(self) -> nn.Module:
        """The base model, the same one every time."""
        torch.manual_seed(1)
        return self.base().eval()

    def outputs(self, model: nn.Module) -> Tensor:
        torch.manual_seed(2)
        with torch.no_grad():
            if self.base is ConvNet:
                return model(torch.randn(2, 3, 8, 8))
            ids = torch.randint(0, 40, (2, 7))
            more = {"decoder_input_ids": ids} if self.base is t5 else {}
            return model(input_ids=ids, **more).logits.float()


def _lora(task: str | None, targets: Any, **fields: Any) -> dict[str, Any]:
    return {"task_type": task, "target_modules": targets, "r": 4, "lora_alpha": 6, **fields}


CASES = {
    "llama": Case(llama, _lora("CAUSAL_LM", ["q_proj", "v_proj"])),
    "all_linear": Case(llama, _lora("CAUSAL_LM", "all-linear", use_rslora=True)),
    "rank_pattern": Case(
        llama, _lora("CAUSAL_LM", ["q_proj", "down_proj"], rank_pattern={"down_proj": 3}, alpha_pattern={"q_proj": 5})
    ),
    "embeddings": Case(llama, _lora("CAUSAL_LM", ["q_proj", "embed_tokens", "lm_head"])),
    "embedding_regex": Case(llama, _lora("CAUSAL_LM", r".*\.(q_proj|embed_tokens)")),
    "embeddings_not_saved": Case(llama, _lora("CAUSAL_LM", ["embed_tokens"]), {"save_embedding_layers": False}),
    "embeddings_saved": Case(llama, _lora("CAUSAL_LM", ["q_proj"]), {"save_embedding_layers": True}),
    "tied": Case(lambda: llama(tie=True), _lora("CAUSAL_LM", ["q_proj"]), {"save_embedding_layers": True}),
    "trained_head": Case(llama, _lora("CAUSAL_LM", ["q_proj"], modules_to_save=["lm_head", "embed_tokens"])),
    "trained_and_saved": Case(
        llama, _lora("CAUSAL_LM", ["q_proj"], modules_to_save=["embed_tokens"]), {"save_embedding_layers": True}
    ),
    "bert": Case(bert, _lora("SEQ_CLS", ["query", "value"])),
    "bert_bias_all": Case(bert, _lora("SEQ_CLS", ["query"], bias="all")),
    "bert_bias_lora_only": Case(bert, _lora("SEQ_CLS", ["query", "dense"], bias="lora_only")),
    "deep_trained": Case(bert, _lora("SEQ_CLS", ["query"], bias="all", modules_to_save=["pooler"])),
    "lora_bias": Case(bert, _lora("SEQ_CLS", ["query"], lora_bias=True)),
    "gpt2": Case(gpt2, _lora("CAUSAL_LM", ["c_attn", "wte"], fan_in_fan_out=True)),
    "t5": Case(t5, _lora("SEQ_2_SEQ_LM", ["q", "v", "wo"])),
    "conv": Case(ConvNet, _lora(None, ["conv"], modules_to_save=["norm", "head"])),
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that both libraries give alike for these cases."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def randomise(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Random values for the tensors of a file: a fresh lora_B is zero and would hide everything."""
    generator = torch.Generator().manual_seed(3)
    random = {}
    for name, tensor in state.items():
        values = torch.randn(tensor.shape, generator=generator).mul(0.3).to(tensor.dtype)
        random[name] = values.abs() if name.endswith("running_var") else values
        if not tensor.is_floating_point():
            random[name] = tensor + 5
    return random

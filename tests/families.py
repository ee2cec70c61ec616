"""Tiny models of the common architectures, and the same adapter on them from peft and from peft_fast."""

import copy
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import peft_fast

VOCAB, ROWS, LENGTH = 60, 2, 7
_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}

# family -> (prefix of its classes, configuration, what LoRA adapts)
FAMILIES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "llama": ("Llama", _DECODER, ["q_proj", "v_proj", "down_proj"]),
    "qwen2": ("Qwen2", _DECODER, ["q_proj", "k_proj", "up_proj"]),
    "gpt2": (
        "GPT2",
        {
            "vocab_size": VOCAB,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        ["c_attn"],
    ),
    "opt": (
        "OPT",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
            "dropout": 0.0,
        },
        ["q_proj", "v_proj"],
    ),
    "bert": ("Bert", _ENCODER, ["query", "value"]),
    "roberta": ("Roberta", {**_ENCODER, "pad_token_id": 1}, ["query", "value"]),
    "t5": (
        "T5",
        {
            "vocab_size": VOCAB,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "dropout_rate": 0.0,
            "decoder_start_token_id": 0,
        },
        ["q", "v"],
    ),
    "bart": (
        "Bart",
        {
            "vocab_size": VOCAB,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "dropout": 0.0,
            "max_position_embeddings": 64,
            "forced_eos_token_id": None,
            "init_std": 0.3,
        },
        ["q_proj", "v_proj"],
    ),
}
_SUFFIX = {
    "CAUSAL_LM": "ForCausalLM",
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "FEATURE_EXTRACTION": "Model",
    "SEQ_2_SEQ_LM": "ForConditionalGeneration",
}
CASES = [
    ("llama", "CAUSAL_LM"),
    ("llama", "SEQ_CLS"),
    ("llama", "TOKEN_CLS"),
    ("llama", "QUESTION_ANS"),
    ("qwen2", "CAUSAL_LM"),
    ("qwen2", "SEQ_CLS"),
    ("gpt2", "CAUSAL_LM"),
    ("gpt2", "SEQ_CLS"),
    ("gpt2", "TOKEN_CLS"),
    ("opt", "CAUSAL_LM"),
    ("opt", "SEQ_CLS"),
    ("bert", "SEQ_CLS"),
    ("bert", "TOKEN_CLS"),
    ("bert", "QUESTION_ANS"),
    ("bert", "FEATURE_EXTRACTION"),
    ("roberta", "SEQ_CLS"),
    ("roberta", "QUESTION_ANS"),
    ("roberta", "FEATURE_EXTRACTION"),
    ("t5", "SEQ_2_SEQ_LM"),
    ("bart", "SEQ_2_SEQ_LM"),
    ("bart", "QUESTION_ANS"),
]


def make_base(family: str, task: str, **changes: Any) -> Any:
    """A new base model in eval mode, always with the same weights."""
    prefix, settings, _ = FAMILIES[family]
    name = {("gpt2", "CAUSAL_LM"): "GPT2LMHeadModel"}.get((family, task), prefix + _SUFFIX[task])
    config = getattr(transformers, f"{prefix}Config")(**{**settings, **changes})
    torch.manual_seed(7)
    return getattr(transformers, name)(config).eval()


def make_config(library: Any, family: str, task: str | None, **changes: Any) -> Any:
    settings = {"r": 4, "lora_alpha": 6, "target_modules": list(FAMILIES[family][2]), "task_type": task}
    if family == "gpt2":
        settings["fan_in_fan_out"] = True
    return library.LoraConfig(**{**settings, **changes})


def make_pair(family: str, task: str, **changes: Any) -> tuple[Any, Any]:
    """(peft's model, peft_fast's model): the same base, the same random adapter, lora_B not zero."""
    base = make_base(family, task)
    pair = []
    for library in (peft, peft_fast):
        torch.manual_seed(11)
        config = make_config(library, family, task, **{"init_lora_weights": False, **changes})
        pair.append(library.get_peft_model(copy.deepcopy(base), config))
    return pair[0], pair[1]


def make_inputs(task: str, seed: int = 3) -> dict[str, Tensor]:
    """Random token ids with the labels of the task; a part of the second row is masked."""
    generator = torch.Generator().manual_seed(seed)

    def ids(high: int, *shape: int, low: int = 0) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    inputs = {
        "input_ids": ids(VOCAB, ROWS, LENGTH, low=3),
        "attention_mask": torch.ones(ROWS, LENGTH, dtype=torch.long),
    }
    inputs["attention_mask"][1, -2:] = 0
    if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        inputs["labels"] = ids(VOCAB, ROWS, LENGTH, low=3)
    elif task == "SEQ_CLS":
        inputs["labels"] = ids(2, ROWS)
    elif task == "TOKEN_CLS":
        inputs["labels"] = ids(2, ROWS, LENGTH)
    elif task == "QUESTION_ANS":
        inputs["start_positions"], inputs["end_positions"] = ids(LENGTH, ROWS), ids(LENGTH, ROWS)
    return inputs


def output_tensors(output: Any) -> dict[str, Tensor]:
    """The floating point tensors of a model's output, without caches."""
    return {key: value for key, value in output.items() if isinstance(value, Tensor) and value.is_floating_point()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def trainable(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]

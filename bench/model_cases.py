"""Whole models: a Llama alone, with all-linear LoRA under peft, and under peft_fast, all from the same weights."""

import copy
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .cases import ModelCase
from .providers import DTYPES

NAMES = ("base", "peft", "peft_fast")
RANK = 16


def base_model(hidden: int = 512, layers: int = 8, kv_heads: int = 8) -> nn.Module:
    """A random Llama in fp32, frozen; a small vocabulary, so that the output layer (not a LoRA site) hides nothing."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=kv_heads, vocab_size=1024, max_position_embeddings=1024, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).requires_grad_(False)


def llama_8b(device: torch.device, layers: int = 32, tiny: bool = False) -> Any:
    """A random, frozen bf16 Llama of the 8B's sizes; tiny: a hundredth of them, to try a script on a CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, int] = dict(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256
    )
    if tiny:
        layers = min(layers, 2)
        sizes = dict(
            hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, vocab_size=256
        )
    config = LlamaConfig(num_hidden_layers=layers, max_position_embeddings=2048, **sizes)
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        try:
            return LlamaForCausalLM(config).requires_grad_(False).eval()
        finally:
            torch.set_default_dtype(dtype)


def make_models(case: ModelCase, small: bool = False) -> dict[str, nn.Module]:
    """The model for each of ``NAMES``; peft and peft_fast hold the same adapter, which is not zero."""
    base = (base_model(128, 2) if small else base_model()).to(DTYPES[case.dtype])
    models = {"base": base}
    for name in NAMES[1:]:
        library = importlib.import_module(name)
        config = library.LoraConfig(
            r=RANK, lora_alpha=2 * RANK, lora_dropout=case.dropout, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        models[name] = library.get_peft_model(
            copy.deepcopy(base), config, autocast_adapter_dtype=case.adapters == "default"
        )
    generator = torch.Generator().manual_seed(1)
    ours = dict(models["peft_fast"].named_parameters())
    with torch.no_grad():
        for key, weight in models["peft"].named_parameters():
            if "lora_" in key:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05)
                ours[key].copy_(weight)
    for model in models.values():
        model.train(case.mode == "train")
    return models


def inputs(case: ModelCase, model: Any, batch: int = 0, tokens: int = 0) -> dict[str, Tensor]:
    """Embedded random tokens, so that every model has a gradient to bring back to its input, and labels to train on."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 1024, (batch or case.batch, tokens or case.tokens), generator=generator)
    embedded = model.get_input_embeddings()(ids).detach()
    if case.mode != "train":
        return {"inputs_embeds": embedded}
    return {"inputs_embeds": embedded.requires_grad_(), "labels": ids}


def trained(model: nn.Module, given: dict[str, Tensor]) -> list[Tensor]:
    """What a step differentiates: the model's input and its adapters."""
    return [given["inputs_embeds"], *(weight for weight in model.parameters() if weight.requires_grad)]


def runner(case: ModelCase, model: nn.Module) -> Callable[[int], Any]:
    """The function to time."""
    given = inputs(case, model)
    if case.mode == "train":
        wanted = trained(model, given)
        return lambda i: torch.autograd.grad(model(**given).loss, wanted)

    @torch.no_grad()
    def forward(i: int) -> Tensor:
        return model(**given).logits

    return forward


def outputs(case: ModelCase, name: str, model: nn.Module) -> list[Tensor]:
    """Logits of a few tokens, in training all gradients by name, without dropout: compared with fp64 before timing."""
    given = inputs(case, model, 2, 16)
    model.eval()
    try:
        if case.mode != "train":
            with torch.no_grad():
                return [model(**given).logits]
        result = model(**given)
        weights = dict(sorted((k, w) for k, w in model.named_parameters() if w.requires_grad))
        gradients = torch.autograd.grad(result.loss, [given["inputs_embeds"], *weights.values()])
        return [result.logits.detach(), *gradients]
    finally:
        model.train(case.mode == "train")


def exact(case: ModelCase, model: nn.Module) -> list[Tensor]:
    """The same in fp64, from a model's copy."""
    return outputs(case, "exact", copy.deepcopy(model).double())

"""Tiny models with the same LoRA adapters in peft_fast and in peft, and what is compared between them."""

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import peft
import torch
import transformers as hf
from torch import Tensor, nn

from peft_fast.tuners.lora import LoraConfig, LoraModel

IDS = torch.randint(2, 51, (4, 9), generator=torch.Generator().manual_seed(3))


def llama(**changes: Any) -> nn.Module:
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=51)
    config = hf.LlamaConfig(**sizes | dict(num_key_value_heads=1, tie_word_embeddings=False) | changes)
    return hf.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    config = hf.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=51, n_positions=16)
    config.attn_pdrop = config.resid_pdrop = config.embd_pdrop = 0.0
    return hf.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    return hf.BertForSequenceClassification(
        hf.BertConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=51,
            max_position_embeddings=16,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=3,
        )
    )


def opt() -> nn.Module:
    return hf.OPTForCausalLM(
        hf.OPTConfig(
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=51,
            dropout=0.0,
            max_position_embeddings=16,
            word_embed_proj_dim=32,
        )
    )


def t5() -> nn.Module:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            d_model=32,
            d_kv=16,
            d_ff=48,
            num_layers=2,
            num_heads=2,
            vocab_size=51,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            pad_token_id=0,
        )
    )


# name -> (model, targets that mix what the architecture has)
BASES: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "llama": (llama, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
    "gpt2": (gpt2, ["c_attn", "c_fc", "c_proj"]),
    "bert": (bert, ["query", "value", "dense"]),
    "opt": (opt, ["q_proj", "v_proj", "fc1", "fc2"]),
    "t5": (t5, ["q", "v", "wi", "wo"]),
    "llama-embeddings": (llama, ["embed_tokens", "lm_head", "q_proj"]),
    "llama-tied": (lambda: llama(tie_word_embeddings=True), ["embed_tokens", "lm_head"]),
}


def base_and_targets(name: str) -> tuple[nn.Module, list[str]]:
    """A base model, the same at every call, and targets in it."""
    make, targets = BASES[name]
    torch.manual_seed(1)
    return make().eval(), targets


def ours(base: nn.Module, adapter_name: str = "default", **config: Any) -> Any:
    """peft_fast's LoraModel over a copy of `base`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LoraModel(copy.deepcopy(base), LoraConfig(**config), adapter_name)


def theirs(base: nn.Module, adapter_name: str = "default", **config: Any) -> Any:
    """peft's LoraModel over a copy of `base`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.LoraModel(copy.deepcopy(base), peft.LoraConfig(**config), adapter_name)


def randomize(model: nn.Module, std: float = 0.15) -> None:
    """Give every LoRA weight a random value: a zero lora_B would hide most errors."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=std)


def pair(name: str, **config: Any) -> tuple[Any, Any]:
    """(ours, peft's) with equal weights, random in the adapter."""
    base, targets = base_and_targets(name)
    config.setdefault("target_modules", targets)
    mine, their = ours(base, **config), theirs(base, **config)
    randomize(mine)
    same_weights(mine, their)
    return mine, their


def same_weights(mine: nn.Module, their: nn.Module) -> None:
    """Copy the first model's weights into the second, whose keys must be the same."""
    result = their.load_state_dict(mine.state_dict())
    assert not result.missing_keys and not result.unexpected_keys


def forward(model: Any) -> Tensor:
    """The logits for fixed inputs."""
    inputs = {"labels": IDS} if model.config.is_encoder_decoder else {}
    return model(input_ids=IDS, **inputs).logits


def logits(model: Any) -> Tensor:
    """`forward` without gradients."""
    with torch.no_grad():
        return forward(model)


def run(model: Any, seed: int = 7, context: Any = None) -> dict[str, Tensor]:
    """Logits, and the gradient of every parameter that has one, of a fixed loss."""
    model.zero_grad()
    torch.manual_seed(seed)
    with context or nullcontext():
        logits = forward(model)
    weights = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view(logits.shape)
    (logits.double() * weights).sum().backward()
    return {"logits": logits.detach()} | {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def assert_as_accurate_as(mine: Any, their: Any, exact: Any, context: Any = None) -> dict[str, Tensor]:
    """Logits and all gradients of `mine`: at most twice the error of `their`, against `exact` in fp64."""
    got, same, reference = run(mine, context=context), run(their, context=context), run(exact)
    assert_runs_as_accurate(got, same, reference)
    return got


def assert_runs_as_accurate(got: dict[str, Tensor], same: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """The same for results of `run`, all tensors together: an error is mostly the luck of the roundings in the layers
    around it, so that of one tensor alone says little. Each counts by its root mean square over its largest value."""
    assert got.keys() == same.keys() == exact.keys()
    assert all(got[name].shape == exact[name].shape for name in exact)
    errors = [relative_error(result, exact) for result in (got, same)]
    eps = max(torch.finfo(value.dtype).eps for value in got.values())
    assert errors[0] <= 2 * errors[1] + eps, f"error {errors[0]:.3e} > 2 x {errors[1]:.3e}"


def relative_error(got: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Root mean square over the tensors of each one's relative error; without those that are 0 but for rounding (the
    gradient of the bias of an attention's keys)."""
    scales = {name: value.abs().max().item() for name, value in exact.items()}
    names = [name for name, scale in scales.items() if scale > 1e-12 * max(scales.values())]
    errors = [(got[name].double() - exact[name]).square().mean().sqrt() / scales[name] for name in names]
    return torch.stack(errors).square().mean().sqrt().item()


def in_fp64(model: Any) -> Any:
    """A copy of a model in fp64."""
    return copy.deepcopy(model).double()

"""Experts, whose weights transformers fused into parameters: never left out of what a config means without a word."""

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from peft_fast import LoraConfig, get_peft_model, inject_adapter_in_model

SIZES = dict(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, num_experts_per_tok=1, pad_token_id=0,
)  # fmt: skip
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def qwen3_moe() -> nn.Module:
    config = transformers.Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=8, head_dim=8)
    return transformers.Qwen3MoeForCausalLM(config)


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=2))


def gpt_oss() -> nn.Module:
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**SIZES, num_local_experts=2, head_dim=8))


def _id(value: Any) -> str:
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (qwen3_moe, [*ATTENTION, "gate_proj", "up_proj", "down_proj"]),
        (qwen3_moe, "all-linear"),
        (qwen3_moe, r".*\.(q_proj|down_proj)"),
        (qwen3_moe, ["q_proj", "experts.down_proj"]),
        (mixtral, ["q_proj", "w1"]),
        (mixtral, "all-linear"),
        (gpt_oss, ["q_proj", "gate_up_proj"]),
    ],
    ids=_id,
)
def test_a_name_that_means_experts_is_refused(make: Any, targets: Any) -> None:
    model = make()
    with pytest.raises(ValueError, match=r"means layers of the experts 'model.layers.0.mlp.experts'.*not supported"):
        get_peft_model(model, LoraConfig(r=2, target_modules=targets))
    assert not any("lora" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (qwen3_moe, dict(target_modules=ATTENTION)),
        (qwen3_moe, dict(target_modules="all-linear", exclude_modules=r".*\.experts\..*")),
        (qwen3_moe, dict(target_modules=[*ATTENTION, "down_proj"], exclude_modules=r".*\.experts\..*")),
        (mixtral, dict(target_modules=ATTENTION)),
    ],
    ids=_id,
)
@pytest.mark.filterwarnings("ignore:You have passed exclude_modules")
def test_who_leaves_them_out_gets_the_others(make: Any, options: Any) -> None:
    model = get_peft_model(make(), LoraConfig(r=2, **options))
    names = {
        name.rpartition(".lora_A")[0].rpartition(".")[2] for name, _ in model.named_parameters() if "lora_A" in name
    }
    assert set(ATTENTION) <= names


def test_a_file_with_weights_of_experts_is_refused() -> None:
    """As transformers' load_adapter gives it: targets come from the file."""
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts.0.gate_proj"]
    tensors = {f"{name}.lora_{part}.weight": torch.zeros(2, 2) for name in names for part in "AB"}
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.experts.0.gate_proj' means layers of the experts"):
        inject_adapter_in_model(
            LoraConfig(r=2, target_modules=["q_proj", "gate_proj"]), qwen3_moe(), state_dict=tensors
        )

"""Targets that cannot just be replaced: torch reads past them, they hang at several places, or are never called."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from peft_fast import LoraConfig, get_peft_model


def randomized(model: Any) -> Any:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)


@pytest.mark.parametrize("padded", [False, True])
def test_an_encoder_layer_of_torch_calls_its_adapters_in_evaluation(padded: bool) -> None:
    """Its fast path reads the weights of linear1 and linear2 past them."""
    model = randomized(get_peft_model(encoder(), LoraConfig(r=2, target_modules=["linear1", "linear2"])))
    x = torch.randn(2, 4, 16)
    mask = torch.tensor([[False] * 4, [False] * 2 + [True] * 2]) if padded else None
    own = slice(None) if mask is None else ~mask
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        expected = model(x, src_key_padding_mask=mask)[own]
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    with torch.no_grad():
        torch.testing.assert_close(model(x, src_key_padding_mask=mask)[own], expected, rtol=1e-4, atol=1e-5)
        model.merge_adapter()
        torch.testing.assert_close(model(x, src_key_padding_mask=mask)[own], expected, rtol=1e-4, atol=1e-5)
        base = model.merge_and_unload()
        torch.testing.assert_close(base(x, src_key_padding_mask=mask)[own], expected, rtol=1e-4, atol=1e-5)
    assert not any(module._forward_pre_hooks for module in base.modules()), "the base model has its fast path again"
    assert base.use_nested_tensor


def test_the_output_of_torchs_attention_is_refused_by_name() -> None:
    model = encoder()
    with pytest.raises(ValueError, match=r"'layers.0.self_attn.out_proj' cannot be adapted: .*MultiheadAttention"):
        get_peft_model(model, LoraConfig(target_modules=["out_proj"]))
    assert not any("lora" in name for name, _ in model.named_modules())


def test_all_linear_leaves_it_out_and_says_so() -> None:
    model = encoder()
    with pytest.warns(UserWarning, match=r"leaves out layers.0.self_attn.out_proj, layers.1.self_attn.out_proj:"):
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    names = {
        name.split(".lora_A")[0].split("model.", 1)[1] for name, _ in adapted.named_parameters() if "lora_A" in name
    }
    assert {name.rpartition(".")[2] for name in names} == {"linear1", "linear2"}


class Twice(nn.Module):
    """One linear layer at two places, and in a list."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 8)
        self.second = self.first
        self.more = nn.ModuleList([self.first, nn.Linear(8, 8)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.first, self.second, *self.more):
            x = torch.tanh(layer(x))
        return x


def test_a_module_at_several_places_is_adapted_at_all_of_them() -> None:
    plain = Twice()
    model = randomized(get_peft_model(plain, LoraConfig(r=2, target_modules=["first", "second"])))
    inner = model.base_model.model
    assert inner.first is inner.second is inner.more[0] and hasattr(inner.first, "lora_A")
    x = torch.randn(3, 8)
    before = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    base = model.unload()
    assert type(base.first) is nn.Linear and base.first is base.second is base.more[0]


def test_a_failed_injection_gives_every_place_back() -> None:
    plain = Twice()
    plain.more.append(nn.Conv2d(3, 3, 1, groups=3))
    with pytest.raises(ValueError, match="groups"):
        get_peft_model(plain, LoraConfig(r=2, target_modules=["first", "2"]))
    assert type(plain.first) is nn.Linear and plain.first is plain.second is plain.more[0]


def seq2seq(kind: str) -> Any:
    if kind == "t5":
        config: Any = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        return T5ForConditionalGeneration(config)
    sizes = {
        f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 1), ("attention_heads", 2))
    }
    return BartForConditionalGeneration(
        BartConfig(vocab_size=32, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, **sizes)
    )


@pytest.mark.filterwarnings("ignore:Model has")
@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("where", ["target_modules", "modules_to_save"])
def test_embeddings_that_are_never_called_are_refused_by_name(kind: str, where: str) -> None:
    target = ["q", "v", "q_proj", "v_proj"]
    options: dict[str, Any] = {
        "target_modules": target,
        where: ["shared", *(target if where == "target_modules" else ())],
    }
    with pytest.raises(ValueError, match=r"shared' is never called: .*embed_tokens.* Name 'embed_tokens' instead"):
        get_peft_model(seq2seq(kind), LoraConfig(r=2, task_type="SEQ_2_SEQ_LM", **options))
    with pytest.warns(UserWarning, match="is never called"):  # a file of peft's does no harm
        get_peft_model(seq2seq(kind), LoraConfig(r=2, task_type="SEQ_2_SEQ_LM", inference_mode=True, **options))
    get_peft_model(seq2seq(kind), LoraConfig(r=2, task_type="SEQ_2_SEQ_LM", target_modules=["embed_tokens"]))

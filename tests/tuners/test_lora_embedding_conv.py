"""LoRA on embeddings and convolutions beside the installed peft."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lora_layers import K, N, R, check, frozen, layers
from torch import Tensor, nn

from peft_fast.tuners.lora import LoraConfig, layer as our_layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"scale_grad_by_freq": True}], ids=str)
def test_embedding(options: dict[str, Any], dtype: torch.dtype) -> None:
    mine, their = (layer.to(dtype) for layer in layers(frozen(nn.Embedding(K, N, **options)), "Embedding"))
    ids = torch.tensor([[2, 5, 5, 0], [7, 2, 23, 5]])
    got = check(mine, their, ids)
    assert set(got) == {"y", "lora_embedding_A.default", "lora_embedding_B.default"} and got["y"].dtype == dtype


def test_embedding_with_a_scale_of_its_own() -> None:
    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * self.embed_scale

    mine, their = layers(frozen(Scaled(K, N)), "Embedding", names=("a", "b"))
    for layer in (mine, their):
        layer.set_adapter(["a", "b"])
    check(mine, their, torch.arange(K))


@pytest.mark.filterwarnings("ignore:.*merging LoRA weights won't be possible")
def test_embedding_merged_disabled_and_refused() -> None:
    mine = layers(frozen(nn.Embedding(K, N)), "Embedding")[0]
    ids = torch.arange(K)
    adapted, plain = mine(ids), mine.base_layer(ids)
    mine.merge()
    torch.testing.assert_close(mine(ids), adapted)
    with pytest.raises(ValueError, match="when there are merged adapters"):
        mine(ids, adapter_names=["default"] * K)
    mine.enable_adapters(False)
    torch.testing.assert_close(mine(ids), plain)
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same"):
        mine(ids, adapter_names=["default"])
    with pytest.raises(ValueError, match="lora_bias=True is not supported for Embedding"):
        mine.update_layer("b", 2, 1, LoraConfig(lora_bias=True))


CONVOLUTIONS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "plain": ("Conv2d", lambda: nn.Conv2d(6, 8, 3)),
    "1x1": ("Conv2d", lambda: nn.Conv2d(6, 8, 1, bias=False)),
    "stride-padding": ("Conv2d", lambda: nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(1, 2))),
    "same": ("Conv2d", lambda: nn.Conv2d(6, 8, 3, padding="same")),
    "groups": ("Conv2d", lambda: nn.Conv2d(6, 8, 3, groups=2)),
    "1d": ("Conv1d", lambda: nn.Conv1d(6, 8, 3, padding=1)),
    "3d": ("Conv3d", lambda: nn.Conv3d(6, 8, 2)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_convolutions(name: str) -> None:
    kind, make = CONVOLUTIONS[name]
    base = frozen(make())
    mine, their = layers(base, kind, names=("a", "b"), lora_bias=base.bias is not None)
    for layer in (mine, their):
        layer.set_adapter(["a", "b"])
    check(mine, their, torch.randn(2, 6, *[7, 6, 5][: base.weight.ndim - 2]))
    if name == "groups":
        with pytest.raises(NotImplementedError, match="groups > 1"):
            mine.merge()


def test_convolution_with_dilation_merges_to_the_same_function() -> None:
    """peft forgets the dilation of the base; here the adapter is what its merged weight is."""
    base = frozen(nn.Conv2d(6, 8, 3, dilation=2, padding=2))
    mine = our_layer.Conv2d(base, "default", LoraConfig(r=R), r=R, lora_alpha=6)
    nn.init.normal_(mine.lora_B["default"].weight)
    x = torch.randn(2, 6, 9, 9)
    adapted = mine(x)
    mine.merge()
    torch.testing.assert_close(mine(x), adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_convolution_errors_and_dtypes() -> None:
    with pytest.raises(ValueError, match=r"groups=2 and rank 3"):
        our_layer.Conv2d(nn.Conv2d(6, 8, 3, groups=2), "default", LoraConfig(), r=3, lora_alpha=1)
    mine = layers(frozen(nn.Conv2d(6, 8, 3)), "Conv2d")[0]
    mine.base_layer.bfloat16()
    x = torch.randn(2, 6, 5, 5)
    assert mine(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same"):
        mine(x, adapter_names=["default"] * 3)

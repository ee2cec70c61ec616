"""One LoRA layer in peft_fast and in peft with equal weights, and what is compared between them."""

import copy
from typing import Any

import peft
import torch
from peft.tuners.lora import layer as peft_layer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from numerics import assert_as_accurate
from peft_fast.tuners.lora import LoraConfig, layer as our_layer

K, N, R = 24, 20, 4


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


def conv1d() -> nn.Module:
    layer = Conv1D(N, K)
    nn.init.normal_(layer.bias)
    return layer


def layers(base: nn.Module, kind: str = "Linear", names: tuple[str, ...] = ("default",), **config: Any) -> list[Any]:
    """[our layer, peft's layer], each over its own copy of `base`, with equal random weights."""
    config = dict(r=R, lora_alpha=6, fan_in_fan_out=isinstance(base, Conv1D)) | config
    r, alpha = config["r"], config["lora_alpha"]
    both = []
    for module, config_cls in ((our_layer, LoraConfig), (peft_layer, peft.LoraConfig)):
        cls = getattr(module, kind)
        extra = {"is_target_conv_1d_layer": True} if isinstance(base, Conv1D) else {}
        layer = cls(copy.deepcopy(base), names[0], config_cls(**config), r=r, lora_alpha=alpha, **extra)
        for name in names[1:]:
            layer.update_layer(name, r, lora_alpha=alpha, config=config_cls(**config))
        both.append(layer)
    for name, parameter in both[0].named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.4)
    both[1].load_state_dict(both[0].state_dict())
    return both


def results(layer: nn.Module, x: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """The output and every gradient, x's too where it is a float."""
    layer.zero_grad()
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    torch.manual_seed(seed)
    y = layer(x)
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype))
    grads = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), **grads} | ({"x": x.grad} if x.grad is not None else {})


def check(mine: Any, their: Any, x: Tensor) -> dict[str, Tensor]:
    """Each of `results` within twice the error of `their`, against peft's layer in fp64 with the weights of `mine`."""
    exact = copy.deepcopy(their).double()
    exact.load_state_dict(mine.state_dict())
    got, same = results(mine, x), results(their, x)
    reference = results(exact, x.double() if x.is_floating_point() else x)
    assert got.keys() == reference.keys()
    for name, value in got.items():
        assert_as_accurate(name, value, same[name].to(value.dtype), reference[name])
    return got

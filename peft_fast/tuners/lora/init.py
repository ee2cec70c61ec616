"""Initial values of LoRA weights: `LoraConfig.init_lora_weights`. The random numbers are drawn in PEFT's order."""

import math
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_PISSA_NITER = re.compile(r"pissa_niter_(\d+)")


def init_lora_weights(layer: Any, adapter_name: str, method: bool | str) -> None:
    """Give one adapter of a layer its initial values.

    Args:
        layer: a LoraLayer with the adapter's modules or parameters, r and scaling in place.
        method: False keeps what torch drew (A and B random). True: A uniform as in nn.Linear, B zero. "gaussian": A
            normal with deviation 1 / r, B zero. "olora", "pissa", "pissa_niter_<n>" (linear layers only): A and B
            from the base weight W, which becomes W - scaling * B A. Embeddings always get A zero, B normal.
    Raises: ValueError for a method that this kind of layer does not know; TypeError for one that reads a base weight
        which is not fp32, fp16 or bf16.
    Source: olora arXiv:2406.01775, pissa arXiv:2404.02948.
    """
    if method is False:
        return
    if adapter_name in layer.lora_embedding_A:
        nn.init.zeros_(layer.lora_embedding_A[adapter_name])
        nn.init.normal_(layer.lora_embedding_B[adapter_name])
        return
    name = method.lower() if isinstance(method, str) else method
    a, b = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    if name is True:
        nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
    elif name == "gaussian":
        nn.init.normal_(a.weight, std=1 / layer.r[adapter_name])
    elif isinstance(name, str) and a.weight.ndim == 2 and (name in ("olora", "pissa") or _PISSA_NITER.fullmatch(name)):
        _init_from_base(layer, adapter_name, name)
        return
    else:
        raise ValueError(f"Unknown initialization init_lora_weights={method!r} for {type(layer).__name__} layers")
    nn.init.zeros_(b.weight)
    if b.bias is not None:
        nn.init.zeros_(b.bias)


def changes_base(method: bool | str) -> bool:
    """Whether an initialisation takes its values out of the base weights."""
    name = method.lower() if isinstance(method, str) else ""
    return name in ("olora", "pissa") or bool(_PISSA_NITER.fullmatch(name))


def check_init(base_layer: Any, method: bool | str) -> None:
    """Raises what `init_lora_weights` would for a layer over this base; to be asked before any base is changed."""
    if isinstance(method, bool) or method.lower() == "gaussian" or isinstance(base_layer, nn.Embedding):
        return
    weight = getattr(base_layer, "weight", None)
    if weight is not None and weight.ndim != 2 and weight.is_floating_point():
        raise ValueError(f"Unknown initialization init_lora_weights={method!r} for {type(base_layer).__name__} layers")
    dtype = getattr(weight, "dtype", None)
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(
            f"init_lora_weights={method!r} needs a base weight in fp32, fp16 or bf16, got {dtype}: initialise "
            "first, quantize what is left of the base afterwards"
        )


@torch.no_grad()
def _init_from_base(layer: Any, adapter_name: str, method: str) -> None:
    """Factor the base weight's main part into A and B, and leave the rest in the base."""
    base_layer = layer.get_base_layer()
    check_init(base_layer, method)
    weight = base_layer.weight
    r, scaling = layer.r[adapter_name], layer.scaling[adapter_name]
    w = weight.data.float()
    w = w.T if layer.fan_in_fan_out else w
    rank = min(r, *w.shape)  # there are no more singular values; the rest of A and B is 0
    a, b = _olora(w, rank) if method == "olora" else _pissa(w, rank, scaling, method)
    a, b = F.pad(a, (0, 0, 0, r - rank)), F.pad(b, (0, r - rank))
    layer.lora_A[adapter_name].weight = nn.Parameter(a.contiguous())
    layer.lora_B[adapter_name].weight = nn.Parameter(b.contiguous())
    rest = (w - scaling * b @ a).to(weight.dtype)
    base_layer.weight.data = (rest.T if layer.fan_in_fan_out else rest).contiguous()


def _olora(w: Tensor, r: int) -> tuple[Tensor, Tensor]:
    q, triangular = torch.linalg.qr(w)
    return triangular[:r], q[:, :r]


def _pissa(w: Tensor, r: int, scaling: float, method: str) -> tuple[Tensor, Tensor]:
    """The r largest singular values and their vectors, half of each value on either side."""
    iterations = _PISSA_NITER.fullmatch(method)
    if iterations:
        u, s, v = torch.svd_lowrank(w, r, niter=int(iterations[1]))
        vh = v.T
    else:
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
    root = torch.sqrt(s[:r] / scaling)
    return root[:, None] * vh[:r], u[:, :r] * root

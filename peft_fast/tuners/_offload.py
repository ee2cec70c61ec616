"""Layers whose weights accelerate keeps elsewhere (CPU, disk) while they are not used."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def onload_layer(layer: Any) -> Iterator[None]:
    """Bring an adapter layer's weights to the device where it runs, and put them back afterwards.

    A base weight that was changed meanwhile is kept on the CPU from then on, also where it came from disk. Nothing
    happens to layers that accelerate does not manage.
    """
    hooked = [module for module in layer.modules() if getattr(getattr(module, "_hf_hook", None), "offload", False)]
    for module in hooked:
        module._hf_hook.pre_forward(module)
    try:
        yield
    finally:
        for module in hooked:
            hook = module._hf_hook
            if module is layer.base_layer:
                tensors = [*module.named_parameters(), *module.named_buffers()]
                hook.weights_map = {name: tensor.detach().to("cpu") for name, tensor in tensors}
            hook.post_forward(module, torch.tensor([]))

"""Which modules FSDP (version 1) shards as units of their own, where a model has adapters: PEFT's rule."""

import functools
import os
from typing import Any

from torch import nn


def fsdp_auto_wrap_policy(model: nn.Module) -> Any:
    """A policy for torch's FullyShardedDataParallel: the layers that transformers does not split, prompt encoders, and
    every trainable leaf that has a weight, so that a unit is trainable or frozen as a whole.

    Args:
        model: with adapters. FSDP_TRANSFORMER_CLS_TO_WRAP has the names of its layer classes, else the model.
    Raises: TypeError for a name that no module's class has.
    """
    from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

    default = ",".join(getattr(model, "_no_split_modules", None) or ())
    names = [name for name in os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", default).split(",") if name]
    classes = {type(module).__name__: type(module) for module in model.modules()}
    unknown = [name for name in names if name not in classes]
    if unknown:
        raise TypeError(f"Could not find the transformer layer class to wrap in the model: {', '.join(unknown)}")
    # prompt encoders are what gives tensors to a file (`tuners` is above this module)
    encoders = {kind for kind in classes.values() if hasattr(kind, "file_tensors")}
    policies = [
        functools.partial(lambda_auto_wrap_policy, lambda_fn=_is_trainable_leaf),
        functools.partial(
            transformer_auto_wrap_policy, transformer_layer_cls={classes[name] for name in names} | encoders
        ),
    ]
    return functools.partial(_or_policy, policies=policies)


def _is_trainable_leaf(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return not module._modules and weight is not None and bool(weight.requires_grad)

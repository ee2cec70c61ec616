"""Register an operator once: schema, launcher, plain-torch reference, fake, and the choice between the first two."""

import importlib
from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "peft_fast"


def register(
    schema: str,
    *,
    kernel: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    resolve: Callable[..., str],
    flash: Callable[..., Any] | None = None,
) -> torch._ops.OpOverload:
    """Define ``peft_fast::<schema>`` and return its overload.

    The schema's first argument is a tensor, its last ``str implementation``. ``resolve`` turns that into the
    implementation of this call when the op runs, not when it is traced, so that one compiled graph serves all sizes:
    "torch" runs ``reference`` with the other arguments, "flash" likewise ``flash``, anything else the launcher.
    ``kernel`` is "module:function", imported at the first launch, so that ``import peft_fast`` needs no triton.
    """
    name = schema[: schema.index("(")]
    module, function = kernel.split(":")

    def run(*args: Any) -> Any:
        device = args[0].device.type
        # the op's casts were made outside; a backward may run under an autocast that the forward did not see
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return run(*args)
        implementation = resolve(*args)
        if implementation == "torch":
            return reference(*args[:-1])
        if implementation == "flash" and flash is not None:
            return flash(*args[:-1])
        return getattr(importlib.import_module(module), function)(*args[:-1], implementation)

    torch.library.define(f"{NAMESPACE}::{name}", schema[len(name) :])
    torch.library.impl(f"{NAMESPACE}::{name}", "default", run)  # every device: plain torch runs on all of them
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake)
    overload: torch._ops.OpOverload = getattr(getattr(torch.ops, NAMESPACE), name).default
    return overload

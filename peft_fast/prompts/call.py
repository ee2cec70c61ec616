"""The learned prompt of a call: data of the call, never a choice made on a module.

A call enters `use_prompt(...)`; a hook that stands before the base model's forward (`before_forward`) then changes the
arguments of that forward, and one behind it (`after_forward`) what it returns. So everything that runs the base model
inside the call (generate, a compiled forward, a Trainer) takes part, and nothing of the base model is replaced. The
field is the thread's own.
"""

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn


class PromptCall(Protocol):
    """What a call does to the arguments of `base`'s forward. running: the model whose forward began last."""

    base: nn.Module
    running: nn.Module | None

    def apply(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments that `base` gets in place of `kwargs`, which may be changed."""
        ...

    def own_positions(self, output: Any) -> Any:
        """What `base` returned, at the positions of the caller's own tokens."""
        ...


class _ThreadState(threading.local):
    def __init__(self) -> None:
        self.call: PromptCall | None = None


_STATE = _ThreadState()


def current_prompt() -> PromptCall | None:
    """The prompt of the call that this thread is inside of, or None."""
    return _STATE.call


@contextmanager
def use_prompt(call: PromptCall | None) -> Iterator[None]:
    """Let forwards of `call.base` that this thread runs inside the `with` have the prompt; None: no prompt."""
    before = _STATE.call
    _STATE.call = call
    try:
        yield
    finally:
        _STATE.call = before


_OWNERS = "_prompt_owners"  # how many models with learned prompts a base model is part of


def acquire(base: nn.Module) -> None:
    """Let calls change the arguments of the base model's forward, until everyone who acquired it has released it."""
    base.__dict__[_OWNERS] = base.__dict__.get(_OWNERS, 0) + 1
    add_hook(base, before_forward, before=True)
    add_hook(base, after_forward, before=False)


def release(base: nn.Module) -> bool:
    """The opposite of `acquire`; nothing where nobody has it. Returns: whether that was the last."""
    owners = base.__dict__.pop(_OWNERS, 0)
    if owners > 1:
        base.__dict__[_OWNERS] = owners - 1
    if owners != 1:
        return False
    remove_hook(base, before_forward)
    remove_hook(base, after_forward)
    return True


def add_hook(module: nn.Module, hook: Callable[..., Any], before: bool) -> None:
    """Run `hook` before or after a module's forward, with its keyword arguments, once however often it is added."""
    if hook not in (module._forward_pre_hooks if before else module._forward_hooks).values():
        (module.register_forward_pre_hook if before else module.register_forward_hook)(hook, with_kwargs=True)


def remove_hook(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Take a hook away again."""
    for hooks, with_kwargs in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs),
    ):
        for key in [key for key, found in hooks.items() if found is hook]:
            del hooks[key]
            with_kwargs.pop(key, None)


def before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The hook of the base model. Does nothing outside of calls; no closure, so that models with it can be copied."""
    call = _STATE.call
    if call is None:
        return None
    call.running = module
    if call.base is not module:
        return None
    if args:
        names = list(inspect.signature(module.forward).parameters)
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    return (), call.apply(dict(kwargs))


def after_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """The hook behind the base model."""
    call = _STATE.call
    return output if call is None or call.base is not module else call.own_positions(output)


def leading_input(kwargs: dict[str, Any], is_encoder_decoder: bool) -> Tensor:
    """The tensor (rows, tokens, ...) that the prompt's positions are about: the decoder's input if there is one.

    Raises: ValueError if no input is given.
    """
    decoder = ("decoder_input_ids", "decoder_inputs_embeds", "labels") if is_encoder_decoder else ()
    for name in (*decoder, "input_ids", "inputs_embeds"):
        value = kwargs.get(name)
        if isinstance(value, Tensor) and value.ndim > 1:  # labels of a classification are (rows,)
            return value
    raise ValueError("You have to provide either input_ids or inputs_embeds")

"""What would run for a model's own adapted layers, and why: `peft-fast info --model`."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..ops.choice import Choice, choose, dtype_name
from ..ops.prefix_choice import choose_prefix
from ..ops.situations import Situation, answer
from . import model as models

_DROPOUT = 0.05  # whether there is any is what counts


def explain(model: nn.Module, tokens: Sequence[int], device: torch.device) -> dict[str, list[Situation]]:
    """For every kind of adapted layer a line for each number of rows, as if the model was on ``device``.

    The model may be on the meta device: nothing is computed.
    """
    shapes, dtype = models.shapes_of(model, tokens), models.dtype_of(model)
    found: dict[str, list[Situation]] = {}
    for site in models.sites_of(model):
        names = ", ".join(sorted({name.rpartition(".")[2] for name in site.names}))
        base = "" if site.kind == "plain" else f", {site.kind} base"
        title = f"{names}: {len(site.names)} layers of {site.N} x {site.K}{base}, {dtype_name(dtype)}, rank {site.R}"
        lines = found.setdefault(title, [])
        for what, op, ask in _questions(site):
            for M in shapes.trained if "training" in what else shapes.tokens:
                choice = answer(functools.partial(ask, device, dtype, M, site.N, site.K, site.R))
                lines.append(Situation(op, f"{M} row{'s' * (M > 1)}{what}", *choice))
    for D in shapes.head_sizes:
        lines = found.setdefault(f"attention with a prefix: heads of {D}, {dtype_name(dtype)}", [])
        for what, training in (("inference", False), ("training", True)):
            choice = answer(functools.partial(choose_prefix, device, dtype, D, training=training))
            lines.append(Situation("prefix_attention", what, *choice))
    return found


def _questions(site: models.AdaptedSite) -> list[tuple[str, str, Callable[..., Choice]]]:
    if site.kind == "plain":
        questions: list[tuple[str, str, Callable[..., Choice]]] = [
            ("", "lora_linear", functools.partial(choose, "lora_linear")),
            (", mixed adapters", "lora_mixed", functools.partial(choose, "lora_mixed")),
        ]
        if site.dropout:
            dropped = functools.partial(choose, "lora_linear", p=_DROPOUT)
            questions.append((", training with dropout", "lora_linear", dropped))
        return questions
    if site.kind == "8bit":
        return [("", "lora_linear_int8", functools.partial(choose, "lora_linear_int8"))]
    return [
        ("", "lora_linear_4bit", functools.partial(choose, "lora_linear_4bit")),
        (", mixed adapters", "lora_linear_mixed_4bit", functools.partial(choose, "lora_linear_mixed_4bit")),
    ]

"""What is measured to choose implementations: for every operator with a table its sizes and its uses.

An op is used in several ways with one choice. An implementation other than the safe path is chosen if it wins beyond
noise in the first of these uses and loses beyond noise in none. A row speaks for all M above the next smaller row's up
to its own, and for all ranks that kernels round up to its own: among the uses are the smallest such M and rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops import functional
from ..ops.fourbit_linear import linear_4bit, linear_mixed_4bit
from ..ops.operators import OPERATORS
from ..ops.quantized import dequantize_4bit, linear_int8
from ..quantized.weights import weight_of
from ..reference import lora as reference, quantized as reference_quant
from .case import SCALING, Case, Setting, Size
from .mixed import ADAPTERS, Mix, draw_mix
from .shapes import Shapes, Site, rank_bucket

DROPOUT, THRESHOLD = 0.05, 6.0
# What a row may name.
NAMES = {op.name: op.measured for op in OPERATORS.values() if op.measured}


@dataclass(frozen=True)
class Use:
    """case(name): the case with that implementation; inputs and formula are those of the safe path's for all.

    graph: timed in a CUDA graph, without what the host costs.
    """

    what: str
    case: Callable[[str], Case]
    graph: bool


@dataclass(frozen=True)
class Choice:
    """A row to be.

    names: who takes part, the safe path first.    smaller: the M of the row below it, if any.
    library: the safe path is bitsandbytes' own product, whose accuracy is not ours to judge.
    """

    op: str
    dropout: bool
    size: Size
    names: tuple[str, ...]
    smaller: int | None
    uses: Callable[[Setting], list[Use]]
    library: bool = False


def choices(shapes: Shapes) -> list[Choice]:
    """All rows, M ascending for one op and (N, K, R)."""
    tokens = shapes.tokens
    found = [_linear(size, smaller, False) for size, smaller in _sizes(tokens, shapes.plain)]
    if shapes.dropout:
        trained = shapes.trained or tokens[-1:]
        found += [_linear(size, smaller, True) for size, smaller in _sizes(trained, shapes.plain)]
    found += [_mixed(size, smaller) for size, smaller in _sizes(tokens, shapes.plain)]
    found += [_dequantize((1, N, K, 1)) for N, K in dict.fromkeys((N, K) for N, K, _ in shapes.four_bit)]
    for make, sites in ((_linear_4bit, shapes.four_bit), (_mixed_4bit, shapes.four_bit), (_linear_int8, shapes.int8)):
        found += [make(size, smaller) for size, smaller in _sizes(tokens, sites)]
    return found


def _sizes(tokens: tuple[int, ...], sites: tuple[Site, ...]) -> list[tuple[Size, int | None]]:
    """Each size with the next smaller M; ranks that kernels round up to the same are the same."""
    before = (None, *tokens[:-1])
    once = {(N, K, rank_bucket(R)): (N, K, R) for N, K, R in sites}.values()
    return [((M, N, K, R), low) for N, K, R in once for M, low in zip(tokens, before, strict=True)]


def _names(op: str, safe: str, size: Size, without: str = "") -> tuple[str, ...]:
    """The safe path, then what else a row may name and is for such sizes."""
    known, (M, _, _, R) = OPERATORS[op], size
    return (safe, *(it for it in known.measured if it not in (safe, without) and known[it].holds(M, R)))


def _lowest(size: Size, smaller: int | None) -> Size:
    """The smallest M and rank that a row speaks for; ranks below 8 are not in use, those between 16 and 64 rare."""
    _, N, K, R = size
    return (smaller or 0) + 1, N, K, 8 if R == 16 else R


# ---------------------------------------------------------------------------------------------------------------- LoRA
def _linear(size: Size, smaller: int | None, dropout: bool) -> Choice:
    names = _names("lora_linear", "addmm" if dropout else "torch", size, without="torch" if dropout else "")

    def uses(on: Setting) -> list[Use]:
        low = _lowest(size, smaller)
        if dropout:
            training = [Use("training", lambda name: _training(on, size, DROPOUT, name), False)]
            return [*training, Use(f"training at M={low[0]}", lambda name: _training(on, low, DROPOUT, name), False)]
        found = [
            Use("forward", lambda name: _forward(on, size, name), True),
            Use(f"forward at M={low[0]} R={low[3]}", lambda name: _forward(on, low, name), True),
            Use("forward without a graph", lambda name: _forward(on, size, name), False),
            Use("update of an opaque base", lambda name: _update(on, size, name), True),
        ]
        return [
            *found,
            *([Use("training", lambda name: _training(on, size, 0.0, name), False)] if size[0] >= 256 else []),
        ]

    return Choice("lora_linear", dropout, size, names, smaller, uses)


def _weights(on: Setting, size: Size) -> tuple[Tensor, Tensor, Tensor]:
    _, N, K, R = size
    return on.weight(N, K), *on.factors(N, K, R)


def _forward(on: Setting, size: Size, name: str) -> Case:
    @torch.no_grad()
    def run(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return functional.lora_linear(x, w, a, b, SCALING, implementation=name)

    return Case(
        lambda: (on.draw(size[0], size[2]), *_weights(on, size)),
        run,
        lambda D, x, w, a, b: reference.lora_linear(x.to(D), w.to(D), None, a.to(D), b.to(D), SCALING),
    )


def _update(on: Setting, size: Size, name: str) -> Case:
    @torch.no_grad()
    def run(base: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return functional.lora_update(base, x, a, b, SCALING, implementation=name)

    return Case(
        lambda: (on.draw(size[0], size[1]), on.draw(size[0], size[2]), *_weights(on, size)[1:]),
        run,
        lambda D, base, x, a, b: reference.lora_update(base.to(D), x.to(D), a.to(D), b.to(D), SCALING),
    )


def _training(on: Setting, size: Size, p: float, name: str) -> Case:
    """Forward and backward, all gradients."""
    M, N, K, _ = size
    seed = torch.tensor([1234], device=on.device)

    def inputs() -> tuple[Tensor, ...]:
        w, a, b = _weights(on, size)
        return on.draw(M, N), on.draw(M, K).requires_grad_(), w, a.requires_grad_(), b.requires_grad_()

    def run(dy: Tensor, x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        y = functional.lora_linear(x, w, a, b, SCALING, dropout_p=p, seed=seed, implementation=name)
        return y, *torch.autograd.grad(y, (x, a, b), dy)

    @torch.no_grad()
    def formula(D: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        dy, x, w, a, b = (t.to(D) for t in tensors)
        y, s, bits = reference.lora_linear_fwd(x, w, None, a, b, SCALING, p, seed)
        return y, *reference.lora_linear_bwd(dy, x, w, a, b, s, bits, SCALING, p, [True] * 3)

    return Case(inputs, run, formula)


def _mixed(size: Size, smaller: int | None) -> Choice:
    names = _names("lora_mixed", "grouped", size)

    def uses(on: Setting) -> list[Use]:
        low = _lowest(size, smaller)
        return [
            Use(f"{ADAPTERS} adapters", lambda name: _mixed_forward(on, size, ADAPTERS, name), True),
            Use(f"one at M={low[0]}", lambda name: _mixed_forward(on, (*low[:3], size[3]), 1, name), True),
            Use("without a graph", lambda name: _mixed_forward(on, size, ADAPTERS, name), False),
        ]

    return Choice("lora_mixed", False, size, names, smaller, uses)


def _mixed_forward(on: Setting, size: Size, adapters: int, name: str) -> Case:
    M, N, K, R = size

    def inputs() -> tuple[Any, ...]:
        mix = draw_mix(on, M, N, K, R, adapters)
        return on.draw(M, K), on.weight(N, K), mix.a, mix.b, mix

    @torch.no_grad()
    def run(x: Tensor, w: Tensor, a: Tensor, b: Tensor, mix: Mix) -> Tensor:
        return functional.lora_linear_mixed(x, w, mix.site, mix.plan, implementation=name)

    return Case(inputs, run, lambda D, x, w, a, b, mix: x.to(D) @ w.to(D).T + mix.update(D, x))


# --------------------------------------------------------------------------------------------------- quantized weights
# "torch" below is what a model does where no kernel is chosen: bitsandbytes' own layer, then the update.
def _layer(on: Setting, N: int, K: int, bits: int) -> tuple[Any, Any]:
    """A layer of bitsandbytes, the model's next one or a random one, and its weight; not the same memory on a CPU,
    because there the layer packs its own anew."""
    import bitsandbytes

    layer: Any
    own = on.own.get((f"{bits}bit", N, K))
    if own is not None:
        layer = next(own)
        return layer, weight_of(layer)
    w = on.draw(N, K, std=K**-0.5).cpu()
    if bits == 8:
        layer = bitsandbytes.nn.Linear8bitLt(K, N, bias=False, has_fp16_weights=False, threshold=THRESHOLD)
        layer.weight = bitsandbytes.nn.Int8Params(w, requires_grad=False, has_fp16_weights=False)
    else:
        layer = bitsandbytes.nn.Linear4bit(K, N, bias=False, compute_dtype=on.dtype, quant_type="nf4")
        layer.weight = bitsandbytes.nn.Params4bit(
            w, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
        )
    layer = layer.to(on.device).eval()
    weight: Any = weight_of(layer)
    return layer, type(weight)(*(t.clone() if isinstance(t, Tensor) else t for t in weight))


def _plain_4bit(weight: Any, D: torch.dtype) -> Tensor:
    w: Tensor = reference_quant.dequantize_4bit(*weight[:-1], torch.float32)  # type: ignore[call-arg]
    return w.to(D)


def _dequantize(size: Size) -> Choice:
    def case(on: Setting, name: str) -> Case:
        def inputs() -> tuple[Any, ...]:
            weight = _layer(on, size[1], size[2], 4)[1]
            return weight.packed, weight

        return Case(
            inputs,
            lambda packed, weight: dequantize_4bit(*weight[:-1], on.dtype, name),
            lambda D, packed, weight: _plain_4bit(weight, D),
        )

    def uses(on: Setting) -> list[Use]:
        return [
            Use("alone", lambda name: case(on, name), True),
            Use("without a graph", lambda name: case(on, name), False),
        ]

    return Choice("dequantize_4bit", False, size, NAMES["dequantize_4bit"], None, uses)


def _quantized_uses(case: Callable[[Setting, Size, str], Case], size: Size, low: Size, graph: bool) -> Any:
    def uses(on: Setting) -> list[Use]:
        found = [
            Use("forward", lambda name: case(on, size, name), graph),
            Use(f"forward at M={low[0]} R={low[3]}", lambda name: case(on, low, name), graph),
        ]
        return [*found, *([Use("without a graph", lambda name: case(on, size, name), False)] if graph else [])]

    return uses


def _linear_4bit(size: Size, smaller: int | None) -> Choice:
    def case(on: Setting, size: Size, name: str) -> Case:
        M, N, K, R = size

        def inputs() -> tuple[Any, ...]:
            layer, weight = _layer(on, N, K, 4)
            return on.draw(M, K), *on.factors(N, K, R), weight[0], layer, weight

        @torch.no_grad()
        def run(x: Tensor, a: Tensor, b: Tensor, packed: Tensor, layer: Any, weight: Any) -> Tensor:
            if name == "torch":
                return functional.lora_update(layer(x), x, a, b, SCALING, implementation=name)
            y: Tensor = linear_4bit(x, *weight[:-1], None, a, b, SCALING, name)
            return y

        def formula(D: torch.dtype, x: Tensor, a: Tensor, b: Tensor, packed: Tensor, layer: Any, weight: Any) -> Tensor:
            return reference.lora_linear(x.to(D), _plain_4bit(weight, D), None, a.to(D), b.to(D), SCALING)

        return Case(inputs, run, formula)

    uses = _quantized_uses(case, size, _lowest(size, smaller), True)
    return Choice("lora_linear_4bit", False, size, NAMES["lora_linear_4bit"], smaller, uses, library=True)


def _mixed_4bit(size: Size, smaller: int | None) -> Choice:
    def case(on: Setting, size: Size, name: str) -> Case:
        M, N, K, R = size

        def inputs() -> tuple[Any, ...]:
            mix, (layer, weight) = draw_mix(on, M, N, K, R), _layer(on, N, K, 4)
            return on.draw(M, K), mix.a, mix.b, weight[0], mix, layer, weight

        @torch.no_grad()
        def run(x: Tensor, a: Tensor, b: Tensor, packed: Tensor, mix: Mix, layer: Any, weight: Any) -> Tensor:
            if name == "torch":
                return functional.lora_update_mixed(layer(x), x, mix.site, mix.plan, implementation="grouped")
            y: Tensor = linear_mixed_4bit(x, *weight[:-1], None, *mix.site, *mix.plan, name)
            return y

        return Case(
            inputs,
            run,
            lambda D, x, a, b, packed, mix, layer, weight: x.to(D) @ _plain_4bit(weight, D).T + mix.update(D, x),
        )

    low = (*_lowest(size, smaller)[:3], size[3])  # the largest rank in the table is what counts
    uses = _quantized_uses(case, size, low, True)
    return Choice("lora_linear_mixed_4bit", False, size, NAMES["lora_linear_mixed_4bit"], smaller, uses, library=True)


def _linear_int8(size: Size, smaller: int | None) -> Choice:
    """Without a graph: the host asks which columns are outliers."""

    def case(on: Setting, size: Size, name: str) -> Case:
        M, N, K, R = size

        def inputs() -> tuple[Any, ...]:
            layer, weight = _layer(on, N, K, 8)
            x = on.draw(M, K)
            x[:, 1] *= 10.0  # an outlier
            return x, *on.factors(N, K, R), weight[0], layer, weight

        @torch.no_grad()
        def run(x: Tensor, a: Tensor, b: Tensor, values: Tensor, layer: Any, weight: Any) -> Tensor:
            if name == "torch":
                return functional.lora_update(layer(x), x, a, b, SCALING, implementation=name)
            y: Tensor = linear_int8(x, weight.values, weight.scales, None, a, b, SCALING, THRESHOLD, name)
            return y

        def formula(D: torch.dtype, x: Tensor, a: Tensor, b: Tensor, values: Tensor, layer: Any, weight: Any) -> Tensor:
            x_of_library = x.float() if D == torch.float64 else x
            y = reference_quant.linear_int8(x_of_library, weight.values, weight.scales, None, THRESHOLD)
            return reference.lora_update(y.to(D), x.to(D), a.to(D), b.to(D), SCALING)

        return Case(inputs, run, formula)

    uses = _quantized_uses(case, size, _lowest(size, smaller), False)
    return Choice("lora_linear_int8", False, size, NAMES["lora_linear_int8"], smaller, uses, library=True)

"""Cases of kernels: quantized weights, csrc_triton/quantized. Sizes: kernels.py.

A weight of random bytes is as good as another: bitsandbytes is not needed here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..reference import quantized as reference_quant
from .case import SCALING, Case, Setting, Size
from .mixed import Mix, draw_mix

_BLOCKSIZE, _NESTED_BLOCKSIZE = 64, 256


def _draw_4bit(on: Setting, N: int, K: int) -> tuple[Tensor, ...]:
    """packed, code, absmax and its code, absmax and offset: NF4, double quantization. Any bytes are a weight."""
    from csrc_triton.quantized.fourbit_codes import NF4

    blocks, device = N * K // _BLOCKSIZE, on.device
    return (
        torch.randint(256, (N * K // 2,), dtype=torch.uint8, device=device),
        torch.tensor(NF4, device=device),
        torch.randint(256, (blocks,), dtype=torch.uint8, device=device),
        torch.linspace(0, 1, 256, device=device),
        torch.rand(-(-blocks // _NESTED_BLOCKSIZE), device=device) * K**-0.5,
        torch.full((1,), K**-0.5, device=device),
    )


def _plain_4bit(weight: Any, N: int, K: int, D: torch.dtype) -> Tensor:
    blocks = _BLOCKSIZE, _NESTED_BLOCKSIZE
    w: Tensor = reference_quant.dequantize_4bit(*weight, "nf4", *blocks, N, K, torch.float32)  # type: ignore[call-arg]
    return w.to(D)


def fourbit(on: Setting, size: Size) -> Case:
    from csrc_triton.quantized.fourbit import Nested, dequantize

    _, N, K, _ = size

    def run(packed: Tensor, code: Tensor, absmax: Tensor, *nested: Tensor) -> Any:
        return dequantize(packed, code, absmax, _BLOCKSIZE, (N, K), on.dtype, Nested(*nested, _NESTED_BLOCKSIZE))

    return Case(lambda: _draw_4bit(on, N, K), run, lambda D, *weight: _plain_4bit(weight, N, K, D))


def fourbit_linear(on: Setting, size: Size) -> Case:
    from csrc_triton.quantized.fourbit_linear import fourbit_linear

    return _one_adapter(on, size, fourbit_linear)


def fourbit_decode(on: Setting, size: Size) -> Case:
    from csrc_triton.quantized.fourbit_decode import fourbit_decode

    return _one_adapter(on, size, fourbit_decode)


def _one_adapter(on: Setting, size: Size, product: Callable[..., Any]) -> Case:
    from csrc_triton.quantized.fourbit import Nested

    M, N, K, R = size

    def run(x: Tensor, a: Tensor, b: Tensor, packed: Tensor, code: Tensor, absmax: Tensor, *nested: Tensor) -> Any:
        double = Nested(*nested, _NESTED_BLOCKSIZE)
        return product(x, packed, code, absmax, _BLOCKSIZE, N, "nf4", double, None, a, b, SCALING)

    def formula(D: torch.dtype, x: Tensor, a: Tensor, b: Tensor, *weight: Tensor) -> Tensor:
        x = x.to(D)
        return x @ _plain_4bit(weight, N, K, D).T + SCALING * (x @ a.to(D).T) @ b.to(D).T

    def inputs() -> tuple[Tensor, ...]:
        return on.draw(M, K), *on.factors(N, K, R), *_draw_4bit(on, N, K)

    return Case(inputs, run, formula)


def fourbit_mixed(on: Setting, size: Size) -> Case:
    from csrc_triton.quantized.fourbit import Nested
    from csrc_triton.quantized.fourbit_linear import fourbit_mixed

    M, N, K, R = size

    def run(x: Tensor, mix: Mix, a: Tensor, b: Tensor, *weight: Tensor) -> Any:
        (packed, code, absmax, *nested), site, plan = weight, mix.site, mix.plan
        tables = (site.addresses, site.ranks, site.scales, site.dtype, R, plan.order, plan.blocks, plan.block_rows)
        double = Nested(*nested, _NESTED_BLOCKSIZE)
        return fourbit_mixed(
            x, packed, code, absmax, _BLOCKSIZE, N, "nf4", double, None, *tables, plan.counters[0]
        )  # fmt: skip

    def inputs() -> tuple[Any, ...]:
        mix = draw_mix(on, M, N, K, R)
        return on.draw(M, K), mix, mix.a, mix.b, *_draw_4bit(on, N, K)

    def formula(D: torch.dtype, x: Tensor, mix: Mix, a: Tensor, b: Tensor, *weight: Tensor) -> Tensor:
        return x.to(D) @ _plain_4bit(weight, N, K, D).T + mix.update(D, x)

    return Case(inputs, run, formula)


def int8_quantize(on: Setting, size: Size) -> Case:
    from csrc_triton.quantized.int8_quantize import int8_quantize

    M, _, K, R = size

    def formula(D: torch.dtype, x: Tensor, a: Tensor) -> tuple[Tensor, ...]:
        half = x.half().float()
        absmax = half.abs().amax(1)
        return (half * (127.0 / absmax)[:, None]).round().to(torch.int8), absmax.to(D), SCALING * (x.to(D) @ a.to(D).T)

    def run(x: Tensor, a: Tensor) -> tuple[Tensor, ...]:
        q, absmax, planes = int8_quantize(x, a, SCALING)
        planes_of_s: Any = planes
        return q, absmax, planes_of_s.sum(0).to(on.dtype)  # the sum takes the same time whatever the configuration

    return Case(lambda: (on.draw(M, K), on.draw(R, K, std=K**-0.5)), run, formula)


def int8_gemm(on: Setting, size: Size) -> Case:
    from csrc_triton.quantized.int8_linear import int8_gemm

    M, N, K, R = size

    def inputs() -> tuple[Tensor, ...]:
        q, w = (torch.randint(-127, 128, shape, dtype=torch.int8, device=on.device) for shape in ((M, K), (N, K)))
        absmax, w_absmax = torch.rand(M, device=on.device) + 1, (torch.rand(N, device=on.device) + 1) * K**-0.5
        return q, absmax, w, w_absmax, on.draw(M, R), on.draw(N, R, std=R**-0.5)

    def formula(D: torch.dtype, q: Tensor, absmax: Tensor, w: Tensor, w_absmax: Tensor, s: Tensor, b: Tensor) -> Tensor:
        y = (q.double() @ w.double().T) * (absmax.double() / 127)[:, None] * (w_absmax.double() / 127)
        return y.to(D) + s.to(D) @ b.to(D).T

    return Case(
        inputs,
        lambda q, absmax, w, w_absmax, s, b: int8_gemm(q, absmax, w, w_absmax, None, s[None], b, on.dtype),
        formula,
    )

"""Quantized weights without a library that quantizes: random codes, read by bitsandbytes (if it is here) and by us."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peft_fast.quantized import weights as quant
from peft_fast.reference import quantized as reference_quant

from ..cases.kinds import quantized_bytes
from ..subjects.lora_sites import SCALING, by_formula
from ..subjects.subject import Call, Compared, Subject, Work
from .here import Here, Row, configs, configured, measure_subject

_NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
_BLOCK, _NESTED = 64, 256
_TRIED = 3


@dataclass(frozen=True)
class QuantCase:
    """A weight (N, K). op: "dequantize_4bit" (M = 1), "lora_linear_4bit", "lora_linear_int8"."""

    op: str
    K: int
    N: int
    M: int = 1
    R: int = 16

    def __str__(self) -> str:
        return f"{self.op}-{self.N}x{self.K}-M{self.M}"

    def tiny(self) -> "QuantCase":
        return QuantCase(self.op, 128, 64, min(self.M, 4), self.R)


def four_bit(N: int, K: int, device: torch.device, seed: int = 0) -> quant.FourBit:
    """Random codes of NF4 with double quantization: a weight about as large as a trained model's."""
    generator = torch.Generator(device).manual_seed(seed)
    blocks, at = N * K // _BLOCK, dict(device=device)
    return quant.FourBit(
        torch.randint(0, 256, (N * K // 2,), generator=generator, dtype=torch.uint8, device=device),
        torch.tensor(_NF4, **at),
        torch.randint(0, 256, (blocks,), generator=generator, dtype=torch.uint8, device=device),
        torch.randn(256, generator=generator, device=device).sort().values,
        torch.rand(-(-blocks // _NESTED), generator=generator, device=device) / 5 / K**0.5,
        torch.tensor(2.0 / K**0.5, **at), "nf4", _BLOCK, _NESTED, N, K, torch.bfloat16,
    )  # fmt: skip


def int8(N: int, K: int, device: torch.device, seed: int = 0) -> quant.Int8:
    """Random values with a factor for each row."""
    generator = torch.Generator(device).manual_seed(seed)
    values = torch.randint(-127, 128, (N, K), generator=generator, device=device).to(torch.int8)
    return quant.Int8(values, (torch.rand(N, generator=generator, device=device) + 0.5) * 2 / K**0.5)


def in_double(w: Any) -> Tensor:
    """The numbers that a weight stands for."""
    return plain(w, torch.float32).double()


def plain(w: Any, dtype: torch.dtype) -> Tensor:
    """The same by plain torch, in ``dtype``."""
    if isinstance(w, quant.Int8):
        return reference_quant.dequantize_int8(*w, dtype)
    return reference_quant.dequantize_4bit(*w[:-1], dtype)


def _state(w: quant.FourBit) -> Any:
    """As bitsandbytes describes it."""
    from bitsandbytes.functional import QuantState

    nested = QuantState(w.nested_absmax, code=w.nested_code, blocksize=_NESTED, dtype=torch.float32)
    return QuantState(
        w.absmax, shape=torch.Size(w.shape), dtype=w.dtype, blocksize=_BLOCK, code=w.code, quant_type="nf4",
        offset=w.nested_offset, state2=nested,
    )  # fmt: skip


# what a provider makes of (w, x, a, b) once, before it is called: the function to time
def _dense(w: Any, x: Tensor, a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    dense = plain(w, x.dtype)
    return lambda: F.linear(x, dense)


def _bitsandbytes(w: Any, x: Tensor, a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    """As peft has it: bitsandbytes' product, then the update in the adapters' dtype."""
    import bitsandbytes

    if isinstance(w, quant.Int8):
        state: Any = bitsandbytes.MatmulLtState()
        state.CB, state.SCB, state.has_fp16_weights, state.threshold = w.values, w.scales, False, 0.0
        product = lambda: bitsandbytes.matmul(x, w.values, state=state)  # noqa: E731
    else:
        packed, described = w.packed.view(-1, 1).t(), _state(w)
        product = lambda: bitsandbytes.matmul_4bit(x, packed, quant_state=described)  # noqa: E731
    return lambda: product() + F.linear(F.linear(x.to(a.dtype), a), b) * SCALING


def _kernel(w: Any, x: Tensor, a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    from peft_fast.ops.fourbit_linear import linear_4bit
    from peft_fast.ops.quantized import linear_int8

    a, b = a.to(x.dtype), b.to(x.dtype)
    if isinstance(w, quant.Int8):
        return lambda: linear_int8(x, *w, None, a, b, SCALING, 0.0, "kernel")
    return lambda: linear_4bit(x, *w[:-1], None, a, b, SCALING, "kernel")


def _dequantized(w: Any, x: Tensor, a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    """Our dequantizing kernel, then the vendor's products."""
    a, b = a.to(x.dtype), b.to(x.dtype)
    return lambda: F.linear(x, w.dequantize(x.dtype, "kernel")).addmm_(F.linear(x, a), b.T, alpha=SCALING)


_PRODUCTS = {
    "base": _dense,
    "bitsandbytes + lora": _bitsandbytes,
    "dequantize + addmm": _dequantized,
    "peft_fast:kernel": _kernel,
}


class Product(Subject):
    """A quantized layer with LoRA; "base" is the dense bf16 product."""

    def __init__(self, case: QuantCase, session: Any) -> None:
        super().__init__(case, session)
        make = int8 if case.op == "lora_linear_int8" else four_bit
        size = quantized_bytes("int8" if make is int8 else "nf4", case.N, case.K)
        count = min(32, int(1 + 2 * session.cache_bytes // size)) if case.M <= 64 else 1
        self.weights: list[Any] = [make(case.N, case.K, session.device, seed) for seed in range(count)]
        generator = torch.Generator(session.device).manual_seed(1)
        at: dict[str, Any] = dict(generator=generator, device=session.device)
        self.x = torch.randn(case.M, case.K, **at).bfloat16()
        self.a, self.b = torch.randn(case.R, case.K, **at) * case.K**-0.5, torch.randn(case.N, case.R, **at) * 0.1

    @classmethod
    def providers(cls, case: QuantCase, device: torch.device) -> Sequence[str]:
        if case.op == "lora_linear_int8":
            return [name for name in _PRODUCTS if name != "dequantize + addmm"]
        tried = configs("fourbit_linear", device, case.R, _TRIED * (case.M <= 16))
        return [*_PRODUCTS, *(f"peft_fast:kernel@{label}" for label in tried)]

    def compared(self, name: str) -> Compared:
        w, x = self.weights[0], self.x
        truth = by_formula(in_double(w), self.a, self.b, x, None, name != "base")
        out, dense = self.runner(name)(0), plain(w, x.dtype)
        same = F.linear(x, dense)
        if name != "base":
            same = same + F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype)) * SCALING
            if self.case.op == "lora_linear_int8":  # x is quantized as well
                product = reference_quant.linear_int8(x.double(), *w, None, 0.0)
                truth = [product + SCALING * (x.double() @ self.a.double().T) @ self.b.double().T]
        return Compared([out], [same], truth)

    def runner(self, name: str) -> Call:
        base, _, label = name.partition("@")
        calls = [_PRODUCTS[base](w, self.x, self.a, self.b) for w in self.weights]

        @torch.no_grad()
        def forward(i: int) -> Tensor:
            return calls[i % len(calls)]()

        if not label:
            return forward
        config = configs("fourbit_linear", self.device, self.case.R, _TRIED)[label]
        return configured("fourbit_linear", config, forward)

    def work(self, name: str) -> Work:
        case, lora = self.case, name != "base"
        kind = "int8" if case.op == "lora_linear_int8" else "nf4"
        w = quantized_bytes(kind, case.N, case.K) if lora else 2 * case.N * case.K
        low_rank = case.R * (case.N + case.K) * lora
        flops = 2 * case.M * (case.N * case.K + low_rank)
        return Work(flops, w + 2 * case.M * (case.N + case.K) + 2 * low_rank, "bf16")

    def capturable(self, name: str) -> int:
        return max(4, len(self.weights)) if self.case.M <= 64 else 0


class Dequantizing(Product):
    """The weight alone, to bf16: the same bits are asked for."""

    @classmethod
    def providers(cls, case: QuantCase, device: torch.device) -> Sequence[str]:
        return ["plain torch", "bitsandbytes", "peft_fast:kernel"]

    def error(self, name: str) -> tuple[float, float]:
        same = torch.equal(self.runner(name)(0), plain(self.weights[0], torch.bfloat16))
        return (0.0, 0.0) if same else (float("inf"), float("inf"))

    def runner(self, name: str) -> Call:
        weights = self.weights
        if name == "plain torch":
            return lambda i: plain(weights[i % len(weights)], torch.bfloat16)
        if name == "peft_fast:kernel":
            return lambda i: weights[i % len(weights)].dequantize(torch.bfloat16, "kernel")
        from bitsandbytes.functional import dequantize_4bit

        states = [_state(w) for w in weights]
        return lambda i: dequantize_4bit(weights[i % len(weights)].packed.view(-1, 1), states[i % len(states)])

    def work(self, name: str) -> Work:
        size = self.case.N * self.case.K
        return Work(0, quantized_bytes("nf4", self.case.N, self.case.K) + 2 * size, "bf16")

    def capturable(self, name: str) -> int:
        return 0


def quant_rows(case: QuantCase, here: Here) -> Iterator[Row]:
    """A ``QuantCase``."""
    session: Any = here
    subject = (Dequantizing if case.op == "dequantize_4bit" else Product)(case, session)
    about = dict(op=case.op, dtype="bfloat16", adapters="bfloat16", mode="fwd", M=case.M, N=case.N, K=case.K)
    yield from measure_subject(subject, here, about | dict(R=1 if case.op == "dequantize_4bit" else case.R))

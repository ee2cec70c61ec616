"""One quantized layer: its weight dequantized, and its product with LoRA, on the same numbers for all.

bitsandbytes alone ("base"), peft and peft_fast on top of it. Each has layers of its own: in evaluation on a CPU
bitsandbytes packs the weight in place, and what peft trains afterwards is wrong.
"""

import copy
import importlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_fast.quantized import weights as quant
from peft_fast.reference import quantized as reference_quant

from ..cases.kinds import QuantSiteCase, QuantWeightCase
from .lora_sites import DTYPES, SCALING, adapter_weights, by_formula
from .subject import Compared, Subject, TakesNoPart, Work

if TYPE_CHECKING:
    from ..session import Session


def quantized(kind: str, N: int, K: int, dtype: torch.dtype, device: torch.device) -> Any:
    """A linear layer of bitsandbytes with random numbers as large as a trained model's, as transformers makes it."""
    import bitsandbytes

    generator = torch.Generator(device).manual_seed(0)
    w = (torch.randn(N, K, generator=generator, device=device) * K**-0.5).to(dtype).cpu()
    layer: Any
    if kind == "int8":
        layer = bitsandbytes.nn.Linear8bitLt(K, N, bias=False, has_fp16_weights=False, threshold=6.0)
        layer.weight = bitsandbytes.nn.Int8Params(w, requires_grad=False, has_fp16_weights=False)
    else:
        layer = bitsandbytes.nn.Linear4bit(K, N, bias=False, compute_dtype=dtype, quant_type="nf4")
        layer.weight = bitsandbytes.nn.Params4bit(
            w, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
        )
    return layer.to(device).requires_grad_(False)


def copied(layer: Any) -> Any:
    """The same numbers in memory of their own."""
    new = copy.deepcopy(layer)
    if quant.kind_of(layer) == "bnb 4bit":
        new.quant_state = new.weight.quant_state
    return new


def _count(case_bytes: float, cache_bytes: int) -> int:
    return min(64, int(1 + 2 * cache_bytes // case_bytes))


# ------------------------------------------------------------------------------------------------------ dequantizing
def _by_bitsandbytes(layer: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    w: Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return w


def _by_plain_torch(layer: Any) -> Tensor:
    w: Any = quant.weight_of(layer)
    return reference_quant.dequantize_4bit(*w[:-1], w.dtype)


def _by_kernel(layer: Any) -> Tensor:
    w: Any = quant.weight_of(layer)
    return w.dequantize(implementation="kernel")


DEQUANTIZERS: dict[str, Callable[[Any], Tensor]] = {
    "bitsandbytes": _by_bitsandbytes,
    "plain torch": _by_plain_torch,
    "peft_fast": lambda layer: quant.weight_of(layer).dequantize(),
}
WEIGHT_KERNELS = {"peft_fast:kernel": _by_kernel}


def weights(case: QuantWeightCase, device: torch.device, cache_bytes: int) -> list[Any]:
    """Layers with the same weight, so many that a call finds its own outside the cache."""
    layer = quantized("nf4", case.N, case.K, DTYPES[case.dtype], device)
    return [layer, *(copied(layer) for _ in range(_count(case.bytes(), cache_bytes) - 1))]


def exact_weight(layer: Any) -> Tensor:
    """The bits that it must be: every product in fp64, rounded where the formula is, at the end to the dtype."""
    w: Any = quant.weight_of(layer)
    codes = torch.stack([w.packed >> 4, w.packed & 15], dim=1).view(-1)[: w.N * w.K].int()
    absmax = w.absmax
    if w.nested_code is not None:
        scales = w.nested_absmax.double().repeat_interleave(w.nested_blocksize)[: len(absmax)]
        absmax = (w.nested_code.double()[absmax.int()] * scales).float().double() + w.nested_offset.double()
    factors = absmax.float().double().repeat_interleave(w.blocksize)[: w.N * w.K]
    return (w.code.double()[codes] * factors).float().to(w.dtype).view(w.N, w.K)


def error_in_bits(w: Tensor, exact: Tensor) -> tuple[float, float]:
    """As ``measure.error_over_budget``, with a budget of nothing."""
    if w.dtype == exact.dtype and torch.equal(w, exact):
        return 0.0, 0.0
    if w.shape != exact.shape:
        return float("inf"), float("inf")
    return ((w.double() - exact.double()).abs().max() / exact.double().abs().max()).item(), float("inf")


class Dequantizing(Subject):
    """A ``QuantWeightCase``: the same bits are asked for. On a GPU the kernel takes part by force too."""

    group = "dequantizing"
    base = "bitsandbytes"
    rivals = ("bitsandbytes", "plain torch")

    def __init__(self, case: QuantWeightCase, session: "Session") -> None:
        super().__init__(case, session)
        self.layers = weights(case, session.device, session.cache_bytes)
        self._exact: Tensor | None = exact_weight(self.layers[0])

    @classmethod
    def providers(cls, case: QuantWeightCase, device: torch.device) -> Sequence[str]:
        return [*DEQUANTIZERS, *(WEIGHT_KERNELS if device.type == "cuda" else ())]

    def error(self, name: str) -> tuple[float, float]:
        assert self._exact is not None
        return error_in_bits((DEQUANTIZERS | WEIGHT_KERNELS)[name](self.layers[0]), self._exact)

    def checked(self) -> None:
        self._exact = None

    def runner(self, name: str) -> Callable[[int], Any]:
        dequantize, layers = (DEQUANTIZERS | WEIGHT_KERNELS)[name], self.layers
        return lambda i: dequantize(layers[i % len(layers)])

    def work(self, name: str) -> Work:
        return Work(0, self.case.bytes(), self.case.dtype)


# ------------------------------------------------------------------------------------------------- a layer with LoRA
@dataclass
class QuantSite:
    """The tensors of a case; with few tokens so many ``copies`` of the base that a call finds it outside the cache."""

    case: QuantSiteCase
    x: Tensor
    dy: Tensor
    base: Any
    a: Tensor
    b: Tensor
    copies: int


def make_site(case: QuantSiteCase, device: torch.device, cache_bytes: int) -> QuantSite:
    dtype = DTYPES[case.dtype]
    generator = torch.Generator(device).manual_seed(1)

    def random(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device) * std

    base = quantized(case.kind, case.N, case.K, dtype, device)
    a, b = random(case.R, case.K, std=case.K**-0.5), random(case.N, case.R, std=0.1)
    few = replace(case, M=0).bytes(False)
    x, dy = random(case.M, case.K).to(dtype), random(case.M, case.N).to(dtype)
    return QuantSite(case, x, dy, base, a, b, _count(few, cache_bytes) if case.M <= 64 else 1)


def _library(name: str) -> Callable[[QuantSite, float], nn.Module]:
    """The LoRA layer that a library puts in place of bitsandbytes', called as a model calls it."""

    def build(site: QuantSite, dropout: float) -> nn.Module:
        library: Any = importlib.import_module(name)
        config = library.LoraConfig(
            r=site.case.R, lora_alpha=site.case.R * SCALING, lora_dropout=dropout, target_modules=["0"]
        )
        model: Any = nn.Sequential(copied(site.base))
        model.is_loaded_in_4bit, model.is_loaded_in_8bit = site.case.kind == "nf4", site.case.kind == "int8"
        layer: Any = library.get_peft_model(model, config).base_model.model[0]
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(site.a)
            layer.lora_B["default"].weight.copy_(site.b)
        return layer

    return build


class _Forced(nn.Module):
    """peft_fast's op for inference with an implementation forced."""

    def __init__(self, site: QuantSite, implementation: str) -> None:
        super().__init__()
        self.w: Any = quant.weight_of(copied(site.base))
        self.implementation = implementation
        self.a, self.b = site.a.to(site.x.dtype), site.b.to(site.x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        from peft_fast.ops.fourbit_linear import linear_4bit

        y: Tensor = linear_4bit(x, *self.w[:-1], None, self.a, self.b, SCALING, self.implementation)
        return y


PROVIDERS: dict[str, Callable[[QuantSite, float], nn.Module]] = {
    "base": lambda site, dropout: copied(site.base),
    "peft": _library("peft"),
    "peft_fast": _library("peft_fast"),
}
KERNELS: dict[str, Callable[[QuantSite, float], nn.Module]] = {
    f"peft_fast:{name}": lambda site, dropout, name=name: _Forced(site, name)  # type: ignore[misc]
    for name in ("torch", "kernel")
}


def _layer(provider: str, site: QuantSite, dropout: float) -> nn.Module:
    return (PROVIDERS | KERNELS)[provider](site, dropout).train(site.case.mode == "train")


def _call(layer: nn.Module, x: Tensor, site: QuantSite) -> Any:
    if site.case.mode != "train":
        with torch.no_grad():
            return layer(x)
    with torch.autocast(x.device.type, torch.bfloat16) if site.case.dtype == "bf16" else nullcontext():
        return layer(x)


def outputs(provider: str, site: QuantSite) -> list[Tensor]:
    """y, and in training dx, da, db, without dropout: what is compared with fp64 before anything is timed."""
    layer, x = _layer(provider, site, 0.0), site.x.detach()
    if site.case.mode != "train":
        return [_call(layer, x, site)]
    y = _call(layer, x.requires_grad_(), site)
    return [y.detach(), *torch.autograd.grad(y, (x, *adapter_weights(layer)), site.dy)]


def exact(site: QuantSite, lora: bool) -> list[Tensor]:
    """The same in fp64, with the numbers that the quantized weight stands for."""
    dy = site.dy if site.case.mode == "train" else None
    return by_formula(quant.read(site.base), site.a, site.b, site.x, dy, lora)


def runner(provider: str, site: QuantSite) -> Callable[[int], Any]:
    """The function to time: call i uses copy i of the layer."""
    count = site.copies
    layers = [_layer(provider, site, site.case.dropout) for _ in range(count)]
    if site.case.mode != "train":
        return lambda i: _call(layers[i % count], site.x, site)
    x = site.x.detach().requires_grad_()

    def step(i: int) -> Any:
        layer = layers[i % count]
        return torch.autograd.grad(_call(layer, x, site), (x, *adapter_weights(layer)), site.dy)

    return step


class QuantLayer(Subject):
    """A ``QuantSiteCase``. On a GPU each implementation takes part by force too, in evaluation of NF4."""

    group = "quantized layer"
    rivals = ("peft",)

    def __init__(self, case: QuantSiteCase, session: "Session") -> None:
        super().__init__(case, session)
        self.memory = case.mode == "train"
        self.site = make_site(case, session.device, session.cache_bytes)
        self._exact = {lora: exact(self.site, lora) for lora in (False, True)}
        self._plain = outputs("peft", self.site)

    @classmethod
    def providers(cls, case: QuantSiteCase, device: torch.device) -> Sequence[str]:
        forced = device.type == "cuda" and case.kind == "nf4" and case.mode != "train"
        return [*PROVIDERS, *(KERNELS if forced else ())]

    def compared(self, name: str) -> Compared:
        lora = name != "base"
        try:
            out = outputs(name, self.site)
        except ValueError as error:
            if name in KERNELS and "implementation" in str(error):
                raise TakesNoPart(str(error)) from error  # a forced kernel says that it is not for this size
            raise
        return Compared(out, self._plain if lora else out, self._exact[lora])

    def checked(self) -> None:
        self._plain, self._exact = [], {}

    def runner(self, name: str) -> Callable[[int], Any]:
        return runner(name, self.site)

    def work(self, name: str) -> Work:
        lora = name != "base"
        return Work(self.case.flops(lora), self.case.bytes(lora), self.case.dtype)

    def capturable(self, name: str) -> int:
        """int8's outliers are looked for on the host."""
        few = self.case.mode == "fwd" and self.case.kind == "nf4" and self.case.M <= 64
        return max(4, self.site.copies) if few else 0

    def tokens(self) -> int:
        return int(self.case.M)

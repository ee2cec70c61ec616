"""One linear layer with LoRA, on the same numbers: the frozen base, plain torch, peft, peft_fast."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..cases.kinds import OpCase
from .subject import Compared, Subject, TakesNoPart, Work

if TYPE_CHECKING:
    from ..session import Session

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SCALING = 2.0


@dataclass
class Site:
    """The tensors of a case. ``copies`` of the weights make a decode find them outside the cache."""

    case: OpCase
    x: Tensor
    dy: Tensor
    copies: list[tuple[Tensor, Tensor, Tensor]]  # w (N, K), a (R, K), b (N, R)


def make_site(case: OpCase, device: torch.device, cache_bytes: int) -> Site:
    """Random tensors as large as a trained model's; where M is small, copies of w that overflow the cache twice."""
    dtype, adapters = DTYPES[case.dtype], DTYPES[case.adapters]
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, std: float, dtype: torch.dtype) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * std).to(dtype)

    size = case.N * case.K * dtype.itemsize
    count = min(64, 1 + 2 * cache_bytes // size) if case.M <= 64 else 1
    copies = [
        (
            random(case.N, case.K, std=case.K**-0.5, dtype=dtype),
            random(case.R, case.K, std=case.K**-0.5, dtype=adapters),
            random(case.N, case.R, std=0.1, dtype=adapters),
        )
        for _ in range(count)
    ]
    x = random(case.M, case.K, std=1.0, dtype=dtype)
    return Site(case, x, random(case.M, case.N, std=1.0, dtype=dtype), copies)


class _Plain(nn.Module):
    """The formula as one writes it; adapters take part in x's dtype, as under autocast."""

    def __init__(self, w: Tensor, a: Tensor, b: Tensor, case: OpCase) -> None:
        super().__init__()
        self.w, self.p = w, case.dropout
        self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(b.clone())

    def forward(self, x: Tensor) -> Tensor:
        s = F.linear(F.dropout(x, self.p, self.training), self.a.to(x.dtype))
        return F.linear(x, self.w) + F.linear(s, self.b.to(x.dtype)) * SCALING


class _Forced(_Plain):
    """peft_fast's op with an implementation forced, which never falls back."""

    implementation = "auto"

    def forward(self, x: Tensor) -> Tensor:
        from peft_fast.ops.functional import lora_linear, new_seed

        p = self.p if self.training else 0.0
        seed = new_seed(x.device) if p else None
        return lora_linear(
            x, self.w, self.a, self.b, SCALING, dropout_p=p, seed=seed, implementation=self.implementation
        )


def _base(w: Tensor, a: Tensor, b: Tensor, case: OpCase) -> nn.Module:
    layer = nn.Linear(case.K, case.N, bias=False, device="meta")
    layer.weight = nn.Parameter(w, requires_grad=False)
    return layer


def _library(name: str) -> Callable[..., nn.Module]:
    """The LoRA layer that a library puts in place of nn.Linear, called as a model calls it."""

    def build(w: Tensor, a: Tensor, b: Tensor, case: OpCase) -> nn.Module:
        library = importlib.import_module(name)
        config = library.LoraConfig(
            r=case.R, lora_alpha=case.R * SCALING, lora_dropout=case.dropout, target_modules=["0"]
        )
        layer: Any = library.inject_adapter_in_model(config, nn.Sequential(_base(w, a, b, case)))[0]
        layer.lora_A["default"].weight = nn.Parameter(a.clone())
        layer.lora_B["default"].weight = nn.Parameter(b.clone())
        return layer

    return build


def _forced(implementation: str) -> Callable[..., nn.Module]:
    def build(w: Tensor, a: Tensor, b: Tensor, case: OpCase) -> nn.Module:
        layer = _Forced(w, a, b, case)
        layer.implementation = implementation
        return layer

    return build


def _compiled(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def compiled(w: Tensor, a: Tensor, b: Tensor, case: OpCase) -> nn.Module:
        layer: nn.Module = torch.compile(build(w, a, b, case), dynamic=False)  # type: ignore[assignment]
        return layer

    return compiled


PROVIDERS: dict[str, Callable[[Tensor, Tensor, Tensor, OpCase], nn.Module]] = {
    "base": _base,
    "plain torch": _Plain,
    "plain torch compiled": _compiled(_Plain),
    "peft": _library("peft"),
    "peft compiled": _compiled(_library("peft")),
    "peft_fast": _library("peft_fast"),
}
KERNELS = {f"peft_fast:{name}": _forced(name) for name in ("torch", "addmm", "one_launch", "split")}


def layers(provider: str, site: Site) -> list[nn.Module]:
    """The provider's layer for each copy of the weights."""
    build = (PROVIDERS | KERNELS)[provider]
    return [build(w, a, b, site.case) for w, a, b in site.copies]


def adapter_weights(layer: Any) -> tuple[Tensor, ...]:
    """a and b of any provider's layer; nothing of the base."""
    return tuple(weight for weight in layer.parameters() if weight.requires_grad)


def outputs(layer: nn.Module, site: Site) -> list[Tensor]:
    """y, and in training dx, da, db, without dropout: what is compared with fp64 before anything is timed."""
    layer.eval()
    if site.case.mode != "train":
        with torch.no_grad():
            return [layer(site.x)]
    x = site.x.detach().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, (x, *adapter_weights(layer)), site.dy)]


def exact(site: Site, lora: bool) -> list[Tensor]:
    """The same in fp64."""
    return by_formula(*site.copies[0], site.x, site.dy if site.case.mode == "train" else None, lora)


def by_formula(w: Tensor, a: Tensor, b: Tensor, x: Tensor, dy: Tensor | None, lora: bool) -> list[Tensor]:
    """y, and with dy also dx, da and db (without LoRA dx alone), in fp64."""
    w, a, b, x = (t.double() for t in (w, a, b, x))
    s = SCALING * x @ a.T
    y = x @ w.T + (s @ b.T if lora else 0)
    if dy is None:
        return [y]
    dy = dy.double()
    ds = SCALING * dy @ b
    dx = dy @ w + (ds @ a if lora else 0)
    return [y, dx, ds.T @ x, dy.T @ s] if lora else [y, dx]


def runner(provider: str, site: Site) -> Callable[[int], Any]:
    """The function to time: call i uses copy i of the weights."""
    all_layers = layers(provider, site)
    count = len(all_layers)
    if site.case.mode != "train":
        for layer in all_layers:
            layer.eval()

        @torch.no_grad()
        def forward(i: int) -> Tensor:
            return all_layers[i % count](site.x)

        return forward
    x = site.x.detach().requires_grad_()

    def step(i: int) -> Any:
        layer = all_layers[i % count]
        return torch.autograd.grad(layer(x), (x, *adapter_weights(layer)), site.dy)

    for layer in all_layers:
        layer.train()
    return step


class LoraSite(Subject):
    """An ``OpCase``. On a GPU each implementation takes part by force too: the table of choices is made from that."""

    group = "one layer"

    def __init__(self, case: OpCase, session: "Session") -> None:
        super().__init__(case, session)
        self.site = make_site(case, session.device, session.cache_bytes)
        self.memory = case.mode == "train"
        self._plain = outputs(layers("plain torch", self.site)[0], self.site)
        self._exact = {lora: exact(self.site, lora) for lora in (False, True)}

    @classmethod
    def providers(cls, case: OpCase, device: torch.device) -> Sequence[str]:
        names = [name for name in PROVIDERS if case.compiled or not name.endswith(" compiled")]
        return [*names, *(KERNELS if device.type == "cuda" else ())]

    def compared(self, name: str) -> Compared:
        lora = name != "base"
        try:
            out = outputs(layers(name, self.site)[0], self.site)
        except ValueError as error:
            if name in KERNELS and name.split(":")[1] in str(error):
                raise TakesNoPart(str(error)) from error  # a forced kernel says that it is not for this size
            raise
        except RuntimeError as error:
            raise without_compiler(name, error) from error
        return Compared(out, self._plain if lora else out, self._exact[lora])

    def checked(self) -> None:
        self._plain, self._exact = [], {}

    def runner(self, name: str) -> Callable[[int], Any]:
        return runner(name, self.site)

    def work(self, name: str) -> Work:
        lora, passes = name != "base", 3 if self.case.mode == "train" else 1
        return Work(self.case.flops(lora), self.case.bytes(lora), self.case.dtype, (4 if lora else 1) * passes)

    def capturable(self, name: str) -> int:
        return max(4, len(self.site.copies)) if self.case.mode == "fwd" and self.case.M <= 64 else 0

    def tokens(self) -> int:
        return int(self.case.M)

    def close(self) -> None:
        torch.compiler.reset()


def without_compiler(name: str, error: RuntimeError) -> Exception:
    """What to raise: a compiled rival takes no part where torch.compile finds no compiler to work with."""
    known = any(word in str(error) for word in ("compiler", "Compiler", "triton"))
    if name.endswith(" compiled") and known:
        return TakesNoPart(f"torch.compile does not work here: {str(error).splitlines()[0]}")
    return error

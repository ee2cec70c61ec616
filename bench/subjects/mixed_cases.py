"""Mixed batches: a Llama alone, and with the same many adapters under peft and under peft_fast."""

import copy
import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..cases.kinds import MIXED_RANKS, MixedCase
from .lora_models import base_model, lora_sites_of, planned, products
from .lora_sites import DTYPES, SCALING
from .subject import Compared, Subject, Work

if TYPE_CHECKING:
    from ..session import Session

NAMES = ("base", "peft", "peft_fast", "peft_fast ids")


def providers(case: MixedCase) -> tuple[str, ...]:
    """Who takes part: where a call takes a second, ids instead of names make no difference that could be seen."""
    return NAMES if case.tokens == 1 else NAMES[:3]


class Loaded:
    """The models, with adapters "a0", "a1", ... of ``MIXED_RANKS`` in turn: random, the same in both libraries.

    Adapters are only added; a case that wants fewer than there are gets new models.
    """

    def __init__(self, small: bool = False) -> None:
        self.small = small
        self.models: dict[str, Any] = {}
        self.count = 0
        self._made_for: tuple[str, str] | None = None

    def bring(self, case: MixedCase) -> None:
        """Have ``case.loaded`` adapters in models of the case's dtypes."""
        if self._made_for != (case.dtype, case.adapters) or self.count > case.loaded:
            base = base_model(128, 2) if self.small else base_model()
            self.models = {"base": base.to(DTYPES[case.dtype]).eval()}
            self._made_for, self.count = (case.dtype, case.adapters), 0
        while self.count < case.loaded:
            self._add(f"a{self.count}", MIXED_RANKS[self.count % len(MIXED_RANKS)], case.adapters == "default")
            self.count += 1

    def _add(self, name: str, rank: int, autocast: bool) -> None:
        for which in ("peft", "peft_fast"):
            library = importlib.import_module(which)
            config = library.LoraConfig(
                r=rank, lora_alpha=rank * SCALING, target_modules="all-linear", task_type="CAUSAL_LM"
            )
            if which not in self.models:
                base = copy.deepcopy(self.models["base"])
                model = library.get_peft_model(base, config, adapter_name=name, autocast_adapter_dtype=autocast)
                self.models[which] = model.eval()
            else:
                self.models[which].add_adapter(name, config, autocast_adapter_dtype=autocast)
        generator = torch.Generator().manual_seed(self.count)
        ours = dict(lora_sites_of(self.models["peft_fast"]))
        with torch.no_grad():
            for site, layer in lora_sites_of(self.models["peft"]):
                for part in ("lora_A", "lora_B"):
                    weight = getattr(layer, part)[name].weight
                    weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05)
                    getattr(ours[site], part)[name].weight.copy_(weight)

    def runner(self, case: MixedCase, provider: str) -> Callable[[int], Tensor]:
        """The function to time: logits of a batch. Slot ids are handed out once, before."""
        model = self.models[provider.split()[0]]
        given: dict[str, Any] = {"input_ids": token_ids(case)}
        if provider == "peft_fast ids":
            given["adapter_ids"] = model.adapter_slots(case.names)
        elif provider != "base":
            given["adapter_names"] = case.names

        @torch.no_grad()
        def forward(i: int) -> Tensor:
            return model(**given).logits

        return forward

    def release(self, case: MixedCase) -> None:
        """Give back the slot ids that ``runner`` took."""
        if "peft_fast ids" not in providers(case):
            return
        model = self.models["peft_fast"]
        model.release_slots([model.adapter_bank.slot_of(name) for name in case.names])

    def exact(self, case: MixedCase, lora: bool) -> Tensor:
        """Logits in fp64 by the formula, without either library's layers."""
        model = copy.deepcopy(self.models["base"]).double()
        if lora:
            rows: dict[str, list[int]] = {}
            for row, name in enumerate(case.names):
                rows.setdefault(name, []).append(row)
            for site, layer in lora_sites_of(self.models["peft"]):
                model.get_submodule(site).register_forward_hook(partial(add_updates, layer, rows))
        with torch.no_grad():
            logits: Tensor = model(input_ids=token_ids(case)).logits
        return logits

    def work(self, case: MixedCase, lora: bool) -> Work:
        """Products with weights only, and the weights in use, as in ``lora_models``."""
        weights = products(self.models["base"])
        flops = sum(2.0 * w.numel() for w in weights) * case.rows * case.tokens
        moved = sum(float(w.nbytes) for w in weights)
        if lora:
            for _, layer in lora_sites_of(self.models["peft"]):
                for name in case.names:
                    parts = [getattr(layer, part)[name].weight for part in ("lora_A", "lora_B")]
                    flops += sum(2.0 * w.numel() for w in parts) * case.tokens
                for name in set(case.names):
                    moved += sum(getattr(layer, part)[name].weight.nbytes for part in ("lora_A", "lora_B"))
        return Work(flops, moved, case.dtype)


def add_updates(layer: Any, rows: dict[str, list[int]], module: nn.Module, args: tuple[Tensor], y: Tensor) -> Tensor:
    """A forward hook of the base's layer: the updates of its twin's adapters in fp64, by the formula."""
    y = y.clone()
    for name, at in rows.items():
        a, b = (getattr(layer, part)[name].weight.double() for part in ("lora_A", "lora_B"))
        y[at] += SCALING * args[0][at] @ a.T @ b.T
    return y


def token_ids(case: MixedCase) -> Tensor:
    """Random tokens (rows, tokens)."""
    return torch.randint(0, 1024, (case.rows, case.tokens), generator=torch.Generator().manual_seed(2))


def by_row(logits: Tensor) -> list[Tensor]:
    """What is compared: each row on its own, so that one with another's adapter is not lost among the others."""
    return list(logits)


class MixedBatch(Subject):
    """A ``MixedCase``. Every row is compared on its own, of the very call that is timed."""

    group = "mixed batch"
    norm = 2
    rivals = ("peft",)

    def __init__(self, case: MixedCase, session: "Session") -> None:
        super().__init__(case, session)
        few = case.tokens == 1
        self.seconds, self.min_rounds = (4.0, 11) if few else (8.0, 5)
        self.loaded = session.shared("loaded", lambda: Loaded(small=session.tiny_models))
        self.loaded.bring(case)
        self.runners = {name: self.loaded.runner(case, name) for name in providers(case)}
        self._out = {name: by_row(function(0)) for name, function in self.runners.items()}
        self._exact = {lora: by_row(self.loaded.exact(case, lora)) for lora in (False, True)}

    @classmethod
    def providers(cls, case: MixedCase, device: torch.device) -> Sequence[str]:
        return providers(case)

    def compared(self, name: str) -> Compared:
        lora = name != "base"  # peft's arithmetic in this dtype stands for plain torch
        return Compared(self._out[name], self._out["peft" if lora else "base"], self._exact[lora])

    def runner(self, name: str) -> Callable[[int], Any]:
        return self.runners[name]

    def work(self, name: str) -> Work:
        return self.loaded.work(self.case, name != "base")

    def tokens(self) -> int:
        return int(self.case.rows * self.case.tokens)

    def facts(self, name: str) -> dict[str, Any]:
        ranks = [MIXED_RANKS[i % len(MIXED_RANKS)] for i in range(self.case.distinct)]
        adapters = {"adapters": self.case.loaded, "used": self.case.distinct, "rank": round(sum(ranks) / len(ranks))}
        workload = {"batch": self.case.rows, "tokens": self.case.tokens}
        config = self.loaded.models["base"].config
        return {"loaded": self.case.loaded, **planned(config, name, workload, adapters)}

    def close(self) -> None:
        self.loaded.release(self.case)

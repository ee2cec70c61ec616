"""Text generated greedily by whole models: a Llama alone, with all-linear LoRA under peft, and under peft_fast."""

import copy
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..cases.kinds import GenerateCase
from .lora_models import NAMES, RANK, base_model, lora_sites_of, same_adapters
from .lora_sites import DTYPES, SCALING
from .mixed_cases import add_updates
from .quant_models import in_double, quantized_models
from .subject import Compared, Subject

if TYPE_CHECKING:
    from ..session import Session


class Generated(NamedTuple):
    """Logits (rows, new, vocabulary) of every step, and what was chosen by them (rows, new)."""

    logits: Tensor
    tokens: Tensor


def generated(out: Any, new: int) -> Generated:
    """From what generate returns when it is asked for a dictionary with logits."""
    return Generated(torch.stack(out.logits, dim=1), out.sequences[:, -new:])


def up_to_another_choice(out: Generated, same: Generated, exact: Generated) -> Compared:
    """Of each row the logits of the steps before which all three chose the same tokens.

    A wrong one shows in the first of its logits that is wrong; what follows another choice, where two tokens are as
    likely, says nothing.
    """
    tokens = torch.stack([found.tokens for found in (out, same, exact)])
    equal = (tokens == tokens[:1]).all(0).long().cumprod(1)
    steps = [min(int(n) + 1, tokens.shape[2]) for n in equal.sum(1)]
    return Compared(*([row[:n] for row, n in zip(f.logits, steps, strict=True)] for f in (out, same, exact)))


def random_ids(model: Any, rows: int, tokens: int) -> Tensor:
    """Random tokens (rows, tokens), none of them the one that pads."""
    return torch.randint(1, model.config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(2))


def with_adapters(library: str, base: Any, names: Sequence[str]) -> Any:
    """A model around the base with LoRA adapters of these names."""
    found = importlib.import_module(library)
    config = found.LoraConfig(
        r=RANK, lora_alpha=RANK * SCALING, target_modules="all-linear", task_type="CAUSAL_LM"
    )  # fmt: skip
    model = found.get_peft_model(base, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    return model.eval()


class LoraGeneration(Subject):
    """A ``GenerateCase``. Truth is the formula in fp64; peft's own error in the case's dtype sets the budget."""

    group = "generation"
    norm = 2
    rivals = ("peft",)
    seconds = 10.0
    min_rounds = 5

    def __init__(self, case: GenerateCase, session: "Session") -> None:
        super().__init__(case, session)
        small = 128 if case.kind == "dense" else 256  # rows of whole blocks
        dense: Any = base_model(small, 2) if session.tiny_models else base_model()
        dtype, device = DTYPES[case.dtype], session.device
        if case.kind == "dense":
            base = dense.to(device, dtype)
            loaded = {name: copy.deepcopy(base, {id(p): p for p in base.parameters()}) for name in NAMES}
            self.truth = copy.deepcopy(base).double()
        else:
            loaded = quantized_models(dense, case.kind, dtype, device)
            self.truth = in_double(dense.to(device), loaded["base"])
        for model in (self.truth, *loaded.values()):
            model.eval().generation_config.eos_token_id = None  # as many tokens as were asked for
        self.adapters = sorted(set(case.names))
        self.models = {n: m if n == "base" else with_adapters(n, m, self.adapters) for n, m in loaded.items()}
        same_adapters(self.models, self.adapters)
        self._known: dict[str, tuple[Generated, Generated]] = {}

    @classmethod
    def providers(cls, case: GenerateCase, device: torch.device) -> Sequence[str]:
        return NAMES

    @torch.no_grad()
    def generate(self, model: Any, **more: Any) -> Any:
        """Greedy tokens of all rows."""
        ids = random_ids(self.truth, self.case.rows, self.case.tokens).to(self.device)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": self.case.new}
        return model.generate(**given, do_sample=False, pad_token_id=0, use_cache=True, **more)

    def named(self, name: str) -> dict[str, Any]:
        """What tells a model the adapter of each row."""
        return {"adapter_names": self.case.names} if name != "base" and self.case.adapters > 1 else {}

    def outputs(self, name: str) -> Generated:
        """What a provider generates, with its logits."""
        wanted = {**self.named(name), "output_logits": True, "return_dict_in_generate": True}
        return generated(self.generate(self.models[name], **wanted), self.case.new)

    def exact(self, lora: bool) -> Generated:
        """The same in fp64 by the formula, of no library's layers."""
        with self._updated() if lora else torch.no_grad():
            out = self.generate(self.truth, output_logits=True, return_dict_in_generate=True)
        return generated(out, self.case.new)

    @contextmanager
    def _updated(self) -> Iterator[None]:
        rows = {name: [row for row, of in enumerate(self.case.names) if of == name] for name in self.adapters}
        hooks = [
            self.truth.get_submodule(site).register_forward_hook(partial(add_updates, layer, rows))
            for site, layer in lora_sites_of(self.models["peft"])
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def compared(self, name: str) -> Compared:
        like = "base" if name == "base" else "peft"
        if like not in self._known:
            self._known[like] = self.outputs(like), self.exact(like == "peft")
        same, exact = self._known[like]
        return up_to_another_choice(same if name == like else self.outputs(name), same, exact)

    def checked(self) -> None:
        self._known.clear()

    def runner(self, name: str) -> Callable[[int], Any]:
        model, named = self.models[name], self.named(name)
        return lambda i: self.generate(model, **named)

    def tokens(self) -> int:
        return int(self.case.rows * self.case.new)

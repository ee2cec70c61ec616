"""Management of adapters: adding, loading, setting and deleting one while others are there, beside peft."""

import copy
import importlib
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..cases.kinds import ManageCase
from .lora_models import base_model, lora_sites_of
from .lora_sites import SCALING
from .subject import Call, Subject

if TYPE_CHECKING:
    from ..session import Session

NAMES = ("peft", "peft_fast")
_NAME, _RANK = "this one", 8


def copy_adapter(model: Any, name: str, new: str) -> None:
    """Give a model of peft's one more adapter, frozen and inactive, as its add_adapter would leave it."""
    model.peft_config[new] = copy.copy(model.peft_config[name])
    for _, layer in lora_sites_of(model):
        for found in [*vars(layer).values(), *layer.children()]:
            if isinstance(found, dict | nn.ModuleDict) and name in found:
                found[new] = copy.deepcopy(found[name])
                if isinstance(found, nn.ModuleDict):
                    found[new].requires_grad_(False)


class Managed:
    """A Llama of many small layers under both libraries, each with as many adapters as a case wants before its own."""

    def __init__(self, small: bool = False) -> None:
        base = base_model(64, 2 if small else 32)
        self.base, self.count = base.eval(), 1
        self._kept = tempfile.TemporaryDirectory()
        self.folder = Path(self._kept.name)
        self._known: dict[int, tuple[dict[str, dict[str, str]], dict[str, list[dict[str, float]]]]] = {}
        self.models: dict[str, Any] = {}
        self.configs: dict[str, Any] = {}
        for which in NAMES:
            library = importlib.import_module(which)
            config = library.LoraConfig(
                r=_RANK, lora_alpha=_RANK * SCALING, target_modules="all-linear", task_type="CAUSAL_LM"
            )
            self.configs[which] = config
            self.models[which] = library.get_peft_model(copy.deepcopy(base), config, adapter_name="a0").eval()
        self._save()

    def _save(self) -> None:
        """A directory with an adapter that is not zero: what both load."""
        model = self.models["peft"]
        model.add_adapter(_NAME, self.configs["peft"])
        generator = torch.Generator().manual_seed(1)
        self.saved = {}
        with torch.no_grad():
            for site, layer in lora_sites_of(model):
                for part in ("lora_A", "lora_B"):
                    weight = getattr(layer, part)[_NAME].weight
                    weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05)
                    self.saved[site, part] = weight.detach().clone()
        model.save_pretrained(str(self.folder), selected_adapters=[_NAME])
        model.delete_adapter(_NAME)

    def bring(self, case: ManageCase) -> None:
        """Have all adapters but the case's own. peft's are copied: a hundred calls of its add_adapter take minutes."""
        while self.count < case.nth - 1:  # never fewer: cases come in the order of ``nth``
            copy_adapter(self.models["peft"], "a0", f"a{self.count}")
            self.models["peft_fast"].add_adapter(f"a{self.count}", self.configs["peft_fast"])
            self.count += 1

    def results(self, case: ManageCase) -> tuple[dict[str, dict[str, str]], dict[str, list[dict[str, float]]]]:
        """(what is wrong, the rounds) by library, for all operations as number ``nth``: measured once.

        The order of the libraries alternates from round to round.
        """
        if case.nth not in self._known:
            self.bring(case)
            wrong = {name: self.wrong(name) for name in NAMES}
            rounds: dict[str, list[dict[str, float]]] = {name: [] for name in NAMES}
            for done in range(case.rounds):
                for name in NAMES[:: 1 if done % 2 == 0 else -1]:
                    rounds[name].append(self.round(name))
            self._known[case.nth] = wrong, rounds
        return self._known[case.nth]

    def round(self, which: str, clock: Callable[[], float] = time.process_time) -> dict[str, float]:
        """Seconds of each operation; afterwards all is as before. Every adapter goes inactive, as it came."""
        model, times = self.models[which], {}

        def timed(operation: str, *args: Any) -> None:
            start = clock()
            getattr(model, operation)(*args)
            times[operation] = clock() - start

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            timed("add_adapter", _NAME, self.configs[which])
            timed("set_adapter", _NAME)
            model.set_adapter("a0")
            timed("delete_adapter", _NAME)
            timed("load_adapter", str(self.folder / _NAME), _NAME)
            model.delete_adapter(_NAME)
        return times

    def wrong(self, which: str) -> dict[str, str]:
        """What an operation left that is not as it should be, in words; nothing where all is right."""
        model, found = self.models[which], {}
        layers = list(lora_sites_of(model))
        before = set(model.peft_config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.add_adapter(_NAME, self.configs[which])
            if any(_NAME not in layer.lora_A or layer.lora_B[_NAME].weight.any() for _, layer in layers):
                found["add_adapter"] = "is not in all layers, or its B is not zero"
            model.set_adapter(_NAME)
            if model.active_adapter != _NAME or any(layer.active_adapters != [_NAME] for _, layer in layers):
                found["set_adapter"] = "did not activate it everywhere"
            model.set_adapter("a0")
            model.delete_adapter(_NAME)
            if set(model.peft_config) != before or any(_NAME in layer.lora_A for _, layer in layers):
                found["delete_adapter"] = "left something, or took something else"
            model.load_adapter(str(self.folder / _NAME), _NAME)
            for site, layer in layers:
                for part in ("lora_A", "lora_B"):
                    if not torch.equal(getattr(layer, part)[_NAME].weight, self.saved[site, part]):
                        found["load_adapter"] = f"has other weights than the file in {part} of {site}"
            model.delete_adapter(_NAME)
        return found


class Management(Subject):
    """A ``ManageCase``. A round is all operations in turn, of which the case's own is looked at."""

    group = "management"
    base = ""
    rivals = ("peft",)

    def __init__(self, case: ManageCase, session: "Session") -> None:
        super().__init__(case, session)
        managed = session.shared("managed", lambda: Managed(small=session.tiny_models))
        self._wrong, self._rounds = managed.results(case)

    @classmethod
    def providers(cls, case: ManageCase, device: torch.device) -> Sequence[str]:
        return NAMES

    def error(self, name: str) -> tuple[float, float]:
        return (float("inf"), float("inf")) if self.case.operation in self._wrong[name] else (0.0, 0.0)

    def runner(self, name: str) -> Call:
        return lambda i: None

    def facts(self, name: str) -> dict[str, Any]:
        why = self._wrong[name].get(self.case.operation)
        return {} if why is None else {"why": why}

    def timed(self, functions: dict[str, Call], seconds: float) -> dict[str, list[float]]:
        return {name: [times[self.case.operation] for times in self._rounds[name]] for name in functions}

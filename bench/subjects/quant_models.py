"""Whole models on bases that bitsandbytes quantized: a Llama alone, with all-linear LoRA of peft, and of peft_fast.

Each is loaded by itself: in evaluation on a CPU bitsandbytes packs weights in place, and what peft trains afterwards is
wrong. So is, for the same reason, a model for each mode.
"""

import importlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_fast.quantized import weights as quant

from ..cases.kinds import QuantModelCase
from .lora_models import (
    NAMES,
    RANK,
    ModelSubject,
    adapters,
    base_model,
    exact_outputs,
    llama_8b,
    same_adapters,
    trained,
)  # fmt: skip
from .lora_sites import DTYPES, SCALING

if TYPE_CHECKING:
    from ..session import Session

KINDS: dict[str, dict[str, Any]] = {
    "nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "int8": dict(load_in_8bit=True),
}


def quantized_models(dense: Any, kind: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """For each of ``NAMES`` a model of its own that bitsandbytes quantized, frozen."""
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    compute = {"bnb_4bit_compute_dtype": dtype} if kind == "nf4" else {}
    where: dict[str, Any] = {"device_map": {"": device.index or 0}} if device.type == "cuda" else {}
    config, models = BitsAndBytesConfig(**KINDS[kind], **compute), {}
    with tempfile.TemporaryDirectory() as folder:
        dense.save_pretrained(folder)
        for name in NAMES:
            model = LlamaForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype, **where)
            model.config.use_cache = False
            models[name] = model.requires_grad_(False)
    return models


def in_double(dense: Any, base: Any) -> Any:
    """The dense model in fp64 with the numbers of the quantized one. Reads it before it ran, and was packed."""
    dense = dense.double().requires_grad_(False).eval()
    dense.config.use_cache = False
    with torch.no_grad():
        for name, module in base.named_modules():
            twin = dense.get_submodule(name)
            if quant.kind_of(module) is not None:
                twin.weight.copy_(quant.read(module))
                continue
            for key, weight in module.named_parameters(recurse=False):
                twin.get_parameter(key).copy_(weight)
    return dense


class QuantModel(ModelSubject):
    """A ``QuantModelCase``."""

    rivals = ("peft",)
    seconds = 10.0

    def __init__(self, case: QuantModelCase, session: "Session") -> None:
        super().__init__(case, session)
        tiny = session.tiny_models
        if case.size == "8b":
            dense = llama_8b(session.device, layers=4, tiny=tiny)
        else:
            dense = base_model(256, 2) if tiny else base_model(512, 4)  # rows of whole blocks
        loaded = quantized_models(dense, case.kind, DTYPES[case.dtype], session.device)
        self.models = {name: self._prepared(name, model) for name, model in loaded.items()}
        for model in self.models.values():
            model.train(self.memory)
        same_adapters(self.models)
        self.truth: Any = in_double(dense.to(session.device), self.models["base"])

    def _prepared(self, name: str, model: Any) -> Any:
        library: Any = importlib.import_module("peft" if name == "base" else name)
        if self.case.prepared:
            model = library.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        model.requires_grad_(False)
        if name == "base":
            return model
        lora = library.LoraConfig(
            r=RANK, lora_alpha=RANK * SCALING, lora_dropout=self.case.dropout, target_modules="all-linear",
            task_type="CAUSAL_LM",
        )  # fmt: skip
        return library.get_peft_model(model, lora)

    @classmethod
    def providers(cls, case: QuantModelCase, device: torch.device) -> Sequence[str]:
        return NAMES

    def called(self, name: str, given: dict[str, Tensor]) -> Any:
        """The model's output, as the case has it run."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.case.autocast):
            return self.models[name](**given)

    def runner(self, name: str) -> Callable[[int], Any]:
        given = self.inputs(name, self.case.rows)
        if self.case.mode == "train":
            wanted = trained(self.models[name], given)
            return lambda i: torch.autograd.grad(self.called(name, given).loss, wanted)

        @torch.no_grad()
        def forward(i: int) -> Tensor:
            logits: Tensor = self.called(name, given).logits
            return logits

        return forward

    def outputs(self, name: str) -> list[Tensor]:
        """Logits, and in training the gradients of the input and of a and b of every site, without dropout."""
        given = self.inputs(name, self.checked_rows)
        if self.case.mode != "train":
            with torch.no_grad():
                return [self.called(name, given).logits]
        with _without_dropout(self.models[name]):
            output = self.called(name, given)
            wanted = [given["inputs_embeds"], *adapters(self.models[name])]
            return [output.logits.detach(), *torch.autograd.grad(output.loss, wanted)]

    def exact(self, lora: bool) -> list[Tensor]:
        """On the numbers that the quantized weights stand for."""
        return exact_outputs(self.truth, self.models["peft"], self.inputs("base", self.checked_rows), lora)

    def checked(self) -> None:
        """Everything in fp64 may go."""
        super().checked()
        self.truth = None

    def loss(self, name: str) -> tuple[Callable[[], Any], Sequence[Tensor]] | None:
        if self.case.mode != "train":
            return None
        given = self.inputs(name, self.case.rows)
        return lambda: self.called(name, given).loss, list(self.models[name].parameters())

    def facts(self, name: str) -> dict[str, Any]:
        return {"size": self.case.size}


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Training but for dropout: bitsandbytes' layers take another path in evaluation."""
    off = [module for module in model.modules() if isinstance(module, nn.Dropout) and module.training]
    for module in off:
        module.eval()
    try:
        yield
    finally:
        for module in off:
            module.train()

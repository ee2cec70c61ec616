"""Whole models: a Llama alone, with all-linear LoRA under peft, and under peft_fast, all from the same weights."""

import copy
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..cases.kinds import ModelCase
from .lora_sites import DTYPES, SCALING, without_compiler
from .subject import Compared, Subject, Work

if TYPE_CHECKING:
    from ..session import Session

NAMES = ("base", "peft", "peft_fast")
RANK = 16
_PLANNED = (  # what of a configuration peft_fast.planning.plan reads
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "vocab_size", "tie_word_embeddings", "attention_bias", "mlp_bias"),
)


def base_model(hidden: int = 512, layers: int = 8, kv_heads: int = 8) -> nn.Module:
    """A random Llama in fp32, frozen; a small vocabulary, so that the output layer (not a LoRA site) hides nothing."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=kv_heads, vocab_size=1024, max_position_embeddings=1024, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).requires_grad_(False)


def llama_8b(device: torch.device, layers: int = 32, tiny: bool = False) -> Any:
    """A random, frozen bf16 Llama of the 8B's sizes; tiny: a hundredth of them, to try a script on a CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, int] = dict(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256
    )
    if tiny:
        layers = min(layers, 2)
        sizes = dict(
            hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, vocab_size=256
        )
    config = LlamaConfig(num_hidden_layers=layers, max_position_embeddings=2048, **sizes)
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        try:
            return LlamaForCausalLM(config).requires_grad_(False).eval()
        finally:
            torch.set_default_dtype(dtype)


def make_models(case: ModelCase, device: torch.device, tiny: bool = False) -> dict[str, Any]:
    """The model for each of ``NAMES``; peft and peft_fast hold the same adapter, which is not zero."""
    if case.size == "8b":
        base: Any = llama_8b(device, layers=4, tiny=tiny)
    else:
        base = (base_model(128, 2) if tiny else base_model()).to(device, DTYPES[case.dtype])
    base.config.use_cache = False
    models = {"base": base}
    for name in NAMES[1:]:
        library = importlib.import_module(name)
        config = library.LoraConfig(
            r=RANK, lora_alpha=2 * RANK, lora_dropout=case.dropout, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        models[name] = library.get_peft_model(
            copy.deepcopy(base, {id(p): p for p in base.parameters()}), config,
            autocast_adapter_dtype=case.adapters == "default",
        )  # fmt: skip
    same_adapters(models)
    for model in models.values():
        model.train(case.mode == "train")
    return models


def trained(model: nn.Module, given: dict[str, Tensor]) -> list[Tensor]:
    """What a step differentiates: the model's input and its adapters."""
    return [given["inputs_embeds"], *(weight for weight in model.parameters() if weight.requires_grad)]


def products(model: nn.Module) -> list[Tensor]:
    """The weights that a forward multiplies with."""
    return [weight for name, weight in model.named_parameters() if "embed" not in name and weight.ndim == 2]


def same_adapters(models: dict[str, Any], names: Sequence[str] = ("default",)) -> None:
    """Random numbers for peft's adapters, and the same for peft_fast's."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in names:
            for theirs, ours in zip(*(adapters(models[who], name) for who in NAMES[1:]), strict=True):
                theirs.copy_(torch.randn(theirs.shape, generator=generator) * 0.05)
                ours.copy_(theirs)


def exact_outputs(truth: Any, adapted: Any, given: dict[str, Tensor], lora: bool) -> list[Tensor]:
    """Logits of a model in fp64, with labels all gradients too; with LoRA by the formula, of no library's layers.

    truth: the base in fp64.    adapted: a model whose adapters take part.    given: its inputs, in any dtype.
    """
    train = "labels" in given
    given = {name: value.detach() for name, value in given.items()}
    x = given["inputs_embeds"] = given["inputs_embeds"].double().requires_grad_(train)
    leaves, hooks = [], []
    for site, layer in lora_sites_of(adapted) if lora else ():
        a, b = (w.detach().double().requires_grad_(train) for w in adapters(layer))
        leaves += [a, b]

        def add(module: nn.Module, args: Any, y: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
            return y + SCALING * (args[0] @ a.T) @ b.T

        hooks.append(truth.get_submodule(site).register_forward_hook(add))
    try:
        with torch.set_grad_enabled(train):
            output = truth(**given)
    finally:
        for hook in hooks:
            hook.remove()
    return [output.logits.detach(), *(torch.autograd.grad(output.loss, [x, *leaves]) if train else ())]


class ModelSubject(Subject):
    """A model under both libraries. Truth is fp64 by the formula; peft's own error in the dtype sets the budget.

    A subclass has ``models`` by library, ``outputs(name)`` and ``exact(lora)``, each made once for all providers.
    """

    norm = 2
    models: dict[str, Any]

    def __init__(self, case: Any, session: "Session") -> None:
        super().__init__(case, session)
        self.group = "training step" if case.mode == "train" else "model"
        self.memory = case.mode == "train"
        self._known: dict[str, list[Tensor]] = {}

    def inputs(self, library: str, rows: int) -> dict[str, Tensor]:
        """Embedded random tokens, so that every model has a gradient to bring back to its input, and labels."""
        generator = torch.Generator().manual_seed(2)
        model = self.models[library]
        shape = (rows, self.case.tokens)
        ids = torch.randint(0, model.config.vocab_size, shape, generator=generator).to(self.device)
        embedded = model.get_input_embeddings()(ids).detach()
        if self.case.mode != "train":
            return {"inputs_embeds": embedded}
        return {"inputs_embeds": embedded.requires_grad_(), "labels": ids}

    @property
    def checked_rows(self) -> int:
        """All, so that what is compared is the call that is timed; of the large model what fits in fp64."""
        return min(self.case.rows, 2) if self.case.size == "8b" else self.case.rows

    def outputs(self, name: str) -> list[Tensor]:
        """Logits, and in training the gradients of the input and of a and b of every site, without dropout."""
        raise NotImplementedError

    def exact(self, lora: bool) -> list[Tensor]:
        """The same in fp64."""
        raise NotImplementedError

    def compared(self, name: str) -> Compared:
        """Of the base it is its own error that counts."""
        like = "base" if name == "base" else "peft"
        for key, make in ((like, lambda: self.outputs(like)), (f"exact {like}", lambda: self.exact(like == "peft"))):
            if key not in self._known:
                self._known[key] = make()
        try:
            out = self._known[name] if name == like else self.outputs(name)
        except RuntimeError as error:
            raise without_compiler(name, error) from error
        return Compared(out, self._known[like], self._known[f"exact {like}"])

    def checked(self) -> None:
        self._known.clear()

    def tokens(self) -> int:
        return int(self.case.rows * self.case.tokens)


class LoraModel(ModelSubject):
    """A ``ModelCase``."""

    rivals = ("peft", "peft compiled")
    seconds = 20.0
    min_rounds = 5

    def __init__(self, case: ModelCase, session: "Session") -> None:
        super().__init__(case, session)
        self.models = make_models(case, session.device, session.tiny_models)
        self.compiled: dict[str, Any] = {}

    @classmethod
    def providers(cls, case: ModelCase, device: torch.device) -> Sequence[str]:
        return NAMES if not case.compiled else ("base", "peft", "peft compiled", "peft_fast", "peft_fast compiled")

    def model(self, name: str) -> Any:
        """Compiled ones share their weights with the others."""
        library = name.removesuffix(" compiled")
        if name == library:
            return self.models[library]
        if name not in self.compiled:
            self.compiled[name] = torch.compile(self.models[library], dynamic=False)
        return self.compiled[name]

    def outputs(self, name: str) -> list[Tensor]:
        library = name.removesuffix(" compiled")
        module, model = self.models[library], self.model(name)
        given = self.inputs(library, self.checked_rows)
        if self.case.mode != "train":
            with torch.no_grad():
                return [model(**given).logits]
        module.train(self.case.dropout == 0)
        try:
            result = model(**given)
            gradients = torch.autograd.grad(result.loss, [given["inputs_embeds"], *adapters(module)])
            return [result.logits.detach(), *gradients]
        finally:
            module.train()

    def exact(self, lora: bool) -> list[Tensor]:
        truth = copy.deepcopy(self.models["base"]).double()
        return exact_outputs(truth, self.models["peft"], self.inputs("base", self.checked_rows), lora)

    def runner(self, name: str) -> Callable[[int], Any]:
        library = name.removesuffix(" compiled")
        given, model = self.inputs(library, self.case.rows), self.model(name)
        if self.case.mode == "train":
            wanted = trained(self.models[library], given)
            return lambda i: torch.autograd.grad(model(**given).loss, wanted)

        @torch.no_grad()
        def forward(i: int) -> Tensor:
            logits: Tensor = model(**given).logits
            return logits

        return forward

    def work(self, name: str) -> Work:
        """Products with weights only; attention's own are a few per cent at these lengths."""
        weights, passes = products(self.models[name.removesuffix(" compiled")]), 2 if self.case.mode == "train" else 1
        flops = sum(2.0 * w.numel() * (passes + w.requires_grad * (passes - 1)) for w in weights) * self.tokens()
        return Work(flops, sum(float(w.nbytes) for w in weights) * passes, self.case.dtype)

    def facts(self, name: str) -> dict[str, Any]:
        workload = dict(batch=self.case.rows, tokens=self.case.tokens, train=self.case.mode == "train")
        return planned(self.models["base"].config, name, workload, {"adapters": 1, "rank": RANK, "used": 1})

    def loss(self, name: str) -> tuple[Callable[[], Any], Sequence[Tensor]] | None:
        if self.case.mode != "train" or name.endswith(" compiled"):
            return None
        given, model = self.inputs(name, self.case.rows), self.models[name]
        return lambda: model(**given).loss, list(model.parameters())

    def close(self) -> None:
        torch.compiler.reset()


def planned(config: Any, name: str, workload: dict[str, Any], adapters: dict[str, Any]) -> dict[str, Any]:
    """What peft_fast.planning.plan predicts this model's time from, for the providers that it speaks for."""
    if name not in ("base", "peft_fast"):
        return {}
    sizes = {key: value for key, value in config.to_dict().items() if key in _PLANNED}
    return {"plan": {"config": sizes, "workload": workload | (adapters if name == "peft_fast" else {})}}


def lora_sites_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name in the base model, layer) of each layer that has adapters, in either library."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "lora_A", None), nn.ModuleDict):
            yield name.removeprefix("base_model.model."), module


def adapters(module: Any, name: str = "default") -> list[Tensor]:
    """a and b of every site, in the order of the model."""
    return [getattr(s, part)[name].weight for _, s in lora_sites_of(module) for part in ("lora_A", "lora_B")]

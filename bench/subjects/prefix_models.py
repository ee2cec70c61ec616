"""Whole models with prefixes, and the way from an encoder to its keys and values: a Llama alone, peft, peft_fast."""

import copy
import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..cases.kinds import PrefixModelCase, PrefixPromptCase
from .generate_models import Generated, generated, random_ids, up_to_another_choice
from .lora_models import base_model, llama_8b, products
from .lora_sites import DTYPES
from .subject import Compared, Subject, Work

if TYPE_CHECKING:
    from ..session import Session

NAMES = ("base", "peft", "peft_fast")
PROMPT_NAMES = ("peft", "peft_fast", "peft_fast get_prompt")


def with_prefixes(library: str, base: Any, length: int, count: int = 1, **more: Any) -> Any:
    """A model around the base's own weights with ``count`` adapters "a0", "a1", ... of ``length`` learned tokens."""
    found = importlib.import_module(library)
    config = found.PrefixTuningConfig(num_virtual_tokens=length, task_type="CAUSAL_LM", **more)
    shared = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    model = found.get_peft_model(shared, config, adapter_name="a0")
    for i in range(1, count):
        model.add_adapter(f"a{i}", config)
    return model


def same_prefixes(models: dict[str, Any]) -> None:
    """Random numbers, as large as keys and values are, for peft's prefixes; the same for peft_fast's."""
    generator = torch.Generator().manual_seed(1)
    ours = dict(models["peft_fast"].prompt_encoder.named_parameters())
    with torch.no_grad():
        for name, weight in models["peft"].prompt_encoder.named_parameters():
            std = weight.shape[-1] ** -0.5 if "transform" in name else 0.5
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)
            ours[name].copy_(weight)


class PrefixModel(Subject):
    """A ``PrefixModelCase``. Truth is peft's model in fp64; its own error in the case's dtype sets the budget."""

    norm = 2
    rivals = ("peft",)
    seconds = 12.0

    def __init__(self, case: PrefixModelCase, session: "Session") -> None:
        super().__init__(case, session)
        self.memory = case.mode == "train"
        self.group = "training step" if self.memory else "generation"
        tiny = session.tiny_models
        if case.size == "8b":
            base = llama_8b(session.device, layers=4, tiny=tiny)
        else:
            base = base_model(128, 2, 2) if tiny else base_model(512, 4, 2)
            base = base.to(session.device, DTYPES[case.dtype])
        base.generation_config.eos_token_id = None  # as many tokens as were asked for
        self.models: dict[str, Any] = {"base": base}
        for library in NAMES[1:]:
            self.models[library] = with_prefixes(library, base, case.prefix, case.prefixes)
        same_prefixes(self.models)
        for model in self.models.values():
            model.train(self.memory)
        self._known: dict[str, Any] = {}

    @classmethod
    def providers(cls, case: PrefixModelCase, device: torch.device) -> Sequence[str]:
        return NAMES

    def inputs(self) -> dict[str, Tensor]:
        """Random tokens with their mask, as a tokenizer gives it."""
        rows, tokens = self.case.rows, self.case.tokens
        ids = random_ids(self.models["base"], rows, tokens)
        mask = torch.ones_like(ids)
        if self.case.padded:
            absent = torch.arange(rows) * (tokens // 2) // max(rows - 1, 1)
            mask = (torch.arange(tokens) >= absent[:, None]).long()
        return {"input_ids": (ids * mask).to(self.device), "attention_mask": mask.to(self.device)}

    def runner(self, name: str) -> Callable[[int], Any]:
        if self.case.mode == "train":
            return self._step(name)
        model = self.models[name]
        return lambda i: self.generate(name, model)

    def called(self, name: str, model: Any) -> tuple[Any, list[Tensor]]:
        """(the model's output, what its loss is differentiated by): the prefix; of the base, its embedded input."""
        given = self.inputs()
        labels = given["input_ids"]
        if name != "base":
            return model(**given, labels=labels), [w for w in model.parameters() if w.requires_grad]
        embedded = model.get_input_embeddings()(given.pop("input_ids")).detach().requires_grad_()
        return model(**given, inputs_embeds=embedded, labels=labels), [embedded]

    def _step(self, name: str) -> Callable[[int], Any]:
        model = self.models[name]
        weights = [w for w in model.parameters() if w.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=1e-5) if weights else None

        def step(i: int) -> None:
            output, _ = self.called(name, model)
            output.loss.backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()

        return step

    @torch.no_grad()
    def generate(self, name: str, model: Any, **more: Any) -> Any:
        """Greedy tokens of all rows. peft takes one prefix at a time: with several, those of one after the other."""
        given = {**self.inputs(), "max_new_tokens": self.case.new, "do_sample": False, "pad_token_id": 0}
        given |= {"use_cache": True, **more}
        n = self.case.prefixes
        if n == 1 or name == "base":
            return model.generate(**given)
        if name == "peft_fast":
            return model.generate(**given, adapter_names=self.case.names)
        outs = []
        for i in range(n):
            model.set_adapter(f"a{i}")
            rows = {key: value[i::n] if isinstance(value, Tensor) else value for key, value in given.items()}
            outs.append(model.generate(**rows))
        return outs

    def generated(self, name: str, model: Any) -> Generated:
        """What is compared of generated text; peft's, with several prefixes, put together again."""
        outs = self.generate(name, model, output_logits=True, return_dict_in_generate=True)
        if not isinstance(outs, list):
            return generated(outs, self.case.new)
        parts = [generated(out, self.case.new) for out in outs]
        tensors = []
        for several in zip(*parts, strict=True):
            whole = several[0].new_empty(self.case.rows, *several[0].shape[1:])
            for i, part in enumerate(several):
                whole[i :: len(parts)] = part
            tensors.append(whole)
        return Generated(*tensors)

    def outputs(self, name: str, model: Any) -> Any:
        """Logits and in training all gradients, or what was generated."""
        if self.case.mode == "train":
            return _with_gradients(*self.called(name, model))
        return self.generated(name, model)

    def compared(self, name: str) -> Compared:
        like = "base" if name == "base" else "peft"
        if like not in self._known:
            double = copy.deepcopy(self.models[like]).double()
            self._known[like] = self.outputs(like, self.models[like]), self.outputs(like, double)
        same, exact = self._known[like]
        out = same if name == like else self.outputs(name, self.models[name])
        if self.case.mode == "train":
            return Compared(out, same, exact)
        return up_to_another_choice(out, same, exact)

    def checked(self) -> None:
        self._known.clear()

    def work(self, name: str) -> Work | None:
        """Products with weights only, and only those of training: nothing is learned but the prefix."""
        if self.case.mode != "train":
            return None
        weights = products(self.models["base"])
        flops = sum(2.0 * w.numel() for w in weights) * 2 * self.tokens()
        return Work(flops, sum(float(w.nbytes) for w in weights) * 2, self.case.dtype)

    def loss(self, name: str) -> tuple[Callable[[], Any], Sequence[Tensor]] | None:
        if self.case.mode != "train":
            return None
        model = self.models[name]
        return lambda: self.called(name, model)[0].loss, list(model.parameters())

    def tokens(self) -> int:
        return int(self.case.rows * (self.case.tokens if self.case.mode == "train" else self.case.new))

    def facts(self, name: str) -> dict[str, Any]:
        return {"size": self.case.size}


def _with_gradients(output: Any, wanted: list[Tensor]) -> list[Tensor]:
    return [output.logits.detach(), *torch.autograd.grad(output.loss, wanted)]


class Prompt(Subject):
    """A ``PrefixPromptCase``: an encoder with a projection; what a call of the model makes of it for all layers.

    peft expands the tokens over the rows, projects, and fills a cache; peft_fast's attention reads the projection of
    the tokens. "peft_fast get_prompt" is its method of PEFT's name, which fills a cache all the same. There is none
    without a prefix.
    """

    group = "prompt"
    base = ""
    rivals = ("peft",)

    def __init__(self, case: PrefixPromptCase, session: "Session") -> None:
        super().__init__(case, session)
        base: Any = base_model(128, 2, 2) if session.tiny_models else base_model(512, 4, 2)
        base, sizes = base.to(session.device), base.config
        self.layers: int = sizes.num_hidden_layers
        self.models = {
            library: with_prefixes(library, base, case.prefix, prefix_projection=True) for library in NAMES[1:]
        }
        same_prefixes(self.models)
        generator = torch.Generator().manual_seed(2)
        shape = (2 * self.layers, case.rows, sizes.num_key_value_heads, case.prefix, sizes.head_dim)
        self.douts = torch.randn(shape, generator=generator).to(session.device)
        self.shared_douts = self.douts.sum(1).transpose(1, 2).contiguous()  # what attention gives back for all rows
        self._plain, self._exact = self.outputs("peft"), self.exact()

    @classmethod
    def providers(cls, case: PrefixPromptCase, device: torch.device) -> Sequence[str]:
        return PROMPT_NAMES

    def compared(self, name: str) -> Compared:
        return Compared(self.outputs(name), self._plain, self._exact)

    def made(self, name: str) -> list[Tensor]:
        """Keys and values of each layer: (rows, heads, slots, size), or (slots, heads, size) for all rows."""
        model = self.models[name.split()[0]]
        if name == "peft_fast":
            from peft_fast.prompts.attention import prefix_layers

            layer = prefix_layers([model.prompt_encoder["a0"]], [model.peft_config["a0"]], model.get_base_model())
            return [t for i in range(self.layers) for t in layer(i)]
        cache = model.get_prompt(self.case.rows)
        return [t for layer in cache.layers for t in (layer.keys, layer.values)]

    def runner(self, name: str) -> Callable[[int], Any]:
        """The function to time; "train": with the gradients of the encoder."""
        if self.case.mode != "train":

            @torch.no_grad()
            def forward(i: int) -> Any:
                return self.made(name)

            return forward
        weights = list(self.models[name.split()[0]].prompt_encoder.parameters())
        douts = (self.shared_douts if name == "peft_fast" else self.douts).unbind(0)
        return lambda i: torch.autograd.grad(self.made(name), weights, douts)

    def outputs(self, name: str) -> list[Tensor]:
        """Keys and values of the last row, and in training all gradients."""
        made = [t if t.ndim == 3 else t[-1].transpose(0, 1) for t in self.made(name)]
        return [t.detach() for t in made] + (list(self.runner(name)(0)) if self.case.mode == "train" else [])

    def exact(self) -> list[Tensor]:
        """The same in fp64 by the formula."""
        encoder: nn.Module = copy.deepcopy(self.models["peft"].prompt_encoder["a0"]).double()
        table = encoder.transform(encoder.embedding.weight)  # type: ignore[operator, union-attr]
        slots = table.view(self.case.prefix, 2 * self.layers, -1, self.douts.shape[-1]).transpose(0, 1)
        made = [t.detach() for t in slots]
        if self.case.mode != "train":
            return made
        douts = self.douts.double().sum(1).transpose(1, 2)
        return made + list(torch.autograd.grad(slots, list(encoder.parameters()), douts))

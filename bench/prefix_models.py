"""Whole models with prefixes, and the way from an encoder to its keys and values: a Llama alone, peft, peft_fast."""

import copy
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .cases import PrefixModelCase, PrefixPromptCase
from .model_cases import base_model, llama_8b
from .providers import DTYPES

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


class PrefixModels:
    """The models of a case. tiny: small ones, to see whether everything works."""

    def __init__(self, case: PrefixModelCase, device: torch.device, tiny: bool = False) -> None:
        self.case, self.device = case, device
        if case.size == "8b":
            base = llama_8b(device, layers=4, tiny=tiny)
        else:
            base = base_model(128, 2, 2) if tiny else base_model(512, 4, 2)
            base = base.to(DTYPES[case.dtype])
        base.generation_config.eos_token_id = None  # as many tokens as were asked for
        self.models: dict[str, Any] = {"base": base}
        for library in NAMES[1:]:
            self.models[library] = with_prefixes(library, base, case.prefix, case.prefixes)
        same_prefixes(self.models)
        for model in self.models.values():
            model.train(case.mode == "train")

    def inputs(self) -> dict[str, Tensor]:
        """Random tokens with their mask, as a tokenizer gives it."""
        rows, tokens = self.case.rows, self.case.tokens
        generator = torch.Generator().manual_seed(2)
        vocabulary = self.models["base"].config.vocab_size
        ids = torch.randint(1, vocabulary, (rows, tokens), generator=generator)
        mask = torch.ones_like(ids)
        if self.case.padded:
            absent = torch.arange(rows) * (tokens // 2) // max(rows - 1, 1)
            mask = (torch.arange(tokens) >= absent[:, None]).long()
        return {"input_ids": (ids * mask).to(self.device), "attention_mask": mask.to(self.device)}

    def runner(self, name: str) -> Callable[[int], Any]:
        """The function to time."""
        if self.case.mode == "train":
            return self._step(name)
        model = self.models[name]
        return lambda i: self.generate(name, model)

    def loss(self, name: str, model: Any) -> tuple[Any, list[Tensor]]:
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
            output, _ = self.loss(name, model)
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

    def generated(self, name: str, model: Any) -> tuple[Tensor, Tensor]:
        """Logits (rows, new, vocabulary) of every step, and tokens (rows, new)."""
        outs = self.generate(name, model, output_logits=True, return_dict_in_generate=True)
        outs = outs if isinstance(outs, list) else [outs]
        n, new = len(outs), self.case.new
        tokens = torch.empty(self.case.rows, new, dtype=torch.long, device=self.device)
        logits: list[Any] = [None] * self.case.rows
        for i, out in enumerate(outs):
            tokens[i::n] = out.sequences[:, -new:]
            logits[i::n] = torch.stack(out.logits, dim=1).unbind(0)
        return torch.stack(logits), tokens

    def checked(self, name: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """(what the model gives, what peft gives in its dtype, fp64): logits, and in training all gradients.

        Of generated text the steps before which all three chose the same tokens: a wrong one shows in the first of its
        logits that is wrong, and what follows another choice, where two tokens are as likely, says nothing.
        """
        like = "base" if name == "base" else "peft"
        models = (self.models[name], self.models[like], copy.deepcopy(self.models[like]).double())
        names = (name, like, like)
        if self.case.mode == "train":
            out, same, exact = (_with_gradients(*self.loss(n, model)) for n, model in zip(names, models, strict=True))
            return out, same, exact
        found = [self.generated(n, model) for n, model in zip(names, models, strict=True)]
        tokens = torch.stack([t for _, t in found])
        equal = (tokens == tokens[:1]).all(0).long().cumprod(1)
        steps = [min(int(n) + 1, self.case.new) for n in equal.sum(1)]
        out, same, exact = ([row[:n] for row, n in zip(logits, steps, strict=True)] for logits, _ in found)
        return out, same, exact


def _with_gradients(output: Any, wanted: list[Tensor]) -> list[Tensor]:
    return [output.logits.detach(), *torch.autograd.grad(output.loss, wanted)]


class PrefixPrompt:
    """An encoder with a projection under both libraries: what a call of the model makes of it for all layers.

    peft expands the tokens over the rows, projects, and fills a cache; peft_fast's attention reads the projection of
    the tokens. "peft_fast get_prompt" is its method of PEFT's name, which fills a cache all the same.
    """

    def __init__(self, case: PrefixPromptCase, tiny: bool = False) -> None:
        self.case = case
        base = base_model(128, 2, 2) if tiny else base_model(512, 4, 2)
        sizes: Any = base.config
        self.layers: int = sizes.num_hidden_layers
        self.models = {
            library: with_prefixes(library, base, case.prefix, prefix_projection=True) for library in NAMES[1:]
        }
        same_prefixes(self.models)
        generator = torch.Generator().manual_seed(2)
        shape = (2 * self.layers, case.rows, sizes.num_key_value_heads, case.prefix, sizes.head_dim)
        self.douts = torch.randn(shape, generator=generator)
        self.shared_douts = self.douts.sum(1).transpose(1, 2).contiguous()  # what attention gives back for all rows

    def made(self, name: str) -> list[Tensor]:
        """Keys and values of each layer: (rows, heads, slots, size), or (slots, heads, size) for all rows."""
        model = self.models[name.split()[0]]
        if name == "peft_fast":
            from peft_fast.attention import prefix_layers

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

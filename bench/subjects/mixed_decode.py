"""A decode step end to end, for the GPU campaign: a random Llama of the 8B's sizes with up to 128 adapters.

Every row has ``CONTEXT`` tokens of random keys and values behind it, and a call computes the next token at the same
place again. The base's weights and the adapters are one set of tensors that all models share.
"""

import copy
import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..cases.kinds import MIXED_RANKS, MixedDecodeCase
from .lora_models import llama_8b, lora_sites_of
from .lora_sites import SCALING
from .manage_cases import copy_adapter
from .mixed_cases import add_updates
from .subject import Compared, Subject

if TYPE_CHECKING:
    from ..session import Session

CONTEXT = 128
NAMES = ("base", "peft", "peft_fast", "peft_fast ids")


class Decoder:
    """The models. tiny: a hundredth of the size and a few adapters, to try the script on a CPU."""

    def __init__(self, device: torch.device, tiny: bool) -> None:
        self.device, self.tiny, self.count = device, tiny, 0
        self.base = llama_8b(device, tiny=tiny)
        self.config = self.base.config
        self.layers = self.config.num_hidden_layers
        self.models: dict[str, Any] = {"base": self.base}

    def bring(self, case: MixedDecodeCase) -> None:
        """Have ``case.loaded`` adapters; peft's are copies of its first, since its add_adapter takes ever longer."""
        generator = torch.Generator(self.device).manual_seed(self.count)
        while self.count < case.loaded:
            rank, name = MIXED_RANKS[self.count % len(MIXED_RANKS)], f"a{self.count}"
            for which in ("peft", "peft_fast"):
                library = importlib.import_module(which)
                config = library.LoraConfig(
                    r=rank, lora_alpha=rank * SCALING, target_modules="all-linear", task_type="CAUSAL_LM"
                )
                meta = dict(low_cpu_mem_usage=True, autocast_adapter_dtype=False)
                if which not in self.models:
                    # a copy of the modules around the same parameters
                    base = copy.deepcopy(self.base, {id(p): p for p in self.base.parameters()})
                    self.models[which] = library.get_peft_model(base, config, adapter_name=name, **meta).eval()
                elif which == "peft":
                    copy_adapter(self.models[which], "a0", name)
                else:
                    self.models[which].add_adapter(name, config, **meta)
            ours = dict(lora_sites_of(self.models["peft_fast"]))
            for site, layer in lora_sites_of(self.models["peft"]):
                N, K = layer.base_layer.weight.shape
                for part, shape in (("lora_A", (rank, K)), ("lora_B", (N, rank))):
                    weight = torch.randn(*shape, generator=generator, device=self.device) * 0.02
                    shared = nn.Parameter(weight.bfloat16(), requires_grad=False)
                    getattr(layer, part)[name].weight = shared
                    getattr(ours[site], part)[name].weight = shared
            self.count += 1

    def runner(self, provider: str, case: MixedDecodeCase) -> Callable[[int], Tensor]:
        """The function to time: logits (rows, vocabulary) of the next token."""
        which = provider.split()[0]
        given: dict[str, Any] = {}
        if "ids" in provider:
            given["adapter_ids"] = self.models[which].adapter_slots(case.names)
        elif which != "base":
            given["adapter_names"] = case.names
        return static_step(self.models[which], case.rows, given, torch.bfloat16)

    def release(self, case: MixedDecodeCase) -> None:
        """Give back the slot ids that a runner took."""
        bank = self.models["peft_fast"].adapter_bank
        self.models["peft_fast"].release_slots([bank.slot_of(name) for name in case.names])

    def exact(self, case: MixedDecodeCase, lora: bool) -> Tensor:
        """Logits in fp64 by the formula; one decoder layer at a time is in fp64, for all would not fit."""
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(case.names):
            rows.setdefault(name, []).append(row)
        sites = dict(lora_sites_of(self.models["peft"])) if lora else {}
        return static_step(in_double(self.base, sites, rows), case.rows, {}, torch.float64)(0)


def past_of(config: Any, rows: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Random keys and values (2, rows, heads, CONTEXT, size) of each layer: bf16's numbers in ``dtype``."""
    generator = torch.Generator(device).manual_seed(1)
    shape = (2, rows, config.num_key_value_heads, CONTEXT, config.hidden_size // config.num_attention_heads)
    layers = range(config.num_hidden_layers)
    return [torch.randn(shape, generator=generator, device=device).bfloat16().to(dtype) for _ in layers]


def next_ids(config: Any, rows: int, device: torch.device) -> Tensor:
    """The token (rows, 1) that a step reads."""
    generator = torch.Generator(device).manual_seed(2)
    return torch.randint(0, config.vocab_size, (rows, 1), generator=generator, device=device)


def static_step(model: Any, rows: int, given: dict[str, Any], dtype: torch.dtype) -> Callable[[int], Tensor]:
    """A step on a static cache; each call computes the same place again. Returns logits (rows, vocabulary)."""
    from transformers import StaticCache

    config, device = model.config, next(model.parameters()).device
    cache = StaticCache(config=config, max_cache_len=CONTEXT + 1)
    for layer, (keys, values) in zip(cache.layers, past_of(config, rows, dtype, device), strict=True):
        layer.update(keys, values)
    lengths = [layer.cumulative_length for layer in cache.layers]
    starts = [length.clone() for length in lengths]
    position = torch.full((rows, 1), CONTEXT, device=device)
    mask = torch.ones(rows, 1, 1, CONTEXT + 1, dtype=torch.bool, device=device)
    given = {**given, "input_ids": next_ids(config, rows, device), "position_ids": position, "attention_mask": mask}

    @torch.no_grad()
    def step(i: int) -> Tensor:
        torch._foreach_copy_(lengths, starts)  # the cache counts on by itself
        logits: Tensor = model(**given, past_key_values=cache).logits[:, -1]
        return logits

    return step


def in_double(base: Any, sites: dict[str, Any], rows: dict[str, list[int]]) -> Any:
    """The base in fp64, one decoder layer at a time, for all would not fit; with the updates of the rows' adapters."""
    model = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    inner = model.model
    inner.layers = nn.ModuleList(
        _InDouble(layer, {s.removeprefix(f"model.layers.{i}."): site for s, site in sites.items()
                          if s.startswith(f"model.layers.{i}.")}, rows)
        for i, layer in enumerate(inner.layers)
    )  # fmt: skip
    inner.embed_tokens, inner.norm, model.lm_head, inner.rotary_emb = (
        copy.deepcopy(part).double() for part in (inner.embed_tokens, inner.norm, model.lm_head, inner.rotary_emb)
    )
    return model


class _InDouble(nn.Module):
    """A decoder layer that is in fp64 while it runs, with the updates of the rows' adapters by the formula."""

    def __init__(self, layer: nn.Module, sites: dict[str, Any], rows: dict[str, list[int]]) -> None:
        super().__init__()
        self.layer, self.sites, self.rows = layer, sites, rows

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        layer = copy.deepcopy(self.layer).double()
        for name, site in self.sites.items():
            layer.get_submodule(name).register_forward_hook(partial(add_updates, site, self.rows))
        return layer(*args, **kwargs)


class MixedStep(Subject):
    """A ``MixedDecodeCase``."""

    group = "decode step"
    norm = 2
    rivals = ("peft",)
    seconds = 6.0
    min_rounds = 5

    def __init__(self, case: MixedDecodeCase, session: "Session") -> None:
        super().__init__(case, session)
        self.decoder = session.shared("decoder", lambda: Decoder(session.device, tiny=session.tiny_models))
        self.decoder.bring(case)
        self.runners = {name: self.decoder.runner(name, case) for name in NAMES}
        self._out = {name: list(step(0).clone()) for name, step in self.runners.items()}
        self._exact = {lora: list(self.decoder.exact(case, lora)) for lora in (False, True)}

    @classmethod
    def providers(cls, case: MixedDecodeCase, device: torch.device) -> Sequence[str]:
        return NAMES

    def compared(self, name: str) -> Compared:
        lora = name != "base"
        return Compared(self._out[name], self._out["peft" if lora else "base"], self._exact[lora])

    def runner(self, name: str) -> Callable[[int], Any]:
        return self.runners[name]

    def capturable(self, name: str) -> int:
        """Names are looked up on the host."""
        return int(name in ("base", "peft_fast ids"))

    def tokens(self) -> int:
        return int(self.case.rows)

    def facts(self, name: str) -> dict[str, Any]:
        return {"layers": self.decoder.layers}

    def close(self) -> None:
        self.decoder.release(self.case)

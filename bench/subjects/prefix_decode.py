"""A decode step end to end with prefixes, for the GPU campaign: a random Llama of the 8B's sizes.

As ``mixed_decode``: ``CONTEXT`` tokens of random keys and values behind every row, the same place computed again by
each call, one set of weights. Eagerly all have a dynamic cache, as generate has by default; peft's has the prefix of
each row in it. What is captured in a graph has a static cache, which peft cannot fill.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..cases.kinds import PrefixDecodeCase
from .lora_models import llama_8b
from .mixed_decode import CONTEXT, in_double, next_ids, past_of, static_step
from .prefix_models import NAMES, with_prefixes
from .subject import Compared, Subject

if TYPE_CHECKING:
    from ..session import Session


class PrefixDecoder:
    """The models. tiny: a hundredth of the size, to try the script on a CPU."""

    def __init__(self, device: torch.device, tiny: bool) -> None:
        self.device = device
        self.base = llama_8b(device, tiny=tiny)
        self.config = self.base.config
        self.layers = self.config.num_hidden_layers
        self.models: dict[str, Any] = {"base": self.base}

    def bring(self, case: PrefixDecodeCase) -> None:
        """Have the prefixes of a case: random, as large as keys and values are."""
        generator = torch.Generator(self.device).manual_seed(3)
        model = with_prefixes("peft_fast", self.base, case.prefix, case.prefixes).eval()
        self.tables = []
        with torch.no_grad():
            for encoder in model.prompt_encoder.values():
                weight = encoder.embedding.weight
                random = torch.randn(weight.shape, generator=generator, device=self.device) * 0.5
                weight.copy_(random.bfloat16())
                self.tables.append(weight.view(case.prefix, 2 * self.layers, self.config.num_key_value_heads, -1))
        self.models["peft_fast"] = model

    def runner(self, provider: str, case: PrefixDecodeCase) -> Callable[[int], Tensor]:
        """The function to time: logits (rows, vocabulary) of the next token."""
        given = {"adapter_names": case.names} if provider == "peft_fast" and case.prefixes > 1 else {}
        return self._dynamic_step(self._model(provider), case, given, torch.bfloat16, filled=provider == "peft")

    def static(self, provider: str, case: PrefixDecodeCase) -> Callable[[int], Tensor]:
        """The same step on a static cache, of the active prefix."""
        return static_step(self._model(provider), case.rows, {}, torch.bfloat16)

    def _model(self, provider: str) -> Any:
        return self.models["peft_fast" if provider == "peft_fast" else "base"]

    def exact(self, case: PrefixDecodeCase, prefix: bool) -> Tensor:
        """Logits in fp64, the prefix in the cache, without either library."""
        return self._dynamic_step(in_double(self.base, {}, {}), case, {}, torch.float64, filled=prefix)(0)

    def _dynamic_step(
        self, model: Any, case: PrefixDecodeCase, given: dict[str, Any], dtype: torch.dtype, filled: bool
    ) -> Callable[[int], Tensor]:
        """filled: the prefix of each row stands in the cache, as generate leaves it to peft's base model."""
        from transformers import DynamicCache

        past = past_of(self.config, case.rows, dtype, self.device)
        if filled:
            past = [torch.cat([self._expanded(case, layer, dtype), old], dim=3) for layer, old in enumerate(past)]
        cache = DynamicCache([(keys, values) for keys, values in past])
        ids = next_ids(self.config, case.rows, self.device)
        position = torch.full_like(ids, CONTEXT + case.prefix * filled)
        given = {**given, "input_ids": ids, "position_ids": position}

        @torch.no_grad()
        def step(i: int) -> Tensor:
            for layer, (keys, values) in zip(cache.layers, past, strict=True):
                layer.keys, layer.values = keys, values
            logits: Tensor = model(**given, past_key_values=cache).logits[:, -1]
            return logits

        return step

    def _expanded(self, case: PrefixDecodeCase, layer: int, dtype: torch.dtype) -> Tensor:
        """Keys and values (2, rows, heads, slots, size) of a layer's prefixes."""
        of_row = [self.tables[i % case.prefixes][:, 2 * layer : 2 * layer + 2] for i in range(case.rows)]
        return torch.stack(of_row).permute(2, 0, 3, 1, 4).to(dtype)


class PrefixStep(Subject):
    """A ``PrefixDecodeCase``. Of those that are captured, the step on a static cache is compared with fp64 too."""

    group = "decode step"
    norm = 2
    rivals = ("peft",)
    seconds = 6.0
    min_rounds = 5

    def __init__(self, case: PrefixDecodeCase, session: "Session") -> None:
        super().__init__(case, session)
        tiny = session.tiny_models
        self.decoder = session.shared("prefix decoder", lambda: PrefixDecoder(session.device, tiny))
        self.decoder.bring(case)
        self.steps = {name: self.decoder.runner(name, case) for name in NAMES}
        self._out = {name: list(step(0).clone()) for name, step in self.steps.items()}
        self._exact = {prefix: list(self.decoder.exact(case, prefix)) for prefix in (False, True)}

    @classmethod
    def providers(cls, case: PrefixDecodeCase, device: torch.device) -> Sequence[str]:
        return NAMES

    def compared(self, name: str) -> Compared:
        """Row by row, so that one with another's prefix is not lost among the others."""
        prefix = name != "base"
        out, same, exact = self._out[name], self._out["peft" if prefix else "base"], self._exact[prefix]
        if not self.capturable(name):
            return Compared(out, same, exact)
        return Compared([*out, *self.captured_runner(name)(0)], [*same, *same], [*exact, *exact])

    def checked(self) -> None:
        self._out, self._exact = {}, {}

    def runner(self, name: str) -> Callable[[int], Any]:
        return self.steps[name]

    def capturable(self, name: str) -> int:
        """Of several prefixes, the names are looked up on the host."""
        return int(name == "base" or (name == "peft_fast" and self.case.prefixes == 1))

    def captured_runner(self, name: str) -> Callable[[int], Any]:
        return self.decoder.static(name, self.case)

    def tokens(self) -> int:
        return int(self.case.rows)

    def facts(self, name: str) -> dict[str, Any]:
        return {"layers": self.decoder.layers}

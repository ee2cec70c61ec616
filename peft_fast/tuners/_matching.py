"""Which modules of a base model an adapter's config means.

A config may come from a stranger, and some regular expressions take longer than anybody waits. All of them run in the
`regex`
package (the semantics of `re`) under one budget of seconds per adapter.
"""

import math
import re
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import regex
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND, SEQ_CLS_HEAD_NAMES
from ..utils.other import Site, walk

# ordinary patterns need milliseconds for thousands of modules
MATCH_SECONDS = 5.0
# characters times the product of all counted repetitions: a{100} is compiled to 100 copies of a
MAX_COMPILED_SIZE = 200_000


class PatternBudget:
    """Matches patterns until its seconds are used up.

    Args:
        seconds: for all calls together; None means `MATCH_SECONDS`.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self.seconds = MATCH_SECONDS if seconds is None else seconds
        self._left = self.seconds
        self._compiled: dict[tuple[str, str], regex.Pattern[str]] = {}

    def match(self, field: str, pattern: str, text: str, template: str = "{}", full: bool = False) -> bool:
        """Whether `regex.match` (`fullmatch` if `full`) finds `template`, with `pattern` in the place of {}, in the
        text.

        Raises: ValueError naming the config's field and the pattern if it is not a regular expression or takes too
            long.
        """
        return self.find(field, pattern, text, template, full) is not None

    def find(
        self, field: str, pattern: str, text: str, template: str = "{}", full: bool = False
    ) -> "regex.Match[str] | None":
        """As `match`, but returns what was found."""
        start = time.perf_counter()
        try:
            compiled = self._compiled.get((template, pattern))
            if compiled is None:
                compiled = self._compiled[template, pattern] = _compile(field, pattern, template)
            matcher = compiled.fullmatch if full else compiled.match
            return matcher(text, timeout=max(self._left, 1e-3))
        except TimeoutError as error:
            raise ValueError(
                f"{field}: matching {pattern!r} against the names of the model's modules took more than "
                f"{self.seconds} s. "
                "Patterns with nested repetition, such as (a|aa)+, can take for ever; write it without."
            ) from error
        finally:
            self._left -= time.perf_counter() - start


def _compile(field: str, pattern: str, template: str) -> "regex.Pattern[str]":
    counts = [int(high or low or 1) for low, high in re.findall(r"\{(\d{0,9})(?:,(\d{0,9}))?\}", pattern)]
    size = len(pattern) * math.prod(max(count, 1) for count in counts)
    if size > MAX_COMPILED_SIZE or re.search(r"\{\d{10}|\{\d*,\d{10}", pattern):
        raise ValueError(f"{field}: the pattern {pattern[:80]!r}... with its repetitions written out is too long")
    try:
        return regex.compile(template.replace("{}", pattern))
    except (regex.error, RecursionError) as error:
        raise ValueError(f"{field}: {pattern!r} is not a regular expression: {error}") from error


class _ExcludedModule:
    """False, and tells that the module would have been looked at, had it not been excluded."""

    def __bool__(self) -> bool:
        return False


class TargetMatcher:
    """The part of a config that chooses modules, prepared for asking about many names.

    Args:
        config: with target_modules (a regular expression, or names that match whole or from a dot on),
            exclude_modules (same),
            modules_to_save, layers_to_transform, layers_pattern.
        budget: shared by everything that is matched for one adapter.
    """

    def __init__(self, config: Any, budget: PatternBudget | None = None) -> None:
        self.budget = budget or PatternBudget()
        self.targets = _names_or_pattern(config.target_modules)
        self.excluded = _names_or_pattern(getattr(config, "exclude_modules", None))
        self.saved = [f".{name}." for name in getattr(config, "modules_to_save", None) or []]
        layers = getattr(config, "layers_to_transform", None)
        self.layers: set[int] | None = {layers} if isinstance(layers, int) else set(layers or ()) or None
        patterns = getattr(config, "layers_pattern", None) or []
        self.layers_patterns = [patterns] if isinstance(patterns, str) else list(patterns)

    def __call__(self, key: str) -> bool | _ExcludedModule:
        """Whether the module `key` is a target; `_ExcludedModule` (false too) if the config keeps adapters off it."""
        if self._chosen("exclude_modules", self.excluded, key):
            return _ExcludedModule()
        # what is trained whole, and what is inside it, is never adapted as well
        if any(name in f".{key}." for name in self.saved):
            return _ExcludedModule()
        if not self._chosen("target_modules", self.targets, key):
            return False
        if self.layers is None or isinstance(self.targets, str) or key in self.targets:
            return True
        return self._layer_index(key) in self.layers

    def _chosen(self, field: str, wanted: str | frozenset[str], key: str) -> bool:
        if isinstance(wanted, str):
            return self.budget.match(field, wanted, key, full=True)
        return bool(wanted) and not wanted.isdisjoint(_suffixes(key))

    def _layer_index(self, key: str) -> int | None:
        """The first number after `layers_pattern` (default: after any two names). First, since experts are numbered
        too.
        """
        for pattern in self.layers_patterns:
            found = self.budget.find("layers_pattern", pattern, key, template=r"(?:^|.*?\.){}\.(?P<idx>\d+)\.")
            if found:
                return int(found["idx"])
        if self.layers_patterns:
            return None
        return next((int(part) for part in key.split(".")[2:-1] if part.isdecimal()), None)


def _names_or_pattern(value: str | Iterable[str] | None) -> str | frozenset[str]:
    return value if isinstance(value, str) and value else frozenset(value or ())


def _suffixes(name: str) -> list[str]:
    """All dotted endings of a name, the shortest first: c, b.c, a.b.c."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in reversed(range(len(parts)))]


def check_target_module_exists(config: Any, key: str) -> bool | _ExcludedModule:
    """Whether `config` adapts the module `key`. Raises: ValueError for a pattern that is wrong or takes too long."""
    return TargetMatcher(config)(key)


def match_target_against_key(target_pattern: str, key: str) -> "regex.Match[str] | None":
    """The match if the whole of `key` matches the regular expression `target_pattern`. Raises: as
    `PatternBudget.match`.
    """
    return PatternBudget().find("target_modules", target_pattern, key, full=True)


def get_pattern_key(pattern_keys: Iterable[str], key_to_match: str, field: str = "rank_pattern/alpha_pattern") -> str:
    """The first key of rank_pattern or alpha_pattern that means the module, else the module's own name.

    A key means a module if it matches, as a regular expression, the whole of its name or its end from a dot on.
    Raises: as `PatternBudget.match`.
    """
    budget = PatternBudget()
    return next((key for key in pattern_keys if _pattern_means(budget, field, key, key_to_match)), key_to_match)


def _pattern_means(budget: PatternBudget, field: str, pattern: str, name: str) -> bool:
    return budget.match(field, pattern, name, template=r"(.*\.)?({})$")


def unused_patterns(config: Any, field: str, names: Sequence[str], budget: PatternBudget) -> list[str]:
    """Keys of `config.<field>` (rank_pattern, alpha_pattern) that mean none of the modules, sorted.

    Every key meets every name: what `get_pattern_key` does for each module later takes no longer than this did.
    """
    patterns = getattr(config, field, None) or {}
    return sorted(key for key in patterns if not sum(_pattern_means(budget, field, key, name) for name in names))


def is_linear(module: nn.Module) -> bool:
    """Whether it is an nn.Linear or a transformers Conv1D (which exists only once transformers' module is loaded)."""
    transformers = sys.modules.get("transformers.pytorch_utils")
    return isinstance(module, nn.Linear) or (transformers is not None and isinstance(module, transformers.Conv1D))


def resolve_all_linear(config: Any, model: Any, sites: Iterable[Site]) -> None:
    """Replace target_modules="all-linear" by the names of all linear layers but the output embeddings and, for sequence
    classification, the head. Other values stay."""
    targets = getattr(config, "target_modules", None)
    if not isinstance(targets, str) or targets.lower() != INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None and hasattr(model, "get_output_embeddings") and config.task_type == "SEQ_CLS":
        heads = (getattr(model, name, None) for name in SEQ_CLS_HEAD_NAMES)
        head = next((module for module in heads if module is not None), None)
    names, skipped = set(), []
    for site in sites:
        adapted: Any = site.module
        base = adapted.get_base_layer() if hasattr(adapted, "get_base_layer") else adapted
        if isinstance(base, NonDynamicallyQuantizableLinear):
            skipped.append(site.name)
        elif site.name and adapted is not head and is_linear(base):
            names.add(site.name)
    if skipped:
        more = f" and {len(skipped) - 3} more" if len(skipped) > 3 else ""
        warnings.warn(
            f"target_modules='all-linear' leaves out {', '.join(skipped[:3])}{more}: torch.nn.MultiheadAttention reads "
            "the weight of its out_proj and never calls it, so that an adapter would have no effect.",
            stacklevel=6,
        )
    config.target_modules = names


def _maybe_include_all_linear_layers(peft_config: Any, model: nn.Module) -> Any:
    """`resolve_all_linear` for a whole model; returns the config, which is changed in place."""
    resolve_all_linear(peft_config, model, walk(model, "nothing"))
    return peft_config


def _find_minimal_target_modules(
    target_modules: list[str] | set[str], other_module_names: list[str] | set[str]
) -> set[str]:
    """The shortest endings that tell the targets from the other modules: hundreds of names often come down to a few.

    Example: 100 times layers.<i>.attn.q_proj beside layers.<i>.attn.k_proj -> {"q_proj"}.
    Raises: ValueError if `target_modules` is a string, is empty, holds "" or shares a name with `other_module_names`.
    """
    if isinstance(target_modules, str) or not target_modules:
        raise ValueError("target_modules should be a list or set of strings.")
    if "" in target_modules:
        raise ValueError("target_modules should not contain an empty string.")
    common = set(target_modules) & set(other_module_names)
    if common:
        raise ValueError(f"target_modules and other_module_names contain common elements: {sorted(common)}")
    taken = {suffix for name in other_module_names for suffix in _suffixes(name)}
    # an ending that is free for one target is free for all that share it, so the shortest ones cover each other
    return {next((suffix for suffix in _suffixes(name) if suffix not in taken), name) for name in target_modules}

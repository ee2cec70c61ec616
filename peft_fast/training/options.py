"""What training can be told: every option, its default, what it may be, and which of them go together.

No torch here: `peft-fast train --help` answers at once.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from ..jobs.errors import UsageError

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}  # transformers' names
METHODS = ("lora", "prefix", "prompt", "p-tuning")
QUANTIZE = ("nf4", "nf4-dq", "fp4", "int8", "none")
TASKS = ("causal-lm", "seq-cls", "seq2seq")
LEARNING_RATES = {"lora": 2e-4, "prefix": 1e-2, "prompt": 3e-2, "p-tuning": 1e-3}  # where PEFT's own examples begin
_LORA = {"target_modules": ["all-linear"], "r": 16, "lora_alpha": 32, "lora_dropout": 0.05}
_PROMPT = {"num_virtual_tokens": 20}
_KINDS = {"LORA": "lora", "PREFIX_TUNING": "prefix", "PROMPT_TUNING": "prompt"}  # of an adapter's file: the method
_TASKS = {"CAUSAL_LM": "causal-lm", "SEQ_CLS": "seq-cls", "SEQ_2_SEQ_LM": "seq2seq"}
# files count by what is in them
_NOT_OF_THE_RESULT = ("data", "eval_data", "model", "adapter", "out", "device", "resume")


class Options(NamedTuple):
    """All of them, as ``complete`` makes them. `peft-fast train --help` has the meaning of each."""

    model: Path
    data: Path
    out: Path
    method: str
    lr: float
    eval_data: Path | None = None
    eval_split: float = 0.05
    task: str = "causal-lm"
    adapter: Path | None = None
    quantize: str = "none"
    target_modules: list[str] | None = None
    r: int | None = None
    lora_alpha: int | None = None
    lora_dropout: float | None = None
    num_virtual_tokens: int | None = None
    epochs: float = 3.0
    max_steps: int | None = None
    batch_size: int = 8
    gradient_accumulation: int = 1
    max_length: int | None = None
    bf16: bool = False
    gradient_checkpointing: bool = False
    weight_decay: float = 0.0
    schedule: str = "linear"
    warmup: float = 0.03
    packing: bool = False
    save_steps: int | None = None
    keep_best: bool = False
    early_stopping: int | None = None
    seed: int = 0
    device: str = "auto"
    resume: bool = False

    def of_the_result(self) -> dict[str, Any]:
        """Option -> value, of those that decide what comes out, as plain JSON."""
        return {_flag(name): value for name, value in self._asdict().items() if name not in _NOT_OF_THE_RESULT}


class Rule(NamedTuple):
    """parse: from the text of a command line, ValueError where it is none. good: whether a value can be used."""

    parse: Callable[[str], Any]
    good: Callable[[Any], bool]
    expected: str


def complete(given: Mapping[str, Any]) -> Options:
    """The options, those that are not given by default or by the method's default; None is the same as not given.

    Raises: UsageError for an option that there is not, a value that it cannot have, an option of another method, and an
        adapter that cannot be trained on with them.
    """
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        _check(name, value)
    if lacking := [name for name in ("model", "data", "out") if name not in given]:
        raise UsageError(f"{_flag(lacking[0])} is needed")
    values = given | {name: Path(given[name]) for name in _PATHS if name in given}
    if "adapter" in values:
        values |= _of_the_adapter(values)
    else:
        values.setdefault("method", METHODS[0])
    method = values["method"]
    own, other, others = (_LORA, _PROMPT, METHODS[1:]) if method == "lora" else (_PROMPT, _LORA, METHODS[:1])
    for name in other:
        if values.get(name) is not None:
            raise UsageError(f"{_flag(name)} is for --method {' or '.join(others)}, not for {method}")
    if "adapter" not in values:
        values = own | values
    if "target_modules" in given:
        values["target_modules"] = list(given["target_modules"])
    if values.get("packing") and (method != "lora" or values.get("task", TASKS[0]) != "causal-lm"):
        raise UsageError("--packing is for --method lora and --task causal-lm: other rows cannot share one")
    values.setdefault("lr", LEARNING_RATES[method])
    values["keep_best"] = values.get("keep_best", False) or "early_stopping" in given
    return Options(**values)


def _check(name: str, value: Any) -> None:
    if name not in Options._fields:
        near = get_close_matches(name, Options._fields, 1)
        raise UsageError(f"there is no option {name!r}{f', did you mean {near[0]!r}?' if near else ''}")
    if name in _PATHS:
        if not isinstance(value, str | Path):
            raise UsageError(f"{_flag(name)} must be a path, got {value!r}")
    elif not RULES[name].good(value):
        raise UsageError(f"{_flag(name)} must be {RULES[name].expected}, got {value!r}")


def _of_the_adapter(given: Mapping[str, Any]) -> dict[str, Any]:
    """What the file of --adapter says in place of options."""
    where, task_now = f"--adapter {given['adapter']}", given.get("task", TASKS[0])
    if fixed := [name for name in ("method", *_LORA, *_PROMPT) if name in given]:
        raise UsageError(f"{_flag(fixed[0])}: --adapter stays what it is; leave {_flag(fixed[0])} out")
    try:
        saved = json.loads((given["adapter"] / "adapter_config.json").read_text(encoding="utf-8"))
        kind, task = saved["peft_type"], saved.get("task_type")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{where}: expected the directory of an adapter, with adapter_config.json: {error}") from None
    if kind == "P_TUNING" or saved.get("prefix_projection"):
        raise UsageError(f"{where}: the file has what its network made, not the network, which is what is trained")
    if kind not in _KINDS:
        raise UsageError(f"{where}: its method is {kind!r}; expected {', '.join(_KINDS)}")
    if _TASKS.get(task, task_now) != task_now:
        raise UsageError(f"{where}: made for --task {_TASKS[task]}, not for {task_now}")
    values = {name: saved.get(name) for name in ("r", "lora_alpha", "lora_dropout")} if kind == "LORA" else {}
    return {"method": _KINDS[kind], **values, "num_virtual_tokens": saved.get("num_virtual_tokens")}


def _whole(low: int) -> Rule:
    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit():
            raise ValueError(text)
        return int(text)

    return Rule(parse, lambda value: type(value) is int and value >= low, f"a whole number, {low} or more")


def _number(low: float, high: float, expected: str, *, low_allowed: bool = False) -> Rule:
    def good(value: Any) -> bool:
        if type(value) not in (int, float):
            return False
        return bool(low < value < high or (low_allowed and value == low))

    return Rule(float, good, expected)


def _one_of(names: Sequence[str]) -> Rule:
    return Rule(str, lambda value: value in tuple(names), f"one of {', '.join(names)}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


_PATHS = ("model", "data", "out", "eval_data", "adapter")
_SWITCH = Rule(str, lambda value: type(value) is bool, "True or False")
_NAMES = Rule(
    str,
    lambda value: isinstance(value, list | tuple) and bool(value) and all(isinstance(name, str) for name in value),
    "a list of names of layers",
)
RULES = {
    "eval_split": _number(0, 1, "a fraction from 0 (no evaluation) to below 1", low_allowed=True),
    "task": _one_of(TASKS),
    "method": _one_of(METHODS),
    "quantize": _one_of(QUANTIZE),
    "target_modules": _NAMES,
    "r": _whole(1),
    "lora_alpha": _whole(1),
    "lora_dropout": _number(0, 1, "a number from 0 to below 1", low_allowed=True),
    "num_virtual_tokens": _whole(1),
    "epochs": _number(0, math.inf, "a number above 0"),
    "max_steps": _whole(1),
    "batch_size": _whole(1),
    "gradient_accumulation": _whole(1),
    "lr": _number(0, math.inf, "a number above 0"),
    "max_length": _whole(2),
    "bf16": _SWITCH,
    "gradient_checkpointing": _SWITCH,
    "weight_decay": _number(0, math.inf, "a number, 0 or more", low_allowed=True),
    "schedule": _one_of(tuple(SCHEDULES)),
    "warmup": _number(0, 1, "a fraction from 0 to below 1", low_allowed=True),
    "packing": _SWITCH,
    "save_steps": _whole(1),
    "keep_best": _SWITCH,
    "early_stopping": _whole(1),
    "seed": _whole(0),
    "device": Rule(str, lambda value: isinstance(value, str), "the name of a device"),
    "resume": _SWITCH,
}

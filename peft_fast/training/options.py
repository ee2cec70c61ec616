"""The options of `peft-fast train`: what they are, what they default to, and which of them go together.

No torch here: `peft-fast train --help` answers at once.
"""

import argparse
import json
import math
from collections.abc import Callable
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
_NOT_OF_THE_RESULT = (
    "data",
    "eval_data",
    "model",
    "adapter",
    "out",
    "device",
    "resume",
)  # files count by what is in them


class Options(NamedTuple):
    """What the command line says; the options' help has the meaning."""

    model: Path
    data: Path
    eval_data: Path | None
    eval_split: float
    out: Path
    task: str
    adapter: Path | None
    method: str
    quantize: str
    target_modules: list[str] | None
    r: int | None
    lora_alpha: int | None
    lora_dropout: float | None
    num_virtual_tokens: int | None
    epochs: float
    max_steps: int | None
    batch_size: int
    gradient_accumulation: int
    lr: float
    max_length: int | None
    bf16: bool
    gradient_checkpointing: bool
    weight_decay: float
    schedule: str
    warmup: float
    packing: bool
    save_steps: int | None
    keep_best: bool
    early_stopping: int | None
    seed: int
    device: str
    resume: bool

    def of_the_result(self) -> dict[str, Any]:
        """Option -> value, of those that decide what comes out, as plain JSON."""
        return {_flag(name): value for name, value in self._asdict().items() if name not in _NOT_OF_THE_RESULT}


def from_arguments(args: argparse.Namespace) -> Options:
    """The options, with the defaults of the method filled in.

    Raises: UsageError for an option of another method, and for an adapter that cannot be trained on with them.
    """
    values = {name: getattr(args, name) for name in Options._fields}
    if args.adapter is not None:
        values |= _of_the_adapter(args)
        args = argparse.Namespace(**{**vars(args), "method": values["method"]})
    elif args.method is None:
        values["method"] = args.method = METHODS[0]
    own, other, others = (_LORA, _PROMPT, METHODS[1:]) if args.method == "lora" else (_PROMPT, _LORA, METHODS[:1])
    for name in other:
        if values[name] is not None:
            raise UsageError(f"{_flag(name)} is for --method {' or '.join(others)}, not for {args.method}")
    for name, default in own.items():
        if values[name] is None and args.adapter is None:
            values[name] = default
    if args.target_modules is not None:
        values["target_modules"] = [name for names in args.target_modules for name in names.split(",") if name]
        if not values["target_modules"]:
            raise UsageError(f"--target-modules {' '.join(args.target_modules)}: expected names of layers")
    if args.packing and (args.method != "lora" or args.task != "causal-lm"):
        raise UsageError("--packing is for --method lora and --task causal-lm: other rows cannot share one")
    if args.lr is None:
        values["lr"] = LEARNING_RATES[args.method]
    values["keep_best"] = args.keep_best or args.early_stopping is not None
    return Options(**values)


def _of_the_adapter(args: argparse.Namespace) -> dict[str, Any]:
    """What the file of --adapter says in place of options."""
    where = f"--adapter {args.adapter}"
    given = next((name for name in ("method", *_LORA, *_PROMPT) if getattr(args, name) is not None), None)
    if given is not None:
        raise UsageError(f"{_flag(given)}: --adapter stays what it is; leave {_flag(given)} out")
    try:
        saved = json.loads((args.adapter / "adapter_config.json").read_text(encoding="utf-8"))
        kind, task = saved["peft_type"], saved.get("task_type")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{where}: expected the directory of an adapter, with adapter_config.json: {error}") from None
    if kind == "P_TUNING" or saved.get("prefix_projection"):
        raise UsageError(f"{where}: the file has what its network made, not the network, which is what is trained")
    if kind not in _KINDS:
        raise UsageError(f"{where}: its method is {kind!r}; expected {', '.join(_KINDS)}")
    if _TASKS.get(task, args.task) != args.task:
        raise UsageError(f"{where}: made for --task {_TASKS[task]}, not for {args.task}")
    values = {name: saved.get(name) for name in ("r", "lora_alpha", "lora_dropout")} if kind == "LORA" else {}
    return {"method": _KINDS[kind], **values, "num_virtual_tokens": saved.get("num_virtual_tokens")}


def add_to(parser: argparse.ArgumentParser) -> None:
    """Give the parser of `peft-fast train` its options."""
    _add_files(parser.add_argument_group("model, data, result"), parser)
    _add_method(parser.add_argument_group("method"))
    _add_training(parser.add_argument_group("training"))


def _add_files(group: Any, parser: argparse.ArgumentParser) -> None:
    add = group.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="the base model, saved by transformers")
    add("--data", type=Path, required=True, metavar="FILE.jsonl", help="one JSON object per line, see below")
    held_out = group.add_mutually_exclusive_group()
    held_out.add_argument(
        "--eval-split",
        type=_number(0, 1, "a fraction from 0 (no evaluation) to below 1", low_allowed=True),
        default=0.05,
        metavar="FRACTION",
        help="of the lines, chosen by --seed, held out for evaluation; at least one line (default: 0.05)",
    )
    held_out.add_argument("--eval-data", type=Path, metavar="FILE.jsonl", help="evaluate on these lines instead")
    add("--out", type=Path, required=True, metavar="DIR", help="adapter, checkpoints, results.json, loss.png")
    add(
        "--resume",
        action="store_true",
        help="insist on going on: an error if --out has no run (one that is there is gone on with in any case)",
    )
    add(
        "--adapter", type=Path, metavar="DIR", help="train this adapter on, in place of a new one; DIR is left as it is"
    )
    add("--task", choices=TASKS, default="causal-lm", help="what the model learns (default: causal-lm)")


def _add_method(group: Any) -> None:
    add = group.add_argument
    add("--method", choices=METHODS, help="default: lora")
    add(
        "--quantize",
        choices=QUANTIZE,
        default="none",
        help="the frozen base in 4 or 8 bits, by bitsandbytes; nf4-dq: its scales quantized too (default: none)",
    )
    add(
        "--target-modules",
        nargs="+",
        metavar="NAME",
        help="lora: names of the layers, with spaces or commas between, or all-linear (default: all-linear)",
    )
    add("--r", type=whole(1), metavar="N", help="lora: the rank (default: 16)")
    add("--lora-alpha", type=whole(1), metavar="N", help="lora: the update is scaled by it / rank (default: 32)")
    add(
        "--lora-dropout",
        type=_number(0, 1, "a number from 0 to below 1", low_allowed=True),
        metavar="P",
        help="lora: default 0.05",
    )
    add("--num-virtual-tokens", type=whole(1), metavar="N", help="the others: learned tokens (default: 20)")


def _add_training(group: Any) -> None:
    add = group.add_argument
    length = group.add_mutually_exclusive_group()
    length.add_argument(
        "--epochs", type=_number(0, math.inf, "a number above 0"), default=3.0, metavar="X", help="default: 3"
    )
    length.add_argument("--max-steps", type=whole(1), metavar="N", help="steps of the optimizer, in place of --epochs")
    add("--batch-size", type=whole(1), default=8, metavar="N", help="rows of a batch (default: 8)")
    add("--gradient-accumulation", type=whole(1), default=1, metavar="N", help="batches of a step (default: 1)")
    rates = ", ".join(f"{name} {rate:g}" for name, rate in LEARNING_RATES.items())
    add(
        "--lr",
        "--learning-rate",
        dest="lr",
        type=_number(0, math.inf, "a number above 0"),
        metavar="X",
        help=f"learning rate, see --schedule (default: {rates})",
    )
    add(
        "--schedule",
        choices=SCHEDULES,
        default="linear",
        help="how the rate goes down to 0 when it has been warmed up, or that it stays (default: linear)",
    )
    fraction = _number(0, 1, "a fraction from 0 to below 1", low_allowed=True)
    add("--warmup", type=fraction, default=0.03, metavar="FRACTION", help="of the steps (default: 0.03)")
    decay = _number(0, math.inf, "a number, 0 or more", low_allowed=True)
    add("--weight-decay", type=decay, default=0.0, metavar="X", help="of AdamW (default: 0)")
    add(
        "--max-length",
        type=whole(2),
        metavar="N",
        help="tokens of a row, longer ones are cut (default: 512, or what the model has positions for)",
    )
    add("--bf16", action="store_true", help="the base in bfloat16, autocast; without it everything is in float32")
    add("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    add("--packing", action="store_true", help="the rows of a batch behind one another: no time for filling them up")
    add(
        "--save-steps",
        type=whole(1),
        metavar="N",
        help="steps between checkpoints and evaluations (default: an epoch, if that is not more than 100 steps or less "
        "than a 20th of the run)",
    )
    add("--keep-best", action="store_true", help="the adapter of the checkpoint with the least loss held out")
    add(
        "--early-stopping",
        type=whole(1),
        metavar="N",
        help="stop when N evaluations in a row found no smaller loss (implies --keep-best)",
    )
    add("--seed", type=whole(0), default=0, metavar="N", help="default: 0")
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda (default: auto)")


def whole(low: int) -> Callable[[str], int]:
    """For argparse: a whole number, `low` or more."""

    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < low:
            raise argparse.ArgumentTypeError(f"must be a whole number, {low} or more, got {text!r}")
        return int(text)

    return parse


def _number(low: float, high: float, expected: str, *, low_allowed: bool = False) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (low < value < high or (low_allowed and value == low)):
            raise argparse.ArgumentTypeError(f"must be {expected}, got {text!r}")
        return value

    return parse


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


DESCRIPTION = """Fine-tune a frozen model, quantized or not, with LoRA or learned tokens, on a file of examples.
On a GPU or a CPU; the adapter in --out is in PEFT's format."""

EPILOG = """a line of the data, all lines of one kind (other keys are ignored):
  --task causal-lm   {"text": "all of it is learned"}
                     or {"prompt": "Translate: cat", "completion": " Katze"}: the loss is on the completion only
                     or {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}:
                     by the tokenizer's chat template, the loss is on the assistant's answers; "tools" if there are any
  --task seq-cls     {"text": "I like it", "label": "good"}; labels are texts or whole numbers
  --task seq2seq     {"prompt": "...", "completion": "..."}, for models with encoder and decoder
  Prompt and completion are joined as they are, no space or chat template between them; the end token follows.
  Of a file in CSV, Parquet or another format it is said how to convert it.
  A model without tokenizer whose vocabulary is 256 takes bytes as tokens. Token classification needs a label for each
  token, which these lines cannot say: it is not among the tasks.

Ctrl-C ends the step, saves a checkpoint and stops (exit code 130); a second one stops at once. Stopped or killed, the
same command goes on from the last checkpoint, with the losses that it would have had (same machine and versions).
With other settings it refuses to touch --out. The model is evaluated before the first step, with every checkpoint and
at the end. To train an adapter further (other data, more epochs): --adapter, with another --out.
Exit codes: 0 done, 1 failed, 2 an option or a line of the data cannot be used, 130 stopped with Ctrl-C.

examples:
  peft-fast train --model DIR --data train.jsonl --out my_adapter --quantize nf4 --bf16     # QLoRA
  peft-fast train --model DIR --data train.jsonl --out my_prefix --method prefix --epochs 5
  peft-fast train --model DIR --data reviews.jsonl --out my_classifier --task seq-cls --eval-data test.jsonl
  peft-fast train --model DIR --data chats.jsonl --out my_chat --schedule cosine --early-stopping 3
  peft-fast train --model DIR --data more.jsonl --out my_chat_2 --adapter my_chat"""

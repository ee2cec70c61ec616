"""`peft-fast train`: an adapter for a model, quantized or not, from a file of examples."""

import argparse
import sys
from pathlib import Path
from typing import Any

from ..jobs.errors import Stopped
from ..training.options import LEARNING_RATES, METHODS, QUANTIZE, RULES, SCHEDULES, TASKS, complete

HELP = "fine-tune a model, quantized or not, with LoRA, a prefix or learned tokens, on a file of examples"
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


def add_to(parser: argparse.ArgumentParser) -> None:
    """The command's options: those that are not given are left to ``training.options``."""
    parser.argument_default = argparse.SUPPRESS
    _add_files(parser.add_argument_group("model, data, result"))
    _add_method(parser.add_argument_group("method"))
    _add_training(parser.add_argument_group("training"))


def _add_files(group: Any) -> None:
    add = group.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="the base model, saved by transformers")
    add("--data", type=Path, required=True, metavar="FILE.jsonl", help="one JSON object per line, see below")
    held_out = group.add_mutually_exclusive_group()
    held_out.add_argument(
        "--eval-split",
        type=_value("eval_split"),
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
    add("--task", choices=TASKS, help="what the model learns (default: causal-lm)")


def _add_method(group: Any) -> None:
    add = group.add_argument
    add("--method", choices=METHODS, help="default: lora")
    add(
        "--quantize",
        choices=QUANTIZE,
        help="the frozen base in 4 or 8 bits, by bitsandbytes; nf4-dq: its scales quantized too (default: none)",
    )
    add(
        "--target-modules",
        nargs="+",
        metavar="NAME",
        help="lora: names of the layers, with spaces or commas between, or all-linear (default: all-linear)",
    )
    add("--r", type=_value("r"), metavar="N", help="lora: the rank (default: 16)")
    add(
        "--lora-alpha",
        type=_value("lora_alpha"),
        metavar="N",
        help="lora: the update is scaled by it / rank (default: 32)",
    )
    add(
        "--lora-dropout",
        type=_value("lora_dropout"),
        metavar="P",
        help="lora: default 0.05",
    )
    add(
        "--num-virtual-tokens",
        type=_value("num_virtual_tokens"),
        metavar="N",
        help="the others: learned tokens (default: 20)",
    )


def _add_training(group: Any) -> None:
    add = group.add_argument
    length = group.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=_value("epochs"), metavar="X", help="default: 3")
    length.add_argument(
        "--max-steps", type=_value("max_steps"), metavar="N", help="steps of the optimizer, in place of --epochs"
    )
    add("--batch-size", type=_value("batch_size"), metavar="N", help="rows of a batch (default: 8)")
    add(
        "--gradient-accumulation",
        type=_value("gradient_accumulation"),
        metavar="N",
        help="batches of a step (default: 1)",
    )
    rates = ", ".join(f"{name} {rate:g}" for name, rate in LEARNING_RATES.items())
    add(
        "--lr",
        "--learning-rate",
        dest="lr",
        type=_value("lr"),
        metavar="X",
        help=f"learning rate, see --schedule (default: {rates})",
    )
    add(
        "--schedule",
        choices=SCHEDULES,
        help="how the rate goes down to 0 when it has been warmed up, or that it stays (default: linear)",
    )
    add("--warmup", type=_value("warmup"), metavar="FRACTION", help="of the steps (default: 0.03)")
    add("--weight-decay", type=_value("weight_decay"), metavar="X", help="of AdamW (default: 0)")
    add(
        "--max-length",
        type=_value("max_length"),
        metavar="N",
        help="tokens of a row, longer ones are cut (default: 512, or what the model has positions for)",
    )
    add("--bf16", action="store_true", help="the base in bfloat16, autocast; without it everything is in float32")
    add("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    add("--packing", action="store_true", help="the rows of a batch behind one another: no time for filling them up")
    add(
        "--save-steps",
        type=_value("save_steps"),
        metavar="N",
        help="steps between checkpoints and evaluations (default: an epoch, if that is not more than 100 steps or less "
        "than a 20th of the run)",
    )
    add("--keep-best", action="store_true", help="the adapter of the checkpoint with the least loss held out")
    add(
        "--early-stopping",
        type=_value("early_stopping"),
        metavar="N",
        help="stop when N evaluations in a row found no smaller loss (implies --keep-best)",
    )
    add("--seed", type=_value("seed"), metavar="N", help="default: 0")
    add("--device", help="auto (a GPU if there is one), cpu, cuda (default: auto)")


def run(args: argparse.Namespace) -> int:
    """Returns 0 when the adapter is in --out, 130 if it was stopped (143 by SIGTERM)."""
    given = {name: value for name, value in vars(args).items() if name not in ("command", "debug")}
    if "target_modules" in given:
        given["target_modules"] = [name for names in given["target_modules"] for name in names.split(",") if name]
    options = complete(given)
    from ..training.run import run as train

    try:
        train(options, say)
    except Stopped as stopped:
        print(f"peft-fast: {stopped}", file=sys.stderr)
        return stopped.exit_code
    return 0


def say(text: str) -> None:
    """Print at once, also where the output is no terminal."""
    print(text, flush=True)


def _value(name: str) -> Any:
    """The type of an option, for argparse."""
    rule = RULES[name]

    def parse(text: str) -> Any:
        try:
            value = rule.parse(text)
        except ValueError:
            value = None
        if value is None or not rule.good(value):
            raise argparse.ArgumentTypeError(f"must be {rule.expected}, got {text!r}")
        return value

    return parse

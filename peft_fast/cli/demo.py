"""`peft-fast demo`: adapters on a small model, each best on its own text."""

import argparse
from pathlib import Path

from .arguments import whole

HELP = "train four LoRA adapters and a prefix on a CPU in under 3 minutes and see each win on its own text"
DESCRIPTION = """Fine-tune a small byte-level Llama with one LoRA adapter per Python package, on the package's
docstrings, and with one prefix, on code; save the adapters in PEFT's format, load them back, compare held-out losses,
and run all in one batch. Fails (exit code 1) unless every adapter wins on its own text."""
EPILOG = "Stop it with Ctrl-C whenever you like: finished adapters are kept, the same command goes on."


def add_to(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add("--out", type=Path, default=Path("peft_fast_demo"), metavar="DIR", help="default: %(default)s")
    add(
        "--steps",
        type=whole(1),
        default=None,
        metavar="N",
        help="training steps per adapter (default: 40; 12 with --quick)",
    )
    add("--seed", type=whole(0), default=0, metavar="N", help="default: %(default)s")
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ... (default: auto)")
    add("--quick", action="store_true", help="a quarter of the work: smaller batches, fewer steps, less text")
    add("--fresh", action="store_true", help="train again what an earlier run left in --out")


def run(args: argparse.Namespace) -> int:
    """Returns 0, if every adapter wins on its own text."""
    from ..demo import run as demo

    steps = args.steps or (12 if args.quick else 40)
    demo.run(demo.Settings(args.out, steps, args.seed, args.device, args.quick), fresh=args.fresh, say=say)
    return 0


def say(text: str) -> None:
    """Print at once, also where the output is no terminal."""
    print(text, flush=True)

"""The `peft-fast` command: options, exit codes, one-line errors.

Exit codes: 0 done, 1 the job failed, 2 an option's value cannot be used, 130 stopped with Ctrl-C.
Torch is imported by the commands, not here: `peft-fast --help` answers at once.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from peft_fast import __version__

from .errors import CommandError, UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (default: the process's own) and return its exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 2
    command: Callable[[argparse.Namespace], int] = COMMANDS[args.command]
    try:
        return command(args)
    except KeyboardInterrupt:
        return _complain("stopped. What was finished is kept: the same command goes on from there", 130)
    except UsageError as error:
        return _complain(f"error: {error}", 2)
    except (CommandError, OSError, ValueError, RuntimeError) as error:  # what the library raises for bad input
        if args.debug:
            raise
        return _complain(f"error: {_one_line(error)}", 1)


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} ({self.prog} --help shows the options)\n")


def build_parser() -> OneLineParser:
    """All commands with their options."""
    parser = OneLineParser(prog="peft-fast", description="PEFT's API and PEFT's files, at the speed of the base model.")
    parser.add_argument("--version", action="version", version=f"peft-fast {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    _add_demo(commands)
    commands.add_parser(
        "info",
        help="versions, devices, and the implementation that each op will use, and why",
        description="Print versions, devices, and for each op the implementation that will be used, and why.",
    )
    check = commands.add_parser(
        "check",
        help="validate an adapter directory without loading its weights into a model",
        description="Validate an adapter directory: its configuration; names, shapes, dtypes, values of its weights.",
        epilog="example: peft-fast check peft_fast_demo/adapters/email --base peft_fast_demo/base",
    )
    check.add_argument("adapter", type=Path, metavar="ADAPTER_DIR", help="directory with adapter_config.json")
    check.add_argument(
        "--base",
        metavar="MODEL",
        help="directory or hub name of the base model: only its config is read, and every weight of the adapter "
        "has to fit it, with none missing",
    )
    return parser


def _add_demo(commands: "argparse._SubParsersAction[OneLineParser]") -> None:
    demo = commands.add_parser(
        "demo",
        help="train four LoRA adapters on a CPU in under 3 minutes and see each win on its own text",
        description="Fine-tune a small byte-level Llama with one LoRA adapter per Python package, on the package's "
        "docstrings; save the adapters in PEFT's format, load them back, and compare held-out losses. Fails (exit "
        "code 1) unless every adapter wins on its own package.",
        epilog="Stop it with Ctrl-C whenever you like: finished adapters are kept, the same command goes on.",
    )
    demo.add_argument("--out", type=Path, default=Path("peft_fast_demo"), metavar="DIR", help="default: %(default)s")
    demo.add_argument(
        "--steps",
        type=_positive,
        default=None,
        metavar="N",
        help="training steps per adapter (default: 40; 12 with --quick)",
    )
    demo.add_argument("--seed", type=_not_negative, default=0, metavar="N", help="default: %(default)s")
    demo.add_argument(
        "--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ... (default: auto)"
    )
    demo.add_argument(
        "--quick", action="store_true", help="a quarter of the work: smaller batches, fewer steps, less text"
    )
    demo.add_argument("--fresh", action="store_true", help="train again what an earlier run left in --out")


def _demo(args: argparse.Namespace) -> int:
    from . import demo

    steps = args.steps or (12 if args.quick else 40)
    return demo.run(demo.Settings(args.out, steps, args.seed, args.device, args.quick), fresh=args.fresh)


def _info(args: argparse.Namespace) -> int:
    from . import info

    print(info.report())
    return 0


def _check(args: argparse.Namespace) -> int:
    from . import check

    print(check.report(args.adapter, args.base))
    return 0


COMMANDS = {"demo": _demo, "info": _info, "check": _check}


def _positive(text: str) -> int:
    value = _not_negative(text)
    if value == 0:
        raise argparse.ArgumentTypeError("must be at least 1, got 0")
    return value


def _not_negative(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 or more, got {text!r}")
    return int(text)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _complain(message: str, code: int) -> int:
    print(f"peft-fast: {message}", file=sys.stderr)
    return code

"""The `peft-fast` command: its commands, exit codes, one-line errors. Each command is a module of its own here.

Exit codes: 0 done, 1 the job failed, 2 an option's value cannot be used, 130 stopped with Ctrl-C.
Torch is imported by the commands when they run: `peft-fast --help` answers at once.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from peft_fast import __version__

from ..jobs.errors import JobError, UsageError
from . import bench, check, demo, generate, info, plan, run, train, tune

COMMANDS = {
    "demo": demo, "info": info, "check": check, "generate": generate, "train": train, "plan": plan, "bench": bench,
    "tune": tune, "run": run,
}  # fmt: skip
BEGIN = """
three things to try:
  peft-fast demo                                      # trains five adapters on a CPU and runs them in one batch
  peft-fast train --model DIR --data rows.jsonl --out my_adapter --quantize nf4 --bf16      # QLoRA, from a file
  peft-fast generate --model DIR --adapters-dir ADAPTERS --in requests.jsonl --out results.jsonl"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (default: the process's own) and return its exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 2
    command = COMMANDS[args.command]
    try:
        code: int = command.run(args)
        return code
    except KeyboardInterrupt:
        if command is run:
            raise
        return _complain("stopped. What was finished is kept: the same command goes on from there", 130)
    except UsageError as error:
        return _complain(f"error: {error}", 2)
    except (JobError, OSError, ValueError, RuntimeError) as error:  # what the library raises for bad input
        if args.debug or command is run:  # the program's own errors are shown as Python shows them
            raise
        return _complain(f"error: {_one_line(error)}", 1)


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage before it."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """A command complains of an option that it has not, so that the help which is named is its own."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} ({self.prog} --help shows the options)\n")


def build_parser() -> OneLineParser:
    """All commands with their options."""
    parser = OneLineParser(
        prog="peft-fast",
        description="PEFT's API and PEFT's files, at the speed of the base model.",
        epilog=BEGIN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"peft-fast {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.DESCRIPTION,
            epilog=module.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_to: Callable[[argparse.ArgumentParser], None] = module.add_to
        add_to(command)
    return parser


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _complain(message: str, code: int) -> int:
    print(f"peft-fast: {message}", file=sys.stderr)
    return code

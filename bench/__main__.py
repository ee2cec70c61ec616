"""Command line of the measurements: ``python -m bench aot | run | report | tune | first-contact | tables``."""

import argparse
import sys

from . import run, tune
from .aot import command as aot
from .first_contact import command as first_contact, tables
from .report import command as report

COMMANDS = {
    "aot": (aot, "compile every kernel for GPUs that need not be here; fail on spills and the like"),
    "run": (run, "measure LoRA beside plain torch and peft"),
    "report": (report, "show a result file side by side, draw it, fill in README.md and docs/benchmarks.md"),
    "tune": (tune, "measure on this GPU which configuration and which implementation is fastest; fill the tables"),
    "first-contact": (first_contact, "ten minutes of a GPU: check every kernel at real sizes, time, one JSON"),
    "tables": (tables, "what follows from the JSON of first-contact: rows to ship, README's lines about a GPU"),
}


def main(argv: list[str] | None = None) -> int:
    """Parse ``argv`` and run one sub-command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, text) in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=text, description=text))
    args = parser.parse_args(argv)
    return COMMANDS[args.command][0].run(args)


if __name__ == "__main__":
    sys.exit(main())

"""`peft-fast check`: everything about an adapter directory that can be wrong, found before it is used."""

import argparse
from pathlib import Path

HELP = "validate an adapter directory without loading its weights into a model"
DESCRIPTION = "Validate an adapter directory: its configuration; names, shapes, dtypes, values of its weights."
EPILOG = "example: peft-fast check peft_fast_demo/adapters/email --base peft_fast_demo/base"


def add_to(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("adapter", type=Path, metavar="ADAPTER_DIR", help="directory with adapter_config.json")
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="directory or hub name of the base model: only its config is read, and every weight of the adapter "
        "has to fit it, with none missing",
    )


def run(args: argparse.Namespace) -> int:
    """Print what is in the directory. Returns 0."""
    from ..jobs.check import report

    print(report(args.adapter, args.base))
    return 0

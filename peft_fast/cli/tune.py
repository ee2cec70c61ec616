"""`peft-fast tune`: measure on this GPU what is fastest for a model's own layers, and use it from now on."""

import argparse

from ..jobs.errors import JobError
from . import model_options

HELP = "measure on this GPU what is fastest for a model's own layers, and use it from now on"
DESCRIPTION = """Measure on this GPU, for the sizes of one model's layers, which configuration and implementation is
fastest, on the model's own weights. Every result is compared with fp64 before it is timed. The rows go to
~/.cache/peft_fast/tables ($PEFT_FAST_CACHE/tables), each as soon as it is finished, and are used from then on.
Stopped with Ctrl-C, or when --seconds are over, the same command goes on. `peft-fast info --model DIR` shows what
runs then."""
EPILOG = """examples:
  peft-fast tune --model DIR                               # LoRA of rank 16 on all linear layers
  peft-fast tune --model DIR --adapter my_adapter --tokens 1 8 4096 --seconds 120
  peft-fast tune --model DIR --dry                         # what would be measured; needs no GPU
Exit codes: 0 done (also when the time was over, and on a CPU, where there is nothing to tune), 1 a result was wrong or
a file cannot be loaded, 2 an option cannot be used, 130 stopped with Ctrl-C."""


def add_to(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    model_options.add_to(parser, required=True)
    add = parser.add_argument
    add("--seconds", type=float, default=30.0, metavar="S", help="start nothing after this time (default: 30)")
    add("--again", action="store_true", help="measure also what has a row, the oldest first")
    add("--dry", action="store_true", help="measure nothing, show what would be")


def run(args: argparse.Namespace) -> int:
    """Returns 0, or 1 if a result was wrong."""
    import torch

    from ..jobs.device import pick_device
    from ..tuning import tune

    device = pick_device(args.device)
    compute = not args.dry and device.type == "cuda"
    model = model_options.load(args, device if compute else torch.device("meta"))
    found = tune(model, tuple(args.tokens), seconds=args.seconds, again=args.again, dry=not compute)
    if args.dry:
        print("\n".join(found.planned))
    elif not compute:
        print(f"plain torch runs on {device}: there is nothing to tune. --dry shows what a GPU would measure")
        return 0
    print(found)
    if found.faults:
        raise JobError(f"{len(found.faults)} results were wrong or failed, see above; none of them is used")
    return 0

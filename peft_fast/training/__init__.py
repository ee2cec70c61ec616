"""Training an adapter from a file of examples: `peft-fast train`, and the same from Python.

run        the whole of it, from the options to what is in OUT        options    what can be told, and its defaults
data       the lines of a file, checked                               rows       lines as tokens; chat: by the template
model      the base, its adapter; fit: whether they go together       loop       transformers' Trainer, checkpoints
packing    rows behind one another                                    out        whose OUT it is, and what is in it
report     numbers, the picture, how to use what was trained
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any


def train(
    model: str | Path, data: str | Path, out: str | Path, *, say: Callable[[str], None] | None = None, **options: Any
) -> dict[str, Any]:
    """Train an adapter as `peft-fast train` does; called again with the same options it goes on where it was stopped.

    Args:
        model: directory of the base, saved by transformers.    data: the examples, one JSON object per line.
        out: directory of the adapter, its checkpoints, results.json and loss.png.
        say: gets the lines that the command prints; None: nobody does.
        options: the command's own, by name: task="seq-cls", quantize="nf4", r=8, lr=1e-4, ... (``options.Options``).
    Returns: what results.json has: settings, losses and evaluations by step, numbers of parameters and rows.
    Raises: UsageError (a ValueError) for an option, a line of the data, a model or an OUT that cannot be used; JobError
        (a RuntimeError) for weights that cannot be loaded, an OUT that another run is writing, a loss that is no
        number; Stopped (a KeyboardInterrupt) by Ctrl-C or SIGTERM, after a checkpoint.
    """
    from .options import complete
    from .run import run

    return run(complete({"model": model, "data": data, "out": out, **options}), say or (lambda text: None))

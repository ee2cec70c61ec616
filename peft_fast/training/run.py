"""An adapter for a model, quantized or not, from a file of examples, from the options to what is in OUT.

All that can be wrong with options and data is found before weights are read or anything is written.
"""

import logging
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ..demo.report import write_json
from ..jobs.device import pick_device
from ..jobs.errors import Stopped, UsageError
from . import (
    data as train_data,
    loop as train_loop,
    model as train_model,
    out as train_out,
    packing as train_packing,
    report as train_report,
)
from .options import Options
from .rows import Collator, Rows, split


class Data(NamedTuple):
    """The checked lines, and which of them are for what."""

    lines: train_data.Lines
    held_out_lines: train_data.Lines
    train: Sequence[int]
    held_out: Sequence[int]


Say = Callable[[str], None]  # what is done with a line for people


def run(options: Options, say: Say) -> dict[str, Any]:
    """Train, or go on with it. Returns what results.json has, when the adapter is in OUT.

    Raises: Stopped by Ctrl-C and SIGTERM, after a checkpoint; UsageError for an option, a line of the data, a model or
        an OUT that cannot be used; JobError for weights that cannot be loaded, an OUT that another run is writing, and
        a loss that is no number.
    """
    start = time.perf_counter()
    device = pick_device(options.device)
    if device.index:
        raise UsageError(f"--device {device}: give cuda; the variable CUDA_VISIBLE_DEVICES chooses among several GPUs")
    train_out.check_is_directory(options.out)
    data = _read(options)
    if options.keep_best and not data.held_out:
        raise UsageError("--keep-best and --early-stopping compare losses of held-out lines, and none are held out")
    with _quiet():
        chats = "messages" in (*data.lines.keys, *data.held_out_lines.keys)
        plan = train_model.plan(options, data.lines.labels, chats=chats)
        origin = train_out.origin(options, data.lines, data.held_out_lines)
        finished = train_out.check(options, origin)
        if finished is not None:
            say(f"{options.out}: finished by an earlier run, kept\n{train_report.summary(finished)}")
            say(train_report.how_to_use(options, finished, data.lines.keys))
            return finished
        ends = options.task == "seq-cls" and plan.config.is_encoder_decoder
        rows = [
            Rows(lines, chosen, options.task, plan.text, plan.max_length, plan.classes, ends=ends)
            for lines, chosen in ((data.lines, data.train), (data.held_out_lines, data.held_out))
        ]
        if options.task == "causal-lm" and (plan.text.end is None or chats):
            for part in rows:
                part.check_each_has_something_to_learn()
        model, other_head = train_model.build(options, plan, device)
        if options.packing:
            train_packing.check(model)
        with train_out.locked(options.out), train_loop.Stop() as stop:
            checkpoint = train_out.begin(options.out, origin)
            trainer = train_loop.make_trainer(
                options,
                model,
                rows[0],
                rows[1] if data.held_out else None,
                train_packing.collator() if options.packing else Collator(plan.pad),
                stop,
                begins=checkpoint is None,
                one_row=train_model.takes_one_row(options, model.get_base_model()),
            )
            before = _train(options, trainer, checkpoint, say)
            if stop.signal and trainer.state.global_step < trainer.args.max_steps:
                raise _stopped(options, trainer, stop)
            return _finish(options, plan, trainer, data, before, start, other_head, say)


def _finish(
    options: Options, plan: train_model.Plan, trainer: Any, data: Data, before: int, start: float, other_head: bool,
    say: Say,
) -> dict[str, Any]:  # fmt: skip
    """Save the adapter, the picture and the numbers, and say so."""
    model, rows = trainer.model, trainer.train_dataset
    trainable, parameters = model.get_nb_trainable_parameters()  # of packed weights as of what they stand for
    numbers = {
        "base": options.model.name,
        "trainable_parameters": trainable,
        "parameters": parameters,
        "rows": len(data.train),
        "rows_held_out": len(data.held_out),
        "rows_read": rows.asked,
        "rows_cut": rows.cut,
        "max_length": plan.max_length,
        "steps": trainer.state.global_step,
        "steps_before": before,
        "seconds": round(time.perf_counter() - start, 2),
        "device": str(trainer.args.device),
        "head_replaced": other_head,
    }
    if options.keep_best:
        numbers["best_step"] = trainer.state.best_global_step
    found = train_report.results(trainer.state.log_history, options, plan.classes, numbers)
    train_loop.check_finite(model, trainer.state.global_step)
    if plan.classes:  # a base knows neither the labels' names nor, often, a token that fills rows up
        plan.config.to_json_file(options.out / train_report.BASE_CONFIG)
    model.save_pretrained(options.out)
    picture = train_report.draw(found, options.out / "loss.png")
    write_json(options.out / train_out.RESULTS, found)
    say(f"{train_report.summary(found)}\n{picture}\nadapter: {options.out}")
    say(train_report.how_to_use(options, found, data.lines.keys))
    return found


def _read(options: Options) -> Data:
    """Check all lines and choose those that are held out."""
    lines = train_data.check(options.data, options.task, "--data")
    if options.eval_data is None:
        return Data(lines, lines, *split(len(lines.offsets), options.eval_split, options.seed))
    held_out = train_data.check(options.eval_data, options.task, "--eval-data")
    if unknown := sorted(held_out.labels - lines.labels, key=str):
        raise UsageError(f"--eval-data {options.eval_data}: the label {unknown[0]!r} is not in {options.data}")
    return Data(lines, held_out, range(len(lines.offsets)), range(len(held_out.offsets)))


def _train(options: Options, trainer: Any, checkpoint: Path | None, say: Say) -> int:
    """All steps that are left. Returns how many were done before."""
    if checkpoint is None:
        trainer.train()
        return 0
    state = type(trainer.state).load_from_json(str(checkpoint / train_out.STATE))
    before: int = state.global_step
    if before < trainer.args.max_steps and not train_loop.stopped_early(options, state):
        say(f"going on after step {before} of {trainer.args.max_steps}, {checkpoint}")
        trainer.train(resume_from_checkpoint=str(checkpoint))
    else:  # all but the end was done; the Trainer would make one step more
        train_loop.load_adapter(trainer.model, checkpoint)
        trainer.state = state
        if trainer.args.load_best_model_at_end:
            train_loop.load_best(trainer)
    return before


def _stopped(options: Options, trainer: Any, stop: train_loop.Stop) -> Stopped:
    step, steps = trainer.state.global_step, trainer.args.max_steps
    saved = options.out / f"checkpoint-{step}"
    return Stopped(
        f"stopped after step {step} of {steps}, saved in {saved}: the same command goes on from there",
        143 if stop.signal == signal.SIGTERM else 130,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' reports and bars of loading."""
    from transformers.utils import logging as transformers_logging

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which kernels of its own it has not
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()

"""transformers' Trainer for `peft-fast train`, with what it does not do for this library's models.

It saves and loads adapters, not the base; weights each batch's loss by its tokens, in training and evaluation; and
stops on Ctrl-C after the step, with a checkpoint.
"""

import math
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from peft_fast.quantized.weights import kind_of

from ..jobs.errors import JobError
from .options import SCHEDULES, Options
from .rows import IGNORED, Rows

LONGEST = 100  # steps between checkpoints, if nothing else is said
TRAINED = "trained.safetensors"  # of p-tuning: its network; the adapter is only what comes out of it
POINTS = 500  # of the loss curve, at most


class Stop:
    """Ctrl-C (or SIGTERM) as a wish: the loop ends its step, saves, and stops. A second one stops at once."""

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        main = threading.current_thread() is threading.main_thread()  # no other can have handlers
        for number in (signal.SIGINT, signal.SIGTERM) if main else ():
            self._before[number] = signal.signal(number, self._asked)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        tqdm.write("stopping after this step, with a checkpoint; once more stops at once", file=sys.stderr)


def make_trainer(
    options: Options,
    model: Any,
    train: Rows,
    held_out: Rows | None,
    collator: Any,
    stop: Stop,
    *,
    begins: bool,
    one_row: bool,
) -> Any:
    """A Trainer that is ready.

    Args:
        begins: whether the run does; then the model is evaluated as it is.
        one_row: a batch is one row, a step is as many of them as otherwise.
    """
    from transformers import TrainingArguments

    epoch = steps_of_an_epoch(options, len(train))
    steps = options.max_steps or math.ceil(options.epochs * epoch)
    every = options.save_steps or min(LONGEST, max(epoch, math.ceil(steps / 20)))
    arguments = TrainingArguments(
        output_dir=str(options.out),
        max_steps=steps,
        per_device_train_batch_size=1 if one_row else options.batch_size,
        per_device_eval_batch_size=1 if one_row else options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation * (options.batch_size if one_row else 1),
        learning_rate=options.lr,
        lr_scheduler_type=SCHEDULES[options.schedule],
        warmup_steps=math.ceil(options.warmup * steps),
        weight_decay=options.weight_decay,
        logging_steps=math.ceil(steps / POINTS),
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_steps=every,
        save_total_limit=2,
        eval_strategy="steps" if held_out else "no",
        eval_steps=every,
        load_best_model_at_end=options.keep_best,
        metric_for_best_model="eval_loss" if options.keep_best else None,
        greater_is_better=False,
        restore_callback_states_from_checkpoint=options.early_stopping is not None,
        eval_on_start=begins and held_out is not None,
        bf16=options.bf16,
        use_cpu=next(model.parameters()).device.type == "cpu",
        seed=options.seed,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process, one GPU: PeftModels are no replicas of DataParallel
    trainer = _trainer_class()(
        model=model, args=arguments, train_dataset=train, eval_dataset=held_out, data_collator=collator
    )
    trainer.stop = stop
    trainer.classifies = options.task == "seq-cls"
    trainer.model_accepts_loss_kwargs = True  # the Trainer counts what is learned in a step, compute_loss divides by it
    _add_callbacks(trainer, stop, options)
    return trainer


def steps_of_an_epoch(options: Options, rows: int) -> int:
    """Steps of the optimizer."""
    return math.ceil(math.ceil(rows / options.batch_size) / options.gradient_accumulation)


def load_adapter(model: Any, checkpoint: Path) -> None:
    """The numbers of the checkpoint's adapter into the model's."""
    from peft_fast import load_peft_weights, set_peft_model_state_dict

    if (checkpoint / TRAINED).is_file():
        model.load_state_dict(load_file(checkpoint / TRAINED), strict=False)
        return
    set_peft_model_state_dict(model, load_peft_weights(str(checkpoint)))


def load_best(trainer: Any) -> None:
    """--keep-best: the checkpoint with the least loss held out, wherever --out is by now."""
    load_adapter(trainer.model, Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.best_global_step}")


def stopped_early(options: Options, state: Any) -> bool:
    """Whether --early-stopping ended the run that this state is of."""
    saved = state.stateful_callbacks.get("EarlyStoppingCallback")
    if options.early_stopping is None or not saved:
        return False
    return bool(saved["attributes"]["early_stopping_patience_counter"] >= options.early_stopping)


def _trainer_class() -> Any:
    """Made here: transformers is imported by the command, not with it."""
    from transformers import Trainer

    class AdapterTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped here
        stop: Stop
        classifies: bool
        control: Any

        def _save(self, output_dir: str, state_dict: Any = None) -> None:
            check_finite(self.model, self.state.global_step)
            self.model.save_pretrained(output_dir)
            if self.model.peft_config["default"].peft_type == "P_TUNING":
                trained = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
                save_file(trained, Path(output_dir) / TRAINED)

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            """transformers' schedule from its second rate on: the first one is 0, and a step with it learns nothing."""
            schedule = super().create_scheduler(num_training_steps + 1, optimizer)
            schedule.lr_lambdas = [_one_later(rate) for rate in schedule.lr_lambdas]
            for group, rate in zip(schedule.optimizer.param_groups, schedule.lr_lambdas, strict=True):
                group["lr"] = group["initial_lr"] * rate(0)
            schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]  # what is logged
            return schedule

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            load_adapter(self.model, Path(resume_from_checkpoint))

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            """The sum over what is learned in this batch, divided by how much that is in the whole step."""
            outputs = model(**inputs)
            return outputs.loss * (_learned(inputs) / num_items_in_batch)

        def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
            """An evaluation that was stopped has no metrics."""
            return bool(metrics) and bool(super()._determine_best_metric(metrics, trial))

        def _load_best_model(self) -> None:
            load_best(self)

        @torch.no_grad()
        def evaluate(self, *arguments: Any, **more: Any) -> dict[str, float]:
            """Over all rows: mean loss of what is learned, and perplexity or accuracy."""
            loader = self.get_eval_dataloader()
            self.callback_handler.eval_dataloader = loader
            self.model.eval()
            keep_as_trained(self.model)
            total, count, right = 0.0, 0, 0
            for batch in loader:
                inputs = self._prepare_inputs(batch)
                outputs = self.model(**inputs)
                learned = int(_learned(inputs))
                total, count = total + float(outputs.loss) * learned, count + learned
                if self.classifies:
                    right += int((outputs.logits.argmax(-1) == inputs["labels"]).sum())
                self.callback_handler.on_prediction_step(self.args, self.state, self.control)
                if self.stop.signal and self.state.global_step < self.state.max_steps:
                    return self._leave_evaluation()
            mean = total / count
            metrics = {"eval_loss": mean}
            if self.classifies:
                metrics["eval_accuracy"] = right / count
            else:
                metrics["eval_perplexity"] = math.exp(min(mean, 700.0))  # beyond it there is no such float
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

        def _leave_evaluation(self) -> dict[str, float]:
            if self.state.global_step == 0:
                raise KeyboardInterrupt  # there is nothing to save
            self.control.should_save = self.control.should_training_stop = True
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, {})
            return {}

    return AdapterTrainer


def keep_as_trained(model: Any) -> None:
    """Leave 4-bit layers on a CPU in training mode.

    In the first forward in eval mode bitsandbytes packs their weights anew, for good, and then they let no gradient
    through: the layers that an adapter is not on would cut it off, without an error.
    """
    for module in model.modules():
        if kind_of(module) == "bnb 4bit":
            module.train()


def check_finite(model: Any, step: int) -> None:
    """Raises: JobError if a number that is trained has become NaN or infinite."""
    if not all(bool(parameter.isfinite().all()) for parameter in model.parameters() if parameter.requires_grad):
        raise JobError(
            f"after step {step} the adapter has numbers that are no numbers (NaN or infinite); a smaller --lr may help"
        )


def _one_later(rate: Callable[[int], float]) -> Callable[[int], float]:
    return lambda step: rate(step + 1)


def _learned(inputs: Mapping[str, Any]) -> Any:
    return (inputs["labels"] != IGNORED).sum()


def _add_callbacks(trainer: Any, stop: Stop, options: Options) -> None:
    from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, TrainerCallback

    class Progress(ProgressCallback):  # type: ignore[misc]
        """Losses beside the bar instead of a line for each."""

        shown: dict[str, str]

        def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            super().on_train_begin(args, state, control, **more)
            self.shown = {}
            self.current_step = state.global_step
            self.training_bar.update(state.global_step)
            self.training_bar.unit = "step"

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
            names = {"loss": "loss", "eval_loss": "held out", "eval_accuracy": "accuracy"}
            self.shown |= {label: f"{logs[key]:.4g}" for key, label in names.items() if key in logs}
            if self.training_bar is not None:
                self.training_bar.set_postfix(self.shown, refresh=False)

    class Lines(TrainerCallback):  # type: ignore[misc]
        """In place of a bar, where nobody watches: a line for each entry of the log."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
            names = {"loss": "loss", "learning_rate": "rate", "eval_loss": "held out", "eval_accuracy": "accuracy"}
            values = ", ".join(f"{label} {logs[key]:.4g}" for key, label in names.items() if key in logs)
            if values:
                tqdm.write(f"step {state.global_step} of {state.max_steps}: {values}", file=sys.stderr)

    class Watch(TrainerCallback):  # type: ignore[misc]
        """Ctrl-C, and losses that are no numbers."""

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if stop.signal:
                control.should_save = control.should_log = control.should_training_stop = True
                control.should_evaluate = control.should_evaluate and state.global_step >= state.max_steps

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
            name = "eval_loss" if "eval_loss" in logs else "loss"
            loss = logs.get(name, 0.0)
            if not math.isfinite(loss):
                of = "held-out rows after step" if name == "eval_loss" else "step"
                raise JobError(
                    f"the loss of {of} {state.global_step} is {loss}: a smaller --lr may help; checkpoints before it "
                    "are kept"
                )

    if trainer.args.disable_tqdm:
        trainer.pop_callback(PrinterCallback)
        trainer.add_callback(Lines)
    else:
        trainer.pop_callback(ProgressCallback)
        trainer.add_callback(Progress)
    if options.early_stopping is not None:
        trainer.add_callback(EarlyStoppingCallback(options.early_stopping))
    trainer.add_callback(Watch)

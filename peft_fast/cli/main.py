"""The `peft-fast` command: options, exit codes, one-line errors.

Exit codes: 0 done, 1 the job failed, 2 an option's value cannot be used, 130 stopped with Ctrl-C.
Torch is imported by the commands, not here: `peft-fast --help` answers at once.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from peft_fast import __version__

from ..jobs.errors import CommandError, UsageError
from ..training import options as train_options
from . import bench as bench_command, model_options, plan as plan_command, tune as tune_command


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
        if command is _run:
            raise
        return _complain("stopped. What was finished is kept: the same command goes on from there", 130)
    except UsageError as error:
        return _complain(f"error: {error}", 2)
    except (CommandError, OSError, ValueError, RuntimeError) as error:  # what the library raises for bad input
        if args.debug or command is _run:  # the program's own errors are shown as Python shows them
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
    parser = OneLineParser(prog="peft-fast", description="PEFT's API and PEFT's files, at the speed of the base model.")
    parser.add_argument("--version", action="version", version=f"peft-fast {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    _add_demo(commands)
    info = commands.add_parser(
        "info",
        help="versions, devices, and the implementation that each op will use, and why",
        description="Print versions, devices, and for each op the implementation that will be used, and why; with "
        "--model for the model's own layers, without reading its weights.",
    )
    model_options.add_to(info, required=False)
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
    _add_generate(commands)
    train = commands.add_parser(
        "train",
        help="fine-tune a model, quantized or not, with LoRA, a prefix or learned tokens, on a file of examples",
        description=train_options.DESCRIPTION,
        epilog=train_options.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train_options.add_to(train)
    plan = commands.add_parser(
        "plan",
        help="will it fit, how long is a step, what do the adapters cost: calculated, no GPU needed",
        description="Memory and time of one step of a Llama-shaped model with LoRA adapters on H100, H200, A100 or\n"
        "MI300X, by arithmetic: bytes, flops, launches, exchange between GPUs. docs/plan.md has the formulas.",
        epilog="example:\n  peft-fast plan --model-config DIR --adapters 100 --batch 32 --context 1024 --gpu H100",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    plan_command.add_to(plan)
    bench = commands.add_parser(
        "bench",
        help="measure this machine: peft_fast beside the base, peft, torch.compile and the roofline (needs a checkout)",
        description=bench_command.DESCRIPTION,
        epilog=bench_command.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench_command.add_to(bench)
    tune = commands.add_parser(
        "tune",
        help="measure on this GPU what is fastest for a model's own layers, and use it from now on",
        description=tune_command.DESCRIPTION,
        epilog=tune_command.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tune_command.add_to(tune)
    _add_run(commands)
    return parser


def _add_demo(commands: "argparse._SubParsersAction[OneLineParser]") -> None:
    demo = commands.add_parser(
        "demo",
        help="train four LoRA adapters and a prefix on a CPU in under 3 minutes and see each win on its own text",
        description="Fine-tune a small byte-level Llama with one LoRA adapter per Python package, on the package's "
        "docstrings, and with one prefix, on code; save the adapters in PEFT's format, load them back, compare "
        "held-out losses, and run all in one batch. Fails (exit code 1) unless every adapter wins on its own text.",
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


def _add_generate(commands: "argparse._SubParsersAction[OneLineParser]") -> None:
    generate = commands.add_parser(
        "generate",
        help="answer a file of requests, each with an adapter of its own, in mixed batches",
        description="Answer the requests of a file with one model and many adapters, LoRA and prefixes: requests for "
        "different adapters share a batch.\nResults come in the order of the requests, one line for one line; a line "
        "that is wrong gets a result that says so.",
        epilog=_GENERATE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = generate.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="the base model, saved by transformers")
    add(
        "--adapters",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=DIR",
        help="adapters, each with the name that requests use; without any, the base model answers",
    )
    add("--adapters-dir", type=Path, metavar="DIR", help="every adapter in DIR, named as its sub-directory")
    add("--in", type=Path, required=True, dest="requests", metavar="FILE", help="requests, one JSON object per line")
    add("--out", type=Path, required=True, metavar="FILE", help="results, one JSON object per line; FILE.meta.json too")
    add("--batch-size", type=_positive, default=16, metavar="N", help="sequences that run at once (default: 16)")
    add("--max-new-tokens", type=_positive, metavar="N", help="for requests that do not say (default: 128)")
    add(
        "--settings",
        default="{}",
        metavar="JSON",
        help='settings of requests that do not say, as \'{"do_sample": true, "top_p": 0.9}\' (default: the model\'s)',
    )
    add("--seed", type=_not_negative, default=0, metavar="N", help="for sampling (default: 0)")
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ... (default: auto)")
    add(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="of the base model (default: auto, that of its file)",
    )
    add("--overwrite", action="store_true", help="write --out anew, whatever is in it (not to go on with it)")


_GENERATE_EPILOG = """a request, on one line:
  {"prompt": "Return the", "adapter": "email", "max_new_tokens": 40}
  or {"input_ids": [0, 82, 101]} in place of the prompt. Optional: adapter (null: the base model), id (copied to the
  result), seed, do_sample, temperature, top_k, top_p, min_p, max_new_tokens, min_new_tokens, stop, eos_token_id,
  num_beams, num_return_sequences, length_penalty, early_stopping, repetition_penalty, no_repeat_ngram_size.
a result:
  {"index": 0, "adapter": "email", "text": " ...", "prompt_tokens": 11, "new_tokens": 40, "finish_reason": "length"}
  or {"index": 0, "error": "..."}. input_ids are answered with output_ids. With num_return_sequences above 1, text,
  output_ids, new_tokens and finish_reason are lists.

The prompt is used as it is, no chat template. A model without tokenizer whose vocabulary is 256 takes bytes as tokens.
Stopped or killed, the same command goes on after the last result: none is lost or doubled, and the file becomes what it
would have been (on the same machine). A request's sampling depends on its own "seed", or on --seed and its line, not on
the requests beside it; rounding may still differ with them, so that a near tie can fall otherwise in another batch.
Exit codes: 0 all answered, 1 some lines have errors, 2 an option cannot be used, 130 stopped with Ctrl-C.

examples:
  peft-fast demo                                            # makes a model and five adapters
  peft-fast generate --model peft_fast_demo/base --adapters-dir peft_fast_demo/adapters --in req.jsonl --out res.jsonl
  peft-fast generate --model DIR --adapters fr=adapters/fr de=adapters/de --in req.jsonl --out res.jsonl \\
      --settings '{"do_sample": true, "temperature": 0.7}'"""


def _add_run(commands: "argparse._SubParsersAction[OneLineParser]") -> None:
    run = commands.add_parser(
        "run",
        help="run a program that uses peft, unchanged, with peft_fast in peft's place",
        description="Run a script, or with -m a module, as python would, where `import peft` means peft_fast: for the\n"
        "program, the libraries it uses (transformers, accelerate, trl, ...) and the Python processes it starts.\n"
        "Whether peft is installed does not matter. A name of peft that peft_fast does not have is an ImportError\n"
        "that says what there is. Exit code: the program's own; 2 if there is no such program.",
        epilog="examples: peft-fast run train.py --lr 1e-4\n"
        "          peft-fast run -m torch.distributed.run --nproc-per-node 2 train.py --lr 1e-4",
        usage="peft-fast run [-h] [-m] SCRIPT [ARGUMENT ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument("-m", action="store_true", dest="is_module", help="SCRIPT is the name of a module")
    run.add_argument("target", metavar="SCRIPT", help="the program")
    run.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGUMENT", help="what the program gets")


def _demo(args: argparse.Namespace) -> int:
    from ..demo import run as demo

    steps = args.steps or (12 if args.quick else 40)
    return demo.run(demo.Settings(args.out, steps, args.seed, args.device, args.quick), fresh=args.fresh)


def _info(args: argparse.Namespace) -> int:
    from . import info

    if args.model is None and args.adapter is not None:
        raise UsageError("--adapter needs --model, the base model that it is for")
    print(info.report() if args.model is None else info.report_of_model(args))
    return 0


def _check(args: argparse.Namespace) -> int:
    from . import check

    print(check.report(args.adapter, args.base))
    return 0


def _generate(args: argparse.Namespace) -> int:
    from ..generation import run as generate

    return generate.run(generate.Options(**{name: getattr(args, name) for name in generate.Options._fields}))


def _train(args: argparse.Namespace) -> int:
    options = train_options.from_arguments(args)
    from ..training import run as train

    return train.run(options)


def _plan(args: argparse.Namespace) -> int:
    return plan_command.run(
        plan_command.Options(**{name: getattr(args, name) for name in plan_command.Options._fields})
    )


def _run(args: argparse.Namespace) -> int:
    from . import run

    return run.run(args.target, args.arguments, args.is_module)


COMMANDS = {
    "demo": _demo,
    "info": _info,
    "check": _check,
    "generate": _generate,
    "train": _train,
    "plan": _plan,
    "bench": bench_command.run,
    "tune": tune_command.run,
    "run": _run,
}


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

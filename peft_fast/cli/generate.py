"""`peft-fast generate`: a file of requests, each with an adapter of its own, answered in mixed batches."""

import argparse
from pathlib import Path

from .arguments import whole

HELP = "answer a file of requests, each with an adapter of its own, in mixed batches"
DESCRIPTION = (
    "Answer the requests of a file with one model and many adapters, LoRA and prefixes: requests for "
    "different adapters share a batch.\nResults come in the order of the requests, one line for one line; a line "
    "that is wrong gets a result that says so."
)
EPILOG = """a request, on one line:
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


def add_to(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
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
    add("--batch-size", type=whole(1), default=16, metavar="N", help="sequences that run at once (default: 16)")
    add("--max-new-tokens", type=whole(1), metavar="N", help="for requests that do not say (default: 128)")
    add(
        "--settings",
        default="{}",
        metavar="JSON",
        help='settings of requests that do not say, as \'{"do_sample": true, "top_p": 0.9}\' (default: the model\'s)',
    )
    add("--seed", type=whole(0), default=0, metavar="N", help="for sampling (default: 0)")
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ... (default: auto)")
    add(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="of the base model (default: auto, that of its file)",
    )
    add("--overwrite", action="store_true", help="write --out anew, whatever is in it (not to go on with it)")


def run(args: argparse.Namespace) -> int:
    """Returns 0, if every request has an answer."""
    from ..generation import run as generate

    return generate.run(generate.Options(**{name: getattr(args, name) for name in generate.Options._fields}), print)

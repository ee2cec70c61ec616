"""`peft-fast generate`: a file of requests, each for an adapter of its own or none, answered in batches by one model.

The requests are read as a stream, in windows of `WINDOW` batches: inside a window equal settings and similar lengths go
together, whatever the adapters; between windows the order of the file holds. The results come in the order of the
requests, one line for one line (generate_results.py says what a kill leaves and how a run goes on from there).

A run that goes on forms the same batches as the one that was stopped and skips those whose results are all there: the
finished file is the same, byte for byte, as that of a run without a stop (same machine, threads and versions).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from ..jobs.device import pick_device
from ..jobs.errors import JobError, UsageError
from . import batches as generate_batches, model as generate_model, settings as generate_settings
from .requests import LineError, Reader, Request, parse_settings
from .results import Results, Tally, digest_of_directory, digest_of_input

WINDOW = 16  # batches that are planned together: more waste less padding, and let a result wait longer
FORMAT = 1  # of the results: a run does not go on with another version's


class Options(NamedTuple):
    """What the command line says; the options' help has the meaning."""

    model: Path
    adapters: Sequence[str]
    adapters_dir: Path | None
    requests: Path
    out: Path
    batch_size: int
    max_new_tokens: int | None
    settings: str
    seed: int
    device: str
    dtype: str
    overwrite: bool


def run(options: Options, say: Callable[[str], None] = lambda text: None) -> int:
    """Answer every request that has no result yet; 0 if none of all has an error.

    Raises: UsageError for an option that cannot be used, an OUT that belongs to something else included; JobError,
        at the end, if lines have errors, and before anything is generated for a model or adapter that cannot be loaded.
    """
    start = time.perf_counter()
    device = pick_device(options.device)
    adapters = generate_model.adapters_of(options.adapters, options.adapters_dir)
    _check_paths(options)
    digest, lines = digest_of_input(options.requests)
    origin = {
        "format": FORMAT,
        "--in": digest,
        "--model": digest_of_directory(options.model),
        "--adapters": {name: digest_of_directory(path) for name, path in adapters.items()},
        "--batch-size": options.batch_size,
        "--max-new-tokens": options.max_new_tokens,
        "--settings": options.settings,
        "--seed": options.seed,
        "--dtype": options.dtype,
    }
    with Results(options.out, origin, overwrite=options.overwrite) as results:
        kept, tokens_before = results.next_index, results.tally.new_tokens
        if kept < lines:
            generator = generate_model.load(options.model, adapters, device, options.dtype)
            reader = _reader(options, generator)
            with tqdm(total=lines, initial=kept, unit="line", dynamic_ncols=True, mininterval=0.5) as bar:
                _answer(options, generator, reader, results, bar)
    say(_summary(options, results.tally, kept, tokens_before, time.perf_counter() - start))
    if errors := results.tally.errors:
        raise JobError(f'{errors} of {lines} requests got no answer: their lines in {options.out} say why ("error")')
    return 0


def _check_paths(options: Options) -> None:
    if not (options.model / "config.json").is_file():
        raise UsageError(f"--model {options.model}: expected the directory of a model, with config.json")
    if not options.requests.is_file():
        raise UsageError(f"--in {options.requests}: there is no such file")
    if options.out.exists() and options.out.samefile(options.requests):
        raise UsageError(f"--out {options.out}: this is the file of the requests")


def _answer(
    options: Options, generator: generate_model.Generator, reader: Reader, results: Results, bar: "tqdm[Any]"
) -> None:
    """All windows that are not finished, batch by batch."""
    start, tokens_before = time.perf_counter(), results.tally.new_tokens

    def add(records: dict[int, generate_batches.Record]) -> None:
        bar.update(results.add(records))
        rate = (results.tally.new_tokens - tokens_before) / (time.perf_counter() - start)
        bar.set_postfix_str(f"{rate:.0f} tokens/s, {results.tally.errors} errors", refresh=False)

    for first, lines in _windows(options.requests, WINDOW * options.batch_size):
        if first + len(lines) <= results.next_index:
            continue
        requests, errors = _read(reader, first, lines)
        add(errors)
        for batch in generate_batches.plan(requests, options.batch_size):
            if any(request.line >= results.next_index for request in batch):
                add(generate_batches.run(generator, batch, options.seed))


def _reader(options: Options, generator: generate_model.Generator) -> Reader:
    """Checks requests for this model. Raises: UsageError for --settings and --max-new-tokens that cannot be used."""
    defaults = generate_settings.from_model(generator.config)
    if options.max_new_tokens is not None:
        defaults = defaults._replace(max_new_tokens=options.max_new_tokens)
    try:
        defaults = parse_settings(options.settings, defaults, generator.vocab_size)
    except ValueError as error:
        raise UsageError(f"--settings {options.settings}: {error}") from None
    return Reader(
        generator.adapters,
        generator.virtual_tokens,
        generator.codec,
        generator.vocab_size,
        generator.positions,
        generator.encoder_decoder,
        defaults,
    )


def _windows(path: Path, size: int) -> Iterator[tuple[int, list[bytes]]]:
    """(index of the first line, at most `size` lines), over and over."""
    first = 0
    with path.open("rb") as file:
        while lines := list(islice(file, size)):
            yield first, lines
            first += len(lines)


def _read(
    reader: Reader, first: int, lines: Sequence[bytes]
) -> tuple[list[Request], dict[int, generate_batches.Record]]:
    """What can be run, and results for what cannot."""
    requests, errors = [], {}
    for index, line in enumerate(lines, first):
        try:
            requests.append(reader.read(index, line))
        except LineError as error:
            errors[index] = generate_batches.error_record(index, str(error), error.labels)
    return requests, errors


def _summary(options: Options, tally: Tally, kept: int, tokens_before: int, seconds: float) -> str:
    tokens = tally.new_tokens - tokens_before
    earlier = f" ({kept} of them by an earlier run, kept)" if kept else ""
    counts = ", ".join(f"{name} {count}" for name, count in sorted(tally.by_adapter.items())) or "none"
    return (
        f"{options.out}: {tally.lines} requests{earlier}, {tally.errors} with an error\n"
        f"answered: {counts}\n"
        f"{tokens} new tokens in {seconds:.1f} s, {tokens / seconds:.0f} tokens/s with loading"
    )

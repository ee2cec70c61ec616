"""The lines of `peft-fast train --data`: all are checked before anything is loaded, then read when a batch needs them.

In memory is where each line begins, 8 bytes for one: a file can be larger than the memory.
"""

import hashlib
import json
from array import array
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from ..generation.settings import short
from ..jobs.errors import UsageError

Json = dict[str, Any]
# task -> kinds of lines that it can use: the keys of a line
KINDS = {
    "causal-lm": (("text",), ("prompt", "completion"), ("messages",)),
    "seq-cls": (("text", "label"),),
    "seq2seq": (("prompt", "completion"),),
}
_KEYS = ("text", "label", "prompt", "completion", "messages")
_READERS = {"CSV": "read_csv({!r})", "TSV": "read_csv({!r}, sep='\\t')", "Parquet": "read_parquet({!r})"}
_READERS |= {"JSON array": "read_json({!r})"}


class Lines(NamedTuple):
    """The checked lines of a file, as a sequence."""

    path: Path
    offsets: "array[int]"
    numbers: "array[int]"  # of the lines, from 1: empty ones are left out
    keys: tuple[str, ...]  # of every line
    labels: frozenset[str | int]
    digest: str

    def read(self, index: int) -> Json:
        """One line, as its JSON object. Raises: UsageError if the file is another one by now."""
        with self.path.open("rb") as file:
            file.seek(self.offsets[index])
            return _parse(file.readline(), f"{self.path}, line {self.numbers[index]}")


def check(path: Path, task: str, option: str) -> Lines:
    """Read the whole file once.

    Args:
        task: a key of KINDS.        option: "--data" or "--eval-data", for the errors.
    Raises: UsageError for a file that is not there or has no line, and for the first line that cannot be used, with its
        number, what is wrong and what was expected.
    """
    if not path.is_file():
        raise UsageError(f"{option} {path}: {'this is a directory' if path.is_dir() else 'there is no such file'}")
    _check_is_lines(path, option)
    offsets, numbers, digest = array("Q"), array("Q"), hashlib.sha256()
    keys: tuple[str, ...] = ()
    labels: set[str | int] = set()
    offset = 0
    size = path.stat().st_size
    with path.open("rb") as file, tqdm(total=size, desc=f"reading {path.name}", unit="B", delay=2, leave=False) as bar:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}, line {number}"
                record = _parse(line, where)
                found = _keys(record, task, where)
                _check_values(record, found, where)
                if keys and found != keys:
                    raise UsageError(
                        f"{where}: has {_names(found)}, the lines before {_names(keys)}; expected one kind of lines"
                    )
                keys = found
                if "label" in found:
                    labels.add(record["label"])
                    _check_same_type(labels, record["label"], where)
                offsets.append(offset)
                numbers.append(number)
            digest.update(line)
            offset += len(line)
            bar.update(len(line))
    if not offsets:
        raise UsageError(f"{option} {path}: the file has no lines; expected {_expected(task)} on each")
    return Lines(path, offsets, numbers, keys, frozenset(labels), digest.hexdigest()[:32])


def _check_is_lines(path: Path, option: str) -> None:
    """Raises: UsageError for a table in another format, with how to convert it."""
    with path.open("rb") as file:
        begin = file.read(4096)
    kind = {".csv": "CSV", ".tsv": "TSV", ".parquet": "Parquet"}.get(path.suffix.lower())
    if begin.startswith(b"PAR1"):
        kind = "Parquet"
    elif begin.lstrip().startswith(b"["):
        kind = "JSON array"
    elif begin.lstrip().startswith(b"{"):
        kind = None  # whatever it is called
    elif begin.startswith(b"\x1f\x8b"):
        raise UsageError(f"{option} {path}: compressed; expected text: gunzip it first")
    if kind is None:
        return
    convert = _READERS[kind].format(str(path))
    raise UsageError(
        f"{option} {path}: a file in {kind} format; expected one JSON object on each line. This converts it (pip "
        f'install pandas pyarrow), columns become keys: python -c "import pandas; pandas.{convert}'
        f".to_json({str(path.with_suffix('.jsonl'))!r}, orient='records', lines=True, force_ascii=False)\""
    )


def _parse(line: bytes, where: str) -> Json:
    try:
        record = json.loads(line.decode("utf-8").removeprefix("\ufeff").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{where}: not UTF-8, byte {error.start + 1} of the line is {line[error.start]:#04x}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not JSON: {error}; expected one JSON object on each line") from None
    if not isinstance(record, dict):
        raise UsageError(f"{where}: expected a JSON object, got {short(record)}")
    return record


def _keys(record: Json, task: str, where: str) -> tuple[str, ...]:
    """Which of the task's kinds of lines this is."""
    found = {key for key in _KEYS if key in record}
    for keys in KINDS[task]:
        if found == set(keys):
            return keys
    got = _names(tuple(record)[:8]) if record else "no keys"
    hint = ""
    for other, kinds in KINDS.items():
        if other != task and any(found == set(keys) for keys in kinds):
            hint = f" (such lines are for --task {other})"
            break
    raise UsageError(f"{where}: got {got}; --task {task} expects {_expected(task)}{hint}")


def _check_values(record: Json, keys: tuple[str, ...], where: str) -> None:
    for key in keys:
        value = record[key]
        if key == "label":
            if type(value) is not int and not (isinstance(value, str) and value):
                raise UsageError(f'{where}: "label" must be a text or a whole number, got {short(value)}')
        elif key == "messages":
            _check_messages(value, where)
            if not isinstance(record.get("tools") or [], list):
                raise UsageError(f'{where}: "tools" must be a list, got {short(record["tools"])}')
        elif not isinstance(value, str):
            raise UsageError(f'{where}: "{key}" must be a text, got {short(value)}')
        elif not value.strip():
            raise UsageError(f'{where}: "{key}" is empty; expected a text')
        else:
            try:
                value.encode()
            except UnicodeEncodeError:
                raise UsageError(f'{where}: "{key}" has half of a surrogate pair, which is no character') from None


def _check_messages(messages: Any, where: str) -> None:
    expected = 'expected a list of {"role": ..., "content": ...}, the last one of the role "assistant"'
    if not isinstance(messages, list) or not messages:
        raise UsageError(f'{where}: "messages" is {short(messages)}; {expected}')
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UsageError(f"{where}: message {number} is {short(message)}; {expected}")
        content, calls = message.get("content"), message.get("tool_calls")
        if not isinstance(content, str) and not (content is None and calls):
            raise UsageError(f'{where}: "content" of message {number} must be a text, got {short(content)}')
    if messages[-1]["role"] != "assistant":
        raise UsageError(f"{where}: the last message is of the role {short(messages[-1]['role'])}; {expected}")


def _check_same_type(labels: set[str | int], label: str | int, where: str) -> None:
    other = next((found for found in labels if type(found) is not type(label)), None)
    if other is not None:
        raise UsageError(
            f'{where}: "label" is {short(label)}, lines before have {short(other)}; expected one of texts and '
            "whole numbers"
        )


def _expected(task: str) -> str:
    return " or ".join(_names(keys) for keys in KINDS[task])


def _names(keys: tuple[str, ...]) -> str:
    return " and ".join(f'"{short(key)[1:-1]}"' for key in keys)

"""Real text that every machine has: the docstrings of Python's standard library, by package, and pydoc's topics.

Sources are read with `ast`, never imported: importing some of the standard library opens browsers or prints poems.
Text becomes bytes, one token each (vocabulary 256, no tokenizer file); byte 0 ends a docstring.
"""

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

# package shown in the table -> the file or folder of the standard library that holds its docstrings
DOMAINS = {"asyncio": "asyncio", "decimal": "_pydecimal.py", "email": "email", "logging": "logging"}
VOCAB_SIZE = 256
END = 0  # no docstring contains a zero byte
HELD_OUT_EVERY = 6
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "__pycache__"}


def package_docstrings(package: str) -> list[str]:
    """The docstrings of one domain, in the order of the sources, each text once.

    Args:
        package: a key of DOMAINS, or any file or folder of the standard library.
    Raises: FileNotFoundError where this Python has no sources for it (some are shipped without).
    """
    path = _library() / DOMAINS.get(package, package)
    if not path.exists():
        raise FileNotFoundError(
            f"this Python has no sources for {package!r}: expected {path}. Use a Python whose standard library "
            "is installed as .py files (python.org, a distribution's full python3, conda, pyenv, uv)."
        )
    return list(dict.fromkeys(_docstrings_below(path)))


def general_text() -> list[str]:
    """Everything else: all other docstrings and pydoc's topics. What the demo's base model was trained on."""
    from pydoc_data.topics import topics

    library = _library()
    own = {library / name for name in DOMAINS.values()}
    texts = [text for path in sorted(library.iterdir()) if path not in own for text in _docstrings_below(path)]
    return [*dict.fromkeys(texts), *topics.values()]


def split(texts: list[str]) -> tuple[list[str], list[str]]:
    """(for training, held out): every 6th docstring is held out."""
    held_out = texts[::HELD_OUT_EVERY]
    return [text for i, text in enumerate(texts) if i % HELD_OUT_EVERY], held_out


def to_ids(texts: list[str]) -> Tensor:
    """(T,) int64: the bytes of the texts, each text ended by END."""
    joined = bytes([END]).join(text.encode() for text in texts) + bytes([END])
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8).long()


def windows(ids: Tensor, length: int) -> Tensor:
    """(T // length, length): non-overlapping windows, what is left over at the end is dropped."""
    return ids[: len(ids) // length * length].view(-1, length)


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _docstrings_below(path: Path) -> Iterator[str]:
    files = [path] if path.suffix == ".py" else sorted(path.rglob("*.py"))
    for file in files:
        if _NOT_LIBRARY.intersection(file.relative_to(_library()).parts):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # a few files are broken on purpose, or templates
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
                text = ast.get_docstring(node)
                if text and "\0" not in text:
                    yield text

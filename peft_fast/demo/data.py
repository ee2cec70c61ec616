"""Real text that every machine has: Python's standard library, its docstrings by package, pydoc's topics, and code.

Sources are read with `ast`, never imported: importing some of the standard library opens browsers or prints poems.
Text becomes bytes, one token each (vocabulary 256, no tokenizer file); byte 0 ends a docstring or a function.
"""

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

# package shown in the table -> the file or folder of the standard library that holds its docstrings
DOMAINS = {"asyncio": "asyncio", "decimal": "_pydecimal.py", "email": "email", "logging": "logging"}
CODE, CODE_OF = "code", "logging"  # a domain that is no docstrings: that package's functions
NAMES = (*DOMAINS, CODE)
VOCAB_SIZE = 256
END = 0  # no text contains a zero byte
HELD_OUT_EVERY = 6
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "__pycache__"}


def texts_of(name: str) -> list[str]:
    """The texts of one of NAMES. Raises: FileNotFoundError, as `package_docstrings`."""
    return package_functions(CODE_OF) if name == CODE else package_docstrings(name)


def package_docstrings(package: str) -> list[str]:
    """The docstrings of one domain, in the order of the sources, each text once.

    Args:
        package: a key of DOMAINS, or any file or folder of the standard library.
    Raises: FileNotFoundError where this Python has no sources for it (some are shipped without).
    """
    return list(dict.fromkeys(_docstrings_below(_sources(package))))


def package_functions(package: str) -> list[str]:
    """The functions and methods of one domain as code, without their docstrings; arguments and errors as above."""
    found = []
    for tree in _trees_below(_sources(package)):
        for function in _outer_functions(tree):
            if ast.get_docstring(function) is not None:
                function.body = function.body[1:] or [ast.Pass()]
            found.append(ast.unparse(function))
    return [text for text in dict.fromkeys(found) if "\0" not in text]


def general_text() -> list[str]:
    """Everything else: all other docstrings and pydoc's topics. What the demo's base model was trained on."""
    from pydoc_data.topics import topics

    library = _library()
    own = {library / name for name in DOMAINS.values()}
    texts = [text for path in sorted(library.iterdir()) if path not in own for text in _docstrings_below(path)]
    return [*dict.fromkeys(texts), *topics.values()]


def split(texts: list[str]) -> tuple[list[str], list[str]]:
    """(for training, held out): every 6th text is held out."""
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


def _sources(package: str) -> Path:
    path = _library() / DOMAINS.get(package, package)
    if not path.exists():
        raise FileNotFoundError(
            f"this Python has no sources for {package!r}: expected {path}. Use a Python whose standard library "
            "is installed as .py files (python.org, a distribution's full python3, conda, pyenv, uv)."
        )
    return path


def _docstrings_below(path: Path) -> Iterator[str]:
    for tree in _trees_below(path):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
                text = ast.get_docstring(node)
                if text and "\0" not in text:
                    yield text


def _outer_functions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Those that are in no other function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        else:
            yield from _outer_functions(child)


def _trees_below(path: Path) -> Iterator[ast.Module]:
    files = [path] if path.suffix == ".py" else sorted(path.rglob("*.py"))
    for file in files:
        if _NOT_LIBRARY.intersection(file.relative_to(_library()).parts):
            continue
        try:
            yield ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # a few files are broken on purpose, or templates
            continue

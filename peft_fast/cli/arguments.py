"""Types of the commands' options, for argparse: a value that cannot be used is said in one line."""

import argparse
from collections.abc import Callable


def whole(low: int) -> Callable[[str], int]:
    """A whole number, `low` or more."""

    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < low:
            raise argparse.ArgumentTypeError(f"must be a whole number, {low} or more, got {text!r}")
        return int(text)

    return parse

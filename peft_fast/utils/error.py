"""Exceptions of the library, with PEFT's names."""


class PeftError(Exception):
    """Base class of the library's own errors."""


class NoMatchingPeftModuleError(PeftError, ValueError):
    """The adapter's configuration matches no module of the base model."""


class UnknownMethodError(PeftError, ValueError, KeyError):
    """A configuration names a method that there is not, or not yet."""

    __str__ = Exception.__str__  # KeyError's own puts the message into quotes


class UnknownTaskError(PeftError, ValueError, KeyError):
    """Prompt learning needs a task_type that says how tokens are put before the text."""

    __str__ = Exception.__str__  # KeyError's own puts the message into quotes

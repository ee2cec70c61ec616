"""Exceptions of the library, with PEFT's names."""


class PeftError(Exception):
    """Base class of the library's own errors."""


class NoMatchingPeftModuleError(PeftError, ValueError):
    """The adapter's configuration matches no module of the base model."""

"""Warning categories of the library, with PEFT's names."""


class PeftWarning(UserWarning):
    """Base class of the library's own warnings."""

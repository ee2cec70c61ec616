"""Errors of the programs, from Python and on the command line, which shows them as one line without a traceback."""


class UsageError(ValueError):
    """An option's value cannot be used: exit code 2, as argparse's own."""


class JobError(RuntimeError):
    """The job could not be done: exit code 1."""


class Stopped(KeyboardInterrupt):
    """Stopped by Ctrl-C or SIGTERM, after what was finished had been saved.

    Attributes: exit_code: 130, or 143 for SIGTERM.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code

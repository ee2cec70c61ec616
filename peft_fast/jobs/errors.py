"""Errors that the command line shows as one line, without a traceback."""


class UsageError(Exception):
    """An option's value cannot be used: exit code 2, as argparse's own."""


class CommandError(Exception):
    """The command could not do its job: exit code 1."""

"""pentad's exceptions. A message is one line: what is wrong, where, and what to do about it."""

__all__ = ["BadInput", "PentadError"]


class PentadError(Exception):
    """An operation failed: a download, a disk, a device. Exit code 1."""


class BadInput(PentadError, ValueError):
    """The caller's input is wrong: a file, a name, an option, a text. Exit code 2."""

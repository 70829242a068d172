"""Completion of paths."""

import os
from pathlib import Path


def files(prefix: str) -> list[str]:
    """The paths that begin with a text; folders end with a slash."""
    folder, slash, start = prefix.rpartition(os.sep)
    try:
        entries = sorted(Path(folder + slash or ".").expanduser().iterdir())
    except OSError:
        return []
    return [
        folder + slash + entry.name + (os.sep if entry.is_dir() else "")
        for entry in entries
        if entry.name.startswith(start) and entry.name.isprintable() and (start or not entry.name.startswith("."))
    ]

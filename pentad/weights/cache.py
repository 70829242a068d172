"""The folder of pulled models, progress reports, and errors about a full or read-only disk."""

import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from pentad.errors import PentadError

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


class Progress:
    """Receives the progress of any number of tasks, one after another; this class ignores it.

    `advance` may be called from a worker thread, but never from two threads at once.
    """

    def start(self, description: str, total: int | None) -> None:
        """A task of `total` bytes begins; None if the size is unknown."""

    def advance(self, n: int) -> None:
        """`n` more bytes are done."""

    def finish(self) -> None:
        """The task that was started last has ended, done or failed."""


@contextlib.contextmanager
def task(progress: Progress, description: str, total: int | None) -> Iterator[None]:
    """A task that is finished even if its block raises."""
    progress.start(description, total)
    try:
        yield
    finally:
        progress.finish()


def cache_folder() -> Path:
    """pentad's own cache, which may not exist yet: `$PENTAD_CACHE`, else `pentad` in the platform's cache folder.

    The latter is `$XDG_CACHE_HOME`, else `~/.cache`, on macOS `~/Library/Caches`.
    """
    if folder := os.environ.get("PENTAD_CACHE"):
        return Path(folder).expanduser().absolute()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).expanduser().absolute() / "pentad"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "pentad"


def storage_error(error: OSError, folder: Path, variable: str = "PENTAD_CACHE") -> PentadError:
    """The error to raise if a cache's disk is full or read-only; `variable` moves that cache elsewhere."""
    if error.errno in FULL_DISK:
        return PentadError(f"no space left for {folder}: free some, or set {variable} to a folder on another disk")
    reason = error.strerror or str(error)
    return PentadError(f"cannot use the cache folder {folder}: {reason}; set {variable} to a writable folder")


def check_space(folder: Path, nbytes: int, remedy: str) -> None:
    """Raise PentadError if the disk of a folder, which may not exist yet, has less than `nbytes` free."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < nbytes:
        raise PentadError(f"{folder}: no space left: {nbytes:,} bytes are needed, {free:,} are free; {remedy}")

"""Where pulled models are kept, how a pull tells how far it is, what to say of a bad disk."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from pentad.errors import PentadError

__all__ = ["Progress", "Silent", "cache_folder", "storage_error", "task"]


class Progress(Protocol):
    """What a pull tells whoever watches: any number of tasks, one after another.

    `advance` may be called from a worker thread, never from two at once.
    """

    def start(self, description: str, total: int | None) -> None:
        """A task of `total` bytes begins; None where nobody knows how many."""

    def advance(self, n: int) -> None:
        """`n` more bytes are there."""

    def finish(self) -> None:
        """The task that was started last is over, done or failed."""


class Silent:
    """A `Progress` for when nobody watches."""

    def start(self, description: str, total: int | None) -> None: ...

    def advance(self, n: int) -> None: ...

    def finish(self) -> None: ...


@contextlib.contextmanager
def task(progress: Progress, description: str, total: int | None) -> Iterator[None]:
    """A task of `progress` that is finished whatever happens in it."""
    progress.start(description, total)
    try:
        yield
    finally:
        progress.finish()


def cache_folder() -> Path:
    """pentad's own cache: `$PENTAD_CACHE`, else `pentad` in the platform's folder for caches.

    That is `$XDG_CACHE_HOME`, else `~/.cache`, on macOS `~/Library/Caches`. It may not exist yet.
    """
    if chosen := os.environ.get("PENTAD_CACHE"):
        return Path(chosen).expanduser().absolute()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).expanduser().absolute() / "pentad"
    home = Path.home()
    return home / "Library" / "Caches" / "pentad" if sys.platform == "darwin" else home / ".cache" / "pentad"


def storage_error(error: OSError, folder: Path, variable: str = "PENTAD_CACHE") -> PentadError:
    """What to tell a user whose disk refused: a full disk or a folder that can't be written.

    `variable` is the environment variable that moves the cache elsewhere.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return PentadError(f"no space left for {folder}: free some, or set {variable} to a folder on another disk")
    reason = error.strerror or str(error)
    return PentadError(f"cannot use the cache folder {folder}: {reason}; set {variable} to a folder you can write to")

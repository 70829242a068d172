"""Files that are there whole or not at all: written under another name, renamed when they are complete."""

import contextlib
import errno
import glob
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pentad.errors import BadInput, PentadError
from pentad.weights.cache import FULL_DISK, Progress, check_space, storage_error, task

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_RENAME = "choose another name, or remove it"
_FREE_SPACE = "free some, or write to another disk"


@dataclass(frozen=True)
class NewFile:
    """A file to be written; its size is known before, and each piece of its content is made when it is asked for."""

    path: Path
    nbytes: int
    pieces: Iterable[bytes | memoryview]


def write_files(files: Sequence[NewFile], progress: Progress | None = None) -> list[Path]:
    """Write files of one folder, all of them or none.

    Until all are complete they have hidden names in the same folder.

    Args:
        files: an existing file is never replaced.
        progress: is told of the bytes written.

    Returns:
        The files' paths.

    Raises:
        BadInput: a file of that name exists, or the folder is a file.
        PentadError: the disk is full, before or while writing, or the folder can't be written.
    """
    folder, needed = files[0].path.parent, sum(file.nbytes for file in files)
    for file in files:
        if os.path.lexists(file.path):
            raise BadInput(f"{file.path} exists already: {_RENAME}")
    progress = progress or Progress()
    suffix = f".{secrets.token_hex(4)}.part"
    partials = [file.path.with_name(f".{file.path.name}{suffix}") for file in files]
    placed: list[Path] = []
    with _made(folder, needed):
        with disk_errors(folder, needed):
            check_space(folder, needed, _FREE_SPACE)
        for file in files:
            clear_leftovers(file.path)
        try:
            with contextlib.ExitStack() as locks, task(progress, "Writing", needed):
                for file, partial in zip(files, partials, strict=True):
                    _write(partial, file, needed, progress, locks)
            for file, partial in zip(files, partials, strict=True):
                placed.append(file.path)
                with disk_errors(file.path, needed):
                    os.replace(partial, file.path)
        except BaseException:  # also Ctrl-C
            for path in (*partials, *placed):
                with contextlib.suppress(OSError):  # the first error is the one to report
                    path.unlink(missing_ok=True)
            raise
    return placed


@contextlib.contextmanager
def _made(folder: Path, needed: int | None = None) -> Iterator[None]:
    """Make a folder and its parents where they are missing; remove those made, if empty, when the block fails."""
    with disk_errors(folder, needed):
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        parent = (missing[-1] if missing else folder / "_").parent
        if not parent.is_dir():
            raise BadInput(f"{parent} is a file; expected a folder")
    try:
        with disk_errors(folder, needed):
            folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


@contextlib.contextmanager
def cache_entry(target: Path, progress: Progress | None = None) -> Iterator[None]:
    """A block that makes a file of pentad's cache; of several processes one enters at a time, and the others wait.

    Args:
        target: the file; its folder is made.
        progress: shows that a pull waits.

    Raises:
        PentadError: the disk is full or can't be written; the message says how to move the cache.
    """
    from filelock import FileLock, Timeout  # imported only here: it takes as long as reading a model's header

    lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            with task(progress or Progress(), f"waiting for another process that pulls {target.name}", None):
                lock.acquire()
        try:
            yield
        finally:
            lock.release()
    except BadInput:
        raise
    except (OSError, PentadError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        raise storage_error(cause, target.parent) from cause


def clear_leftovers(target: Path) -> None:
    """Remove the hidden parts of a file or folder that killed processes left.

    Raises:
        BadInput: another process is writing `target`.
    """
    for part in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
        try:
            with contextlib.ExitStack() as locks:
                lock(part, locks)
                shutil.rmtree(part) if part.is_dir() else part.unlink()
        except BlockingIOError:
            raise BadInput(f"{target}: another process is writing it; choose another name") from None
        except OSError:
            continue  # it is gone, or belongs to another user


def lock(path: Path, locks: contextlib.ExitStack) -> None:
    """Lock a file or folder as long as `locks` is open. Raises BlockingIOError if another process has locked it."""
    if fcntl is not None:
        descriptor = os.open(path, os.O_RDONLY)
        locks.callback(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _write(partial: Path, file: NewFile, needed: int, progress: Progress, locks: contextlib.ExitStack) -> None:
    with disk_errors(file.path, needed):
        out = open_new(partial)
        lock(partial, locks)
    try:
        for piece in file.pieces:
            with disk_errors(file.path, needed):
                out.write(piece)
            progress.advance(len(piece))
            del piece  # may be a view of a whole tensor, and the next tensor is about to be made
        with disk_errors(file.path, needed):
            out.flush()
            os.fsync(out.fileno())  # some disks report only here that they are full
            out.close()
    except BaseException:
        with contextlib.suppress(OSError):  # closing flushes once more
            out.close()
        raise


def open_new(path: Path) -> BinaryIO:
    """A file that doesn't exist yet, opened for writing; tests put a failing disk here."""
    return path.open("xb")


@contextlib.contextmanager
def disk_errors(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn errors of the disk into a PentadError of one line; `needed` is the size of all files, in bytes."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL_DISK:
            amount = f": {needed:,} bytes are needed in all" if needed is not None else ""
            raise PentadError(f"{path}: no space left{amount}; {_FREE_SPACE}") from error
        if error.errno == errno.EFBIG:
            raise PentadError(f"{path}: larger than the disk allows files to be; write smaller shards") from error
        raise PentadError(f"{path}: cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `destination` at the end, and is deleted if the block fails.

    Missing parents of `destination` are made.

    Raises:
        BadInput: `destination` is a file, in a file, a folder that isn't empty, or the current folder.
        PentadError: it can't be made, or the disk is full (also if the block finds out).
    """
    target = destination.resolve()  # a link stays a link
    with disk_errors(destination):
        _check_new(destination, target)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    with _made(target.parent), contextlib.ExitStack() as locks:
        clear_leftovers(target)
        with disk_errors(destination):
            partial.mkdir()
            lock(partial, locks)
        try:
            try:
                yield partial
            except PentadError as error:  # names the hidden folder, which the user doesn't know
                raise type(error)(str(error).replace(str(partial), str(destination))) from error
            except OSError as error:
                if error.errno not in FULL_DISK:
                    raise
                with disk_errors(destination):
                    raise
            with disk_errors(destination):
                os.replace(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _check_new(destination: Path, target: Path) -> None:
    """Raise BadInput if `target`, which the user calls `destination`, can't become a new folder."""
    if target == Path.cwd():
        raise BadInput(f"{destination} is the current folder; expected a new one")
    if target.is_dir() and any(target.iterdir()):
        raise BadInput(f"{destination} exists already and is not empty: {_RENAME}")
    if target.exists() and not target.is_dir():
        raise BadInput(f"{destination} exists already and is a file: {_RENAME}")


def replace_text(file: Path, text: str) -> None:
    """Write a file, or replace it by one that is complete."""
    partial = file.with_name(f".{file.name}.part")
    partial.write_text(text)
    os.replace(partial, file)

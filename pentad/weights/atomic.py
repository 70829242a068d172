"""Files that are there whole or not at all: written under another name, renamed when they are complete."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pentad.errors import BadInput, PentadError
from pentad.weights.cache import Progress, Silent, task

__all__ = ["NewFile", "new_folder", "write_files"]


@dataclass(frozen=True)
class NewFile:
    """A file to be written: its size in bytes, known before, and what is in it, made piece by piece as it is taken."""

    path: Path
    nbytes: int
    pieces: Iterable[bytes | memoryview]


def write_files(files: Sequence[NewFile], progress: Progress | None = None) -> list[Path]:
    """Write files of one folder, all of them or none, and give their paths.

    Until all are complete they have hidden names beside their own. `progress` counts bytes.

    Raises:
        BadInput: a file of that name exists: none is ever replaced. Or what would be its folder is a file.
        PentadError: the disk is full, before or while writing, or the folder can't be written.
    """
    folder, needed = files[0].path.parent, sum(file.nbytes for file in files)
    for file in files:
        if os.path.lexists(file.path):
            raise BadInput(f"{file.path} exists already: choose another name, or remove it")
    progress = progress or Silent()
    suffix = f".{secrets.token_hex(4)}.part"
    partials = [file.path.with_name(f".{file.path.name}{suffix}") for file in files]
    placed: list[Path] = []
    with _made(folder, needed):
        with _disk_errors(folder, needed):
            free = shutil.disk_usage(folder).free
        if free < needed:
            raise PentadError(f"{folder}: no space left: {needed:,} bytes are needed, {free:,} are free")
        try:
            with task(progress, "Writing", needed):
                for file, partial in zip(files, partials, strict=True):
                    _write(partial, file, needed, progress)
            for file, partial in zip(files, partials, strict=True):
                placed.append(file.path)
                with _disk_errors(file.path, needed):
                    os.replace(partial, file.path)
        except BaseException:  # an interruption too
            for path in (*partials, *placed):
                with contextlib.suppress(OSError):  # what went wrong first is what is to be told
                    path.unlink(missing_ok=True)
            raise
    return placed


@contextlib.contextmanager
def _made(folder: Path, needed: int | None = None) -> Iterator[None]:
    """A folder and those above it, made where they are missing; gone again, where they are empty, if anything fails."""
    with _disk_errors(folder, needed):
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        there = (missing[-1] if missing else folder / "_").parent
        if not there.is_dir():
            raise BadInput(f"{there} is a file: nothing can be put in it")
    try:
        with _disk_errors(folder, needed):
            folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def _write(partial: Path, file: NewFile, needed: int, progress: Progress) -> None:
    with _disk_errors(file.path, needed):
        out = _create(partial)
    try:
        for piece in file.pieces:
            with _disk_errors(file.path, needed):
                out.write(piece)
            progress.advance(len(piece))
            del piece  # which may be a view of a whole tensor, and the next one is about to be made
        with _disk_errors(file.path, needed):
            out.flush()
            os.fsync(out.fileno())  # some disks say only now that they are full
            out.close()
    except BaseException:
        with contextlib.suppress(OSError):  # it would flush once more
            out.close()
        raise


def _create(path: Path) -> BinaryIO:
    return path.open("xb")


@contextlib.contextmanager
def _disk_errors(path: Path, needed: int | None = None) -> Iterator[None]:
    """Says in one line what is wrong with the disk; `needed`: how many bytes all of it takes."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            amount = f": {needed:,} bytes are needed in all" if needed is not None else ""
            raise PentadError(f"{path}: no space left{amount}; free some, or write to another disk") from error
        if error.errno == errno.EFBIG:
            raise PentadError(f"{path}: larger than files may be there; write smaller shards") from error
        raise PentadError(f"{path}: cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `destination` at the end, and is gone if anything goes wrong before.

    Folders above it are made where they are missing.

    Raises:
        BadInput: `destination` is a file, in a file, a folder with something in it, or the one that this process is in.
        PentadError: it can't be made, or the disk is full (whoever finds that out within).
    """
    target = destination.resolve()  # a link stays a link
    with _disk_errors(destination):
        _check_new(destination, target)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    with _made(target.parent):
        with _disk_errors(destination):
            partial.mkdir()
        try:
            try:
                yield partial
            except PentadError as error:  # in the words of whoever named the destination
                raise type(error)(str(error).replace(str(partial), str(destination))) from error
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise PentadError(f"{destination}: no space left; free some, or write to another disk") from error
            with _disk_errors(destination):
                os.replace(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _check_new(destination: Path, target: Path) -> None:
    """BadInput where `target`, which the user named as `destination`, can't become a new folder."""
    if target.is_dir():
        if target == Path.cwd():
            raise BadInput(f"{destination} is the current folder: name a new one")
        if any(target.iterdir()):
            raise BadInput(f"{destination} exists already and is not empty: choose another name, or remove it")
    elif target.exists():
        raise BadInput(f"{destination} exists already, and is no folder: choose another name, or remove it")

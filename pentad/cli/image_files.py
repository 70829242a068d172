"""The images that a command's arguments name: files, folders, and patterns."""

from __future__ import annotations

from collections.abc import Sequence
from glob import glob, has_magic
from pathlib import Path

from pentad.errors import BadInput

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
"""Suffixes of the files of a folder that are read."""


def image_files(arguments: Sequence[str], suffixes: Sequence[str] = IMAGES) -> list[Path]:
    """The files that arguments name, in their order, those of a folder or a pattern by name.

    Args:
        arguments: files, which may have any suffix; folders, which are searched with their subfolders; or patterns with
            ``*``, ``?`` or ``[]``, for shells that don't expand them.
        suffixes: the suffixes of the files that count in folders and patterns.

    Raises:
        BadInput: an argument names nothing.
    """
    files: list[Path] = []
    for argument in arguments:
        path = Path(argument).expanduser()
        if path.is_dir():
            found = [file for file in path.rglob("*") if file.suffix.lower() in suffixes and file.is_file()]
        elif not path.exists() and has_magic(argument):
            found = [Path(name) for name in glob(str(path), recursive=True)]
            found = [file for file in found if file.suffix.lower() in suffixes and file.is_file()]
        elif path.exists():
            found = [path]
        else:
            raise BadInput(f"no such file or folder: {argument!r}")
        if not found:
            raise BadInput(f"{argument} has no images; expected files that end in {', '.join(suffixes[:4])}, …")
        files += sorted(found)
    return files

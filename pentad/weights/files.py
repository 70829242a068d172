"""What files hold: JSON read with care, and a guess at what a file is that nobody expected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from pentad.errors import BadInput

__all__ = ["READABLE", "describe", "read_json", "read_start", "refuse"]

READABLE = (
    "pentad reads GGUF files, folders with a config.json and model.safetensors or pytorch_model.bin, and folders with "
    "a params.json and consolidated.safetensors or .pth"
)
_MAX_JSON_BYTES = 100_000_000  # what safetensors allows its headers
_MAX_MESSAGE = 600  # what a hostile file calls its tensors may be megabytes
_KINDS = (
    (b"version https://git-lfs", "a Git LFS pointer: the file itself was never downloaded"),
    (b"<", "a web page or XML"),
    (b"GGUF", "a GGUF file"),
    (b"ggml", "a GGML file from before GGUF"),
    (b"tjgg", "a GGML file from before GGUF"),
    (b"fmgg", "a GGML file from before GGUF"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x80", "a bare pickle, which could run code"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"%PDF", "a PDF"),
    (b"{", "JSON"),
)


def refuse(path: Path, message: str) -> NoReturn:
    """Raises BadInput: the path and, in one line of bearable length, what is wrong with it."""
    raise BadInput(f"{path}: {message[:_MAX_MESSAGE]}".replace("\n", " "))


def read_start(path: Path, nbytes: int = 512) -> bytes:
    """The first bytes of a file. BadInput where it is absent or cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(nbytes)
    except OSError as error:
        refuse(path, error.strerror or str(error))


def describe(path: Path) -> str:
    """What a file seems to be, by its first bytes, as a noun for an error message."""
    start = read_start(path)
    if not start:
        return "an empty file"
    for magic, kind in _KINDS:
        if start.lstrip().startswith(magic):
            return kind
    return "text" if all(9 <= byte < 127 for byte in start) else "no format that pentad knows"


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object. BadInput, in one line, for everything else."""
    content = read_start(path, _MAX_JSON_BYTES + 1)
    if len(content) > _MAX_JSON_BYTES:
        refuse(path, f"longer than the {_MAX_JSON_BYTES} bytes that pentad takes as JSON")
    try:
        value = json.loads(content.decode())
    except UnicodeDecodeError as error:
        refuse(path, f"not UTF-8: {error.reason} at byte {error.start}")
    except RecursionError:
        refuse(path, "JSON nested too deeply")
    except ValueError as error:
        kind = describe(path)
        refuse(path, f"{'broken JSON' if kind == 'JSON' else f'not JSON but {kind}'}: {error}")
    if not isinstance(value, dict):
        refuse(path, f"a JSON {type(value).__name__}, where an object is expected")
    return value

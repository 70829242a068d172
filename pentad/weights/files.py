"""Read JSON and the start of untrusted files, and raise errors about files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from pentad.errors import BadInput

READABLE = (
    "pentad reads GGUF files, folders with a config.json and model.safetensors or pytorch_model.bin, and folders with "
    "a params.json and consolidated.safetensors or .pth; of vision models also one .pth or .safetensors file alone"
)
MAX_JSON_BYTES = 100_000_000  # the limit of safetensors headers
_MAX_MESSAGE = 600  # a hostile file may have megabytes for a tensor's name
_SIGNATURES: tuple[tuple[bytes | tuple[bytes, ...], str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer: the file itself was never downloaded"),
    (b"<", "a web page or XML"),
    (b"GGUF", "a GGUF file"),
    ((b"ggml", b"tjgg", b"fmgg"), "a GGML file from before GGUF"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x80", "a bare pickle, which could run code"),
    (b"\x1f\x8b", "a gzip archive"),
    ((b"\x89PNG", b"\xff\xd8\xff"), "a picture"),
    (b"%PDF", "a PDF"),
    (b"{", "JSON"),
)


def refuse(path: Path, message: str) -> NoReturn:
    """Raise BadInput with the path and the message, cut to one line of readable length."""
    raise BadInput(f"{path}: {message[:_MAX_MESSAGE]}".replace("\n", " "))


def check_present(path: Path, files: Sequence[Path]) -> None:
    """Raise BadInput about `path` if any of the files that belong to it is missing."""
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        refuse(path, f"{len(missing)} of {len(files)} files missing: {', '.join(missing[:8])}")


def read_start(path: Path, nbytes: int = 512) -> bytes:
    """The first bytes of a file; BadInput if it is absent or cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(nbytes)
    except OSError as error:
        refuse(path, error.strerror or str(error))


def describe(path: Path) -> str:
    """A noun for an error message: the probable type of a file, by its first bytes."""
    start = read_start(path)
    if not start:
        return "an empty file"
    for signature, noun in _SIGNATURES:
        if start.lstrip().startswith(signature):
            return noun
    return "text" if all(9 <= byte < 127 for byte in start) else "no format that pentad knows"


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object; BadInput, in one line, for everything else."""
    content = read_start(path, MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        refuse(path, f"longer than {MAX_JSON_BYTES} bytes, pentad's limit for JSON")
    try:
        value = json.loads(content.decode())
    except UnicodeDecodeError as error:
        refuse(path, f"not UTF-8: {error.reason} at byte {error.start}")
    except RecursionError:
        refuse(path, "JSON nested too deeply")
    except ValueError as error:
        noun = describe(path)
        refuse(path, f"{'broken JSON' if noun == 'JSON' else f'not JSON but {noun}'}: {error}")
    if not isinstance(value, dict):
        refuse(path, f"JSON of type {type(value).__name__}; expected an object")
    return value

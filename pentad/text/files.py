"""Read a tokenizer's files; each error is one line that names the file."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pentad.errors import BadInput, PentadError

__all__ = ["one_line", "read_bytes", "read_json", "read_text", "refusing"]

_MAX_BYTES = 200_000_000  # ten times the largest published file


def one_line(error: BaseException, limit: int = 500) -> str:
    """The message of `error`, or its class if there is none, in one line of at most `limit` characters."""
    message = " ".join(str(error)[:10_000].split()) or type(error).__name__
    return message if len(message) <= limit else message[:limit] + "…"


@contextlib.contextmanager
def refusing(subject: str, *, prefix: bool = False) -> Iterator[None]:
    """Convert exceptions and Rust panics of the libraries that read untrusted files to `BadInput`.

    Args:
        subject: the beginning of the message.
        prefix: put `subject` in front of pentad's own errors too.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, PentadError):
            if not prefix:
                raise
            raise BadInput(f"{subject}: {error}") from None
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise BadInput(f"{subject}: {type(error).__name__}: {one_line(error, 200)}") from None


def read_bytes(file: Path) -> bytes:
    """Read a file. Raises `BadInput` if it is unreadable, or larger than any tokenizer's file."""
    try:
        size = file.stat().st_size
        if size > _MAX_BYTES:
            raise BadInput(f"{file} has {size} bytes; expected at most {_MAX_BYTES} in a tokenizer's file")
        return file.read_bytes()
    except OSError as error:
        raise BadInput(f"{file}: {error.strerror or error}") from None


def read_text(file: Path) -> str:
    """Read a text file. Raises `BadInput` as `read_bytes`, and if it isn't UTF-8."""
    try:
        return read_bytes(file).decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"{file}: byte {error.start} is not valid UTF-8; save the file as UTF-8") from None


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object. Raises `BadInput` as `read_bytes`, and for any other content."""
    try:
        content = json.loads(read_bytes(file))
    except BadInput:
        raise
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise BadInput(f"{file} holds a {type(content).__name__}; expected a JSON object")
    return content

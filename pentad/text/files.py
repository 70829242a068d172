"""Files of a tokenizer, read with care: each error is one line that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pentad.errors import BadInput

__all__ = ["one_line", "read_bytes", "read_json", "read_text"]

_MAX_BYTES = 200_000_000  # ten times the largest published


def one_line(error: BaseException) -> str:
    """The message of `error` in one line of at most 500 characters; where it has none, its class."""
    message = " ".join(str(error).split()) or type(error).__name__
    return message if len(message) <= 500 else message[:500] + "…"


def read_bytes(file: Path) -> bytes:
    """The content. Raises `BadInput` where the file can't be read, or is larger than any tokenizer's."""
    try:
        size = file.stat().st_size
        if size > _MAX_BYTES:
            raise BadInput(f"{file}: {size} bytes are too many for a tokenizer's file")
        return file.read_bytes()
    except OSError as error:
        raise BadInput(f"{file}: {error.strerror or error}") from None


def read_text(file: Path) -> str:
    """The content as text. Raises `BadInput` as `read_bytes`, and for what isn't UTF-8."""
    try:
        return read_bytes(file).decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"{file}: not valid UTF-8 (byte {error.start}): save it as UTF-8") from None


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`. Raises `BadInput` as `read_bytes`, and for anything else in it."""
    try:
        content = json.loads(read_bytes(file))
    except BadInput:
        raise
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{file}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise BadInput(f"{file}: a JSON object was expected, not {type(content).__name__}")
    return content

"""Output of commands: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pentad.errors import PentadError
from pentad.weights.cache import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

# Shown as U+2400…: neither a model's text nor a file's name can send commands to the terminal.
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_CONTROLS |= {0x7F: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD)}
_CELL = {**_CONTROLS, **{ord(character): 0x2400 + ord(character) for character in "\n\t"}}
_JSON = {code: f"\\u{code:04x}" for code in range(0x7F, 0xA0)}  # those that json.dumps leaves as they are


def write(text: str) -> None:
    """Write to standard output and flush; control characters are shown as symbols."""
    _send(text.translate(_CONTROLS))


@contextmanager
def generated() -> Iterator[Callable[[str], None]]:
    """A function that writes the pieces of a model's text; the end of the ``with`` block completes the last line.

    A file or pipe gets the text unchanged. A terminal gets symbols for control characters, and lines that end between
    words.
    """
    if not sys.stdout.isatty():
        yield _send
        return
    from pentad.cli.wrapping import WordWrap

    lines = WordWrap(write)
    try:
        yield lines.write
    finally:
        lines.flush()


def _send(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        abandon_stdout()
        raise PentadError(f"standard output can't be written: {(error.strerror or str(error)).lower()}") from error


def write_json(value: object) -> None:
    """Write one line of JSON to standard output.

    Raises:
        ValueError: a number is NaN or infinite, which JSON can't express.
    """
    unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    _send(json.dumps(value, ensure_ascii=not unicode, allow_nan=False).translate(_JSON) + "\n")


def write_table(rows: Iterable[Sequence[object]]) -> None:
    """Write rows as aligned columns."""
    cells = [[str(cell).translate(_CELL) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        write(line.rstrip() + "\n")


def note(text: str) -> None:
    """Write a line for the user to standard error."""
    print(text.translate(_CONTROLS), file=sys.stderr, flush=True)


def fail(message: str) -> None:
    """Write an error to standard error as one line."""
    note("pentad: " + " ".join(message.split()))


@contextmanager
def log() -> Iterator[None]:
    """Write pentad's log to standard error inside a ``with`` block."""
    import logging

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            note("pentad: " + record.getMessage())

    logger, notes = logging.getLogger("pentad"), Notes()
    level = logger.level
    logger.addHandler(notes)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(notes)
        logger.setLevel(level)


def size(nbytes: int) -> str:
    """A readable number of bytes: ``98.4 MB``."""
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if nbytes >= 1000**power:
            return f"{nbytes / 1000**power:.1f} {unit}"
    return f"{nbytes} bytes"


def abandon_stdout() -> None:
    """Discard what is still buffered for standard output, which has no reader any more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def status(text: str) -> Iterator[None]:
    """Show a line on a terminal's standard error while the ``with`` block runs."""
    if not sys.stderr.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        yield
        return
    print(text.translate(_CELL), end="\r", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


class Bars(Progress):
    """Progress as bars on standard error.

    Args:
        unit: of the amounts: bytes, or anything else.
    """

    def __init__(self, unit: str = "bytes") -> None:
        self._bars: RichProgress | None = None
        self._unit = unit

    def start(self, description: str, total: int | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress
        from rich.progress import TimeRemainingColumn as Remaining

        columns: list[Any] = [TextColumn("{task.description}", markup=False), BarColumn(30)]
        if total is not None:
            columns += [DownloadColumn() if self._unit == "bytes" else MofNCompleteColumn(), Remaining()]
        self._bars = RichProgress(*columns, console=Console(stderr=True), transient=True)
        self._bars.add_task(description.translate(_CELL), total=total)
        self._bars.start()

    def advance(self, n: int) -> None:
        if self._bars is not None:
            self._bars.advance(self._bars.task_ids[0], n)

    def finish(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


def progress(unit: str = "bytes") -> Progress | None:
    """Progress bars if standard error is a terminal, else None."""
    return Bars(unit) if sys.stderr.isatty() else None

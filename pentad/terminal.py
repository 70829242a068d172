"""A terminal that keeps what is typed before a conversation's prompt, without showing it.

This module imports nothing slow: the echo is switched off before the command line is imported.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

try:
    import termios
except ImportError:  # Windows
    termios = None  # type: ignore[assignment]

STDIN = 0
_before: tuple[Any, Any] | None = None  # the terminal's attributes and the handler of SIGCONT, while it is quiet


def starts_conversation(arguments: Sequence[str]) -> bool:
    """True if a command line is ``chat`` with no word but options and, perhaps, their values."""
    words = [word for word in arguments if word not in ("--debug", "--verbose")]
    if words[:1] not in (["chat"], ["run"]) or {"-h", "--help"} & set(words):
        return False
    return all(one.startswith("-") or other.startswith("-") for one, other in pairwise(words))


def hush() -> None:
    """Keep what is typed for the next prompt, without showing it, until `restore`; Ctrl-C still interrupts."""
    global _before
    if _before is not None or termios is None:
        return
    try:
        attributes = termios.tcgetattr(STDIN)
    except termios.error:
        return
    if not _may_change_it():
        return
    quiet = [*attributes]
    quiet[0] &= ~termios.ICRNL
    quiet[3] = quiet[3] & ~(termios.ECHO | termios.ICANON | termios.IEXTEN) | termios.NOFLSH

    def apply(*_: object) -> None:
        if _may_change_it():
            termios.tcsetattr(STDIN, termios.TCSANOW, quiet)
            bracketed_paste(True)

    # A shell changes the terminal while this process is suspended.
    _before = attributes, signal.signal(signal.SIGCONT, apply)
    atexit.register(restore)
    apply()
    _send("\r\x1b[K")  # what has been typed before is in the next prompt, too


def restore() -> None:
    """Make the terminal as it was before `hush`."""
    global _before
    if _before is None:
        return
    (attributes, handler), _before = _before, None
    signal.signal(signal.SIGCONT, handler)
    with contextlib.suppress(termios.error):  # the terminal may be gone
        if _may_change_it():
            bracketed_paste(False)
            termios.tcsetattr(STDIN, termios.TCSANOW, attributes)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """`hush` inside a ``with`` block."""
    hush()
    try:
        yield
    finally:
        restore()


def bracketed_paste(on: bool) -> None:
    """Ask the terminal to mark where pasted text begins and ends."""
    _send(f"\x1b[?2004{'h' if on else 'l'}")


def _send(sequence: str) -> None:
    if sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown"):
        sys.stderr.write(sequence)
        sys.stderr.flush()


def _may_change_it() -> bool:
    """False for a job in the background, which the system would stop."""
    try:
        return os.tcgetpgrp(STDIN) == os.getpgrp()
    except OSError:
        return True  # it isn't the terminal that controls this process

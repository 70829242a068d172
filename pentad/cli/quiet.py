"""A terminal that keeps what is typed before the prompt."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what is typed for the next prompt, without showing it; Ctrl-C still interrupts."""
    try:
        import termios

        before = termios.tcgetattr(sys.stdin)
    except (ImportError, termios.error):
        yield
        return
    after = termios.tcgetattr(sys.stdin)
    after[0] &= ~termios.ICRNL
    after[3] = after[3] & ~(termios.ECHO | termios.ICANON | termios.IEXTEN) | termios.NOFLSH

    def apply(*_: object) -> None:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, after)
        bracketed_paste(True)

    resumed = signal.signal(signal.SIGCONT, apply)  # a shell has changed the terminal while the process was suspended
    try:
        apply()
        yield
    finally:
        signal.signal(signal.SIGCONT, resumed)
        bracketed_paste(False)
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def bracketed_paste(on: bool) -> None:
    """Ask the terminal to mark where pasted text begins and ends."""
    if sys.stderr.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown"):
        sys.stderr.write(f"\x1b[?2004{'h' if on else 'l'}")
        sys.stderr.flush()

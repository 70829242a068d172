"""Ctrl-C that lets a step of the model finish."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType

ECHO = 1.0  # seconds; timeout(1) signals both process and group, so a second signal this soon is the same one


class CtrlC:
    """Handles SIGINT inside a ``with`` block.

    Attributes:
        pressed: true after the first SIGINT.
        gently: the first SIGINT calls `stop`, which lets the step of the model finish; otherwise it raises
            KeyboardInterrupt at once. A second SIGINT always raises.
        stop: ends the present work.
    """

    def __init__(self, *, gently: bool = False) -> None:
        self.pressed = False
        self.gently = gently
        self.stop: Callable[[], None] = lambda: None
        self._first = 0.0

    def __enter__(self) -> CtrlC:
        self._previous = signal.signal(signal.SIGINT, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        again, now = self.pressed, time.monotonic()
        if again and now - self._first < ECHO:
            return
        self.pressed, self._first = True, now
        if again or not self.gently:
            raise KeyboardInterrupt
        self.stop()

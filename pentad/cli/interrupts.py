"""Ctrl-C, heard where it does no harm."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType

ECHO = 1.0  # seconds in which a second signal is the same one: timeout(1) sends it to process and group


class CtrlC:
    """Hears SIGINT inside a ``with`` block.

    Attributes:
        pressed: whether it came.
        gently: only note it and call `stop`, so that a step of the model comes to its end; else
            raise KeyboardInterrupt at once. Whoever presses again gets that in any case.
        stop: what ends the work at hand.
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

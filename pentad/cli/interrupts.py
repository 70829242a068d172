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
        stop: what the first SIGINT calls: it ends the present work after the model's step. Without it the first one
            raises KeyboardInterrupt at once; a second one always does.
    """

    def __init__(self) -> None:
        self.pressed = False
        self.stop: Callable[[], None] | None = None
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
        if again or self.stop is None:
            raise KeyboardInterrupt
        self.stop()

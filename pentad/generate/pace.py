"""The pace of steps: how many tokens a step may prefill without holding up the requests that are decoding."""

import math
from collections import deque
from statistics import median

MEASUREMENTS = 7  # the median of so many, as other processes slow down single steps


class Pace:
    """Measures steps, and bounds the time of those that both prefill and decode.

    Args:
        max_ratio: such a step takes at most this many times as long as one that only decodes; None for no bound.
    """

    def __init__(self, max_ratio: float | None) -> None:
        self._max_ratio = max_ratio
        self._decoding: deque[tuple[float, int]] = deque(maxlen=MEASUREMENTS)  # seconds of a step, its sequences
        self._prefilling: deque[float] = deque(maxlen=MEASUREMENTS)  # seconds per token

    def prefill_tokens(self, decoding: int) -> float:
        """How many tokens a step may prefill in which this many sequences decode; 0 if nothing was measured yet."""
        if self._max_ratio is None or not decoding:
            return math.inf
        if not self._decoding or not self._prefilling:
            return 0
        return max(1, int((self._max_ratio - 1) * self._decode_seconds(decoding) / median(self._prefilling)))

    def break_even(self, decoding: int) -> float:
        """The share of drafted tokens that must be accepted for this many sequences to be decoded faster.

        A draft takes as long as a prefilled token, and saves one sequence's share of a step.
        """
        if not self._decoding or not self._prefilling:
            return 0.0
        return median(self._prefilling) * decoding / self._decode_seconds(decoding)

    def measure(self, seconds: float, decoding: int, prefilled: int) -> None:
        """Add a step's duration, its decoding sequences (and drafted tokens) and its prefilled tokens."""
        if not prefilled:
            self._decoding.append((seconds, decoding))
        elif self._decoding or not decoding:
            rest = seconds - (self._decode_seconds(decoding) if decoding else 0)
            self._prefilling.append(max(rest / prefilled, 0.1 * seconds / (prefilled + decoding)))

    def _decode_seconds(self, sequences: int) -> float:
        """The time of a step that only decodes. Another sequence takes as long as a prefilled token."""
        token = median(self._prefilling) if self._prefilling else 0.0
        return median(max(seconds + (sequences - n) * token, seconds / 10) for seconds, n in self._decoding)

"""Converts a request's tokens to text, up to a stop string."""

from collections.abc import Sequence

from pentad.text.detokenizer import Detokenizer


class Transcript:
    """The text of one generation so far.

    Text that may be the beginning of a stop string is held back until the next tokens decide.

    Args:
        detokenizer: a new detokenizer.
        stop: strings that end the text and are not part of it.
    """

    def __init__(self, detokenizer: Detokenizer, stop: Sequence[str] = ()) -> None:
        self.text = ""
        self.stopped = False
        self._detokenizer = detokenizer
        self._stop = [string for string in stop if string]
        self._longest_begin = max((len(string) for string in self._stop), default=1) - 1
        self._held = ""

    def add(self, token: int) -> None:
        """Add a token."""
        self._grow(self._detokenizer.add(token))
        if not self.stopped:
            self._release(self._may_begin_stop())

    def finish(self) -> None:
        """End the text without a stop string, and release the text held back."""
        if not self.stopped:
            self._grow(self._detokenizer.finish())
            self._release(0)

    def _grow(self, piece: str) -> None:
        self._held += piece
        ends = [at for string in self._stop if (at := self._held.find(string)) >= 0]
        if ends:
            self.text += self._held[: min(ends)]
            self._held, self.stopped = "", True

    def _may_begin_stop(self) -> int:
        """The number of characters at the end of the held text that may begin a stop string."""
        for count in range(min(self._longest_begin, len(self._held)), 0, -1):
            if any(string.startswith(self._held[-count:]) for string in self._stop):
                return count
        return 0

    def _release(self, keep: int) -> None:
        cut = len(self._held) - keep
        self.text += self._held[:cut]
        self._held = self._held[cut:]

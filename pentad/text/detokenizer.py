"""Decode token ids one at a time, without ever cutting a character in half."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pentad.text.tokenizer import Tokenizer

__all__ = ["Detokenizer"]


class Detokenizer:
    """An incremental decoder: its pieces, joined, equal `Tokenizer.decode` of all ids.

    It holds back bytes until they complete a character. Invalid bytes become U+FFFD.

    Attributes:
        opening: true until the first token, if no text precedes it.
    """

    def __init__(self, tokenizer: Tokenizer, *, special: bool = False, continues: bool = False) -> None:
        """Start decoding.

        Args:
            tokenizer: the vocabulary of the ids.
            special: write control tokens as text; by default they are dropped.
            continues: text precedes the first id, so the leading space of a SentencePiece vocabulary is kept.
        """
        self._tokenizer = tokenizer
        self._skipped = frozenset() if special else frozenset(tokenizer.control.values())
        self.opening = not continues
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """Decode one more id.

        Returns:
            The text that the id completes; empty if the last character is incomplete.

        Raises:
            BadInput: `token` is negative.
        """
        if token in self._skipped:
            return ""
        to_bytes = self._tokenizer.first_bytes if self.opening else self._tokenizer.token_bytes
        self.opening = False
        return self._utf8.decode(to_bytes(token))

    def finish(self) -> str:
        """End the text: returns U+FFFD for an incomplete character, otherwise an empty string."""
        return self._utf8.decode(b"", final=True)

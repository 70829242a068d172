"""Token ids -> text, one id at a time, never half a character."""

from __future__ import annotations

import codecs
from typing import Protocol

__all__ = ["Detokenizer", "Pieces"]


class Pieces(Protocol):
    """What a detokenizer needs to know of a vocabulary."""

    @property
    def control(self) -> dict[str, int]:
        """Control string -> id."""

    def token_bytes(self, token: int) -> bytes:
        """The bytes that `token` stands for."""

    def first_bytes(self, token: int) -> bytes:
        """The same where `token` opens a text: without the space that encoding put in front."""


class Detokenizer:
    """Turns a stream of ids into text. The pieces, joined, are what `Tokenizer.decode` gives for
    all of the ids.

    Bytes that don't yet make up a character are held back; bytes that never will come out as
    U+FFFD, where Python's incremental UTF-8 decoder puts it.
    """

    def __init__(self, pieces: Pieces, *, special: bool = False, continues: bool = False) -> None:
        """`special` lets control tokens through as their text; `continues` says that text comes
        before the first id, so that a SentencePiece vocabulary's leading space is a space and not
        the opening of a text.
        """
        self._pieces = pieces
        self._skipped = frozenset() if special else frozenset(pieces.control.values())
        self._opening = not continues
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """The text that is complete now that `token` has come; often empty in the middle of an
        emoji.
        """
        if token in self._skipped:
            return ""
        read = self._pieces.first_bytes if self._opening else self._pieces.token_bytes
        self._opening = False
        return self._utf8.decode(read(token))

    def finish(self) -> str:
        """What was held back: U+FFFD for a character that never ended, else nothing."""
        return self._utf8.decode(b"", final=True)

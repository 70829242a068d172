"""Lines of a terminal that end between words, for text that arrives in pieces."""

import shutil
from collections.abc import Callable

from rich.cells import cell_len

TAB = 8  # columns


class WordWrap:
    """Breaks lines between words, or beside a wide character, at the width that the terminal has at the time.

    A word is written when it is complete. The terminal itself breaks a word that is longer than a line.
    """

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._column = 0
        self._spaces = ""
        self._word = ""
        self._may_break = False
        self._ready: list[str] = []

    def write(self, text: str) -> None:
        """Add a piece of text."""
        width = shutil.get_terminal_size().columns
        for character in text:
            if character == "\n":
                self._place(width)
                self._ready.append("\n")
                self._column, self._spaces = 0, ""
            elif character in " \t":
                self._place(width)
                position = self._column + len(self._spaces)
                self._spaces += " " * (1 if character == " " else TAB - position % TAB)
                self._may_break = True
            elif cell_len(character) > 1:
                self._place(width)
                self._word, self._may_break = character, True
                self._place(width)
                self._may_break = True
            else:
                self._word += character
                if len(self._word) >= width:
                    self._place(width)
        self._send()

    def flush(self) -> None:
        """Write the last word."""
        self._place(shutil.get_terminal_size().columns)
        self._send()

    def _place(self, width: int) -> None:
        if not self._word:
            return
        columns = cell_len(self._word)
        if self._may_break and self._column and self._column + len(self._spaces) + columns > width:
            self._ready.append("\n")
            self._column, self._spaces = 0, ""
        self._ready.append(self._spaces + self._word)
        self._column = (self._column + len(self._spaces) + columns - 1) % width + 1
        self._spaces, self._word, self._may_break = "", "", False

    def _send(self) -> None:
        self._write("".join(self._ready))
        self._ready.clear()

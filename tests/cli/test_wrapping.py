"""Lines of a terminal that end between words."""

import os
import shutil

import pytest

from pentad.cli.wrapping import WordWrap


@pytest.fixture(autouse=True)
def _width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((10, 24)))


def wrapped(*pieces: str) -> str:
    written: list[str] = []
    lines = WordWrap(written.append)
    for piece in pieces:
        lines.write(piece)
    lines.flush()
    return "".join(written)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("one two three four", "one two\nthree four"),
        ("0123456789 a", "0123456789\na"),
        ("a\n\n  b  \nc ", "a\n\n  b\nc"),
        ("a\tb\tc", "a       b\nc"),
        ("see http://example.org/x now", "see\nhttp://example.org/x\nnow"),
        ("日本語の文章です", "日本語の文\n章です"),
        ("a 日本語の", "a 日本語の"),
        ("", ""),
    ],
)
def test_lines_break_between_words(text: str, lines: str) -> None:
    assert wrapped(text) == lines
    assert wrapped(*text) == lines


def test_a_word_is_written_when_it_is_complete() -> None:
    written: list[str] = []
    lines = WordWrap(written.append)
    for piece in ("Hel", "lo wo", "rd", "\n"):
        lines.write(piece)
    assert written == ["", "Hello", "", " word\n"]

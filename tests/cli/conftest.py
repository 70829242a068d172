"""Runs the command line in this process, where torch is already imported, so that tests are fast."""

import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from pentad.cli import main


@dataclass(frozen=True)
class Done:
    """A command's exit code and output."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON object on standard output."""
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The single line on standard error of a command that wrote no result."""
        assert self.out == ""
        line, end = self.err[:-1], self.err[-1:]
        assert end == "\n"
        assert line.startswith("pentad: ")
        assert "\n" not in line
        return line


Pentad = Callable[..., Done]


@pytest.fixture
def pentad(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Pentad:
    """A function that runs `pentad ARGUMENTS…`; standard input is not a terminal unless `terminal` is True."""

    def run(*arguments: object, stdin: bytes = b"", terminal: bool = False) -> Done:
        monkeypatch.setattr(sys, "argv", ["pentad", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        monkeypatch.setattr(sys.stdin, "isatty", lambda: terminal)
        with pytest.raises(SystemExit) as end:
            main()
        written = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return Done(end.value.code, written.out, written.err)

    return run

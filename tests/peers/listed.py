"""A pytest plugin for suites of other projects: listed tests don't apply, all others must pass.

A line of the list is ``what: why``. ``what`` is a test's id, with or without its parameters, or a file or folder; ``*``
stands for any characters. A listed test must fail. A listed file is not run. A line that names nothing is an error.
"""

import re
from pathlib import Path

import pytest

LINES = pytest.StashKey[list["Line"]]()


class Line:
    """One line of the list."""

    def __init__(self, line: str) -> None:
        self.what, _, self.why = line.partition(": ")
        assert self.why, f"{line!r} has no reason"
        self.names_tests = "::" in self.what
        self.used = False
        self._pattern = re.compile(
            re.escape(self.what).replace(r"\*", ".*") + (r"(\[.*\])?" if self.names_tests else "")
        )

    def names(self, name: str) -> bool:
        """Whether the line names this test or file."""
        found = self._pattern.fullmatch(name) is not None
        self.used |= found
        return found


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--listed", type=Path, required=True)


def pytest_configure(config: pytest.Config) -> None:
    lines = config.getoption("listed").read_text().splitlines()
    config.stash[LINES] = [Line(line) for line in lines if line and not line.startswith("#")]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    name = collection_path.relative_to(config.rootpath).as_posix()
    return any(line.names(name) for line in config.stash[LINES] if not line.names_tests) or None


def pytest_collection_modifyitems(items: list[pytest.Item], config: pytest.Config) -> None:
    lines = config.stash[LINES]
    for item in items:
        for line in lines:
            if line.names_tests and line.names(item.nodeid):
                item.add_marker(pytest.mark.xfail(reason=line.why, strict=True))
    if unused := [line.what for line in lines if not line.used]:
        raise pytest.UsageError(f"{config.getoption('listed')} lists what doesn't exist: {', '.join(unused)}")

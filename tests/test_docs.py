"""The docs' examples run, their commands exist, and their links have targets.

A document's blocks run from top to bottom in one empty folder. ``python`` blocks share their namespace; bash runs the
lines of ``console`` blocks that start with ``$ ``. A ``toml`` block whose first line is a comment with a file's name is
written to that file. Commands that install or build are not run: the tests only check
that the scripts and make targets exist.
"""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pentad import models

ROOT = Path(__file__).parents[1]
GENERATED = ROOT / "docs" / "cli.md"  # `make check` compares it with the commands
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EVERY_DOCUMENT = [*DOCUMENTS, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"")
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    line: int


def blocks(document: Path) -> list[Block]:
    """The fenced blocks of a document, with the line number of each block's first line."""
    text = document.read_text()
    return [Block(match[1], match[2], text.count("\n", 0, match.start(2)) + 1) for match in BLOCK.finditer(text)]


def commands(block: Block) -> list[str]:
    """The commands of a console block: lines after ``$ ``, with continuation lines joined."""
    joined = block.text.replace("\\\n", " ")
    return [line[2:].strip() for line in joined.splitlines() if line.startswith("$ ")]


def is_only_checked(command: str) -> bool:
    """Return True for a command that installs or builds, after checking that its script or make target exists."""
    words = shlex.split(command, comments=True)
    match words:
        case ["make", *targets]:
            unknown = set(targets) - TARGETS
        case ["git" | "cd" | "pip" | "source", *_]:
            unknown = set()
        case [path, *_] if path.startswith("scripts/"):
            unknown = set() if (ROOT / path).is_file() else {path}
        case ["python", path, *_] if path.endswith(".py"):
            unknown = set() if (ROOT / path).is_file() else {path}
        case _:
            return False
    assert not unknown, f"{command}: {', '.join(sorted(unknown))} doesn't exist"
    return True


def run_command(command: str, folder: Path) -> None:
    """Run a command with this environment's pentad first on the PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        cwd=folder,
        env={**os.environ, "PATH": path},
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def run_document(document: Path, folder: Path) -> int:
    """Run a document's blocks in order; returns how many ran."""
    names: dict[str, Any] = {"__name__": "__main__"}
    ran = 0
    for block in blocks(document):
        if block.language == "python":
            # Blank lines before the block give tracebacks the document's line numbers.
            source = "\n" * (block.line - 1) + block.text
            exec(compile(source, str(document), "exec"), names)
            ran += 1
        if block.language == "toml" and (name := re.match(r"# (\w+\.toml)\n", block.text)):
            (folder / name[1]).write_text(block.text)
        for command in commands(block) if block.language == "console" else []:
            if not is_only_checked(command):
                run_command(command, folder)
                ran += 1
    return ran


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


@pytest.mark.network
@pytest.mark.parametrize("document", [path for path in DOCUMENTS if path != GENERATED], ids=name_of)
def test_examples_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "_registered", list(models._registered))  # a page may register a family
    ran = run_document(document, tmp_path)
    assert ran > 0 or document.name != "README.md"


@pytest.mark.parametrize("document", EVERY_DOCUMENT, ids=name_of)
def test_links_have_targets(document: Path) -> None:
    targets = [a or b for a, b in LINK.findall(BLOCK.sub("", document.read_text()))]
    local = [target.split("#")[0] for target in targets if "://" not in target]
    assert not [target for target in local if not (document.parent / target).exists()]


@pytest.mark.parametrize("document", EVERY_DOCUMENT, ids=name_of)
def test_blocks_name_a_known_language(document: Path) -> None:
    known = {"python", "console", "text", "toml", "json"}
    assert {block.language for block in blocks(document)} <= known


def test_the_harness_finds_errors(tmp_path: Path) -> None:
    document = tmp_path / "rotten.md"
    for block in ("python\nassert False", "console\n$ false", "console\n$ make nonsense"):
        document.write_text(f"```{block}\n```\n")
        with pytest.raises(AssertionError):
            run_document(document, tmp_path)
    document.write_text("```python\nx = 1\n```\n\n```console\n$ echo \\\n  hi\nhi\n```\n")
    assert run_document(document, tmp_path) == 2

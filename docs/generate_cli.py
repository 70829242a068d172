"""Generate docs/cli.md from the commands; with ``--check``, fail if it is out of date."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from pentad.cli import application

TARGET = Path(__file__).with_name("cli.md")

INTRODUCTION = """\
# The command line

*`scripts/docs` generates this page from the commands; `--help` shows the same text.*

With `--json`, every command prints one JSON object, or one object a line, on standard output. New versions
may add fields, but never rename one. Logs, progress and errors go to standard error; progress is shown only
on a terminal.

| exit code | |
| --- | --- |
| 0 | success |
| 1 | failure: a download, a disk, a device |
| 2 | invalid input: an option, a file, a text |
| 130 | interrupted by Ctrl-C |

An error is one line that says what is wrong and what to do. `--debug`, anywhere in a command, shows the
traceback. `--verbose`, anywhere in a command, shows whether pentad's kernels or plain torch runs the model,
and why.
"""


def reference() -> str:
    """The text of the page."""
    group: Any = typer.main.get_command(application())
    return INTRODUCTION + "".join("\n" + "\n".join(section(name, c)) + "\n" for name, c in commands(group))


def commands(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The commands of a group and of the groups in it, with their full names."""
    for command in group.commands.values():
        name = f"{prefix}{command.name}"
        if hasattr(command, "commands"):
            yield from commands(command, f"{name} ")
        elif not command.hidden:
            yield name, command


def section(name: str, command: Any) -> Iterator[str]:
    """The lines of one command's section."""
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
    usage = [f"pentad {name}"]
    usage += [p.metavar if p.required else f"[{p.metavar}]" for p in arguments]
    yield f"## pentad {name}"
    yield ""
    yield f"`{' '.join([*usage, '[OPTIONS]'])}`"
    yield ""
    yield inspect.cleandoc(command.help)
    yield ""
    yield "| | |"
    yield "| --- | --- |"
    for argument in arguments:
        yield f"| `{argument.metavar}` | {argument.help} |"
    for option in options:
        names = ", ".join(option.opts)
        value = "" if option.is_flag else f" {option.metavar}"
        default = "" if option.default in (None, False) else f" Default: `{option.default}`."
        yield f"| `{names}{value}` | {option.help}{default} |"


def main() -> None:
    """Write the page, or with ``--check`` compare it with the file."""
    page = reference()
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(page)
    elif not TARGET.is_file() or TARGET.read_text() != page:
        sys.exit(f"{TARGET.name} is out of date; run scripts/docs")


if __name__ == "__main__":
    main()

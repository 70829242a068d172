"""The command ``pentad``. Heavy imports happen inside the commands, so that ``--help`` is quick."""

import atexit
import gc
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Annotated

import typer

import pentad
from pentad.cli import output
from pentad.cli.benching import bench
from pentad.cli.classifying import classify
from pentad.cli.converting import convert, merge
from pentad.cli.data import data
from pentad.cli.detecting import detect
from pentad.cli.environment import env
from pentad.cli.evaluating import evaluate
from pentad.cli.generating import chat, complete, score
from pentad.cli.inventory import models, pull, rm
from pentad.cli.options import DECLARED, expected, with_groups
from pentad.cli.reproducing import reproduce
from pentad.cli.segmenting import segment
from pentad.cli.serving import serve
from pentad.cli.showing import show
from pentad.cli.training import train
from pentad.errors import BadInput, PentadError

__all__ = ["application", "main"]

_VISIBLE: tuple[Callable[..., None], ...] = (
    *(chat, complete, score, classify, detect, segment),
    *(models, pull, rm, show, convert, merge, train, serve, evaluate, reproduce, bench, env),
)
_HIDDEN: dict[str, Callable[..., None]] = {"run": chat, "list": models}  # as Ollama names them
COMMANDS: dict[str, Callable[..., None]] = {command.__name__: command for command in _VISIBLE} | _HIDDEN


@cache
def application(only: str | None = None) -> typer.Typer:
    """The command line; with `only`, just this command of it: to build all of them takes a tenth of a chat's start."""
    made = typer.Typer(
        name="pentad",
        rich_markup_mode=None,
        context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]},
    )
    made.callback()(_root)
    for name, command in COMMANDS.items():
        if only in (None, name):
            made.command(name, hidden=name in _HIDDEN)(with_groups(command))
    if only in (None, "data"):
        made.add_typer(data, name="data")
    return made


def _version(wanted: bool) -> None:
    if wanted:
        output.write(f"pentad {pentad.__version__}\n")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="With any command: show the traceback of an error.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="With any command: show what runs the model.")] = False,
) -> None:
    """Run small open models, from the files they were published in."""


def main() -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 bad usage or input, 130 interrupted."""
    if "_PENTAD_COMPLETE" in os.environ:  # the shell asks for completions
        typer.main.get_command(application())(prog_name="pentad")
    arguments = sys.argv[1:] or ["--help"]
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    debug = "--debug" in options
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unlike the default, it removes half-written files
    atexit.register(gc.freeze)  # no search for cycles in what the process leaves
    rest = [a for i, a in enumerate(arguments) if a not in ("--debug", "--verbose") or i >= len(options)]
    with output.log() if "--verbose" in options else nullcontext():
        code = _run(rest, debug)
    sys.exit(code)


def _run(arguments: list[str], debug: bool) -> int:
    """Run one command; an error becomes one line on standard error, and an exit code."""
    stdout_is_closed = sys.stdout is None
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # in the order of their file descriptors
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - until the process ends
    if stdout_is_closed:
        output.fail("standard output is closed: redirect it to a file or a pipe")
        return 1
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    if not debug and not sys.warnoptions:
        warnings.simplefilter("ignore")  # those of libraries mean nothing to users
    try:
        code = _invoke(arguments)
        output.write("")  # flushes: a broken pipe or a full disk is noticed here
        return code
    except KeyboardInterrupt:
        output.note("interrupted")
        return 130
    except BrokenPipeError:  # the reader, such as head, has read enough
        output.abandon_stdout()
        return 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        else:
            output.fail(_explain(error))
        return 2 if isinstance(error, BadInput) or _is_usage(error) else 1


def _invoke(arguments: list[str]) -> int:
    only = arguments[0] if arguments[0] in (*COMMANDS, "data") else None
    group = typer.main.get_command(application(only))
    try:
        with group.make_context("pentad", arguments) as context:
            context.command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    return 0


def _is_usage(error: Exception) -> bool:
    """True if typer refused the command line; the error's class is click's or, in new versions, typer's own."""
    return isinstance(error, typer.BadParameter.__mro__[1])


def _explain(error: Exception) -> str:
    if isinstance(error, PentadError):
        return str(error)
    if _is_usage(error):
        context = getattr(error, "ctx", None)
        message = _out_of_range(error) or error.format_message()  # type: ignore[attr-defined]
        path = context.command_path if context is not None else "pentad"
        return f"{message.rstrip('.')} (see {path} --help)"
    return f"{type(error).__name__}: {error} (--debug shows where)"


def _out_of_range(error: Exception) -> str | None:
    """The message for a value that typer's validator refused, in the words of pentad's other errors."""
    errors, name = getattr(error.__cause__, "errors", None), getattr(getattr(error, "param", None), "name", None)
    if errors is None or name not in DECLARED:
        return None
    return f"{error.param.opts[0]} is {errors()[0]['input']}; expected {expected(name)}"  # type: ignore[attr-defined]

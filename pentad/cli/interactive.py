"""An interactive chat: messages in, replies out, ``/commands``."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pentad.cli import output
from pentad.cli.answer import cut_off, follow
from pentad.cli.conversation import Conversation
from pentad.cli.interrupts import CtrlC
from pentad.cli.options import DECLARED, Generating, check, expected
from pentad.cli.paths import files
from pentad.errors import BadInput, PentadError

HELP = '''\
/help              show this list
/reset             clear the conversation, but keep the system message
/system [TEXT]     set the system message; without TEXT, remove it
/undo              remove the last turn
/retry             reply to the last message again
/set [NAME VALUE]  set an option (temperature 0.2); without VALUE, its default; alone, list options
/tokens            show how much of the context is used
/save FILE         append the conversation to a file, as one line of JSON
/load FILE         continue the last conversation of a file
/quit              leave; so do /exit, /bye, Ctrl-D, and Ctrl-C twice

End a line with \\ to continue it on the next line; begin and end a text of many lines with """. A pasted text is one
message. Tab completes commands, options and files; Ctrl-R searches what was typed before.
Ctrl-C stops a reply, and keeps its text so far.'''

FULL = "(cut off: the context is full; /reset clears it, /set truncate yes drops the oldest turns)"


def _yes_or_no(text: str) -> bool:
    return {"yes": True, "no": False}[text]


SETTINGS: dict[str, Callable[[str], Any]] = {
    **{
        name: get_args(hint)[0]
        for name, hint in get_type_hints(Generating).items()
        if name not in ("stop", "logprobs", "schema")
    },
    "truncate": _yes_or_no,
}
"""The options that /set takes, and how their values are parsed."""


class Loop:
    """Reads messages and commands with `read` until the user leaves."""

    def __init__(self, conversation: Conversation, read: Callable[[], str]) -> None:
        self.conversation = conversation
        self._read = read
        self._commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: output.note(HELP),
            "?": lambda _: output.note(HELP),
            "reset": self._reset,
            "system": self._system,
            "undo": self._undo,
            "retry": self._retry,
            "set": self._set,
            "tokens": self._tokens,
            "save": self._save,
            "load": self._load,
        }

    def run(self) -> None:
        """Run until the user leaves with /quit or Ctrl-D.

        Raises:
            KeyboardInterrupt: the user pressed Ctrl-C twice.
        """
        model = self.conversation.model
        output.note(f"{model.name}, context {model.context_length} tokens. /help lists commands; Ctrl-D leaves.")
        leaving = False
        while True:
            try:
                message = self._read()
                leaving = False
                if message.strip() in ("/quit", "/exit", "/bye"):
                    return
                if message.strip():
                    self._handle(message)
            except EOFError:
                output.write("\n")
                return
            except KeyboardInterrupt:
                output.write("\n")
                if leaving:
                    raise
                output.note("(press Ctrl-C again, or Ctrl-D, to leave)")
                leaving = True
            except UnicodeDecodeError:
                output.fail("the input is not valid UTF-8")

    def _handle(self, message: str) -> None:
        name, _, argument = message.strip().removeprefix("/").partition(" ")
        try:
            if not message.startswith("/"):
                self._say(message)
            elif name in self._commands:
                self._commands[name](argument.strip())
            else:
                raise BadInput(
                    f"unknown command /{name}: /help lists commands; a space before the / makes it a message"
                )
        except PentadError as error:
            output.fail(str(error))

    def _say(self, message: str) -> None:
        conversation = self.conversation
        conversation.add("user", message)
        try:
            with CtrlC() as ctrl_c:
                if dropped := conversation.fit():
                    output.note(f"(dropped {_turns(dropped)} to make room)")
                with output.generated() as write:
                    reply = follow(conversation.stream(), write, ctrl_c)
        except BaseException:
            conversation.undo()
            raise
        output.write("\n\n")
        conversation.add("assistant", reply.text)
        if cut_off(reply, conversation.model):
            output.note(FULL)

    def _reset(self, _: str) -> None:
        self.conversation.reset()
        output.note("(conversation cleared)")

    def _system(self, text: str) -> None:
        self.conversation.set_system(text or None)
        output.note("(system message set)" if text else "(system message removed)")

    def _undo(self, _: str) -> None:
        message = self.conversation.undo()
        output.note("(no turn to remove)" if message is None else f"(removed: {_brief(message)})")

    def _retry(self, _: str) -> None:
        message = self.conversation.undo()
        if message is None:
            raise BadInput("there is no message to reply to")
        self._say(message)

    def _set(self, argument: str) -> None:
        if not argument:
            return self._list_settings()
        conversation = self.conversation
        name, _, text = argument.replace("=", " ", 1).partition(" ")
        name, text = name.replace("-", "_"), text.strip()
        if name not in SETTINGS:
            raise BadInput(f"unknown option {name!r}; known options: {', '.join(SETTINGS)}")
        try:
            value = SETTINGS[name](text) if text else None
        except (ValueError, KeyError):
            raise BadInput(
                f"{name} is {text!r}; expected {expected(name) if name in DECLARED else 'yes or no'}"
            ) from None
        if name == "truncate":
            conversation.truncate = bool(value)
        elif value is None:
            conversation.options.pop(name, None)  # type: ignore[misc]
        else:
            check(name, value)
            conversation.options[name] = value  # type: ignore[literal-required]

    def _list_settings(self) -> None:
        conversation = self.conversation
        values = {
            **vars(conversation.model.sampling),
            **conversation.options,
            "truncate": "yes" if conversation.truncate else "no",
        }
        for name in SETTINGS:
            output.note(f"{name:20}{values.get(name, 'not set')}")

    def _tokens(self, _: str) -> None:
        conversation = self.conversation
        used = conversation.tokens() if conversation.messages else 0
        output.note(f"({used} of {conversation.model.context_length} tokens)")

    def _save(self, file: str) -> None:
        if not file:
            raise BadInput("/save needs the name of a file")
        self.conversation.save(Path(file).expanduser())
        output.note(f"(added to {file})")

    def _load(self, file: str) -> None:
        if not file:
            raise BadInput("/load needs the name of a file")
        self.conversation.load(Path(file).expanduser())
        output.note(f"({len(self.conversation.messages)} messages)")


def _turns(dropped: Sequence[str]) -> str:
    count = "the oldest turn" if len(dropped) == 1 else f"the {len(dropped)} oldest turns"
    return f"{count}, beginning with {_brief(dropped[0])},"


def _brief(text: str) -> str:
    """The first words of a text, in quotes."""
    line = " ".join(text.split())
    return f'"{line[:40]}…"' if len(line) > 40 else f'"{line}"'


def complete_line(line: str) -> tuple[str, Iterable[str]]:
    """The word at the end of a line that Tab completes, and what it may become."""
    if not line.startswith("/"):
        return "", []
    command, space, argument = line.partition(" ")
    if command in ("/save", "/load") and space:
        return argument, files(argument)
    candidates = [f"/{name} " for name in ("load", "save", "set", "system")]
    candidates += [f"/{name}" for name in ("bye", "exit", "help", "quit", "reset", "retry", "tokens", "undo")]
    word = command
    if space:
        name, space, word = argument.rpartition(" ")
        candidates = [f"{setting} " for setting in SETTINGS]
        if space:
            candidates = ["yes", "no"] if name == "truncate" else []
        if command != "/set":
            candidates = []
    return word, [candidate for candidate in candidates if candidate.startswith(word)]

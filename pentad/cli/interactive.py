"""The loop of an interactive chat: lines in, replies out, ``/commands``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pentad.cli import output
from pentad.cli.answer import cut_off, follow
from pentad.cli.conversation import Conversation
from pentad.cli.interrupts import CtrlC
from pentad.errors import BadInput, PentadError

HELP = '''\
/help              this list
/reset             forget the conversation; the system message stays
/system [TEXT]     set the system message; without TEXT, take it away
/undo              take the last turn back
/retry             reply to the last message again
/set [NAME VALUE]  set an option (temperature 0.2); without VALUE its default; alone, list them
/tokens            how much of the context is used
/save FILE         add the conversation to a file, as a line of JSON
/load FILE         go on with the last conversation of a file
/quit              leave; so does Ctrl-D, or Ctrl-C twice

A line that ends in \\ goes on in the next one; """ begins and ends a text of many lines.
Ctrl-C stops a reply; what was said so far stays.'''

FULL = "(cut off: the context is full; /reset begins anew, /set truncate yes drops the oldest turns)"
HISTORY = 1000  # lines
QUOTES = '"""'


def _yes_or_no(text: str) -> bool:
    return {"yes": True, "no": False}[text]


SETTINGS: dict[str, Callable[[str], Any]] = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "max_tokens": int,
    "seed": int,
    "truncate": _yes_or_no,
}


class Loop:
    """Reads messages and commands from the terminal until the user leaves."""

    def __init__(self, conversation: Conversation) -> None:
        self.conversation = conversation
        self._commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: output.note(HELP),
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
        """Returns when the user leaves with /quit or Ctrl-D.

        Raises:
            KeyboardInterrupt: they left with Ctrl-C twice.
        """
        model = self.conversation.model
        output.note(f"{model.name}, context {model.context_length} tokens. /help lists commands; Ctrl-D leaves.")
        with _history():
            leaving = False
            while True:
                try:
                    message = _read_message()
                    leaving = False
                    if message.strip() == "/quit":
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
                    output.note("(Ctrl-C again, or Ctrl-D, leaves)")
                    leaving = True
                except UnicodeDecodeError:
                    output.fail("what you typed is not valid UTF-8")

    def _handle(self, message: str) -> None:
        name, _, argument = message.strip().removeprefix("/").partition(" ")
        try:
            if not message.startswith("/"):
                self._say(message)
            elif name in self._commands:
                self._commands[name](argument.strip())
            else:
                raise BadInput(
                    f"there is no command /{name}: /help lists them, and a space in front makes it a message"
                )
        except PentadError as error:
            output.fail(str(error))

    def _say(self, message: str) -> None:
        conversation = self.conversation
        conversation.add("user", message)
        try:
            with CtrlC(gently=True) as ctrl_c:
                if dropped := conversation.fit():
                    output.note(f"(dropped {_turns(dropped)} to make room)")
                reply = follow(conversation.stream(), output.write, ctrl_c)
        except BaseException:
            conversation.undo()
            raise
        output.write("\n\n")
        conversation.add("assistant", reply.text)
        if cut_off(reply, conversation.model):
            output.note(FULL)

    def _reset(self, _: str) -> None:
        self.conversation.reset()
        output.note("(forgotten)")

    def _system(self, text: str) -> None:
        self.conversation.set_system(text or None)
        output.note("(system message set)" if text else "(no system message)")

    def _undo(self, _: str) -> None:
        said = self.conversation.undo()
        output.note("(nothing to take back)" if said is None else f"(taken back: {_brief(said)})")

    def _retry(self, _: str) -> None:
        said = self.conversation.undo()
        if said is None:
            raise BadInput("there is no message to reply to")
        self._say(said)

    def _set(self, argument: str) -> None:
        if not argument:
            return self._list_settings()
        conversation = self.conversation
        name, _, text = argument.replace("=", " ", 1).partition(" ")
        name, text = name.replace("-", "_"), text.strip()
        if name not in SETTINGS:
            raise BadInput(f"there is no option {name!r}; there are {', '.join(SETTINGS)}")
        try:
            value = SETTINGS[name](text) if text else None
        except (ValueError, KeyError):
            raise BadInput(f"{name} doesn't take {text!r}") from None
        if name == "truncate":
            conversation.truncate = bool(value)
        elif value is None:
            conversation.options.pop(name, None)  # type: ignore[misc]
        else:
            if hasattr(conversation.model.sampling, name):
                conversation.model.sampling.replace(**{name: value})  # refuses what is out of range
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
            raise BadInput("/save takes the name of a file")
        self.conversation.save(Path(file).expanduser())
        output.note(f"(added to {file})")

    def _load(self, file: str) -> None:
        if not file:
            raise BadInput("/load takes the name of a file")
        self.conversation.load(Path(file).expanduser())
        output.note(f"({len(self.conversation.messages)} messages)")


def _turns(dropped: Sequence[str]) -> str:
    count = "the oldest turn" if len(dropped) == 1 else f"the {len(dropped)} oldest turns"
    return f"{count}, from {_brief(dropped[0])} on,"


def _brief(text: str) -> str:
    """The first words of a text, in quotes."""
    line = " ".join(text.split())
    return f'"{line[:40]}…"' if len(line) > 40 else f'"{line}"'


def _read_message() -> str:
    r"""One message: a line, goes on after ``\``, or lines between triple quotes.

    Raises:
        EOFError, KeyboardInterrupt: the user pressed Ctrl-D, Ctrl-C.
    """
    line = input("> ")
    if line.startswith(QUOTES):
        text = line.removeprefix(QUOTES)
        while not text.rstrip().endswith(QUOTES):
            text += "\n" + input("... ")
        return text.rstrip().removesuffix(QUOTES).strip("\n")
    while line.endswith("\\"):
        line = line.removesuffix("\\") + "\n" + input("... ")
    return line


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Line editing with the history of earlier chats, where the system has it."""
    try:
        import readline
    except ImportError:
        yield
        return
    from pentad.weights.cache import cache_folder

    path = cache_folder() / "history"
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(HISTORY)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)
            path.chmod(0o600)

"""The prompt of a conversation: line editing, completion and history."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable

from prompt_toolkit import PromptSession
from prompt_toolkit.application.current import create_app_session, get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output
from prompt_toolkit.output.plain_text import PlainTextOutput
from prompt_toolkit.shortcuts import CompleteStyle
from prompt_toolkit.utils import is_dumb_terminal

from pentad.terminal import bracketed_paste
from pentad.weights.cache import cache_folder

ENTRIES = 1000  # kept in the history
QUOTES = '"""'
_SEPARATOR = b"\n# "  # begins each entry of a FileHistory


class Prompt:
    """Reads messages at a terminal.

    Args:
        complete: from the text before the cursor to the word that Tab completes, and what it may become.
    """

    def __init__(self, complete: Callable[[str], tuple[str, Iterable[str]]]) -> None:
        dumb = is_dumb_terminal()  # it would show escape sequences
        with create_app_session(output=PlainTextOutput(sys.stdout)) if dumb else contextlib.nullcontext():
            self._session: PromptSession[str] = PromptSession(
                "> ",
                completer=_Completer(complete),
                complete_style=CompleteStyle.READLINE_LIKE,
                complete_while_typing=False,
                enable_suspend=True,
                history=history(),
                key_bindings=_bindings(),
                output=None if dumb else create_output(always_prefer_tty=True),
                prompt_continuation="... ",
            )

    def __call__(self) -> str:
        r"""Read a message; a line that ends with ``\``, or is between triple quotes, continues.

        Raises:
            EOFError: the user pressed Ctrl-D.
            KeyboardInterrupt: the user pressed Ctrl-C on an empty line.
        """
        try:
            text = self._session.prompt()
        finally:
            bracketed_paste(True)  # prompt_toolkit has turned it off
        return text.strip()[len(QUOTES) : -len(QUOTES)].strip("\n") if _quoted(text) else text


class _Completer(Completer):
    def __init__(self, complete: Callable[[str], tuple[str, Iterable[str]]]) -> None:
        self._complete = complete

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        word, candidates = self._complete(document.text_before_cursor)
        return [Completion(candidate, -len(word)) for candidate in candidates]


class _File(FileHistory):
    """A history that a full or broken disk doesn't stop."""

    def load_history_strings(self) -> Iterable[str]:
        with contextlib.suppress(OSError):
            return list(super().load_history_strings())
        return []

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError, UnicodeEncodeError):
            super().store_string(string)


def history() -> History:
    """The messages of earlier conversations, in a file that only the user may read."""
    path = cache_folder() / "history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(0o600)
        path.chmod(0o600)
        entries = path.read_bytes().split(_SEPARATOR)[1:]
        if len(entries) > ENTRIES:
            path.write_bytes(_SEPARATOR + _SEPARATOR.join(entries[-ENTRIES:]))
    except OSError:
        return InMemoryHistory()
    return _File(str(path))


def _quoted(text: str) -> bool:
    text = text.strip()
    return len(text) >= 2 * len(QUOTES) and text.startswith(QUOTES) and text.endswith(QUOTES)


def _bindings() -> KeyBindings:
    bindings = KeyBindings()

    def buffer_text(test: Callable[[str], bool]) -> Condition:
        return Condition(lambda: test(get_app().current_buffer.text))

    @bindings.add("enter", filter=buffer_text(lambda text: text.endswith("\\")))
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        buffer.cursor_position = len(buffer.text)
        buffer.delete_before_cursor()
        buffer.insert_text("\n")

    @bindings.add("enter", filter=buffer_text(lambda text: text.startswith(QUOTES) and not _quoted(text)))
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @bindings.add("c-c", filter=buffer_text(bool))
    @bindings.add("<sigint>", filter=buffer_text(bool))
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.reset()

    return bindings

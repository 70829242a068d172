"""A conversation, kept within its model's context."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from pentad.errors import BadInput, PentadError

if TYPE_CHECKING:
    from pentad.generate import LanguageModel, Options, Stream


class Conversation:
    """Messages, and the model that replies to them.

    Attributes:
        messages: ``{"role", "content"}`` each; a system message, if any, comes first.
        options: how replies are generated.
        truncate: drop the oldest turns if the context has no room for a reply, instead of raising an error.
    """

    def __init__(
        self, model: LanguageModel, options: Options, *, system: str | None = None, truncate: bool = False
    ) -> None:
        self.model = model
        self.options = options
        self.truncate = truncate
        self.messages: list[dict[str, str]] = []
        self.set_system(system)

    @property
    def system(self) -> str | None:
        """The text of the system message, if there is one."""
        first = self.messages[:1]
        return first[0]["content"] if first and first[0]["role"] == "system" else None

    def set_system(self, text: str | None) -> None:
        """Set the system message; None removes it."""
        self.messages[: self._begin] = [] if text is None else [{"role": "system", "content": text}]

    def reset(self) -> None:
        """Remove all messages but the system message."""
        del self.messages[self._begin :]

    def add(self, role: str, text: str) -> None:
        """Add a message."""
        self.messages.append({"role": role, "content": text})

    def undo(self) -> str | None:
        """Remove the last turn; returns its user message, or None if there was no turn."""
        starts = self._turns()
        if not starts:
            return None
        text = self.messages[starts[-1]]["content"]
        del self.messages[starts[-1] :]
        return text

    def tokens(self) -> int:
        """The number of tokens of the prompt for the next reply."""
        return len(self.model.chat_ids(self.messages))

    def fit(self) -> list[str]:
        """Make room for a reply; returns the user messages of the turns that were dropped.

        Turns are dropped until half of the context is free: after each drop the rest is prefilled again.

        Raises:
            BadInput: there is no room, and no turn may be dropped.
        """
        limit = self.model.context_length
        room = min(self.options.get("max_tokens") or limit, limit // 4) if self.truncate else 1
        count = self.tokens()
        if count + max(room, 1) <= limit:
            return []
        dropped: list[str] = []
        while self.truncate and count > limit // 2 and len(starts := self._turns()) > 1:
            dropped.append(self.messages[starts[0]]["content"])
            del self.messages[self._begin : starts[1]]
            count = self.tokens()
        if count >= limit:
            several = len(self._turns()) > 1
            raise BadInput(
                f"the conversation has {count} tokens; the context of {limit} has no room for a reply: "
                + ("/set truncate yes drops the oldest turns, /reset all turns" if several else "shorten it")
            )
        return dropped

    def stream(self) -> Stream:
        """Start a reply to the last message."""
        return self.model.stream(self.messages, **self.options)

    def save(self, path: Path) -> None:
        """Append the conversation to a file, as one line of JSON in the format of training data.

        Raises:
            PentadError: the file can't be written.
        """
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self.messages}) + "\n")
        except OSError as error:
            raise PentadError(f"{path}: {error.strerror or error}") from None

    def load(self, path: Path) -> None:
        """Continue with the last conversation of a file.

        Raises:
            BadInput: the file can't be read, or its last line isn't a conversation.
        """
        try:
            last = path.read_text(encoding="utf-8").strip().rpartition("\n")[2]
            messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in json.loads(last)["messages"]]
        except OSError as error:
            raise BadInput(f"{path}: {error.strerror or error}") from None
        except (ValueError, KeyError, TypeError):
            raise BadInput(f'{path}: its last line is not a conversation, {{"messages": […]}}') from None
        self.messages = messages

    @property
    def _begin(self) -> int:
        """The index of the first message after the system message."""
        return 0 if self.system is None else 1

    def _turns(self) -> list[int]:
        """The indices of the user messages, which start the turns."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "user"]

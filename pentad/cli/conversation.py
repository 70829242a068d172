"""A conversation that fits its model's context, or says that it doesn't."""

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
        messages: ``{"role", "content"}`` each; a system message, if there is one, comes first.
        options: how replies are generated.
        truncate: drop the oldest turns where the context has no room for a reply, instead of refusing.
    """

    def __init__(
        self,
        model: LanguageModel,
        options: Options,
        *,
        system: str | None = None,
        truncate: bool = False,
    ) -> None:
        self.model = model
        self.options = options
        self.truncate = truncate
        self.messages: list[dict[str, str]] = []
        self.set_system(system)

    @property
    def system(self) -> str | None:
        """What the system message says."""
        first = self.messages[:1]
        return first[0]["content"] if first and first[0]["role"] == "system" else None

    def set_system(self, text: str | None) -> None:
        """Change the system message, or take it away."""
        self.messages[: self._begin] = [] if text is None else [{"role": "system", "content": text}]

    def reset(self) -> None:
        """Forget everything but the system message."""
        del self.messages[self._begin :]

    def add(self, role: str, text: str) -> None:
        """Add a message."""
        self.messages.append({"role": role, "content": text})

    def undo(self) -> str | None:
        """Take the last turn back; returns what the user had said, None where there is no turn."""
        starts = self._turns()
        if not starts:
            return None
        said = self.messages[starts[-1]]["content"]
        del self.messages[starts[-1] :]
        return said

    def tokens(self) -> int:
        """How many tokens the model is given if it replies now."""
        return len(self.model.chat_ids(self.messages))

    def fit(self) -> list[str]:
        """Make sure that a reply has room; returns what the user had said in turns that were dropped.

        Turns are dropped until half of the context is free, since each time the rest is prefilled anew.

        Raises:
            BadInput: it has none, and nothing may be dropped.
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
                f"the conversation has {count} tokens, which leaves no room for a reply in the context of {limit}: "
                + ("/set truncate yes drops the oldest turns, /reset all of them" if several else "shorten it")
            )
        return dropped

    def stream(self) -> Stream:
        """Begin a reply to the last message."""
        return self.model.stream(self.messages, **self.options)

    def save(self, path: Path) -> None:
        """Add the conversation to a file, as one line of JSON: the form of training data.

        Raises:
            PentadError: the file can't be written.
        """
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self.messages}) + "\n")
        except OSError as error:
            raise PentadError(f"{path}: {error.strerror or error}") from None

    def load(self, path: Path) -> None:
        """Go on with the last conversation of a file.

        Raises:
            BadInput: the file can't be read, or its last line is no conversation.
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
        """Where the turns begin."""
        return 0 if self.system is None else 1

    def _turns(self) -> list[int]:
        """Where each turn begins: at what the user says."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "user"]

"""The sequences that a worker runs for an HTTP request, and what it reports about them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pentad.serve.errors import APIError


class Event(NamedTuple):
    """The progress of one sequence in one step.

    Attributes:
        choice: the number of the sequence in its call.
        token: its new token.
        finish: "stop" or "length" once it has finished.
        logprobs: the new token's log-probability, and the most likely tokens with theirs.
        scores: the same for each token of a prompt but the first.
        embedding: the hidden state of a prompt.
        cached: number of tokens of the prompt that were in the KV cache, with the first token.
    """

    choice: int
    token: int | None = None
    finish: str | None = None
    logprobs: tuple[float, list[tuple[int, float]]] | None = None
    scores: list[tuple[float, list[tuple[int, float]]]] | None = None
    embedding: list[float] | None = None
    cached: int = 0


class Call:
    """The sequences of one request. `close` cancels those that haven't finished.

    Args:
        ids: the worker's names of the sequences.
        cancel: cancels a sequence.
    """

    def __init__(self, ids: Sequence[int], cancel: Callable[[int], None]) -> None:
        self._open = dict(enumerate(ids))
        self._cancel = cancel
        self._events: asyncio.Queue[Event | APIError] = asyncio.Queue()

    async def next(self) -> Event:
        """Wait for the next event.

        Raises:
            APIError: the worker refused a sequence, or died.
        """
        event = await self._events.get()
        if isinstance(event, APIError):
            raise event
        return event

    def put(self, event: Event | APIError) -> None:
        """Add an event."""
        if isinstance(event, Event) and event.finish is not None:
            self._open.pop(event.choice, None)
        self._events.put_nowait(event)

    def cancel(self, choice: int) -> None:
        """End one sequence, unless it has finished."""
        if (number := self._open.pop(choice, None)) is not None:
            self._cancel(number)

    def close(self) -> None:
        """End all sequences that haven't finished."""
        for choice in [*self._open]:
            self.cancel(choice)


@dataclass
class Running:
    """A sequence that a worker runs.

    Attributes:
        call: the call that it belongs to.
        choice: its number there.
        last: the time of its last token, or of its submission.
        decoding: whether it has a token.
    """

    call: Call
    choice: int
    last: float = field(default_factory=time.perf_counter)
    decoding: bool = False

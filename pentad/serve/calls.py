"""The sequences that a worker runs for an HTTP request, and what it reports about them."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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
        result: a vision model's answer.
        cached: number of tokens of the prompt that were in the KV cache, with the first token.
    """

    choice: int
    token: int | None = None
    finish: str | None = None
    logprobs: tuple[float, list[tuple[int, float]]] | None = None
    scores: list[tuple[float, list[tuple[int, float]]]] | None = None
    embedding: list[float] | None = None
    result: dict[str, Any] | None = None
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
        self._events: deque[Event | APIError] = deque()
        self._arrival: asyncio.Future[None] | None = None  # what `next` waits for

    async def next(self) -> Event:
        """Wait for the next event.

        Raises:
            APIError: the worker refused a sequence, or died.
        """
        while not self._events:
            self._arrival = asyncio.get_running_loop().create_future()
            await self._arrival
        event = self._events.popleft()
        if isinstance(event, APIError):
            raise event
        return event

    def put(self, event: Event | APIError) -> None:
        """Add an event."""
        if isinstance(event, Event) and event.finish is not None:
            self._open.pop(event.choice, None)
        self._events.append(event)
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

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

"""The models of a server: their worker processes, and the requests that these run."""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pentad import text
from pentad.errors import BadInput, PentadError
from pentad.serve.errors import APIError
from pentad.text import Tokenizer
from pentad.weights.gguf_header import read_metadata

MAX_LINE_BYTES = 1 << 30  # of a worker's message; the scores of a long prompt are the longest
RETRY_AFTER = 1  # seconds


class Event(NamedTuple):
    """The progress of one sequence of a call in one step.

    Attributes:
        choice: the sequence.
        token: its new token.
        finish: "stop", "length" or "error" once it has finished.
        logprobs: the new token's log-probability, and the most likely tokens with theirs.
        scores: the same for each token of a prompt but the first.
    """

    choice: int
    token: int | None = None
    finish: str | None = None
    logprobs: tuple[float, list[tuple[int, float]]] | None = None
    scores: list[tuple[float, list[tuple[int, float]]]] | None = None


class Call:
    """The sequences that a worker runs for one HTTP request. `close` cancels those that haven't finished."""

    def __init__(self, model: Model, ids: Sequence[int]) -> None:
        self._model = model
        self._open = dict(enumerate(ids))
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

    def cancel(self, index: int) -> None:
        """End one sequence, unless it has finished."""
        if (number := self._open.pop(index, None)) is not None:
            self._model.cancel(number)

    def close(self) -> None:
        """End all sequences that haven't finished."""
        for index in [*self._open]:
            self.cancel(index)


@dataclass(frozen=True)
class Loaded:
    """What the front process knows about a model that is ready.

    Attributes:
        tokenizer: the same as the worker's.
        context_length: maximum sequence length in tokens.
        vocab_size: token ids are smaller.
        backend: what runs its steps.
    """

    tokenizer: Tokenizer
    context_length: int
    vocab_size: int
    backend: str


class Model:
    """A model and its worker process.

    Args:
        name: its name in the API.
        path: its files.
        options: see `pentad.load`, and cache_bytes, the limit of its KV cache.
        max_queue: maximum number of sequences that run or wait.

    Attributes:
        state: "unloaded", "loading", "ready" or "failed".
        created: when the server started, in seconds since 1970.
        load: what its worker has reported last: "open" sequences, and "pages" of the KV cache in use.
    """

    def __init__(self, name: str, path: Path, options: dict[str, Any], *, max_queue: int) -> None:
        self.name = name
        self.path = path
        self.state = "unloaded"
        self.created = int(time.time())
        self.max_queue = max_queue
        self._options = options
        self._loaded: Loaded | None = None
        self._calls: dict[int, tuple[Call, int]] = {}
        self._ids = itertools.count()
        self.load = {"open": 0, "pages": 0}
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None

    @property
    def loaded(self) -> Loaded:
        """What is known about the model.

        Raises:
            APIError: it isn't ready.
        """
        if self.state != "ready" or self._loaded is None:
            raise APIError(503, f"{self.name} is {self.state}; try again soon", retry_after=RETRY_AFTER)
        return self._loaded

    async def start(self) -> None:
        """Start the worker, and wait until it has loaded the model.

        Raises:
            PentadError: the model can't be loaded.
        """
        self.state = "loading"
        arguments = json.dumps({"path": str(self.path), **self._options})
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "pentad.serve", arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=MAX_LINE_BYTES,
            start_new_session=True,  # Ctrl-C at a terminal is for the front process
        )
        assert process.stdout is not None
        self._process = process
        try:
            line = await process.stdout.readline()
            if not line:
                raise PentadError(f"{self.name}: its process ended with {await process.wait()} while it loaded")
            ready = json.loads(line)
            if "failed" in ready:
                raise (BadInput if ready["bad"] else PentadError)(ready["failed"])
            self._loaded = await asyncio.to_thread(_describe, ready)
        except BaseException:
            self.state = "failed"
            await self.stop()
            raise
        self.state = "ready"
        self._reader = asyncio.create_task(self._read(process))

    async def stop(self) -> None:
        """End the worker."""
        if self._process is None or self._process.returncode is not None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(5):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    def submit(self, requests: Sequence[dict[str, Any]]) -> Call:
        """Begin sequences.

        Args:
            requests: see `pentad.serve.worker.Worker`, without ids.

        Raises:
            APIError: the queue is full.
        """
        if len(self._calls) + len(requests) > self.max_queue:
            message = f"{len(self._calls)} sequences run or wait, of at most {self.max_queue}; try again soon"
            raise APIError(429, message, code="rate_limit_exceeded", retry_after=RETRY_AFTER)
        ids = list(itertools.islice(self._ids, len(requests)))
        call = Call(self, ids)
        for index, (number, request) in enumerate(zip(ids, requests, strict=True)):
            self._calls[number] = call, index
            self._send({"id": number, **request})
        return call

    def cancel(self, number: int) -> None:
        """End a sequence."""
        if self._calls.pop(number, None) is not None:
            self._send({"cancel": number})

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        """Pass the worker's events on, until it ends."""
        assert process.stdout is not None
        while line := await process.stdout.readline():
            message = json.loads(line)
            for event in message.pop("events"):
                self._pass_on(event)
            self.load = message

    def _pass_on(self, event: dict[str, Any]) -> None:
        number, reason = event.pop("id"), event.get("finish")
        if number not in self._calls:  # cancelled in the meantime
            return
        call, index = self._calls[number]
        if reason is not None:
            del self._calls[number]
        if reason == "error":
            call.put(APIError(400 if event.get("bad") else 500, event["message"]))
        else:
            call.put(Event(index, **event))


def _describe(ready: dict[str, Any]) -> Loaded:
    """Read the tokenizer of a model that its worker has loaded."""
    path = Path(ready["path"])
    source = _Source(path, ready["format"], read_metadata(path) if ready["format"] == "gguf" else ready["config"])
    tokenizer = text.load(source, vocab_size=ready["vocab_size"])
    assert tokenizer is not None
    return Loaded(tokenizer, ready["context_length"], ready["vocab_size"], ready["backend"])


@dataclass(frozen=True)
class _Source:
    path: Path
    format: str
    config: dict[str, Any]


@dataclass
class Models:
    """The models of a server, by name."""

    by_name: dict[str, Model] = field(default_factory=dict)

    def get(self, name: str) -> Model:
        """The model of a name.

        Raises:
            APIError: there is none.
        """
        if name not in self.by_name:
            message = f"model is {name[:60]!r}; expected one of {', '.join(self.by_name)}"
            raise APIError(404, message, param="model", code="model_not_found")
        return self.by_name[name]

    async def start(self, report: Callable[[Model], None] = lambda model: None) -> None:
        """Load the first model."""
        model = next(iter(self.by_name.values()))
        await model.start()
        report(model)

    async def stop(self) -> None:
        """End all workers."""
        await asyncio.gather(*(model.stop() for model in self.by_name.values()))

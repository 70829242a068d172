"""The models of a server: their worker processes, and the sequences that these run."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pentad.errors import BadInput, PentadError
from pentad.models.family import TASKS
from pentad.serve.budget import Share, Size, shares
from pentad.serve.calls import Call, Event, Running
from pentad.serve.errors import APIError
from pentad.serve.loaded import Loaded, LoadedModel, describe
from pentad.serve.metrics import Metrics

MAX_LINE_BYTES = 1 << 30  # of a worker's message; the scores of a long prompt are the longest
RETRY_SECONDS = 1
LOAD_SECONDS = 5  # until a client should ask again for a model that is loading
STOP_SECONDS = 5
MAX_RESTART_DELAY = 60
_logger = logging.getLogger(__name__)
_to_json = json.JSONEncoder(separators=(",", ":")).encode  # `json.dumps` makes an encoder each time


class Model:
    """A model and its worker process.

    Args:
        name: its name in the API.
        path: its files.
        options: see `pentad.load`.
        max_queue: maximum number of sequences that run or wait.
        metrics: the server's.

    Attributes:
        state: "unloaded", "loading", "ready", "restarting", "unloading" or "failed".
        share: its memory; None until it has been measured.
        created: when the server started, in seconds since 1970.
        last_used: the time of the last request, for unloading.
        load: what its worker has reported last: "open" sequences, and "pages" of the KV cache by their state.
    """

    def __init__(self, name: str, path: Path, options: dict[str, Any], *, max_queue: int, metrics: Metrics) -> None:
        self.name = name
        self.path = path
        self.state = "loading"  # until it has been measured
        self.share: Share | None = None
        self.created = int(time.time())
        self.last_used = 0.0
        self.load: dict[str, Any] = {"open": 0, "pages": {}}
        self._options = options
        self._max_queue = max_queue
        self._metrics = metrics.of(name)
        self._loaded: LoadedModel | None = None
        self._failure = ""
        self._running: dict[int, Running] = {}
        self._ids = itertools.count()
        self._process: asyncio.subprocess.Process | None = None
        self._watcher: asyncio.Task[None] | None = None

    @property
    def loaded(self) -> Loaded:
        """What is known about a language model.

        Raises:
            APIError: it isn't ready, or no language model.
        """
        loaded = self.require("language")
        assert isinstance(loaded, Loaded)
        return loaded

    def require(self, *tasks: str) -> LoadedModel:
        """What is known about the model.

        Raises:
            APIError: it isn't ready, or has none of the tasks.
        """
        loaded = self.ready
        if loaded.task not in tasks:
            found, expected = (TASKS[task].partition(":")[0] for task in (loaded.task, tasks[0]))
            raise APIError(400, f"model is {self.name!r}, {found}; expected {expected}", param="model")
        return loaded

    @property
    def ready(self) -> LoadedModel:
        """What is known about the model.

        Raises:
            APIError: it isn't ready.
        """
        if self.state == "failed":
            raise APIError(500, f"{self.name} can't be loaded: {self._failure}")
        if self.state != "ready" or self._loaded is None:
            raise APIError(503, f"{self.name} is {self.state}; try again soon", retry_after=LOAD_SECONDS)
        return self._loaded

    @property
    def abilities(self) -> dict[str, Any]:
        """Its task, and whether a segmenter takes words; empty before the model has been loaded for the first time."""
        if self._loaded is None:
            return {}
        words = {"words": self._loaded.words} if self._loaded.task == "segment" else {}
        return {"task": self._loaded.task, **words}

    @property
    def idle(self) -> bool:
        """Whether it runs nothing, so that it may be unloaded."""
        return self.state in ("ready", "failed") and not self._running

    async def start(self) -> LoadedModel:
        """Start the worker, and wait until it has loaded the model.

        Raises:
            PentadError: the model can't be loaded.
        """
        self.state = "loading"
        try:
            await self._spawn()
        except PentadError as error:
            self.state, self._failure = "failed", str(error)
            raise
        return self.ready

    async def stop(self) -> None:
        """End the worker."""
        self.state = "unloading"
        if self._watcher is not None:
            self._watcher.cancel()
        await self._end_process()
        self.state = "unloaded"

    async def measure(self, paths: Sequence[Path]) -> list[Size]:
        """Let the worker, which then loads this model, read the headers of models.

        Raises:
            PentadError: a model can't be read.
        """
        answer = await self._ask({"measure": [*map(str, paths)]})
        return [Size(*size) for size in answer["sizes"]]

    async def _spawn(self) -> None:
        assert self.share is not None
        ready = await self._ask({"load": str(self.path), "cache_bytes": self.share.cache})
        self._loaded = await asyncio.to_thread(describe, ready)
        self.state = "ready"
        assert self._process is not None
        self._watcher = asyncio.create_task(self._watch(self._process))

    async def _ask(self, message: dict[str, Any]) -> Any:
        """Send a message to the worker, which is started if it doesn't run, and return its answer."""
        try:
            if self._process is None or self._process.returncode is not None:
                self._process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "pentad.serve", json.dumps(self._options)),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    limit=MAX_LINE_BYTES,
                    start_new_session=True,  # Ctrl-C at a terminal is for the front process
                )
            self._send(message)
            assert self._process.stdout is not None
            line = await self._process.stdout.readline()
            if not line:
                code = await self._process.wait()
                raise PentadError(f"{self.name}: its worker ended with code {code} while it loaded")
            answer = json.loads(line)
            if "failed" in answer:
                raise (BadInput if answer["bad"] else PentadError)(answer["failed"])
            return answer
        except BaseException as error:
            await self._end_process()
            if isinstance(error, OSError):  # such as memory that ran out
                raise PentadError(f"{self.name}: its worker can't be started: {error}") from error
            raise

    async def _end_process(self) -> None:
        if self._process is None or self._process.returncode is not None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """Pass the worker's events on; when it ends, end its sequences with an error and start another one."""
        assert process.stdout is not None
        try:
            while line := await process.stdout.readline():
                self._receive(json.loads(line))
        except Exception:  # whatever is wrong with the message: without its worker the model can't go on
            _logger.exception("pentad: a message of the worker of %s can't be read", self.name)
            process.kill()
        code = await process.wait()
        self.state = "restarting"
        _logger.warning("pentad: the worker of %s ended with code %s; starting another one", self.name, code)
        self._metrics.restarts.inc()
        for running in self._running.values():
            running.call.put(APIError(500, f"the worker of {self.name} ended unexpectedly; its requests are lost"))
        self._running.clear()
        self._receive({"events": [], "open": 0, "pages": dict.fromkeys(self.load["pages"], 0)})
        delay = 1
        while True:
            try:
                await self._spawn()
                return
            except PentadError as error:
                _logger.warning("pentad: %s; trying again in %d s", error, delay)
                await asyncio.sleep(delay)
                delay = min(2 * delay, MAX_RESTART_DELAY)

    def submit(self, requests: Sequence[dict[str, Any]]) -> Call:
        """Begin sequences.

        Args:
            requests: see `pentad.serve.worker.Worker`, without ids.

        Raises:
            APIError: the model isn't ready, or the queue is full.
        """
        self.ready  # noqa: B018 - the worker may have ended since the request began
        if len(requests) > self._max_queue:
            raise APIError(400, f"the request has {len(requests)} sequences; expected at most {self._max_queue}")
        if len(self._running) + len(requests) > self._max_queue:
            message = f"{len(self._running)} sequences run or wait, of at most {self._max_queue}; try again soon"
            raise APIError(429, message, code="rate_limit_exceeded", retry_after=RETRY_SECONDS)
        ids = list(itertools.islice(self._ids, len(requests)))
        call = Call(ids, self._cancel)
        for choice, (number, request) in enumerate(zip(ids, requests, strict=True)):
            self._running[number] = Running(call, choice)
            self._metrics.prompt_tokens.inc(len(request.get("prompt", ())))
            self._send({"id": number, **request})
        self.last_used = time.monotonic()
        return call

    def _cancel(self, number: int) -> None:
        if self._running.pop(number, None) is not None:
            self._send({"cancel": number})

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(_to_json(message).encode() + b"\n")

    def _receive(self, message: dict[str, Any]) -> None:
        """Pass the events of one step on."""
        events = message.pop("events")
        self.load.update(message)
        now, metrics = time.perf_counter(), self._metrics
        for event in events:
            self._pass_on(now, **event)
        if tokens := sum("token" in event for event in events):
            metrics.batch.observe(tokens)
            metrics.generated_tokens.inc(tokens)
        decoding = sum(running.decoding for running in self._running.values())
        metrics.decoding.set(decoding)
        metrics.waiting.set(len(self._running) - decoding)
        metrics.count_pages(message.get("pages", {}))

    def _pass_on(
        self, now: float, id: int, finish: str | None = None, message: str = "", status: int = 500, **event: Any
    ) -> None:
        running = self._running.get(id)
        if running is None:  # cancelled in the meantime
            return
        if finish is not None:
            del self._running[id]
        if finish == "error":
            running.call.put(APIError(status, message))
            return
        if "token" in event:
            histogram = self._metrics.between_tokens if running.decoding else self._metrics.first_token
            histogram.observe(now - running.last)
            running.last, running.decoding = now, True
            if "cached" in event:
                self._metrics.cached_tokens.inc(event["cached"])
        running.call.put(Event(running.choice, finish=finish, **event))


class Models:
    """The models of a server.

    Args:
        models: the first is loaded at the start, the others when they are first used.
        memory: those that are loaded together take at most so many bytes.
        measured: is called before the first model is loaded, when the shares of all are known.
    """

    def __init__(self, models: Sequence[Model], memory: int, measured: Callable[[], None]) -> None:
        self.by_name = {model.name: model for model in models}
        self._memory = memory
        self._measured = measured
        self._tasks: set[asyncio.Task[None]] = set()

    def get(self, name: str) -> Model:
        """The model of a name, ready or not.

        Raises:
            APIError: there is none.
        """
        if name not in self.by_name:
            message = f"model is {name[:60]!r}; expected one of {', '.join(self.by_name)}"
            raise APIError(404, message, param="model", code="model_not_found")
        return self.by_name[name]

    def ready(self, name: str) -> Model:
        """The model of a name; if it isn't loaded, begin to load it, and unload those that were used least recently.

        Raises:
            APIError: there is none, or it isn't ready yet, or others that are in use leave no memory for it.
        """
        model = self.get(name)
        if model.state == "unloaded":
            unused = self._to_unload(model)
            model.state = "loading"
            for one in unused:
                one.state = "unloading"
            task = asyncio.create_task(self._exchange(unused, model))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        model.ready  # noqa: B018 - raises an error if it isn't ready
        return model

    def _to_unload(self, model: Model) -> list[Model]:
        loaded = [one for one in self.by_name.values() if one.state != "unloaded"]
        needed, free = _total(model), self._memory - sum(map(_total, loaded))
        unused: list[Model] = []
        for one in sorted(loaded, key=lambda one: one.last_used):
            if free < needed and one.idle:
                unused.append(one)
                free += _total(one)
        if free < needed:
            message = f"there is no memory to load {model.name} while other models are in use; try again soon"
            raise APIError(503, message, retry_after=LOAD_SECONDS)
        return unused

    async def _exchange(self, unused: Sequence[Model], model: Model) -> None:
        for one in unused:
            await one.stop()
        try:
            await model.start()
        except PentadError as error:
            _logger.warning("pentad: %s", error)

    async def start(self) -> tuple[Model, LoadedModel]:
        """Measure all models, and load the first one.

        Raises:
            PentadError: a model can't be read, or doesn't fit into the memory, or the first one can't be loaded.
        """
        models = [*self.by_name.values()]
        sizes = await models[0].measure([model.path for model in models])
        for model, share in zip(models, shares([*self.by_name], sizes, self._memory), strict=True):
            model.state, model.share = "unloaded", share
        self._measured()
        return models[0], await models[0].start()

    async def stop(self) -> None:
        """End all workers."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(model.stop() for model in self.by_name.values()))


def _total(model: Model) -> int:
    assert model.share is not None
    return model.share.total

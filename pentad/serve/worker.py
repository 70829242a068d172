"""The process that runs one model.

It reads requests from standard input and writes events to standard output, as lines of JSON: one line a step. It ends
when standard input ends, so it never outlives the front process.
"""

import json
import os
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F

from pentad import kernels, weights
from pentad.build import held_bytes
from pentad.errors import BadInput, PentadError
from pentad.generate import LanguageModel
from pentad.generate.constraint import Matcher
from pentad.generate.engine import Engine, EngineConfig
from pentad.generate.requests import Embedding, Evaluation, Generation, Request, TokenLogprobs
from pentad.loading import check_quantize, load, plan
from pentad.memory import kv_cache_bytes
from pentad.models import family_of
from pentad.nn.encoder_decoder import EncoderDecoder
from pentad.serve import vision_worker
from pentad.serve.budget import Size
from pentad.serve.pipe import Pipe
from pentad.text.grammar import Constraint

MAX_STEP_RATIO = 2.0  # so that the gaps that clients see stay below 3 times the usual one, although times vary
PAGE_SIZE = 256  # tokens of a page of the KV cache
COMPILE_SECONDS = 0.002  # between two looks whether a constraint has been compiled, while nothing else runs
COUNT_SECONDS = 0.25  # between two counts of the pages while requests run


class Worker:
    """Runs the requests of the front process.

    A request is a line such as ``{"id": 7, "prompt": [1, 2], "max_tokens": 9, "sampling": {}, "seed": null, "logprobs":
    null}``, or with ``"score": true`` for the log-probabilities of the prompt, or with ``"pooling": "mean"`` for its
    embedding. ``"constraint": GRAMMAR, "opens": true`` constrains it; the grammar is compiled in a thread, so that it
    doesn't delay other requests. ``{"cancel": 7}`` ends it.

    Args:
        model: the model.
        engine: runs the model's steps.
        pipe: to the front process.
    """

    def __init__(self, model: LanguageModel, engine: Engine, pipe: Pipe) -> None:
        self._model = model
        self._engine = engine
        self._pipe = pipe
        self._compiling: dict[int, tuple[dict[str, Any], Future[Matcher]]] = {}
        self._compiler = ThreadPoolExecutor(1)
        self._requests: dict[int, Request] = {}
        self._ids: dict[Request, int] = {}
        self._counted = 0.0
        self._new: set[Request] = set()  # those without an event so far

    def run(self) -> None:
        """Serve until the front process closes its end."""
        self._pipe.send({"events": [], **self._state()})
        while (lines := self._receive()) is not None:
            refusals = [*(self._obey(json.loads(line)) for line in lines), *self._compiled()]
            events = [event for event in refusals if event is not None]
            if self._requests:
                events += self._step()
            if lines or events:
                self._pipe.send({"events": events, **self._state()})

    def _receive(self) -> list[bytes] | None:
        """The lines that have arrived, waiting for some if there is nothing to run; None at the end."""
        return self._pipe.receive(0 if self._requests else COMPILE_SECONDS if self._compiling else None)

    def _obey(self, message: dict[str, Any]) -> dict[str, Any] | None:
        """Begin or cancel a request; returns an event if it is refused."""
        if "cancel" in message:
            self._compiling.pop(message["cancel"], None)
            request = self._requests.get(message["cancel"])
            if request is not None:
                self._engine.cancel(request)
                self._forget(request)
            return None
        if "constraint" in message:
            constraint = Constraint(message["constraint"])
            compiled = self._compiler.submit(self._model.constraints.matcher, constraint, opens=message["opens"])
            self._compiling[message["id"]] = message, compiled
            return None
        return self._begin(message)

    def _compiled(self) -> list[dict[str, Any] | None]:
        """Begin the requests whose constraints have been compiled; returns events of those that are refused."""
        ready = [number for number, (_, compiled) in self._compiling.items() if compiled.done()]
        return [self._begin(*self._compiling.pop(number)) for number in ready]

    def _begin(self, message: dict[str, Any], compiled: Future[Matcher] | None = None) -> dict[str, Any] | None:
        number = message["id"]
        try:
            request = self._request(message, None if compiled is None else compiled.result())
            self._engine.submit(request)
        except PentadError as error:
            return {"id": number, "finish": "error", "message": str(error), "status": _status(error)}
        self._requests[number], self._ids[request] = request, number
        self._new.add(request)
        return None

    def _request(self, message: dict[str, Any], matcher: Matcher | None) -> Request:
        prompt = message["prompt"]
        if "pooling" in message:
            return Embedding(prompt, last=message["pooling"] == "last")
        logprobs = message["logprobs"]
        if message.get("score"):
            return Evaluation(prompt, first=1, logprobs=logprobs)
        generator = torch.Generator()
        generator.seed() if message["seed"] is None else generator.manual_seed(message["seed"])
        return Generation(
            prompt,
            sampling=self._model.sampling.replace(**message["sampling"]),
            generator=generator,
            max_tokens=message["max_tokens"],
            end_ids=frozenset() if message["ignore_eos"] else frozenset(self._model.tokenizer.eos_ids),
            logprobs=logprobs,
            matcher=matcher,
        )

    def _step(self) -> list[dict[str, Any]]:
        try:
            progress = self._engine.step()
        except Exception as error:  # such as memory that ran out: the engine's state is lost, but not the model
            self._engine.reset()
            failed = [*self._requests]
            self._requests.clear()
            self._ids.clear()
            self._new.clear()
            message = f"{type(error).__name__}: {error}"
            return [{"id": number, "finish": "error", "message": message} for number in failed]
        events = []
        for request, token, reason, report in progress:
            event: dict[str, Any] = {"id": self._ids[request], "token": token, "finish": reason}
            if reason == "error":
                event |= {"message": str(request.error), "status": _status(request.error)}
            if isinstance(request, Embedding) and reason == "stop" and request.hidden_D is not None:
                event["embedding"] = F.normalize(request.hidden_D, dim=0).tolist()
            elif isinstance(request, Evaluation) and request.logprobs is not None:
                event["scores"] = [_pair(one) for one in request.token_logprobs]
            elif report is not None:
                event["logprobs"] = _pair(report)
            if request in self._new:  # its first event
                self._new.remove(request)
                event["cached"] = request.cached_tokens or None
            if reason is not None:
                self._forget(request)
            events.append({name: value for name, value in event.items() if value is not None})
        return events

    def _forget(self, request: Request) -> None:
        self._new.discard(request)
        del self._requests[self._ids.pop(request)]

    def _state(self) -> dict[str, Any]:
        """The number of open requests and, now and then, the numbers of pages."""
        count = len(self._requests) + len(self._compiling)
        now = time.monotonic()
        if self._requests and now < self._counted + COUNT_SECONDS:
            return {"open": count}
        self._counted = now
        return {"open": count, "pages": self._engine.count_pages()}


def _status(error: BaseException | None) -> int:
    return 400 if isinstance(error, BadInput) else 500


def _pair(report: TokenLogprobs) -> tuple[float, tuple[tuple[int, float], ...]]:
    return report.logprob, report.top


def measure(path: str, *, dtype: str | None, quantize: str | None) -> Size:
    """What a model needs, by its headers.

    Args:
        path: its files.
        dtype, quantize: see `pentad.load`.

    Raises:
        BadInput: see `pentad.load`.
    """
    check_quantize(quantize, cpu := torch.device("cpu"))
    checkpoint = weights.open(path)
    if family_of(checkpoint).task != "language":
        return vision_worker.measure(checkpoint, dtype)
    network, why_torch, quantized, kept_dtype, cache_dtype = plan(
        checkpoint, device=cpu, dtype=dtype, quantize=quantize
    )
    if isinstance(network, EncoderDecoder):
        raise BadInput(f"{path} is an encoder-decoder; pentad serve runs decoder-only models")
    lanes = kernels.pool_dim(1, cache_dtype) if why_torch is None else 1
    page = PAGE_SIZE * kv_cache_bytes(network, 1, cache_dtype, lanes=lanes)
    return Size(held_bytes(checkpoint, network, kept_dtype, quantized=quantized), page, PAGE_SIZE)


def start(path: str, cache_bytes: int, options: dict[str, Any], pipe: Pipe) -> Worker | vision_worker.VisionWorker:
    """Load a model, and tell the front process what it must know about it."""
    checkpoint = weights.open(path)
    if family_of(checkpoint).task != "language":
        return vision_worker.start(checkpoint, options, pipe)
    model = load(path, **options)
    assert isinstance(model, LanguageModel)
    model.tokenizer  # noqa: B018 - raises an error if there is none
    cache = model.step.cache
    cache_tokens = cache_bytes // cache.page_bytes * cache.page_size
    too_long = cache.bytes_for(model.context_length) > cache_bytes  # one sequence would not fit
    engine = Engine(model.step, EngineConfig(max_cache_bytes=cache_bytes, max_step_ratio=MAX_STEP_RATIO))
    ready = {
        "task": "language",
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "config": None if checkpoint.format == "gguf" else dict(checkpoint.config),
        "context_length": min(model.context_length, cache_tokens) if too_long else model.context_length,
        "vocab_size": model.network.config.vocab_size,
        "backend": model.step.backend,
        "weights_bytes": sum(t.nbytes for t in (*model.network.parameters(), *model.network.buffers())),
        "cache_tokens": cache_tokens,
    }
    pipe.send(ready)
    return Worker(model, engine, pipe)


def main() -> None:
    """Answer lines of standard input: ``{"measure": [paths]}``, and at last ``{"load": path, "cache_bytes": n}``.

    The first argument has the options of `pentad.load`.
    """
    options = json.loads(sys.argv[1])
    send = os.dup(1)
    os.dup2(2, 1)  # what a library prints must not appear among the events
    pipe, worker = Pipe(0, send), None
    try:
        while worker is None and (line := _read_line(0)):
            message = json.loads(line)
            if "load" in message:
                worker = start(message["load"], message["cache_bytes"], options, pipe)
            else:
                chosen = {name: options[name] for name in ("dtype", "quantize")}
                sizes = [measure(path, **chosen) for path in message["measure"]]
                pipe.send({"sizes": sizes})
    except Exception as error:
        text = str(error) if isinstance(error, PentadError) else f"{type(error).__name__}: {error}"
        pipe.send({"failed": " ".join(text.split()), "bad": isinstance(error, BadInput)})
        return
    if worker is not None:
        worker.run()


def _read_line(fd: int) -> bytes:
    """The next line, byte by byte: what follows it is read by the worker."""
    line = b""
    while (byte := os.read(fd, 1)) not in (b"", b"\n"):
        line += byte
    return line

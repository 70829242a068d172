"""What all text runners share: streams, and one lock around an engine, so that several threads may use a model."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, NoReturn, Unpack, overload

import torch
from torch import Tensor

from pentad.errors import BadInput, PentadError
from pentad.generate.completion import Completion, Options
from pentad.generate.engine import Engine, Evaluation, Generation, Request
from pentad.generate.sampling import Sampling
from pentad.generate.step import Step
from pentad.generate.transcript import Transcript
from pentad.text import Detokenizer, Tokenizer


class Stream(Iterator[str]):
    """Pieces of text as they come; `completion` is what there is so far.

    A stream that isn't read to its end is ended by `close`, which a ``with`` block calls, or when nobody holds it.
    """

    def __init__(self, runner: Runner, request: Generation, transcript: Transcript) -> None:
        self._runner = runner
        self._request = request
        self._transcript = transcript
        self._tokens_read = 0
        self._characters_given = 0
        self._stopping = False
        self._started = time.perf_counter()
        self._first_token: float | None = None
        self._last_token = self._started

    def __next__(self) -> str:
        while len(self._transcript.text) == self._characters_given:
            if self._request.error is not None:
                raise self._request.error
            if self._stopping or self._request.finish_reason is not None:
                raise StopIteration
            self._runner._advance(self._request)
        piece = self._transcript.text[self._characters_given :]
        self._characters_given += len(piece)
        return piece

    def stop(self) -> None:
        """End the iteration after the current step; a signal handler may call this."""
        self._stopping = True

    def close(self) -> None:
        """Stop generating; the text so far stays."""
        self._runner._close(self)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> None:
        """Take the request's new tokens into the text."""
        request = self._request
        if len(request.generated) > self._tokens_read:
            self._last_token = time.perf_counter()
            self._first_token = self._first_token or self._last_token
        for token in request.generated[self._tokens_read :]:
            self._transcript.add(token)
        self._tokens_read = len(request.generated)
        if request.finish_reason is not None and not self._transcript.stopped:
            self._transcript.finish()
        if self._transcript.stopped:  # also if the last token that was allowed completed the stop string
            self._runner._engine.cancel(request)
            request.finish_reason = "stop"

    @property
    def completion(self) -> Completion:
        """The text so far, with its tokens and times."""
        request, reason = self._request, self._request.finish_reason
        given = request.prompt if request.source is None else request.source
        prefill = (self._first_token or self._last_token) - self._started
        return Completion(
            model=self._runner.name,
            text=self._transcript.text,
            token_ids=list(request.generated),
            prompt_token_ids=list(given),
            finish_reason=reason if reason in ("stop", "length") else "interrupted",
            prompt_tokens=len(given),
            completion_tokens=len(request.generated),
            seconds={
                "load": self._runner.load_seconds,
                "prefill": prefill,
                "decode": self._last_token - self._started - prefill,
            },
            logprobs=None if request.logprobs is None else list(request.token_logprobs),
        )


class Runner:
    """A network with its tokenizer and an engine; several threads may use one.

    Calls from several threads are queued: each step runs the tokens of all of them, and each gets the answer that it
    would get alone.

    Attributes:
        name: the name or path it was loaded by.
        network: the torch module.
        context_length: the longest sequence in tokens.
        sampling: how tokens are chosen unless a call says otherwise.
        load_seconds: how long loading took.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        tokenizer: Tokenizer | BadInput | None,
        *,
        context_length: int,
        generation: Mapping[str, Any] | None = None,
        load_seconds: float = 0.0,
    ) -> None:
        self.name = name
        self.network = engine.executor.network
        self.context_length = context_length
        self.sampling = Sampling.recommended(generation or {})
        self.load_seconds = load_seconds
        self._tokenizer = tokenizer
        self._engine = engine
        self._lock = threading.RLock()
        self._streams = weakref.WeakValueDictionary[Request, Stream]()
        _runners.add(self)

    def __repr__(self) -> str:
        kind = type(self.network).__name__
        return f"<{type(self).__name__} {self.name!r}: {kind}, context {self.context_length}>"

    def __reduce__(self) -> NoReturn:
        raise PentadError(
            f"a loaded model can't be pickled or copied: call pentad.load({self.name!r}) where it is needed"
            " (its .network can be copied)"
        )

    @property
    def step(self) -> Step:
        """The executor of the network's steps, which owns the KV cache."""
        return self.refresh()

    def refresh(self) -> Step:
        """Look at the network now, and use plain torch or the kernels as it requires.

        Each request does this when it begins, so hooks, adapters and new weights are honoured from the next request
        on, and the kernels come back after a hook is removed. Call it to have a change honoured amid a generation.

        Returns:
            The executor of the network's steps.
        """
        with self._lock:
            return self._engine.refresh()

    def clear_cache(self) -> None:
        """Free the KV cache that is kept for a prompt which continues the last one."""
        with self._lock:
            self._engine.drop_kept()

    @property
    def open_requests(self) -> int:
        """How many requests wait or run."""
        return len(self._engine.requests)

    @property
    def tokenizer(self) -> Tokenizer:
        """Text <-> ids.

        Raises:
            BadInput: the checkpoint has no tokenizer files, or they are broken.
        """
        if isinstance(self._tokenizer, BadInput):
            raise self._tokenizer
        if self._tokenizer is None:
            raise BadInput(
                f"{self.name} has no tokenizer, so it can't read or write text: put tokenizer.json or tokenizer.model"
                " beside its weights (in Python, .logits(ids) works without)"
            )
        return self._tokenizer

    @overload
    def complete(self, prompt: str, *, special: bool = False, **options: Unpack[Options]) -> Completion: ...
    @overload
    def complete(self, prompt: list[str], *, special: bool = False, **options: Unpack[Options]) -> list[Completion]: ...
    def complete(
        self, prompt: str | Sequence[str], *, special: bool = False, **options: Unpack[Options]
    ) -> Completion | list[Completion]:
        """Continue one text, or several together, each as it would be alone.

        Args:
            prompt: the text, or a list of texts.
            special: let control strings in the text become control tokens.
            options: max_tokens, temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty,
                frequency_penalty, stop, seed, logprobs; see `Options`.

        Returns:
            A `Completion`, or a list of them.

        Raises:
            BadInput: an empty prompt, options out of range, or no room in the context.
        """
        if not isinstance(prompt, str | list | tuple):
            raise BadInput(f"the prompt is of type {type(prompt).__name__}; expected a string, or a list of strings")
        prompts = [prompt] if isinstance(prompt, str) else prompt
        encoded = [self.prompt_ids(text, special=special) for text in prompts]
        for ids in encoded:
            self._check_room(ids)
        completions = self._run([self._begin(ids, self._detokenizer(), options) for ids in encoded])
        return completions[0] if isinstance(prompt, str) else completions

    def prompt_ids(self, text: str, *, special: bool = False) -> list[int]:
        """The tokens that `complete` gives the model: BOS if the tokenizer's configuration says so, and the text."""
        return self.tokenizer.encode(text, bos=self.tokenizer.adds_bos, special=special)

    def is_full(self, completion: Completion) -> bool:
        """Whether a completion reached the end of the context."""
        raise NotImplementedError

    def _detokenizer(self) -> Detokenizer:
        return self.tokenizer.stream(continues=True)

    def _check_ids(self, ids: Sequence[int]) -> None:
        if not ids:
            raise BadInput("the prompt is empty: there is no token to start from")
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise BadInput("token ids are not whole numbers in one list, or a tensor of one dimension")
        size: int = self.network.config.vocab_size
        if not 0 <= min(ids) <= max(ids) < size:
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise BadInput(f"token id {wrong} is outside the vocabulary of {size}")

    def _check_length(self, ids: Sequence[int]) -> None:
        self._check_ids(ids)
        if len(ids) > self.context_length:
            raise BadInput(f"{len(ids)} tokens don't fit the context of {self.context_length}")

    def _check_room(self, ids: Sequence[int]) -> int:
        """How many tokens may follow a prompt; BadInput if none."""
        raise NotImplementedError

    def _inputs(self, ids: list[int]) -> tuple[list[int], list[int] | None]:
        """The tokens that the model's sequence begins with, and those that an encoder reads."""
        return ids, None

    def _begin(self, ids: list[int], detokenizer: Detokenizer, options: Options) -> Stream:
        room = self._check_room(ids)
        sampling = dict(options)
        limit, stop, seed, logprobs = (sampling.pop(name, None) for name in ("max_tokens", "stop", "seed", "logprobs"))
        for name, value, least in (("max_tokens", limit, 1), ("logprobs", logprobs, 0), ("seed", seed, 0)):
            if value is not None and (type(value) is not int or not least <= value < 2**63):
                raise BadInput(f"{name} is {value!r}; expected a whole number of at least {least}")
        if unknown := set(sampling) - {field.name for field in fields(Sampling)}:
            raise BadInput(f"unknown option {min(unknown)!r}; known options: {', '.join(Options.__annotations__)}")
        stops = [stop] if isinstance(stop, str) else stop or []
        if not isinstance(stops, Sequence) or not all(isinstance(one, str) for one in stops):
            raise BadInput(f"stop is {stop!r}; expected a string, or a list of strings")
        generator = torch.Generator()
        generator.manual_seed(seed) if isinstance(seed, int) else generator.seed()
        prompt, source = self._inputs(ids)
        request = Generation(
            prompt=prompt,
            source=source,
            sampling=self.sampling.replace(**sampling),
            generator=generator,
            max_tokens=room if not isinstance(limit, int) else min(limit, room),
            end_ids=frozenset(self.tokenizer.eos_ids),
            logprobs=logprobs if isinstance(logprobs, int) else None,
        )
        stream = Stream(self, request, Transcript(detokenizer, stops))
        with self._lock:
            self._streams[request] = stream
            self._engine.submit(request)
        return stream

    def _advance(self, request: Request) -> None:
        """Run a step for all requests, unless another thread's step has brought news for this one meanwhile."""
        before = _progress(request)
        with self._lock:
            if _progress(request) != before:
                return
            for other in self._engine.requests:
                if isinstance(other, Generation) and other not in self._streams:  # nobody reads it any more
                    self._engine.cancel(other)
            for event in self._engine.step():
                if (stream := self._streams.get(event.request)) is not None:
                    stream._read()

    def _close(self, stream: Stream) -> None:
        with self._lock:
            self._engine.cancel(stream._request)
            stream._read()
            self._streams.pop(stream._request, None)

    def _run(self, streams: list[Stream]) -> list[Completion]:
        try:
            for stream in streams:
                for _ in stream:
                    pass
        finally:
            for stream in streams:
                stream.close()
        return [stream.completion for stream in streams]

    def _evaluate(self, *requests: Evaluation) -> None:
        """Run evaluations to their end.

        Raises:
            PentadError: logits are not numbers.
        """
        with self._lock:
            for request in requests:
                self._engine.submit(request)
        try:
            for request in requests:
                while request.finish_reason is None:
                    self._advance(request)
                if request.error is not None:
                    raise request.error
        finally:
            with self._lock:
                for request in requests:
                    self._engine.cancel(request)

    def _forked(self) -> None:
        """In a child process: other threads' locks and requests are not of this world."""
        self._lock = threading.RLock()
        self._engine.reset()


def _progress(request: Request) -> tuple[int, object]:
    count = len(request.generated) if isinstance(request, Generation) else 0
    return count, request.finish_reason


_runners = weakref.WeakSet[Runner]()


def _after_fork() -> None:
    """torch's OpenMP threads don't survive a fork, and waiting for them would hang: it goes on with one thread."""
    if len(_runners):
        torch.set_num_threads(1)
    for runner in list(_runners):
        runner._forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def as_ids(ids: Sequence[int] | Tensor) -> list[int]:
    """Token ids as a list."""
    return ids.tolist() if isinstance(ids, Tensor) else list(ids)

"""The base class of text runners: a lock around the engine, for calls from several threads."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import fields
from functools import cached_property
from typing import NoReturn, Unpack, overload

import torch
from torch import Tensor

from pentad.errors import BadInput, PentadError
from pentad.generate.completion import Completion, Options
from pentad.generate.constraint import Compiler
from pentad.generate.engine import Engine, EngineConfig
from pentad.generate.requests import Evaluation, Generation, Request
from pentad.generate.sampling import Sampling
from pentad.generate.step import Step
from pentad.generate.stream import Stream
from pentad.memory import available_memory
from pentad.text import Detokenizer, Tokenizer
from pentad.text.transcript import Transcript


class Runner:
    """A network with its tokenizer and an engine.

    Several threads may call it. Their calls are queued: each step runs the tokens of all calls, and each call gets the
    answer that it would get alone.

    Args:
        name: the name or path that the model was loaded by.
        step: the executor of the network's steps.
        tokenizer: the tokenizer; None if the checkpoint has none, or the error that reading it raised.
        context: maximum sequence length; the model's limit by default.
        sampling: default sampling options.
        load_seconds: duration of loading.

    Attributes:
        network: the torch module.
        context_length: maximum sequence length in tokens.
        sampling: default sampling options.
    """

    def __init__(
        self,
        name: str,
        step: Step,
        tokenizer: Tokenizer | BadInput | None,
        *,
        context: int | None = None,
        sampling: Sampling | None = None,
        load_seconds: float = 0.0,
    ) -> None:
        self.name = name
        self.network = step.network
        contexts = self._context_lengths()
        if context is not None and context not in contexts:
            raise BadInput(f"context is {context}; expected {contexts.start} to {contexts.stop - 1} tokens for {name}")
        self.context_length: int = context or step.network.config.context_length
        self.sampling = sampling or Sampling()
        self.load_seconds = load_seconds
        self._tokenizer = tokenizer
        # Plain torch rounds differently in other chunks, so the chunks of a call must not depend on measured times.
        self._engine = Engine(step, EngineConfig(max_step_ratio=None))
        self._lock = threading.RLock()
        self._streams = weakref.WeakValueDictionary[Request, Stream]()
        _runners.add(self)

    def __repr__(self) -> str:
        network = type(self.network).__name__
        return f"<{type(self).__name__} {self.name!r}: {network}, context {self.context_length}>"

    def __reduce__(self) -> NoReturn:
        raise PentadError(
            f"a loaded model can't be pickled or copied; call pentad.load({self.name!r}) again,"
            " or copy its .network instead"
        )

    @property
    def step(self) -> Step:
        """The executor of the network's steps, which owns the KV cache, after a `refresh`."""
        return self.refresh()

    def refresh(self) -> Step:
        """Check for changes to the network, and choose plain torch or the kernels accordingly.

        Each request calls this when it begins. So hooks, adapters and new weights take effect from the next request
        on, and the kernels run again after a hook is removed. Call it to apply a change during a generation.

        Returns:
            The executor of the network's steps.
        """
        with self._lock:
            return self._engine.refresh()

    def clear_cache(self) -> None:
        """Free the part of the KV cache that is kept for prompts that begin like earlier ones."""
        with self._lock:
            self._engine.drop_kept()

    def limit_cache(self, nbytes: int | None) -> None:
        """Let the KV cache grow to at most this many bytes; None: no limit."""
        with self._lock:
            self._engine.limit_cache(nbytes)

    @property
    def open_requests(self) -> int:
        """Number of waiting and running requests."""
        return len(self._engine.requests)

    @property
    def tokenizer(self) -> Tokenizer:
        """Converts text to token ids and back.

        Raises:
            BadInput: the checkpoint has no tokenizer files, or broken ones.
        """
        if isinstance(self._tokenizer, BadInput):
            raise self._tokenizer
        if self._tokenizer is None:
            raise BadInput(
                f"{self.name} has no tokenizer, so it can't read or write text: put tokenizer.json or tokenizer.model"
                " beside its weights (in Python, .logits(ids) works without a tokenizer)"
            )
        return self._tokenizer

    @cached_property
    def constraints(self) -> Compiler:
        """Compiles constraints for the tokenizer."""
        return Compiler(self.tokenizer, self.network.config.vocab_size)

    @overload
    def complete(self, prompt: str, *, special: bool = False, **options: Unpack[Options]) -> Completion: ...
    @overload
    def complete(self, prompt: list[str], *, special: bool = False, **options: Unpack[Options]) -> list[Completion]: ...
    def complete(
        self, prompt: str | Sequence[str], *, special: bool = False, **options: Unpack[Options]
    ) -> Completion | list[Completion]:
        """Continue one text, or a batch of texts; each continuation is the same as without the others.

        Args:
            prompt: the text, or a list of texts.
            special: encode control strings in the text as control tokens.
            options: max_tokens, temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty,
                frequency_penalty, logit_bias, stop, seed, logprobs, constraint; see `Options`.

        Returns:
            A `Completion`; for a list of texts a list of them.

        Raises:
            BadInput: a prompt is empty or leaves no room in the context, or an option is out of range.
        """
        if not isinstance(prompt, str | list | tuple):
            raise BadInput(f"the prompt is of type {type(prompt).__name__}; expected a string, or a list of strings")
        prompts = [prompt] if isinstance(prompt, str) else prompt
        encoded = [self.prompt_ids(text, special=special) for text in prompts]
        for ids in encoded:
            self._check_room(ids)
        self._check_memory(encoded)
        completions = self._run([self._begin(ids, self._detokenizer(), options) for ids in encoded])
        return completions[0] if isinstance(prompt, str) else completions

    def prompt_ids(self, text: str, *, special: bool = False) -> list[int]:
        """The prompt of `complete`: the text's tokens, between the tokens that the tokenizer's files put around a text.

        Raises:
            BadInput: the text is much too long for the context; it is then not even tokenized.
        """
        self._check_size(text)
        tokenizer = self.tokenizer
        return [*tokenizer.encode(text, bos=tokenizer.adds_bos, special=special), *tokenizer.closing]

    def is_full(self, completion: Completion) -> bool:
        """True if a completion reached the end of the context."""
        raise NotImplementedError

    def _detokenizer(self) -> Detokenizer:
        return self.tokenizer.stream(continues=True)

    def _check_size(self, *texts: object) -> None:
        self.tokenizer.check_size((text for text in texts if isinstance(text, str)), self.context_length)

    def _check_memory(self, prompts: Iterable[Sequence[int]]) -> None:
        """Raise BadInput if the prompts that run together need more KV cache than there is memory."""
        cache, available = self._engine.executor.cache, available_memory(self.network.device)
        sizes = sorted(cache.bytes_for(len(ids)) for ids in prompts)
        needed = sum(sizes[-self._engine.config.max_num_seqs :])
        if available is not None and needed > available:
            memory = f"{needed / 1e9:.1f} GB of KV cache, and {available / 1e9:.1f} GB of memory are available"
            raise BadInput(f"the prompt needs {memory}: shorten it, or pass fewer at once")

    def _check_ids(self, ids: Sequence[int]) -> None:
        if not ids:
            raise BadInput("the prompt is empty: there is no token to start from")
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise BadInput("token ids are not whole numbers; expected a list of them, or a tensor of one dimension")
        size: int = self.network.config.vocab_size
        if not 0 <= min(ids) <= max(ids) < size:
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise BadInput(f"token id {wrong} is outside the vocabulary of {size}")

    def _check_length(self, ids: Sequence[int]) -> None:
        self._check_ids(ids)
        if len(ids) > self.context_length:
            raise BadInput(f"{len(ids)} tokens don't fit the context of {self._limit}")

    def _check_room(self, ids: Sequence[int]) -> int:
        """The number of tokens that may follow a prompt; BadInput if the context has no room for any."""
        raise NotImplementedError

    @property
    def _limit(self) -> str:
        """The context length, and the setting that it comes from."""
        config = self.network.config
        source = f"max_position_embeddings {config.max_position_embeddings}"
        if config.context_length > config.max_position_embeddings:
            source += ", extended by RoPE's scaling"
        return f"{self.context_length} ({'as requested' if self.context_length != config.context_length else source})"

    def _context_lengths(self) -> range:
        """The values that `context` may have."""
        return range(1, self.network.config.context_length + 1)

    def _inputs(self, ids: list[int]) -> tuple[list[int], list[int] | None]:
        """The first tokens of the model's sequence, and the tokens for an encoder."""
        return ids, None

    def _begin(self, ids: list[int], detokenizer: Detokenizer, options: Options) -> Stream:
        room = self._check_room(ids)
        self._check_memory([ids])
        sampling = dict(options)
        limit, seed, logprobs = (sampling.pop(name, None) for name in ("max_tokens", "seed", "logprobs"))
        stop, constraint = sampling.pop("stop", None), options.get("constraint")
        sampling.pop("constraint", None)
        for name, value, least in (("max_tokens", limit, 1), ("logprobs", logprobs, 0), ("seed", seed, 0)):
            if value is not None and (type(value) is not int or not least <= value < 2**63):
                raise BadInput(f"{name} is {value!r}; expected a whole number of at least {least}")
        if unknown := set(sampling) - {field.name for field in fields(Sampling)}:
            raise BadInput(f"unknown option {min(unknown)!r}; known options: {', '.join(Options.__annotations__)}")
        stops = [stop] if isinstance(stop, str) else stop or []
        if not isinstance(stops, Sequence) or not all(isinstance(one, str) for one in stops):
            raise BadInput(f"stop is {stop!r}; expected a string, or a list of strings")
        matcher = None if constraint is None else self.constraints.matcher(constraint, opens=detokenizer.opening)
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
            matcher=matcher,
        )
        stream = Stream(self, request, Transcript(detokenizer, stops))
        with self._lock:
            self._streams[request] = stream
            self._engine.submit(request)
        return stream

    def _advance(self, request: Request) -> None:
        """Run a step for all requests, unless another thread's step has advanced this one in the meantime."""
        before = _progress(request)
        with self._lock:
            if _progress(request) != before:
                return
            for other in self._engine.requests:
                if isinstance(other, Generation) and other not in self._streams:  # its stream was deleted
                    self._engine.cancel(other)
            for event in self._engine.step():
                if (stream := self._streams.get(event.request)) is not None:
                    stream._read()

    def _read(self, stream: Stream) -> bool:
        """Add new tokens to a stream's text, which a failed step may have left; return whether it has unread text."""
        with self._lock:
            stream._read()
        return len(stream._transcript.text) > stream._text_read

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
        """Run evaluations together to their end.

        Raises:
            BadInput: they need more memory than there is.
            PentadError: the logits are not numbers.
        """
        self._check_memory(request.prompt for request in requests)
        with self._lock:
            for request in requests:
                self._engine.submit(request)
        try:
            for request in requests:
                while request.finish_reason is None:
                    self._advance(request)
        finally:
            with self._lock:
                for request in requests:
                    self._engine.cancel(request)
        for request in requests:
            if request.error is not None:
                raise request.error


def _progress(request: Request) -> tuple[int, object]:
    count = len(request.generated) if isinstance(request, Generation) else 0
    return count, request.finish_reason


_runners = weakref.WeakSet[Runner]()


def _after_fork() -> None:
    """Make runners usable in a forked child, where other threads, their locks and their requests don't exist.

    torch's OpenMP threads don't exist either, and waiting for them would hang, so torch continues with one thread.
    """
    if len(_runners):
        torch.set_num_threads(1)
    for runner in list(_runners):
        runner._lock = threading.RLock()
        runner._engine.reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def as_ids(ids: Sequence[int] | Tensor) -> list[int]:
    """Token ids as a list."""
    return ids.tolist() if isinstance(ids, Tensor) else list(ids)

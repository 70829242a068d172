"""The runner of language models: chat, complete, stream, score, logits."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, Unpack, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from pentad.errors import BadInput, PentadError
from pentad.generate.completion import Completion, Options, Score
from pentad.generate.engine import NOT_NUMBERS, Engine, Request
from pentad.generate.sampling import Sampling
from pentad.generate.step import PlainStep, Step
from pentad.generate.transcript import Transcript
from pentad.nn.batch import pack
from pentad.text import Detokenizer, Tokenizer

Message = Mapping[str, Any]
SCORE_CHUNK = 256  # rows whose logits are held at once


class Stream(Iterator[str]):
    """Pieces of text as they come; `completion` is what there is so far.

    A stream that isn't read to its end is ended by `close`, which a ``with`` block calls.
    """

    def __init__(self, model: LanguageModel, request: Request, transcript: Transcript) -> None:
        self._model = model
        self._request = request
        self._transcript = transcript
        self._heard = 0  # tokens
        self._given = 0  # characters
        self._stopping = False
        self._started = time.perf_counter()
        self._first: float | None = None
        self._last = self._started

    def __next__(self) -> str:
        while len(self._transcript.text) == self._given:
            if self._request.error is not None:
                raise self._request.error
            if self._stopping or self._request.finish_reason is not None:
                raise StopIteration
            self._model._advance()
        piece = self._transcript.text[self._given :]
        self._given += len(piece)
        return piece

    def stop(self) -> None:
        """End the iteration once the step at hand is done; a signal handler may call this."""
        self._stopping = True

    def close(self) -> None:
        """Stop generating; what there is stays."""
        self._model._end(self._request, "interrupted")
        self._transcript.finish()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _hear(self) -> None:
        """The request has gone on."""
        self._last = time.perf_counter()
        self._first = self._first or self._last
        for token in self._request.generated[self._heard :]:
            self._transcript.add(token)
        self._heard = len(self._request.generated)
        if self._transcript.stopped:
            self._model._end(self._request, "stop")
            self._request.finish_reason = "stop"  # also where the last token that was allowed completed it
        elif self._request.finish_reason is not None:
            self._transcript.finish()
            self._model._end(self._request, self._request.finish_reason)

    @property
    def completion(self) -> Completion:
        request = self._request
        given = request.prompt if request.source is None else request.source
        prefill = (self._first or self._last) - self._started
        return Completion(
            model=self._model.name,
            text=self._transcript.text,
            token_ids=list(request.generated),
            prompt_token_ids=list(given),
            finish_reason=request.finish_reason or "interrupted",
            prompt_tokens=len(given),
            completion_tokens=len(request.generated),
            seconds={
                "load": self._model.load_seconds,
                "prefill": prefill,
                "decode": self._last - self._started - prefill,
            },
            logprobs=None if request.logprobs is None else list(request.token_logprobs),
        )


class LanguageModel:
    """A language model that is ready to run; `pentad.load` makes one.

    Attributes:
        name: what it was loaded by.
        network: the torch module.
        tokenizer: text <-> ids; where the checkpoint has none that can be read, only `logits` works.
        context_length: the longest sequence, prompt and generated tokens together.
        sampling: how tokens are chosen where a call says nothing.
    """

    def __init__(
        self,
        name: str,
        step: Step,
        tokenizer: Tokenizer | BadInput | None,
        *,
        context: int | None = None,
        generation: Mapping[str, Any] | None = None,
        load_seconds: float = 0.0,
    ) -> None:
        trained: int = step.network.config.max_position_embeddings
        if context is not None and not 1 <= context <= trained:
            raise BadInput(f"context is {context}; {name} takes 1 to {trained} tokens")
        self.name = name
        self.network = step.network
        self.context_length = context or trained
        self.sampling = Sampling.recommended(generation or {})
        self.load_seconds = load_seconds
        self._tokenizer = tokenizer
        self._engine = Engine(step)
        self._streams = weakref.WeakValueDictionary[Request, Stream]()  # one that nobody holds any more is ended

    def __repr__(self) -> str:
        kind = type(self.network).__name__
        return f"<LanguageModel {self.name!r}: {kind}, context {self.context_length}>"

    @property
    def step(self) -> Step:
        """What executes the network's steps, and owns their cache."""
        return self._engine.refresh()

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

    def chat(self, messages: Sequence[Message] | str, **options: Unpack[Options]) -> Completion:
        """Reply to a conversation ``[{"role": "user", "content": "…"}, …]``; a string is one user's message.

        A conversation that continues the last one prefills only what is new.

        Raises:
            BadInput: no chat template, messages that it refuses, options out of range, or no room in the context.
        """
        return self._run([self._begin(self.chat_ids(messages), self.tokenizer.stream(), options)])[0]

    @overload
    def complete(self, prompt: str, *, special: bool = False, **options: Unpack[Options]) -> Completion: ...
    @overload
    def complete(self, prompt: list[str], *, special: bool = False, **options: Unpack[Options]) -> list[Completion]: ...
    def complete(
        self, prompt: str | Sequence[str], *, special: bool = False, **options: Unpack[Options]
    ) -> Completion | list[Completion]:
        """Continue one text, or many together (each as it would be alone, but for rounding).

        Args:
            prompt: the text, or a list of texts.
            special: let control strings in the text become control tokens.

        Raises:
            BadInput: an empty prompt, options out of range, or no room in the context.
        """
        if not isinstance(prompt, str | list | tuple):
            raise BadInput(f"a prompt is a string, or a list of strings, not {type(prompt).__name__}")
        prompts = [prompt] if isinstance(prompt, str) else prompt
        encoded = [self.prompt_ids(text, special=special) for text in prompts]
        for ids in encoded:
            self._check_room(ids)
        completions = self._run([self._begin(ids, self.tokenizer.stream(continues=True), options) for ids in encoded])
        return completions[0] if isinstance(prompt, str) else completions

    def stream(self, prompt: str | Sequence[Message], *, special: bool = False, **options: Unpack[Options]) -> Stream:
        """The same as `complete` (of a string) or `chat` (of messages), piece by piece."""
        if isinstance(prompt, str):
            return self._begin(self.prompt_ids(prompt, special=special), self.tokenizer.stream(continues=True), options)
        return self._begin(self.chat_ids(prompt), self.tokenizer.stream(), options)

    def prompt_ids(self, text: str, *, special: bool = False) -> list[int]:
        """What `complete` gives the model: BOS where the tokenizer's own configuration says so, and the text."""
        return self.tokenizer.encode(text, bos=self.tokenizer.adds_bos, special=special)

    def chat_ids(self, messages: Sequence[Message] | str) -> list[int]:
        """What `chat` gives the model: the conversation by its own template, up to where the reply begins."""
        return self.tokenizer.chat([{"role": "user", "content": messages}] if isinstance(messages, str) else messages)

    def score(self, text: str, *, stride: int | None = None) -> Score:
        """The log-likelihood of a text, no token added.

        Args:
            text: what to score.
            stride: for texts longer than the context: slide a window of `context_length` by so many tokens, each
                token scored once, with as much context as its window has.

        Raises:
            BadInput: fewer than two tokens, a stride out of range, or longer than the context and no stride.
            PentadError: the model's logits are not numbers.
        """
        ids = self.tokenizer.encode(text)
        self._check_ids(ids)
        if len(ids) < 2:
            raise BadInput(f"the text has {len(ids)} tokens; scoring takes at least 2")
        size = self.context_length
        if stride is not None and not 1 <= stride < size:
            raise BadInput(f"stride is {stride}; it takes 1 to {size - 1} tokens")
        if len(ids) > size and stride is None:
            raise BadInput(f"the text has {len(ids)} tokens, the context {size}; --stride N slides a window over it")
        total, done = 0.0, 1
        for start in range(0, len(ids), stride or size):
            window = ids[start : start + size]
            total += self._log_likelihood(window, done - start)
            done = start + len(window)
            if done == len(ids):
                break
        loss = -total / (len(ids) - 1)
        if loss > 700:
            raise PentadError(f"the perplexity is e^{loss:.0f}, more than a number can hold: the weights are damaged")
        return Score(self.name, len(ids), total, math.exp(loss))

    def _log_likelihood(self, ids: list[int], first: int) -> float:
        """Summed over ``ids[first:]``, given all that comes before; never holds the logits of the whole text."""
        run = self.step
        sequence = run.cache.open(len(ids))
        total = 0.0
        try:
            for start in range(0, len(ids) - 1, SCORE_CHUNK):
                chunk = ids[start : min(start + SCORE_CHUNK, len(ids) - 1)]
                rows = range(max(0, first - 1 - start), len(chunk))
                logits_MV = run([(sequence, chunk)], rows)
                targets = torch.tensor([ids[start + row + 1] for row in rows], dtype=torch.int64)
                total -= float(F.cross_entropy(logits_MV, targets.to(logits_MV.device), reduction="sum"))
        finally:
            run.cache.close(sequence)
        if not total <= 0:
            raise PentadError(NOT_NUMBERS)
        return total

    @torch.inference_mode()
    def logits(self, ids: Sequence[int] | Tensor) -> Tensor:
        """The logits after each of T tokens: float32 [T, vocab].

        Raises:
            BadInput: no ids, more than the context has room for, or ids outside the vocabulary.
        """
        ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        self._check_ids(ids)
        if len(ids) > self.context_length:
            raise BadInput(f"{len(ids)} tokens don't fit the context of {self.context_length}")
        run = self.step
        if not isinstance(run, PlainStep):
            sequence = run.cache.open(len(ids))
            chunks = [ids[start : start + SCORE_CHUNK] for start in range(0, len(ids), SCORE_CHUNK)]
            try:
                return torch.cat([run([(sequence, chunk)], range(len(chunk))) for chunk in chunks])
            finally:
                run.cache.close(sequence)
        hidden_TD = self.network(*pack(ids, device=self.network.device))
        logits: Tensor = self.network.head(hidden_TD)
        return logits.float()

    def is_full(self, completion: Completion) -> bool:
        """Whether a completion and its prompt take all of the context."""
        return completion.prompt_tokens + completion.completion_tokens >= self.context_length

    def _check_ids(self, ids: Sequence[int]) -> None:
        if not ids:
            raise BadInput("the prompt is empty: there is no token to start from")
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise BadInput("token ids are whole numbers, in one list or a tensor of one dimension")
        size: int = self.network.config.vocab_size
        if not 0 <= min(ids) <= max(ids) < size:
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise BadInput(f"token id {wrong} is outside the vocabulary of {size}")

    def _check_room(self, ids: Sequence[int]) -> int:
        """How many tokens may follow a prompt."""
        self._check_ids(ids)
        room = self.context_length - len(ids)
        if room < 1:
            raise BadInput(
                f"the prompt has {len(ids)} tokens and leaves no room in the context of {self.context_length}"
            )
        return room

    def _begin(self, ids: list[int], detokenizer: Detokenizer, options: Options) -> Stream:
        room = self._check_room(ids)
        chosen = dict(options)
        wanted, stop, seed, logprobs = (chosen.pop(name, None) for name in ("max_tokens", "stop", "seed", "logprobs"))
        for name, value, least in (
            ("max_tokens", wanted, 1),
            ("logprobs", logprobs, 0),
            ("seed", seed, 0),
        ):
            if value is not None and (type(value) is not int or not least <= value < 2**63):
                raise BadInput(f"{name} is {value!r}; it takes a whole number from {least}")
        if unknown := set(chosen) - {field.name for field in fields(Sampling)}:
            raise BadInput(f"there is no option {min(unknown)!r}; there are {', '.join(Options.__annotations__)}")
        generator = torch.Generator()
        generator.manual_seed(seed) if isinstance(seed, int) else generator.seed()
        prompt, source = self._inputs(ids)
        request = Request(
            prompt=prompt,
            sampling=self.sampling.replace(**chosen),
            generator=generator,
            max_tokens=room if not isinstance(wanted, int) else min(wanted, room),
            end_ids=frozenset(self.tokenizer.eos_ids),
            logprobs=logprobs if isinstance(logprobs, int) else None,
            source=source,
        )
        stops = [stop] if isinstance(stop, str) else stop or []
        if not isinstance(stops, Sequence) or not all(isinstance(one, str) for one in stops):
            raise BadInput(f"stop is {stop!r}; it takes a string, or a list of strings")
        stream = Stream(self, request, Transcript(detokenizer, stops))
        self._streams[request] = stream
        self._engine.submit(request)
        return stream

    def _inputs(self, ids: list[int]) -> tuple[list[int], list[int] | None]:
        """Of what the model is given: what its sequence begins with, and what an encoder reads."""
        return ids, None

    def _advance(self) -> None:
        """Run one step for all streams that somebody holds."""
        for request in self._engine.requests():
            if request not in self._streams:
                self._engine.finish(request, "interrupted")
        for request in self._engine.step():
            if (stream := self._streams.get(request)) is not None:
                stream._hear()

    def _end(self, request: Request, reason: str) -> None:
        """Forget a request; `reason` counts where it wasn't finished already."""
        if request.finish_reason is None:
            self._engine.finish(request, reason)
        self._streams.pop(request, None)

    def _run(self, streams: list[Stream]) -> list[Completion]:
        try:
            for stream in streams:
                for _ in stream:
                    pass
        finally:
            for stream in streams:
                stream.close()
        return [stream.completion for stream in streams]

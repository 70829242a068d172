"""Decoding many sequences together: which tokens each step runs, and what becomes of its logits.

The engine is synchronous and has one owner: `submit`, `cancel`, `step`. It has no threads, no locks and no I/O.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pentad.errors import BadInput, PentadError
from pentad.generate.sampling import Choice, Sampling, argmax, sample
from pentad.generate.step import Step
from pentad.nn.cache import CachedSequence

NOT_NUMBERS = "the model's logits are not numbers (NaN or infinite): its weights are damaged"
EVALUATED_TOKENS = 256  # of one evaluation in a step: their logits are held at once
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineConfig:
    """Limits of an engine.

    Attributes:
        max_batched_tokens: tokens that one step runs at most, so that decoding sequences don't wait for long prompts.
        max_num_seqs: sequences that run together at most; others wait.
        max_cache_bytes: memory that the KV cache may take; None for no limit. Requests wait until theirs fits.
        reserved_tokens: tokens reserved beyond a prompt when it is admitted, so that a sequence's pages are contiguous.
    """

    max_batched_tokens: int = 512
    max_num_seqs: int = 32
    max_cache_bytes: int | None = None
    reserved_tokens: int = 256


@dataclass(frozen=True)
class TokenLogprobs:
    """The model's own log-probabilities (natural, before temperature and filters) where one token was chosen."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens and their log-probabilities, likeliest first, as many as were asked for."""


@dataclass(eq=False)
class Request:
    """One sequence on its way through the engine.

    Attributes:
        prompt: its ids, at least one; for an encoder-decoder those that the decoder begins with.
        source: what an encoder-decoder's encoder reads.
        finish_reason: "stop" or "length" once it is finished, "error", or "cancelled".
        error: why it could not go on.
        sequence: its place in the cache.
    """

    prompt: Sequence[int]
    source: Sequence[int] | None = field(default=None, kw_only=True)
    finish_reason: str | None = field(default=None, kw_only=True)
    error: PentadError | None = field(default=None, kw_only=True)
    sequence: CachedSequence | None = field(default=None, kw_only=True)

    def pending(self, done: int) -> Sequence[int]:
        """The tokens so far that have to run, after the first `done`."""
        return self.prompt[done:]


@dataclass(eq=False)
class Generation(Request):
    """A request for new tokens.

    Attributes:
        sampling, generator: how tokens are chosen; the generator is the request's own, so its text depends on nothing
            else that is decoded with it.
        max_tokens: how many to generate at most.
        end_ids: tokens that end it, and are not part of it.
        logprobs: None, or how many of the likeliest tokens to report with each token.
        generated: the new tokens so far.
        token_logprobs: a report for each of them, if they were asked for.
    """

    sampling: Sampling
    generator: torch.Generator
    max_tokens: int
    end_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    generated: list[int] = field(default_factory=list)
    token_logprobs: list[TokenLogprobs] = field(default_factory=list)

    def pending(self, done: int) -> Sequence[int]:
        return [*self.prompt[done:], *self.generated[max(0, done - len(self.prompt)) :]]


@dataclass(eq=False)
class Evaluation(Request):
    """A request for the logits of its prompt, or for the likelihood of a part of it.

    Attributes:
        first: the index of the first token whose log-likelihood is summed; None to keep all logits.
        log_likelihood: the sum so far, natural.
        logits: float32 [tokens, V] of the steps so far, if they are kept.
    """

    first: int | None = None
    log_likelihood: float = 0.0
    logits: list[Tensor] = field(default_factory=list)

    def pending(self, done: int) -> Sequence[int]:
        return self.prompt[done : None if self.first is None else -1]  # nothing follows the last token


class Event(NamedTuple):
    """What a step did for a request.

    Attributes:
        request: which one.
        token_id: the new token; None if none was generated.
        finish_reason: set if the request has ended, as on the request.
    """

    request: Request
    token_id: int | None
    finish_reason: str | None


class Engine:
    """Runs requests, all of them in each step: prompts in chunks, then token by token.

    The sequence that finished last keeps its pages, so a request that continues it (the next turn of a chat) prefills
    only what is new.
    """

    def __init__(self, step: Step, config: EngineConfig | None = None) -> None:
        self.executor = step
        self.config = config or EngineConfig()
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._kept: tuple[Sequence[int], CachedSequence] | None = None

    def submit(self, request: Request) -> None:
        """Queue a request; `step` runs it.

        Raises:
            BadInput: it could never fit into `max_cache_bytes`.
        """
        limit = self.config.max_cache_bytes
        if limit is not None and (needed := self._bytes(request)) > limit:
            raise BadInput(f"the request needs {needed} bytes of KV cache; the limit is {limit}")
        self._waiting.append(request)

    def cancel(self, request: Request) -> None:
        """End a request that has not ended; its pages are free at once."""
        if request.finish_reason is None:
            self._finish(request, "cancelled")

    @property
    def requests(self) -> list[Request]:
        """The requests that wait or run."""
        return [*self._waiting, *self._running]

    def drop_kept(self) -> None:
        """Free the pages that are kept for a request which continues the last one."""
        if self._kept is not None:
            self.executor.cache.close(self._kept[1])
            self._kept = None

    def refresh(self) -> Step:
        """Look at the network, and let another executor run it if it has changed: all tokens are then run again."""
        executor = self.executor.refresh()
        if executor is not self.executor:
            _logger.info("the network has changed: it runs %s", executor.backend)
            self.executor, self._kept = executor, None
            for request in self._running:
                self._restart(request)
        return executor

    def reset(self) -> None:
        """End all requests, and begin with an empty cache."""
        for request in self.requests:
            request.finish_reason, request.sequence = "cancelled", None
        self._waiting.clear()
        self._running.clear()
        self._kept = None
        self.executor.cache.clear()

    def step(self) -> list[Event]:
        """Run one step; the network is looked at first if a request is waiting.

        Returns:
            For each request that got a token or has ended what happened to it.
        """
        if self._waiting:
            self.refresh()
        while self._waiting and len(self._running) < self.config.max_num_seqs and self._fits(self._waiting[0]):
            self._admit(self._waiting[0])  # still waiting if this is interrupted
            self._running.append(self._waiting.popleft())
        scheduled = self._schedule()
        if not scheduled:
            return []
        work, wanted, row = [], [], 0
        for request, tokens, rows in scheduled:
            assert request.sequence is not None
            work.append((request.sequence, tokens))
            wanted += [row + i for i in rows]
            row += len(tokens)
        try:
            logits_MV = self.executor(work, wanted)
            return self._process([(request, rows) for request, _, rows in scheduled], logits_MV)
        except BaseException:  # the step may have run tokens whose logits are lost
            for request in self._running:
                assert request.sequence is not None
                if isinstance(request, Evaluation) or not request.pending(request.sequence.length):
                    self.executor.cache.close(request.sequence)
                    self._restart(request)
            raise

    def _schedule(self) -> list[tuple[Request, Sequence[int], range]]:
        """The tokens that each request runs in this step, and which of them have logits that are wanted."""
        budget = self.config.max_batched_tokens
        scheduled: list[tuple[Request, Sequence[int], range]] = []
        decoding_first = sorted(self._running, key=lambda r: not (isinstance(r, Generation) and r.generated))
        for request in decoding_first:
            assert request.sequence is not None
            done = request.sequence.length
            pending = request.pending(done)
            most = min(budget, EVALUATED_TOKENS) if isinstance(request, Evaluation) else budget
            tokens = pending if len(pending) == 1 else pending[: max(most, 0)]
            if not tokens:
                continue
            budget -= len(tokens)
            rows = range(len(tokens) - 1 if len(tokens) == len(pending) else len(tokens), len(tokens))
            if isinstance(request, Evaluation):
                rows = range(0 if request.first is None else max(0, request.first - 1 - done), len(tokens))
            scheduled.append((request, tokens, rows))
        return scheduled

    def _process(self, scheduled: Sequence[tuple[Request, range]], logits_MV: Tensor) -> list[Event]:
        """Choose tokens, add likelihoods, and end what has come to its end."""
        events: list[Event] = []
        chosen: list[tuple[Generation, int]] = []
        row = 0
        for request, rows in scheduled:
            if isinstance(request, Generation):
                chosen += [(request, row + i) for i in range(len(rows))]
            elif isinstance(request, Evaluation) and self._evaluate(request, rows, logits_MV[row : row + len(rows)]):
                events.append(self._finish(request, "error" if request.error else "stop"))
            row += len(rows)
        if chosen:
            logits_GV = logits_MV if len(chosen) == len(logits_MV) else logits_MV[[row for _, row in chosen]]
            events += self._choose([request for request, _ in chosen], logits_GV)
        return events

    def _evaluate(self, request: Evaluation, rows: range, logits_MV: Tensor) -> bool:
        """Take the logits of a step; says whether they were the last ones."""
        assert request.sequence is not None
        done = request.sequence.length
        if request.first is None:
            request.logits.append(logits_MV)
        elif rows:
            start = done - rows.stop  # of this step's tokens
            targets = torch.tensor(request.prompt[start + rows.start + 1 : start + rows.stop + 1], dtype=torch.int64)
            request.log_likelihood -= float(F.cross_entropy(logits_MV, targets.to(logits_MV.device), reduction="sum"))
            if not request.log_likelihood <= 0:
                request.error = PentadError(NOT_NUMBERS)
                return True
        return not request.pending(done)

    def _choose(self, requests: list[Generation], logits_MV: Tensor) -> list[Event]:
        if all(request.sampling.greedy for request in requests):
            tokens, largest = argmax(logits_MV)
        else:
            with self.executor.single_threaded():
                tokens, largest = sample(logits_MV, [_choice(request) for request in requests])
        return [self._take(*each) for each in zip(requests, tokens, largest, logits_MV, strict=True)]

    def _take(self, request: Generation, token: int, largest: float, logits_V: Tensor) -> Event:
        if not math.isfinite(largest):
            request.error = PentadError(NOT_NUMBERS)
            return self._finish(request, "error")
        if token in request.end_ids:
            return self._finish(request, "stop")
        request.generated.append(token)
        if request.logprobs is not None:
            with self.executor.single_threaded():
                request.token_logprobs.append(_logprobs(logits_V, token, request.logprobs))
        if len(request.generated) >= request.max_tokens:
            return self._finish(request, "length", token)
        return Event(request, token, None)

    def _finish(self, request: Request, reason: str, token: int | None = None) -> Event:
        """End a request; its pages are kept for a request that continues it, or freed."""
        request.finish_reason = reason
        for queue in (self._waiting, self._running):
            if request in queue:
                queue.remove(request)
        sequence, request.sequence = request.sequence, None
        if sequence is not None:
            if reason == "error" or not sequence.length or not isinstance(request, Generation):
                self.executor.cache.close(sequence)
            else:
                self.drop_kept()
                self._kept = (request.pending(0)[: sequence.length], sequence)
        return Event(request, token, reason)

    def _bytes(self, request: Request) -> int:
        """KV cache that a request may need."""
        return self.executor.cache.bytes_for(len(request.prompt) + getattr(request, "max_tokens", 0))

    def _fits(self, request: Request) -> bool:
        limit = self.config.max_cache_bytes
        if limit is None or sum(map(self._bytes, [*self._running, request])) <= limit:
            return True
        if not self._running:
            self.drop_kept()
        return not self._running

    def _admit(self, request: Request) -> None:
        """Give a request its place in the cache: the kept sequence's if both begin with the same tokens."""
        cache, prompt = self.executor.cache, request.prompt
        if self._kept is not None and not isinstance(request, Evaluation):
            ids, kept = self._kept
            common = 0
            for ours, theirs in zip(ids, prompt[:-1], strict=False):  # the last token is run for its logits
                if ours != theirs:
                    break
                common += 1
            scaling_key = self.executor.rope_scaling_key
            same_rope = scaling_key(kept.rope_length) == scaling_key(len(prompt))
            if common and same_rope and cache.can_truncate(kept, common):
                cache.truncate(kept, common)
                self._kept, request.sequence = None, kept
        if request.sequence is None:
            request.sequence = self._open(request)
        if cache.window is None and isinstance(request, Generation):
            more = len(prompt) - request.sequence.length + min(request.max_tokens, self.config.reserved_tokens)
            cache.reserve(request.sequence, more)

    def _open(self, request: Request) -> CachedSequence:
        return self.executor.cache.open(len(request.prompt))

    def _restart(self, request: Request) -> None:
        """Let all tokens of a running request be run again."""
        request.sequence = self._open(request)
        if isinstance(request, Evaluation):
            request.log_likelihood = 0.0
            request.logits.clear()


def _choice(request: Generation) -> Choice:
    return Choice(request.sampling, request.generator, request.prompt, request.generated)


def _logprobs(logits_V: Tensor, token: int, count: int) -> TokenLogprobs:
    logprobs_V = logits_V.log_softmax(-1)
    values, ids = logprobs_V.topk(min(count, len(logprobs_V)))
    top = tuple((int(i), float(value)) for i, value in zip(ids, values, strict=True))
    return TokenLogprobs(token, float(logprobs_V[token]), top)

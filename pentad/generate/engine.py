"""Decoding many sequences together: which tokens each step takes, and what becomes of its logits."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pentad.errors import PentadError
from pentad.generate.sampling import Sampling, argmax, sample
from pentad.generate.step import Step
from pentad.nn.cache import CachedSequence

CHUNK = 512  # tokens of prompts that one step takes, so that sequences which decode don't wait for long
MAX_NUM_SEQS = 32  # sequences decoded together; further ones wait
NOT_NUMBERS = "the model's logits are not numbers (NaN or infinite): its weights are damaged"
_logger = logging.getLogger(__name__)
REFRESH_INTERVAL = 16  # steps between two looks at whether the network has changed, which take a tenth of a small one
HEADROOM = 256  # tokens reserved beyond the prompt at first, so that a sequence's pages are neighbors


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
        prompt: its ids, at least one; of an encoder-decoder those that the decoder begins with.
        sampling, generator: how tokens are chosen; the generator is the request's own, so that its text depends on
            nothing else that is decoded with it.
        max_tokens: how many to generate at most.
        end_ids: tokens that end it, and are not part of it.
        logprobs: None, or how many of the likeliest tokens to report with each token.
        source: what an encoder-decoder's encoder reads.
        generated: what was generated so far.
        finish_reason: "stop" or "length" once it is finished, "error", or what `Engine.finish` was told.
        error: why it could not go on; whoever reads its tokens raises it.
    """

    prompt: Sequence[int]
    sampling: Sampling
    generator: torch.Generator
    max_tokens: int
    end_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    source: Sequence[int] | None = None
    generated: list[int] = field(default_factory=list)
    token_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    error: PentadError | None = None
    sequence: CachedSequence | None = None


class Engine:
    """Runs requests, all that are there in each step: prompts in chunks, then token by token.

    The sequence that finished last keeps its pages, so that a request which continues it (the next turn of a chat)
    only prefills what is new.
    """

    def __init__(self, step: Step) -> None:
        self.run = step
        self._waiting: deque[Request] = deque()
        self._active: list[Request] = []
        self._kept: tuple[list[int], CachedSequence] | None = None
        self._steps = 0

    def submit(self, request: Request) -> None:
        """Queue a request; its tokens come from `step`."""
        self._waiting.append(request)

    def requests(self) -> list[Request]:
        """Those that are waited for or run."""
        return [*self._waiting, *self._active]

    def refresh(self) -> Step:
        """What executes the steps, another one where the network has changed: then it runs all tokens again."""
        run = self.run.refresh()
        if run is not self.run:
            _logger.info("the network has changed: it runs %s", run.backend)
            self.run, self._kept = run, None
            for request in self._active:
                if request.sequence is not None:
                    request.sequence = run.cache.open(request.sequence.rope_length)
        return run

    def step(self) -> list[Request]:
        """Run one step; returns the requests that have one token more, or have finished."""
        if self._waiting or self._steps % REFRESH_INTERVAL == 0:
            self.refresh()
        self._steps += 1
        while self._waiting and len(self._active) < MAX_NUM_SEQS:
            self._admit(self._waiting[0])  # still waiting where this is interrupted
            self._active.append(self._waiting.popleft())
        work: list[tuple[CachedSequence, list[int]]] = []
        ready: list[tuple[Request, int]] = []  # requests whose last token is in this step, and its row
        budget, row = CHUNK, 0
        for request in sorted(self._active, key=lambda r: not r.generated):  # those that decode come first
            sequence = request.sequence
            assert sequence is not None
            past = max(0, sequence.length - len(request.prompt))
            pending = [*request.prompt[sequence.length :], *request.generated[past:]]
            tokens = pending if len(pending) == 1 else pending[: max(budget, 0)]
            if not tokens:
                continue
            budget -= len(tokens)
            row += len(tokens)
            work.append((sequence, tokens))
            if len(tokens) == len(pending):
                ready.append((request, row - 1))
        if not work:
            return []
        logits_MV = self.run(work, [row for _, row in ready])
        for i, (request, _) in enumerate(ready):
            self._choose(request, logits_MV[i])
        return [request for request, _ in ready]

    def finish(self, request: Request, reason: str) -> None:
        """End a request, and give back what it holds."""
        request.finish_reason = reason
        if request in self._waiting:
            self._waiting.remove(request)
        if request in self._active:
            self._active.remove(request)
        sequence, request.sequence = request.sequence, None
        if sequence is None:
            return
        if reason == "error" or not sequence.length:  # nothing that another could go on from
            return self.run.cache.close(sequence)
        if self._kept is not None:
            self.run.cache.close(self._kept[1])
        self._kept = ([*request.prompt, *request.generated][: sequence.length], sequence)

    def _admit(self, request: Request) -> None:
        """Give a request its place in the cache: the kept sequence's where it begins alike."""
        cache, prompt = self.run.cache, request.prompt
        rope_length = len(prompt)
        if self._kept is not None:
            ids, kept = self._kept
            common = 0
            for ours, theirs in zip(ids, prompt[:-1], strict=False):  # the last token is run for its logits
                if ours != theirs:
                    break
                common += 1
            alike = self.run.rope_scaling_key(kept.rope_length) == self.run.rope_scaling_key(rope_length)
            if common and alike and cache.can_truncate(kept, common):
                cache.truncate(kept, common)
                self._kept, request.sequence = None, kept
        if request.sequence is None:
            request.sequence = cache.open(rope_length)
        if cache.window is None:
            cache.reserve(
                request.sequence,
                len(prompt) - request.sequence.length + min(request.max_tokens, HEADROOM),
            )

    def _choose(self, request: Request, logits_V: Tensor) -> None:
        token, logit = argmax(logits_V)
        if not math.isfinite(logit):
            request.error = PentadError(NOT_NUMBERS)
            return self.finish(request, "error")
        if not request.sampling.greedy:
            with self.run.single_threaded():
                token = sample(logits_V, request.sampling, request.generator, request.prompt, request.generated)
        if token in request.end_ids:
            return self.finish(request, "stop")
        request.generated.append(token)
        if request.logprobs is not None:
            with self.run.single_threaded():
                request.token_logprobs.append(_logprobs(logits_V, token, request.logprobs))
        if len(request.generated) >= request.max_tokens:
            self.finish(request, "length")


def _logprobs(logits_V: Tensor, token: int, count: int) -> TokenLogprobs:
    logprobs_V = logits_V.log_softmax(-1)
    values, ids = logprobs_V.topk(min(count, len(logprobs_V)))
    top = tuple((int(i), float(value)) for i, value in zip(ids, values, strict=True))
    return TokenLogprobs(token, float(logprobs_V[token]), top)

"""Continuous batching: the engine chooses the tokens of each step and processes their logits.

The engine is synchronous and has one owner, which calls `submit`, `cancel` and `step`. It has no threads, no locks and
no I/O.
"""

import logging
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from pentad.errors import BadInput, PentadError
from pentad.generate.requests import Evaluation, Event, Generation, Request, TokenLogprobs
from pentad.generate.sampling import Choice, argmax, sample
from pentad.generate.step import Step
from pentad.memory import return_free_memory
from pentad.nn.cache import CachedSequence

NOT_NUMBERS = "the model's logits are not numbers (NaN or infinite): its weights are damaged"
MAX_EVALUATED_TOKENS = 256  # per evaluation and step: the logits of all these tokens are in memory at once
MIN_SHRUNK_BYTES = 1 << 27  # a smaller cache keeps its memory
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineConfig:
    """Limits of an engine.

    Attributes:
        max_batched_tokens: maximum tokens per step, so that decoding sequences don't wait for long prompts.
        max_num_seqs: maximum sequences that run together; other requests wait.
        max_cache_bytes: memory limit of the KV cache; None for no limit. Requests wait until their sequence fits. The
            keys and values of an encoder-decoder's sources are not counted.
        reserved_tokens: tokens reserved beyond a prompt when it is admitted, so that a sequence's pages are contiguous.
    """

    max_batched_tokens: int = 512
    max_num_seqs: int = 32
    max_cache_bytes: int | None = None
    reserved_tokens: int = 256


class Engine:
    """Runs all admitted requests in each step: prompts in chunks, then one token a step.

    The sequence that finished last keeps its pages. A request that continues it (the next turn of a chat) prefills only
    its new tokens.
    """

    def __init__(self, step: Step, config: EngineConfig | None = None) -> None:
        self.executor = step
        self.config = config or EngineConfig()
        self._waiting: deque[Request] = deque()
        self._running: dict[Request, CachedSequence] = {}
        self._kept: tuple[Sequence[int], CachedSequence] | None = None

    def submit(self, request: Request) -> None:
        """Queue a request; `step` runs it.

        Raises:
            BadInput: the request alone needs more than `max_cache_bytes`.
        """
        limit = self.config.max_cache_bytes
        if limit is not None and (needed := self._bytes(request)) > limit:
            sizes = f"up to {needed / 1e9:.1f} GB of KV cache; there is room for {limit / 1e9:.1f} GB"
            raise BadInput(f"the request needs {sizes}: shorten it, or lower max_tokens")
        self._waiting.append(request)

    def cancel(self, request: Request) -> None:
        """End a request, unless it has finished.

        The pages of a generation are kept for a request that continues it, and replace the previously kept pages. The
        pages of an evaluation are freed.
        """
        if request.finish_reason is None:
            self._finish(request, "cancelled")

    @property
    def requests(self) -> list[Request]:
        """All waiting and running requests."""
        return [*self._waiting, *self._running]

    def drop_kept(self) -> None:
        """Free the pages of the sequence that finished last."""
        if self._kept is not None:
            self.executor.cache.close(self._kept[1])
            self._kept = None

    def refresh(self) -> Step:
        """Replace the executor if the network has changed; running requests then start again from their first token."""
        executor = self.executor.refresh()
        if executor is not self.executor:
            _logger.info("the network has changed: it runs %s", executor.backend)
            self.executor, self._kept = executor, None
            for request in self._running:
                self._restart(request)
        return executor

    def reset(self) -> None:
        """Cancel all requests and empty the cache."""
        for request in self.requests:
            request.finish_reason = "cancelled"
        self._waiting.clear()
        self._running.clear()
        self._kept = None
        self.executor.cache.clear()

    def step(self) -> list[Event]:
        """Run one step. If requests are waiting, check for changes to the network first.

        Returns:
            One event for each request that got a token or finished.
        """
        if self._waiting:
            self.refresh()
        while self._waiting and len(self._running) < self.config.max_num_seqs:
            if self._running and not self._fits(self._waiting[0]):
                break
            self._admit(self._waiting[0])
        scheduled = self._schedule()
        if not scheduled:
            return []
        work = [(self._running[request], tokens) for request, tokens, _ in scheduled]
        starts = accumulate((len(tokens) for _, tokens in work), initial=0)
        wanted = [start + i for (_, _, rows), start in zip(scheduled, starts, strict=False) for i in rows]
        try:
            return self._process([(request, rows) for request, _, rows in scheduled], self.executor(work, wanted))
        except BaseException:  # some tokens may have run, and their logits are lost
            for request, sequence in self._running.items():
                if isinstance(request, Evaluation) or not request.pending(sequence.length):
                    self.executor.cache.close(sequence)
                    self._restart(request)
            raise

    def _schedule(self) -> list[tuple[Request, Sequence[int], range]]:
        """Each request's tokens in this step, and the indices of the tokens whose logits are wanted."""
        budget = self.config.max_batched_tokens
        scheduled: list[tuple[Request, Sequence[int], range]] = []
        decoding_first = sorted(self._running, key=lambda r: not (isinstance(r, Generation) and r.generated))
        for request in decoding_first:
            done = self._running[request].length
            pending = request.pending(done)
            limit = min(budget, MAX_EVALUATED_TOKENS) if isinstance(request, Evaluation) else budget
            tokens = pending if len(pending) == 1 else pending[: max(limit, 0)]
            if not tokens:
                continue
            budget -= len(tokens)
            rows = range(len(tokens) - (len(tokens) == len(pending)), len(tokens))
            if isinstance(request, Evaluation):
                rows = range(0 if request.first is None else max(0, request.first - 1 - done), len(tokens))
            scheduled.append((request, tokens, rows))
        return scheduled

    def _process(self, scheduled: Sequence[tuple[Request, range]], logits_MV: Tensor) -> list[Event]:
        """Choose tokens, add log-likelihoods, and end finished requests."""
        events: list[Event] = []
        generations: list[tuple[Generation, Tensor]] = []
        parts = logits_MV.split([len(rows) for _, rows in scheduled])  # type: ignore[no-untyped-call]
        for (request, rows), logits_RV in zip(scheduled, parts, strict=True):
            if isinstance(request, Generation) and rows:
                generations.append((request, logits_RV))
            elif isinstance(request, Evaluation) and self._evaluate(request, rows, logits_RV):
                events.append(self._finish(request, "error" if request.error else "stop"))
        if generations:
            whole = len(generations) == len(logits_MV)
            logits_GV = logits_MV if whole else torch.cat([logits_1V for _, logits_1V in generations])
            events += self._choose([request for request, _ in generations], logits_GV)
        return events

    def _evaluate(self, request: Evaluation, rows: range, logits_RV: Tensor) -> bool:
        """Add the logits of a step; return whether the evaluation is complete."""
        done = self._running[request].length
        if request.first is None:
            request.logits.append(logits_RV)
        elif rows:
            start = done - rows.stop  # position of this step's first token
            tokens = request.prompt[start + rows.start + 1 : start + rows.stop + 1]
            targets = torch.tensor(tokens, dtype=torch.int64, device=logits_RV.device)
            request.log_likelihood -= float(F.cross_entropy(logits_RV, targets, reduction="sum"))
            request.greedy = request.greedy and torch.equal(logits_RV.argmax(-1), targets)
            if request.logprobs is not None:
                pairs = zip(logits_RV, tokens, strict=True)
                request.token_logprobs += [_logprobs(*pair, request.logprobs) for pair in pairs]
            if not request.log_likelihood <= 0:
                request.error = PentadError(NOT_NUMBERS)
                return True
        return not request.pending(done)

    def _choose(self, requests: list[Generation], logits_MV: Tensor) -> list[Event]:
        greedy = all(request.sampling.greedy for request in requests)
        unused = {} if greedy else {request: request.generator.get_state() for request in requests}
        events = []
        try:
            if greedy:
                tokens, largest = argmax(logits_MV)
            else:
                with self.executor.single_threaded():
                    choices = [Choice(r.sampling, r.generator, r.prompt, r.generated) for r in requests]
                    tokens, largest = sample(logits_MV, choices)
            for request, *result in zip(requests, tokens, largest, logits_MV, strict=True):
                events.append(self._append(request, *result))
                unused.pop(request, None)
        except BaseException:  # these requests have drawn a random number, and will draw it again
            for request, state in unused.items():
                request.generator.set_state(state)
            raise
        return events

    def _append(self, request: Generation, token: int, largest: float, logits_V: Tensor) -> Event:
        """Add the chosen token to its request."""
        if not math.isfinite(largest):
            request.error = PentadError(NOT_NUMBERS)
            return self._finish(request, "error")
        if token in request.end_ids:
            return self._finish(request, "stop")
        if request.logprobs is not None:
            with self.executor.single_threaded():
                request.token_logprobs.append(_logprobs(logits_V, token, request.logprobs))
        request.generated.append(token)
        if len(request.generated) >= request.max_tokens:
            return self._finish(request, "length", token)
        return Event(request, token, None)

    def _finish(self, request: Request, reason: str, token: int | None = None) -> Event:
        """End a request; its pages are kept for a request that continues it, or freed."""
        request.finish_reason = reason
        if request in self._waiting:
            self._waiting.remove(request)
        sequence = self._running.pop(request, None)
        if sequence is not None and isinstance(request, Generation) and sequence.length and reason != "error":
            self.drop_kept()
            self._kept = (request.pending(0)[: sequence.length], sequence)
        elif sequence is not None:
            self.executor.cache.close(sequence)
        if not self._running and not self._waiting:
            self._shrink_cache()
        return Event(request, token, reason)

    def _shrink_cache(self) -> None:
        """Return the memory of a burst of requests to the system, unless somebody else uses pages."""
        cache = self.executor.cache
        kept = [] if self._kept is None else [self._kept[1]]
        pages = sum(len(sequence.pages) for sequence in kept)
        if cache.nbytes > MIN_SHRUNK_BYTES and cache.pages_in_use == pages < cache.pages / 4:
            cache.compact(*kept)
            return_free_memory()

    def _bytes(self, request: Request) -> int:
        """The KV cache that a request needs at most."""
        return self.executor.cache.bytes_for(len(request.prompt) + getattr(request, "max_tokens", 0))

    def _fits(self, request: Request, *, kept: bool = False) -> bool:
        """True if a request fits into the cache with the running ones, and also with the kept pages if `kept`."""
        cache, limit = self.executor.cache, self.config.max_cache_bytes
        if limit is None:
            return True
        needed = sum(map(self._bytes, [*self._running, request]))
        if kept and self._kept is not None:
            needed += cache.bytes_for(len(self._kept[1].pages) * cache.page_size)
        return needed <= limit

    def _admit(self, request: Request) -> None:
        """Let the first waiting request run."""
        cache, sequence = self.executor.cache, self._continue_kept(request) or self._open(request)
        if not self._fits(request, kept=True):
            self.drop_kept()
        self._running[request] = sequence
        self._waiting.popleft()
        if cache.window is None and isinstance(request, Generation):
            new = len(request.prompt) - sequence.length
            cache.reserve(sequence, new + min(request.max_tokens, self.config.reserved_tokens))

    def _continue_kept(self, request: Request) -> CachedSequence | None:
        """The kept sequence, truncated to the tokens that the request begins with; None if it can't be continued."""
        if self._kept is None or not isinstance(request, Generation):
            return None
        ids, sequence = self._kept
        common = 0
        for cached, token in zip(ids, request.prompt[:-1], strict=False):  # the last token runs for its logits
            if cached != token:
                break
            common += 1
        scaling_key = self.executor.rope_scaling_key
        same_rope = scaling_key(sequence.rope_length) == scaling_key(len(request.prompt))
        if not common or not same_rope or not self.executor.cache.can_truncate(sequence, common):
            return None
        self.executor.cache.truncate(sequence, common)
        self._kept = None
        return sequence

    def _open(self, request: Request) -> CachedSequence:
        return self.executor.cache.open(len(request.prompt))

    def _restart(self, request: Request) -> None:
        """Run all tokens of a running request again, in a new sequence."""
        self._running[request] = self._open(request)
        if isinstance(request, Evaluation):
            request.log_likelihood, request.greedy = 0.0, True
            request.logits.clear()
            request.token_logprobs.clear()


def _logprobs(logits_V: Tensor, token: int, count: int) -> TokenLogprobs:
    logprobs_V = logits_V.log_softmax(-1)
    values, ids = logprobs_V.topk(min(count, len(logprobs_V)))
    return TokenLogprobs(token, float(logprobs_V[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))

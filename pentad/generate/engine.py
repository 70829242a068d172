"""Continuous batching: the engine chooses the tokens of each step and processes their logits.

The engine is synchronous and has one owner, which calls `submit`, `cancel` and `step`. It has no threads, no locks and
no I/O.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from pentad.errors import BadInput, PentadError
from pentad.generate.requests import Embedding, Evaluation, Event, Generation, Request, TokenLogprobs
from pentad.generate.sampling import Choice, argmax, sample
from pentad.generate.scheduler import EngineConfig, Scheduled, Scheduler
from pentad.generate.step import Step

NOT_NUMBERS = "the model's logits are not numbers (NaN or infinite): its weights are damaged"
_logger = logging.getLogger(__name__)

__all__ = ["NOT_NUMBERS", "Engine", "EngineConfig"]


class Engine:
    """Runs all admitted requests in each step: prompts in chunks, then a token a step, or more if drafts are accepted.

    Finished sequences keep their pages until others need them. A request that begins with the same tokens as another
    one shares its pages, and runs only the rest.

    Args:
        step: the executor of the network's steps.
        config: limits.
        clock: returns seconds; replaced in tests.
    """

    def __init__(
        self, step: Step, config: EngineConfig | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.config = config or EngineConfig()
        self._scheduler = Scheduler(step, self.config)
        self._clock = clock
        self._events: list[Event] = []  # not yet returned by `step`

    @property
    def executor(self) -> Step:
        """The executor of the network's steps, which owns the KV cache."""
        return self._scheduler.executor

    def submit(self, request: Request) -> None:
        """Queue a request; `step` runs it.

        Raises:
            BadInput: the request alone needs more than `max_cache_bytes`, or has a bias for a token that doesn't exist.
        """
        size = self.executor.network.config.vocab_size
        if isinstance(request, Generation) and max(request.sampling.logit_bias, default=0) >= size:
            raise BadInput(f"logit_bias names token {max(request.sampling.logit_bias)}; the vocabulary has {size}")
        self._scheduler.submit(request)

    def cancel(self, request: Request) -> None:
        """End a request, unless it has finished; its pages are kept as those of a finished one."""
        if request.finish_reason is None:
            request.finish_reason = "cancelled"
            self._scheduler.finish(request, keep=True)

    def limit_cache(self, nbytes: int | None) -> None:
        """Let a cache that was not allocated at once grow to at most this many bytes; None: no limit."""
        self._scheduler.limit_cache(nbytes)

    def count_pages(self) -> dict[str, int]:
        """The number of the cache's pages by their state; they add up to all pages.

        Returns:
            "used" by unfinished requests, "kept" for requests that begin like finished ones, and "free".
        """
        used, kept, cache = self._scheduler.held_pages(), self._scheduler.store.pages(), self.executor.cache
        return {"used": len(used), "kept": len(kept - used), "free": cache.pages - cache.pages_in_use}

    @property
    def requests(self) -> list[Request]:
        """All waiting and running requests, in the order of their submission."""
        return list(self._scheduler.requests)

    def drop_kept(self) -> None:
        """Free the pages of finished sequences."""
        self._scheduler.store.clear()

    def refresh(self) -> Step:
        """Replace the executor if the network has changed; running requests then start again from their first token."""
        executor = self.executor.refresh()
        if executor is not self.executor:
            _logger.info("the network has changed: it runs %s", executor.backend)
            self._scheduler.use(executor)
        return executor

    def reset(self) -> None:
        """Cancel all requests and empty the cache."""
        for request in self.requests:
            request.finish_reason = "cancelled"
        self._scheduler.reset()
        self._events.clear()

    def step(self) -> list[Event]:
        """Run one step. If requests are waiting, check for changes to the network first.

        Returns:
            An event for each new token and each end of a request, also of an earlier step that then failed.
        """
        if len(self._scheduler.running) < len(self._scheduler.requests):
            self.refresh()
        scheduled = self._scheduler.schedule()
        if scheduled:
            decoding = sum(len(part.tokens) for part in scheduled if part.decodes)
            prefilling = sum(len(part.tokens) for part in scheduled) - decoding
            started = self._clock()
            try:
                self._run(scheduled)
            except BaseException:  # some tokens may have run, and their logits are lost
                for request in self._scheduler.running:
                    done = self._scheduler.sequence(request).length
                    if isinstance(request, Evaluation) or not request.pending(done):
                        self._scheduler.restart(request)
                raise
            self._scheduler.pace.measure(self._clock() - started, decoding, prefilling)
        events, self._events = self._events, []
        return events

    def _run(self, scheduled: list[Scheduled]) -> None:
        work = [(self._scheduler.sequence(part.request), part.tokens) for part in scheduled]
        starts = accumulate((len(tokens) for _, tokens in work), initial=0)
        wanted = [start + i for part, start in zip(scheduled, starts, strict=False) for i in part.rows]
        self._process(scheduled, self.executor(work, wanted))

    def _process(self, scheduled: Sequence[Scheduled], logits_MV: Tensor) -> None:
        """Choose tokens, add log-likelihoods, and end finished requests."""
        generations: list[tuple[Scheduled, int]] = []
        embeds = any(isinstance(part.request, Embedding) for part in scheduled)
        hidden_MD = self.executor.hidden_states() if embeds else logits_MV
        start = 0
        for part in scheduled:
            request, rows = part.request, slice(start, start + len(part.rows))
            if isinstance(request, Embedding):
                request.add(hidden_MD[rows])
                if not request.pending(self._scheduler.sequence(request).length):
                    self._finish(request, "stop")
            elif isinstance(request, Generation) and part.rows:
                generations.append((part, start))
            elif isinstance(request, Evaluation) and self._evaluate(request, part.rows, logits_MV[rows]):
                self._finish(request, "error" if request.error else "stop")
            start = rows.stop
        accepted = 0
        while generations:
            at = [start + accepted for _, start in generations]
            logits_GV = logits_MV if len(at) == len(logits_MV) else logits_MV[at]
            self._choose([part for part, _ in generations], accepted, logits_GV)
            generations = [(part, start) for part, start in generations if _as_drafted(part, accepted)]
            accepted += 1

    def _evaluate(self, request: Evaluation, rows: range, logits_RV: Tensor) -> bool:
        """Add the logits of a step; return whether the evaluation is complete."""
        done = self._scheduler.sequence(request).length
        if request.first is None:
            request.logits.append(logits_RV)
        elif rows:
            start = done - rows.stop  # position of this step's first token
            tokens = request.prompt[start + rows.start + 1 : start + rows.stop + 1]
            targets = torch.tensor(tokens, dtype=torch.int64, device=logits_RV.device)
            logprobs_RV = logits_RV.log_softmax(-1)
            for logprob in logprobs_RV.gather(1, targets[:, None])[:, 0].tolist():
                request.log_likelihood += logprob  # one by one, so that the sum doesn't depend on the chunks
            request.greedy = request.greedy and torch.equal(logits_RV.argmax(-1), targets)
            if request.logprobs is not None:
                request.token_logprobs += _reports(logprobs_RV, tokens, request.logprobs)
            if not request.log_likelihood <= 0:
                request.error = PentadError(NOT_NUMBERS)
                return True
        return not request.pending(done)

    def _choose(self, parts: list[Scheduled], accepted: int, unmasked_MV: Tensor) -> None:
        """Choose one token of each generation, after so many accepted drafts."""
        requests = [part.request for part in parts if isinstance(part.request, Generation)]
        logits_MV = _masked(requests, unmasked_MV)
        greedy = all(request.sampling.greedy for request in requests)
        unused = {} if greedy else {request: request.generator.get_state() for request in requests}
        try:
            if greedy:
                tokens, maxima = argmax(logits_MV)
            else:
                with self.executor.single_threaded():
                    choices = [Choice(r.sampling, r.generator, r.prompt, r.generated) for r in requests]
                    tokens, maxima = sample(logits_MV, choices)
            reports = self._logprobs(requests, tokens, unmasked_MV)
            for part, request, token, maximum, report in zip(parts, requests, tokens, maxima, reports, strict=True):
                if part.drafts and token not in part.drafted[accepted : accepted + 1]:
                    self._scheduler.judge_drafts(part, accepted)
                self._append(request, token, maximum, report)
                unused.pop(request, None)
        except BaseException:  # these requests have drawn a random number, and will draw it again
            for request, state in unused.items():
                request.generator.set_state(state)
            raise

    def _logprobs(
        self, requests: list[Generation], tokens: Sequence[int], logits_MV: Tensor
    ) -> list[TokenLogprobs | None]:
        """The reports on the chosen tokens; None for requests that want none."""
        counts = [request.logprobs for request in requests]
        rows = [row for row, count in enumerate(counts) if count is not None]
        reports: list[TokenLogprobs | None] = [None] * len(requests)
        if rows:
            with self.executor.single_threaded():
                most = max(count for count in counts if count is not None)
                logprobs_RV = (logits_MV if len(rows) == len(counts) else logits_MV[rows]).log_softmax(-1)
                made = _reports(logprobs_RV, [tokens[row] for row in rows], most)
            for row, report in zip(rows, made, strict=True):
                reports[row] = replace(report, top=report.top[: counts[row]])
        return reports

    def _append(self, request: Generation, token: int, maximum: float, report: TokenLogprobs | None) -> None:
        """Add the chosen token to its request."""
        if request.error is not None:
            return self._finish(request, "error")
        if not math.isfinite(maximum):
            request.error = PentadError(NOT_NUMBERS)
            return self._finish(request, "error")
        if token in request.end_ids:
            return self._finish(request, "stop")
        if request.matcher is not None:
            try:
                request.matcher.accept(token)
            except BadInput as error:
                request.error = error
                return self._finish(request, "error")
        if report is not None:
            request.token_logprobs.append(report)
        request.generated.append(token)
        if request.matcher is not None and request.matcher.complete:
            return self._finish(request, "stop", token, report)
        if len(request.generated) >= request.max_tokens:
            return self._finish(request, "length", token, report)
        self._events.append(Event(request, token, None, report))

    def _finish(
        self, request: Request, reason: str, token: int | None = None, report: TokenLogprobs | None = None
    ) -> None:
        request.finish_reason = reason
        self._events.append(Event(request, token, reason, report))
        self._scheduler.finish(request, keep=reason != "error")


def _masked(requests: Sequence[Generation], logits_MV: Tensor) -> Tensor:
    """The logits, with minus infinity for tokens that a request's grammar doesn't allow."""
    if all(request.matcher is None for request in requests):
        return logits_MV
    logits_MV = logits_MV.clone()
    for request, logits_V in zip(requests, logits_MV, strict=True):
        if request.matcher is not None:
            try:
                logits_V.masked_fill_(~request.matcher.mask().to(logits_V.device), -math.inf)
            except BadInput as error:
                request.error = error
    return logits_MV


def _as_drafted(part: Scheduled, accepted: int) -> bool:
    """True if a request goes on and its last token is the next draft, so that the following logits are its own."""
    request = part.request
    assert isinstance(request, Generation)
    return request.finish_reason is None and request.generated[-1:] == part.drafted[accepted : accepted + 1]


def _reports(logprobs_RV: Tensor, tokens: Sequence[int], count: int) -> list[TokenLogprobs]:
    """The log-probabilities of each row's token and of its most likely tokens."""
    chosen = logprobs_RV.gather(1, torch.tensor(tokens, dtype=torch.int64, device=logprobs_RV.device)[:, None])
    values_RC, ids_RC = logprobs_RV.topk(min(count, logprobs_RV.shape[1]))
    tops = [tuple(zip(*pair, strict=True)) for pair in zip(ids_RC.tolist(), values_RC.tolist(), strict=True)]
    return [TokenLogprobs(*one) for one in zip(tokens, chosen[:, 0].tolist(), tops, strict=True)]

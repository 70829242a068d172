"""The scheduler: which tokens run in the next step, and which sequences hold pages of the KV cache."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pentad.errors import BadInput
from pentad.generate.lookup import PromptLookup
from pentad.generate.pace import Pace
from pentad.generate.prefixes import Key, Prefix, PrefixStore, common_length, key_of
from pentad.generate.requests import Evaluation, Generation, Request
from pentad.generate.step import Step
from pentad.nn.cache import CachedSequence
from pentad.nn.moe.layer import MixtureOfExperts
from pentad.weights.mapped import return_free_memory

MAX_EVALUATED_TOKENS = 256  # per evaluation and step: the logits of all these tokens are in memory at once
MAX_KEPT_BYTES = 1 << 27  # of finished sequences in a cache without a limit; the last one always stays
MIN_SHRUNK_BYTES = 1 << 27  # a smaller cache keeps its memory
MIN_AWAITED_TOKENS = 16  # a request waits for another one's prefill if it then has so many tokens less to run


@dataclass(frozen=True)
class EngineConfig:
    """Limits of an engine.

    Attributes:
        max_batched_tokens: maximum tokens per step; None for what the executor runs best.
        max_num_seqs: maximum sequences that run together; other requests wait.
        max_cache_bytes: size of the KV cache, which is allocated once. With None it grows. The keys and values of an
            encoder-decoder's sources are not counted.
        reserved_tokens: tokens reserved beyond a prompt when it is admitted, so that a cache seldom grows.
        max_step_ratio: a step with decoding sequences prefills so few tokens that it takes at most this many times as
            long as a step that only decodes, by the times of earlier steps; None for no bound.
        max_drafts: maximum tokens per sequence and step that are drafted by prompt lookup. Drafts change no token:
            they are only used where logits don't depend on chunks.
    """

    max_batched_tokens: int | None = None
    max_num_seqs: int = 32
    max_cache_bytes: int | None = None
    reserved_tokens: int = 256
    max_step_ratio: float | None = 3.0
    max_drafts: int = 3


class Scheduled(NamedTuple):
    """A request's part of a step.

    Attributes:
        request: the request.
        tokens: its next tokens.
        rows: the indices of those tokens whose logits are wanted.
        drafts: how many of the tokens, the last ones, are drafts.
    """

    request: Request
    tokens: Sequence[int]
    rows: range
    drafts: int = 0

    @property
    def drafted(self) -> Sequence[int]:
        """The drafts."""
        return self.tokens[len(self.tokens) - self.drafts :]

    @property
    def decodes(self) -> bool:
        """True if the tokens are only the one that was generated last, and drafts."""
        return bool(self.rows) and is_decoding(self.request, self.tokens[: len(self.tokens) - self.drafts])


class Scheduler:
    """The requests, their sequences and the finished sequences.

    Requests are admitted in the order of their submission, except those that wait for a prefix that another request is
    prefilling. If the pages of a cache with a limit run out, kept sequences are evicted, then the youngest request is
    preempted: it waits without pages, and later its known tokens run again. The oldest request always proceeds.

    A mixture of experts with capacities computes a token differently in another chunk. There prompts run whole and
    share nothing, and generated tokens run one at a time.

    Attributes:
        requests: all waiting and running requests, the oldest first, with their sequences; None: the request waits.
        executor: runs the steps, and owns the cache.
    """

    def __init__(self, step: Step, config: EngineConfig) -> None:
        self.config = config
        self.requests: dict[Request, CachedSequence | None] = {}
        self._lookups: dict[Request, PromptLookup] = {}
        self.pace = Pace(config.max_step_ratio)
        self._limit: int | None = None
        self.use(step)

    def use(self, step: Step) -> None:
        """Continue with another executor and an empty cache; running requests start again.

        Raises:
            BadInput: the cache's limit is below one page.
        """
        self.executor = step
        self._max_batched_tokens = self.config.max_batched_tokens or step.batched_tokens
        self.store = PrefixStore(step)
        mixtures = [part for part in step.network.modules() if isinstance(part, MixtureOfExperts)]
        self._runs_whole = any(mixture.capacity is not None for mixture in mixtures)
        if (limit := self.config.max_cache_bytes) is not None:
            if limit < step.cache.page_bytes:
                raise BadInput(f"the KV cache is {limit} bytes; expected at least one page of {step.cache.page_bytes}")
            step.cache.fix(limit // step.cache.page_bytes)
        self.limit_cache(self._limit)
        for request in self.running:
            self.requests[request] = None
            request.restart()

    def limit_cache(self, nbytes: int | None) -> None:
        """Let a cache that was not allocated at once grow to at most this many bytes; open requests must still fit."""
        if self.config.max_cache_bytes is not None:
            return
        cache, self._limit = self.executor.cache, nbytes
        needed = [cache.pages_for(request.max_length) for request in self.requests]
        cache.max_pages = math.inf if nbytes is None else max([nbytes // cache.page_bytes, *needed])

    @property
    def running(self) -> list[Request]:
        """The requests that have a sequence, the oldest first."""
        return [request for request, sequence in self.requests.items() if sequence is not None]

    def submit(self, request: Request) -> None:
        """Add a request.

        Raises:
            BadInput: the request alone needs more pages than the cache has.
        """
        cache = self.executor.cache
        if cache.pages_for(request.max_length) > cache.max_pages:
            needed = (
                f"up to {request.max_length} tokens of KV cache ({cache.bytes_for(request.max_length) / 1e6:.1f} MB)"
            )
            room = f"{cache.max_pages * cache.page_size} ({cache.max_pages * cache.page_bytes / 1e6:.1f} MB)"
            raise BadInput(f"the request needs {needed}; there is room for {room}: shorten it, or lower max_tokens")
        self.requests[request] = None

    def sequence(self, request: Request) -> CachedSequence:
        """The sequence of a running request."""
        sequence = self.requests[request]
        assert sequence is not None
        return sequence

    def restart(self, request: Request) -> None:
        """Let a running request wait, and later run all its tokens again."""
        self.executor.cache.close(self.sequence(request))
        self.requests[request] = None
        request.restart()

    def finish(self, request: Request, *, keep: bool) -> None:
        """Remove a request; its sequence is kept for requests that begin with the same tokens, or its pages are freed.

        Args:
            request: the request.
            keep: whether its sequence is kept, if requests may share it.
        """
        cache, sequence = self.executor.cache, self.requests.pop(request)
        self._lookups.pop(request, None)
        if sequence is not None:
            kept = keep and sequence.length and (request.source is not None or not self._runs_whole)
            if isinstance(request, Generation):  # which may have ended within its drafts
                known = len(request.prompt) + len(request.generated)
                cache.truncate(sequence, min(sequence.length, known))
            if kept and not (isinstance(request, Evaluation) and request.first is None):
                key = key_of(request.key, request.generated if isinstance(request, Generation) else [])
                self.store.add(key[: len(request.key) - len(request.prompt) + sequence.length], sequence)
            else:
                cache.close(sequence)
        if self.config.max_cache_bytes is None:
            while len(self.store) > 1 and self.store.nbytes > MAX_KEPT_BYTES:
                self.store.evict()
            if not self.requests:
                self._shrink_cache()

    def reset(self) -> None:
        """Forget all requests and empty the cache."""
        self.requests.clear()
        self._lookups.clear()
        self.executor.cache.clear()
        self.store = PrefixStore(self.executor)

    def schedule(self) -> list[Scheduled]:
        """Admit requests, choose the tokens of the next step, and reserve pages for them."""
        self._admit()
        counts = self._count_tokens()
        scheduled = []
        for request in counts:
            if self.requests[request] is not None and (count := self._reserve(request, counts[request])):
                scheduled.append(self._part(request, count))
        decodes = self.config.max_drafts and self.executor.exact and not self._runs_whole
        return self._with_drafts(scheduled) if decodes and all(part.decodes for part in scheduled) else scheduled

    def _with_drafts(self, scheduled: list[Scheduled]) -> list[Scheduled]:
        """Add drafts to the parts of a step that only decodes, if the cache has pages for them."""
        cache, break_even = self.executor.cache, self.pace.break_even(len(scheduled))
        parts = []
        for request, tokens, _, _ in scheduled:
            assert isinstance(request, Generation)
            sequence, known = self.sequence(request), len(request.prompt) + len(request.generated)
            most = min(self.config.max_drafts, request.max_length - known)
            if cache.window is not None:  # rejected tokens must not push others out of the window
                most = min(most, cache.window - known - 1)
            if request not in self._lookups:
                self._lookups[request] = PromptLookup(request.prompt)
            drafts = self._lookups[request].draft(request.generated, most, break_even)
            ends = [i for i, token in enumerate(drafts) if token in request.end_ids]
            drafts = drafts[: min(ends, default=len(drafts))]
            if cache.missing_pages(sequence, 1 + len(drafts)) > cache.free_pages:
                drafts = []
            cache.reserve(sequence, 1 + len(drafts))
            parts.append(Scheduled(request, [*tokens, *drafts], range(1 + len(drafts)), len(drafts)))
        return parts

    def judge_drafts(self, part: Scheduled, accepted: int) -> None:
        """Take back the drafts of the last step that were not accepted."""
        sequence = self.sequence(part.request)
        self.executor.cache.truncate(sequence, sequence.length - (part.drafts - accepted))
        self._lookups[part.request].learn(part.drafts, accepted)

    def _count_tokens(self) -> dict[Request, int]:
        """The numbers of tokens that running requests may run in a step, the oldest request first."""
        running = self.running
        pending = {request: request.pending(self.sequence(request).length) for request in running}
        decoding = {request for request in running if is_decoding(request, pending[request])}
        left = self._max_batched_tokens - len(decoding)
        if not self._runs_whole:
            left = int(min(left, self.pace.prefill_tokens(len(decoding))))
        counts: dict[Request, int] = {}
        prefills = 0
        for request in running:
            count = len(pending[request])
            if request in decoding:
                counts[request] = 1
            elif self._runs_whole:
                count = self._whole_part(request, count)
                counts[request] = count if not prefills or prefills + count <= left else 0
            else:
                count = min(count, MAX_EVALUATED_TOKENS) if isinstance(request, Evaluation) else count
                counts[request] = max(0, min(count, left - prefills))
            prefills += counts[request] if request not in decoding else 0
        return counts

    def _whole_part(self, request: Request, pending: int) -> int:
        """A whole prompt, or one generated token."""
        if self.sequence(request).length:
            return 1
        return min(pending, len(request.prompt))

    def _part(self, request: Request, count: int) -> Scheduled:
        done = self.sequence(request).length
        pending = request.pending(done)
        if isinstance(request, Evaluation):
            rows = range(0 if request.first is None else max(0, request.first - 1 - done), count)
        else:
            rows = range(count - (count == len(pending)), count)
        return Scheduled(request, pending[:count], rows)

    # Pages

    def _reserve(self, request: Request, count: int) -> int:
        """Reserve pages for a request's next tokens; return how many tokens have pages."""
        cache, sequence = self.executor.cache, self.sequence(request)
        while cache.missing_pages(sequence, count) > cache.free_pages:
            if not self.store.evict() and not self._preempt_younger(request):
                count = 0 if self._runs_whole else int(cache.room(sequence))
        cache.reserve(sequence, count)
        return count

    def _preempt_younger(self, older: Request) -> bool:
        """Take the pages of the youngest running request; return False if none is younger than `older`."""
        for request in reversed(self.requests):
            if request is older:
                break
            if self.requests[request] is not None:
                self.restart(request)
                return True
        return False

    def _fits(self, request: Request, prefix: Prefix | None) -> bool:
        """True if the cache has pages for the known tokens of a request and of all running ones, and for some more."""
        cache = self.executor.cache
        if cache.max_pages == math.inf:
            return True
        shared = [] if prefix is None else prefix.sequence.pages[: prefix.tokens // cache.page_size]
        needed = self._pages_soon(request) - len(shared)
        needed += sum(max(0, self._pages_soon(other) - len(self.sequence(other).pages)) for other in self.running)
        return needed <= cache.max_pages - len(self.held_pages().union(shared))

    def held_pages(self) -> set[int]:
        """The pages of running requests."""
        return {page for request in self.running for page in self.sequence(request).pages}

    def _pages_soon(self, request: Request) -> int:
        """The pages for a request's known tokens, and for a page of new ones."""
        known = len(request.pending(0))
        cache = self.executor.cache
        return cache.pages_for(min(known + cache.page_size, request.max_length))

    def _shrink_cache(self) -> None:
        """Return the memory of a burst of requests to the system, unless somebody else uses pages."""
        cache, pages = self.executor.cache, len(self.store.pages())
        if cache.nbytes > MIN_SHRUNK_BYTES and cache.pages_in_use == pages < cache.pages / 4:
            cache.compact(*(sequence for sequence, _ in self.store.items()))
            return_free_memory()

    # Admission

    def _admit(self) -> None:
        """Give waiting requests a sequence, as long as there is room."""
        running = len(self.running)
        for request in [request for request, sequence in self.requests.items() if sequence is None]:
            if running >= self.config.max_num_seqs:
                break
            prefix, waits = self._find_prefix(request)
            if waits:
                continue
            if running and not self._fits(request, prefix):
                break
            self._start(request, prefix)
            running += 1

    def _start(self, request: Request, prefix: Prefix | None) -> None:
        cache = self.executor.cache
        sequence = self.executor.open(request) if prefix is None else self.store.share(prefix)
        self.requests[request] = sequence
        if prefix is not None and request.reusable < len(request.prompt):
            offset = len(request.key) - len(request.prompt)
            request.cached_tokens = max(0, offset - 1) + min(prefix.tokens, len(request.prompt))
        if self.config.max_cache_bytes is None and cache.window is None and isinstance(request, Generation):
            new = len(request.prompt) - sequence.length
            tokens = max(0, new) + min(request.max_tokens, self.config.reserved_tokens)
            if cache.missing_pages(sequence, tokens) <= cache.free_pages:
                cache.reserve(sequence, tokens)

    def _find_prefix(self, request: Request) -> tuple[Prefix | None, bool]:
        """The longest prefix that a request can share, and whether it waits for a longer one."""
        key = key_of(request.key, request.generated if isinstance(request, Generation) else [])
        offset = len(request.key) - len(request.prompt)
        most = offset + (0 if self._runs_whole else request.reusable)
        scaling_key, cache = self.executor.rope_scaling_key, self.executor.cache
        best, length, awaited = None, 0, 0
        for sequence, other, computed in self._candidates() if most else ():
            common = min(common_length(key, other), most)
            now = min(common, computed)
            if max(common, now) <= length or scaling_key(sequence.rope_length) != scaling_key(len(request.prompt)):
                continue
            if now > length and now >= offset and cache.can_truncate(sequence, now - offset):
                best, length = Prefix(sequence, now - offset), now
            stays = cache.window is None or common + self._max_batched_tokens <= cache.window
            if common > computed and stays:
                awaited = max(awaited, common)
        return best, awaited >= length + MIN_AWAITED_TOKENS

    def _candidates(self) -> Iterator[tuple[CachedSequence, Key, int]]:
        """Sequences that a request may share: their keys, and how much of the key is in the cache."""
        for sequence, key in self.store.items():
            yield sequence, key, len(key)
        for request in self.running:
            sequence = self.sequence(request)
            done = len(request.key) - len(request.prompt) + sequence.length
            yield sequence, request.key, done if sequence.length else 0


def is_decoding(request: Request, tokens: Sequence[int]) -> bool:
    """True if these next tokens of a request are only the one that it generated last."""
    return isinstance(request, Generation) and bool(request.generated) and len(tokens) == 1

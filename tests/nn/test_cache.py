"""The paged cache against a reference model that stores plain lists."""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pentad.errors import PentadError
from pentad.nn.batch import PagedKV
from pentad.nn.cache import CachedSequence, PagedCache
from tests.helpers.plain import read_pages


def cache(page_size: int = 4, window: int | None = None, **options: Any) -> PagedCache:
    return PagedCache(2, 1, 2, dtype=torch.float32, page_size=page_size, window=window, **options)


@dataclass
class Expected:
    """A sequence of the cache, and the tokens that it should contain."""

    sequence: CachedSequence
    tokens: list[float] = field(default_factory=list)


class CacheMachine(RuleBasedStateMachine):
    """Random cache operations. Each token is a distinct number, written to both layers with `PagedKV.write`."""

    def __init__(self) -> None:
        super().__init__()
        self.expected: list[Expected] = []
        self.next_token = 0.0

    @initialize(
        page_size=st.integers(1, 5),
        window=st.none() | st.integers(1, 9),
        contiguous=st.booleans(),
        pages=st.none() | st.integers(0, 60),
    )
    def make(self, page_size: int, window: int | None, contiguous: bool, pages: int | None) -> None:
        self.window = window
        self.cache = cache(page_size, window, contiguous=contiguous)
        if pages is not None:
            self.cache.fix(pages)

    def fits(self, one: Expected, tokens: int) -> bool:
        """Whether the cache has pages for more tokens of a sequence; if it has not, reserving them is refused."""
        missing, free = self.cache.missing_pages(one.sequence, tokens), self.cache.free_pages
        assert (missing <= free) == (tokens <= self.cache.room(one.sequence)) or not tokens
        if missing > free:
            with pytest.raises(PentadError, match="pages"):
                self.cache.reserve(one.sequence, tokens)
        return missing <= free

    def any_of(self, data: st.DataObject) -> Expected:
        return data.draw(st.sampled_from(self.expected))

    @rule()
    def open(self) -> None:
        if len(self.expected) < 6:
            self.expected.append(Expected(self.cache.open()))

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        if len(self.expected) < 6:
            one = self.any_of(data)
            length = data.draw(st.integers(0, len(one.tokens)) | st.just(len(one.tokens)))
            if self.cache.can_truncate(one.sequence, length):
                self.expected.append(Expected(self.cache.fork(one.sequence, length), one.tokens[:length]))
            else:
                with pytest.raises(PentadError):
                    self.cache.fork(one.sequence, length)

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), tokens=st.integers(0, 20))
    def reserve(self, data: st.DataObject, tokens: int) -> None:
        one = self.any_of(data)
        if self.fits(one, tokens):
            free, missing = self.cache.free_pages, self.cache.missing_pages(one.sequence, tokens)
            self.cache.reserve(one.sequence, tokens)
            assert self.cache.free_pages == free - missing

    @precondition(lambda self: self.expected and self.cache.max_pages == math.inf)
    @rule()
    def compact(self) -> None:
        """Free the pages that nobody holds; shared pages stay shared."""
        held = {page for one in self.expected for page in one.sequence.pages}
        self.cache.compact(*(one.sequence for one in self.expected))
        assert self.cache.pages == self.cache.pages_in_use == len(held)

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def append(self, data: st.DataObject) -> None:
        """Run a step of some sequences, and accept any number of its first tokens."""
        chosen = data.draw(st.lists(st.sampled_from(self.expected), min_size=1, unique_by=id))
        chosen = [one for one in chosen if self.fits(one, 12)][: 1 if self.cache.max_pages < math.inf else None]
        if not chosen:
            return
        counts = [data.draw(st.integers(1, 12)) for _ in chosen]
        work = [(one.sequence, n) for one, n in zip(chosen, counts, strict=True)]
        batch = self.cache.batch(work)
        pages = batch.kv
        assert pages is not None
        slots = pages.slot_mapping.tolist()
        assert len(set(slots)) == len(slots), "a step writes two tokens to one slot"
        references = Counter(page for one in self.expected for page in one.sequence.pages)
        assert {references[slot // self.cache.page_size] for slot in slots} == {1}, "a step writes to a shared page"
        positions = [len(o.tokens) + i for o, n in zip(chosen, counts, strict=True) for i in range(n)]
        assert batch.positions.tolist() == positions
        assert batch.layout.lengths == tuple(counts)
        new = [self.next_token + i for i in range(len(slots))]
        self.next_token += len(slots)
        numbers = torch.tensor(new)[:, None, None].expand(-1, 1, 2)
        for layer in range(2):
            pages.write(layer, numbers + layer / 4, -numbers - layer / 4)
        at = 0
        for b, (one, n) in enumerate(zip(chosen, counts, strict=True)):
            self.check_read(pages, b, one.tokens + new[at : at + n], one.sequence.dropped)
            accepted = data.draw(st.integers(0, n))
            self.cache.advance(one.sequence, accepted)
            one.tokens += new[at : at + accepted]
            at += n

    def check_read(self, pages: Any, b: int, tokens: list[float], dropped: int) -> None:
        """Check that the cache contains the right keys and values, and all that a query may attend to."""
        last = [] if self.window is None else tokens[-self.window :]
        expected = tokens if self.window is None else tokens[dropped:]
        assert expected[len(expected) - len(last) :] == last
        for layer in range(2):
            keys, values = (read_pages(pools[layer], pages, b) for pools in (pages.keys, pages.values))
            assert keys[:, 0, 0].tolist() == [token + layer / 4 for token in expected]
            assert values[:, 0, 1].tolist() == [-token - layer / 4 for token in expected]

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        one = self.any_of(data)
        length = data.draw(st.integers(0, len(one.tokens)))
        if self.cache.can_truncate(one.sequence, length):
            self.cache.truncate(one.sequence, length)
            del one.tokens[length:]
        else:
            assert self.window is not None
            with pytest.raises(PentadError):
                self.cache.truncate(one.sequence, length)

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        one = self.any_of(data)
        self.cache.close(one.sequence)
        self.expected.remove(one)

    @invariant()
    def pages_hold_the_tokens(self) -> None:
        if not hasattr(self, "cache"):
            return
        for one in self.expected:
            sequence = one.sequence
            assert sequence.length == len(one.tokens)
            assert len(set(sequence.pages)) == len(sequence.pages)
            assert sequence.held <= len(sequence.pages) * self.cache.page_size
        assert len({len(pool) for pool in (*self.cache.keys, *self.cache.values)}) == 1

    def teardown(self) -> None:
        for one in self.expected:
            self.cache.close(one.sequence)
        if hasattr(self, "cache") and self.cache.pages:
            size, sequence = self.cache.nbytes, self.cache.open()
            self.cache.reserve(sequence, len(self.cache.keys[0]))
            assert self.cache.nbytes == size, "pages leaked"
            assert len(set(sequence.pages)) == len(self.cache.keys[0]) // self.cache.page_size


def test_random_operations() -> None:
    run_state_machine_as_test(CacheMachine, settings=settings(max_examples=100, stateful_step_count=25))


def test_steps_within_the_reservation_allocate_nothing() -> None:
    c = cache()
    sequence = c.open()
    c.reserve(sequence, 30)
    pools = [pool.data_ptr() for pool in (*c.keys, *c.values)]
    for _ in range(30):
        c.batch([(sequence, 1)])
        c.advance(sequence, 1)
    assert [pool.data_ptr() for pool in (*c.keys, *c.values)] == pools
    assert sequence.pages == list(range(8))  # adjacent, so they are read as a view


def test_reserved_pages_are_adjacent_if_possible() -> None:
    c = cache(pages=12)
    first, second = c.open(), c.open()
    c.reserve(first, 12)
    c.reserve(second, 12)
    c.close(first)
    third = c.open()
    c.reserve(third, 20)
    assert third.pages == [6, 7, 8, 9, 10]
    c.reserve(second, 13)
    assert len(second.pages) == 4
    assert c.nbytes == sum(pool.nbytes for pool in (*c.keys, *c.values))


def test_nbytes_counts_pools_in_their_dtype() -> None:
    c = PagedCache(3, 2, 8, dtype=torch.bfloat16, page_size=16, pages=4)
    assert c.nbytes == 3 * 2 * 4 * 16 * 2 * 8 * 2


def test_truncating_to_dropped_tokens_names_both_positions() -> None:
    c = cache(window=4)
    sequence = c.open()
    c.batch([(sequence, 20)])
    c.advance(sequence, 20)
    assert sequence.dropped == 16
    with pytest.raises(PentadError, match=r"token 5\b.* 16\b"):
        c.truncate(sequence, 5)
    assert sequence.length == 20


def test_truncating_beyond_the_end_is_refused() -> None:
    c = cache()
    sequence = c.open()
    c.batch([(sequence, 3)])
    c.advance(sequence, 3)
    with pytest.raises(PentadError):
        c.truncate(sequence, 9)


def test_only_the_written_page_of_a_fork_is_copied() -> None:
    c = cache()
    first = c.open()
    pages = c.batch([(first, 6)]).kv
    assert pages is not None
    pages.write(0, torch.arange(6.0)[:, None, None].expand(-1, 1, 2), torch.zeros(6, 1, 2))
    c.advance(first, 6)
    second = c.fork(first)
    assert second.pages == first.pages
    c.batch([(second, 1)])
    assert second.pages[0] == first.pages[0]
    assert second.pages[1] != first.pages[1]
    old, new = (c.keys[0].view(-1, 4, 1, 2)[s.pages[1]][:2] for s in (first, second))
    assert new[:, 0, 0].tolist() == old[:, 0, 0].tolist() == [4, 5]


def write_positions(c: PagedCache, work: list[tuple[CachedSequence, int]]) -> PagedKV:
    """Run a step; the keys that it writes are the tokens' positions."""
    batch = c.batch(work)
    assert batch.kv is not None
    numbers = batch.positions[:, None, None].expand(-1, 1, 2).float()
    for layer in range(len(c.keys)):
        batch.kv.write(layer, numbers, -numbers)
    for sequence, count in work:
        c.advance(sequence, count)
    return batch.kv


def positions_held(c: PagedCache, sequence: CachedSequence) -> list[int]:
    """The positions of the tokens that the cache holds, in the order of the sequence's pages."""
    rows = [page * c.page_size + i for page in sequence.pages for i in range(c.page_size)]
    keys, values = c.keys[0][rows[: sequence.held], 0, 0], c.values[0][rows[: sequence.held], 0, 1]
    assert torch.equal(keys, -values)
    return keys.int().tolist()


def test_mistrals_example_of_a_rolling_buffer() -> None:
    """mistral-src's cache.py gives each sequence a ring of `window` slots, and writes a token to position % window.

    Its example: at a window of 3, chunks of [5, 7, 2] tokens after [0, 1, 3] cached tokens go to the slots
    [2 0 1 | 5 3 4 | 6 7].

    The ring holds the last 3 positions, but the next token overwrites the oldest of them before any query reads it. The
    paged cache, with pages of one token, has already released that page.
    """
    window, before, chunks = 3, [0, 1, 3], [5, 7, 2]
    c = cache(page_size=1, window=window)
    sequences = [c.open() for _ in chunks]
    for counts in (before, chunks):
        write_positions(c, [(s, count) for s, count in zip(sequences, counts, strict=True) if count])
    ring: dict[int, int] = {}
    slots: list[list[int]] = []
    for b, (start, count) in enumerate(zip(before, chunks, strict=True)):
        ring.update({position % window + b * window: position for position in range(start)})
        written = range(start + count - min(count, window), start + count)
        slots.append([position % window + b * window for position in written])
        ring.update(zip(slots[-1], written, strict=True))
    assert slots == [[2, 0, 1], [5, 3, 4], [6, 7]]
    assert [sorted(ring[b * window + i] for i in range(window)) for b in range(3)] == [[2, 3, 4], [5, 6, 7], [2, 3, 4]]
    for b, sequence in enumerate(sequences):
        del ring[sequence.length % window + b * window]  # the next token's slot
        kept = sorted(position for slot, position in ring.items() if slot // window == b)
        assert positions_held(c, sequence) == kept == [sequence.length - 2, sequence.length - 1]


@pytest.mark.parametrize("page_size", [1, 16, 256])
@pytest.mark.parametrize("chunk", [1, 100, 512])
def test_memory_is_bounded_by_the_window(chunk: int, page_size: int) -> None:
    """Measures the pools' bytes while a prompt of 4 windows is prefilled in chunks and 2 windows are decoded."""
    window = 320
    c = cache(page_size, window)
    sequence = c.open()
    token_bytes = 2 * 2 * 2 * 4  # keys and values, 2 layers, head_dim 2, float32
    for count in [*[chunk] * (4 * window // chunk), *[1] * (2 * window)]:
        write_positions(c, [(sequence, count)])
        max_tokens = min(sequence.length, window + count + page_size)
        assert len(sequence.pages) * page_size < max_tokens + page_size
        largest = min(sequence.length, window + chunk + page_size) + page_size
        assert c.nbytes <= 1.5 * largest * token_bytes + page_size * token_bytes  # pools grow by half
        last = positions_held(c, sequence)[1 - window :]
        assert last == list(range(max(0, sequence.length - window + 1), sequence.length))
    assert sequence.length > 5 * window


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("count", [1, 3])
def test_pages_are_moved_to_stay_adjacent(count: int, window: int | None, page_size: int) -> None:
    """Pages move when a rolling buffer reaches the end of its pool or a sequence grows up to another one.

    A single sequence is always adjacent. Several are most of the time: enough pages may be free, but not adjacent.
    """
    c = cache(page_size, window)
    c.reserve(c.open(), 2 * page_size)  # another sequence's pages
    sequences = [c.open() for _ in range(count)]
    spans: list[bool] = []
    for _ in range(300):
        pages = write_positions(c, [(sequence, 1) for sequence in sequences])
        spans += [isinstance(span, tuple) for span in pages.spans]
    assert all(spans) if count == 1 else sum(spans) > len(spans) / 3
    for sequence in sequences:
        assert positions_held(c, sequence) == list(range(sequence.dropped, sequence.length))


def test_shared_pages_do_not_move() -> None:
    c = cache(pages=8)
    first = c.open()
    write_positions(c, [(first, 8)])
    second, other = c.fork(first), c.open()
    c.reserve(other, 4)
    write_positions(c, [(first, 1), (second, 1)])
    assert first.pages[:2] == second.pages[:2] == [0, 1]
    assert positions_held(c, first) == positions_held(c, second) == list(range(9))
    c.close(second)
    write_positions(c, [(first, 4)])
    assert first.pages == list(range(first.pages[0], first.pages[0] + 4))  # no longer shared, so they may move
    assert positions_held(c, first) == list(range(13))


def test_an_empty_cache_knows_the_size_of_a_sequence() -> None:
    pages = cache()
    expected = pages.bytes_for(9)
    pages.compact()
    assert pages.pages == 0
    assert pages.bytes_for(9) == expected

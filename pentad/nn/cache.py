"""The paged cache of keys and values.

Each layer has one pool of keys and one of values. A sequence has a block table: its pages in logical order. Keys are
stored after RoPE at their absolute positions, so a page can be shared by sequences with a common prefix, moved, and
dropped once no window reaches it. Dropping pages is Mistral 7B's rolling buffer (arXiv:2310.06825, section 2), page by
page: a sequence of T tokens stores at most min(T, window) keys, plus one page and the current chunk.

Legend: N tokens in the batch, P pages, S tokens per page, G key/value heads, D head dimension.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from pentad.errors import PentadError
from pentad.nn.batch import Batch, PagedKV, SequenceLayout


@dataclass(eq=False)
class CachedSequence:
    """One sequence of a `PagedCache`.

    Attributes:
        pages: ids of its pages, in logical order.
        length: number of tokens so far, including dropped ones; also the next token's position.
        dropped: number of tokens before ``pages[0]``, all outside every window; a multiple of the page size.
        rope_length: the length that RoPE is scaled for, fixed when the sequence is opened: cached keys are rotated.
    """

    rope_length: int = 0
    pages: list[int] = field(default_factory=list)
    length: int = 0
    dropped: int = 0

    @property
    def held(self) -> int:
        """The number of tokens in the sequence's pages."""
        return self.length - self.dropped


class PagedCache:
    """Keys and values of many sequences, in pages with reference counts.

    Pages are reserved before a step, so the step itself never allocates: ``batch`` reserves, the network runs, and
    ``advance`` keeps the new tokens (or fewer, if drafts were rejected).

    Args:
        layers: number of layers, each with its own pools.
        kv_heads, head_dim: G and D.
        page_size: S.
        pages: the initial P; the pools grow, by copying, when more are needed.
        window: the widest window of any layer, in tokens; None if a layer has no window.
        contiguous: keep the pages of a sequence contiguous if possible, by moving them.

    Attributes:
        max_pages: the pools don't grow beyond so many pages; infinite by default.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        page_size: int = 256,
        pages: int = 1,
        window: int | None = None,
        contiguous: bool = True,
    ) -> None:
        self.page_size = page_size
        self.window = window
        self.contiguous = contiguous
        self.max_pages = math.inf
        # On a CPU the pools take no memory until they are written: the system maps memory on first touch.
        self.keys = [
            torch.empty(pages * page_size, kv_heads, head_dim, dtype=dtype, device=device) for _ in range(layers)
        ]
        self.values = [torch.empty_like(k) for k in self.keys]
        self._counts = [0] * pages  # reference count of each page

    @property
    def nbytes(self) -> int:
        return sum(pool.nbytes for pool in (*self.keys, *self.values))

    @property
    def pages(self) -> int:
        """The number of pages."""
        return len(self._counts)

    @property
    def pages_in_use(self) -> int:
        """The number of pages that at least one sequence holds."""
        return len(self._counts) - self._counts.count(0)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all pools."""
        return self.page_size * sum(pool.itemsize * pool.shape[1:].numel() for pool in (*self.keys, *self.values))

    @property
    def free_pages(self) -> float:
        """The number of pages that sequences may still take."""
        return max(0, self.max_pages - self.pages_in_use)

    def pages_for(self, tokens: int) -> int:
        """The number of pages that a sequence of `tokens` tokens takes."""
        return self._pages_for(tokens if self.window is None else min(tokens, self.window + self.page_size))

    def bytes_for(self, tokens: int) -> int:
        """Bytes that a sequence of `tokens` tokens takes."""
        return self.pages_for(tokens) * self.page_bytes

    def held_bytes(self, *sequences: CachedSequence) -> int:
        """Bytes of the pages of some sequences; shared pages count once."""
        return len({page for sequence in sequences for page in sequence.pages}) * self.page_bytes

    def fix(self, pages: int) -> None:
        """Free all pages, and allocate pools of `pages` pages, which never grow."""
        self.max_pages = pages
        self._allocate(pages)

    def clear(self) -> None:
        """Free all pages, even if held, and allocate new pools, because a thread may still be growing the old ones."""
        self._allocate(len(self._counts))

    def _allocate(self, pages: int) -> None:
        self.keys = [pool.new_empty(pages * self.page_size, *pool.shape[1:]) for pool in self.keys]
        self.values = [torch.empty_like(pool) for pool in self.keys]
        self._counts = [0] * pages

    def compact(self, *sequences: CachedSequence) -> None:
        """Shrink the pools to the pages of `sequences`; all others must be closed."""
        pages = sorted({page for sequence in sequences for page in sequence.pages})
        for pools in (self.keys, self.values):
            for i, pool in enumerate(pools):
                pools[i] = pool.unflatten(0, (-1, self.page_size))[pages].flatten(0, 1)  # type: ignore[no-untyped-call]
        self._counts = [self._counts[page] for page in pages]
        numbers = {page: number for number, page in enumerate(pages)}
        for sequence in sequences:
            sequence.pages = [numbers[page] for page in sequence.pages]

    def open(self, rope_length: int = 0) -> CachedSequence:
        """A new, empty sequence."""
        return CachedSequence(rope_length)

    def fork(self, sequence: CachedSequence, length: int | None = None) -> CachedSequence:
        """A second sequence with the first `length` tokens of `sequence` (by default all), sharing its pages.

        Raises:
            PentadError: `can_truncate` is false for this length, or the sequence has fewer tokens.
        """
        length = sequence.length if length is None else length
        self._check_length(sequence, length)
        filled = sequence.pages[: self._pages_for(length - sequence.dropped)]  # without reserved pages
        for page in filled:
            self._counts[page] += 1
        return CachedSequence(sequence.rope_length, filled, length, sequence.dropped)

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def close(self, sequence: CachedSequence) -> None:
        """Release all pages."""
        self._release(sequence, slice(None))
        sequence.length = sequence.dropped = 0

    def can_truncate(self, sequence: CachedSequence, length: int) -> bool:
        """True if the sequence still holds all pages of the window that ends at `length` tokens."""
        return not sequence.dropped or sequence.dropped <= length - (self.window or 0) + 1

    def truncate(self, sequence: CachedSequence, length: int) -> None:
        """Drop all tokens from position `length` on.

        Raises:
            PentadError: `can_truncate` is false, or the sequence has fewer tokens.
        """
        self._check_length(sequence, length)
        sequence.length = length
        self._release(sequence, slice(self._pages_for(sequence.held), None))

    def _check_length(self, sequence: CachedSequence, length: int) -> None:
        if length > sequence.length:
            raise PentadError(f"can't go back to token {length} of a sequence that has {sequence.length}")
        if not self.can_truncate(sequence, length):
            raise PentadError(f"can't go back to token {length}: tokens before {sequence.dropped} have left the cache")

    def _next_is_shared(self, sequence: CachedSequence) -> bool:
        """True if the next token goes to a page that another sequence holds, too."""
        first = sequence.held // self.page_size
        return first < len(sequence.pages) and self._counts[sequence.pages[first]] > 1

    def missing_pages(self, sequence: CachedSequence, tokens: int) -> int:
        """The number of free pages that `reserve` takes."""
        missing = max(0, self._pages_for(sequence.held + tokens) - len(sequence.pages))
        return missing + (tokens > 0 and self._next_is_shared(sequence))

    def room(self, sequence: CachedSequence) -> float:
        """The number of tokens that `reserve` has pages for."""
        free = self.free_pages - self._next_is_shared(sequence)
        return max(0, (len(sequence.pages) + free) * self.page_size - sequence.held) if free >= 0 else 0

    def reserve(self, sequence: CachedSequence, tokens: int) -> None:
        """Reserve pages for `tokens` more tokens; copy the page of the first one if it is shared (copy on write).

        Raises:
            PentadError: the pools don't grow, and have too few free pages.
        """
        if tokens and self._next_is_shared(sequence):
            first = sequence.held // self.page_size
            shared, copied = sequence.pages[first], self._free(1)[0]
            self._copy([shared], [copied])
            self._counts[shared] -= 1
            self._counts[copied] = 1
            sequence.pages[first] = copied
        missing = self._pages_for(sequence.held + tokens) - len(sequence.pages)
        if missing > 0:
            self._extend(sequence, missing)

    def batch(self, work: Sequence[tuple[CachedSequence, int]]) -> Batch:
        """Reserve pages for the next `count` tokens of each (sequence, count), and return the batch of these tokens."""
        size = self.page_size
        slots: list[int] = []
        positions: list[int] = []
        for sequence, count in work:
            self.reserve(sequence, count)
            for position in range(sequence.length, sequence.length + count):
                page, offset = divmod(position - sequence.dropped, size)
                positions.append(position)
                slots.append(sequence.pages[page] * size + offset)
        device = self.keys[0].device
        kv = PagedKV(
            self.keys,
            self.values,
            size,
            tuple(tuple(s.pages[: self._pages_for(s.held + count)]) for s, count in work),
            tuple(s.held + count for s, count in work),
            torch.tensor(slots, dtype=torch.int64).to(device),
        )
        return Batch(
            SequenceLayout.of([count for _, count in work]),
            torch.tensor(positions, dtype=torch.int64).to(device),
            kv,
            tuple(s.rope_length for s, _ in work),
        )

    def advance(self, sequence: CachedSequence, tokens: int) -> None:
        """Keep the next `tokens` of the written tokens, and release pages that no window reaches any more."""
        sequence.length += tokens
        if self.window is not None:
            # The next query sees `window - 1` of the cached tokens: its own key is part of its window.
            count = max(0, sequence.held - (self.window - 1)) // self.page_size
            self._release(sequence, slice(count))
            sequence.dropped += count * self.page_size

    def _release(self, sequence: CachedSequence, pages: slice) -> None:
        for page in sequence.pages[pages]:
            self._counts[page] -= 1
        del sequence.pages[pages]

    def _extend(self, sequence: CachedSequence, count: int) -> None:
        """Add `count` pages to a sequence, contiguous if possible: torch's attention reads contiguous pages without a
        copy.

        If the sequence can't grow in place it is moved once, which costs as much as one step with scattered pages.
        Pages are scattered only if some are shared, or no free range holds all of them.
        """
        held, free = sequence.pages, self._free(count)
        contiguous = self._contiguous(held, count) if self.contiguous else None
        pages = held + free[:count] if contiguous is None else list(contiguous)
        if pages[: len(held)] != held:
            self._copy(held, pages[: len(held)])
        for page in held:
            self._counts[page] -= 1
        for page in pages:
            self._counts[page] += 1
        sequence.pages = pages

    def _contiguous(self, held: list[int], count: int) -> range | None:
        """A contiguous range for `held` and `count` more pages, in place if possible; None if there is none."""
        total = len(held) + count
        if held:
            here = range(held[0], held[0] + total)
            if held == list(here[: len(held)]) and self._counts[here.start + len(held) : here.stop] == [0] * count:
                return here
        if any(self._counts[page] > 1 for page in held):
            return None  # shared pages can't move
        movable, run = set(held), 0
        for page, holders in enumerate(self._counts):
            run = run + 1 if not holders or page in movable else 0
            if run == total:
                return range(page + 1 - total, page + 1)
        return None

    def _copy(self, old: list[int], new: list[int]) -> None:
        """Copy pages; old and new ones may overlap."""
        for pool in (*self.keys, *self.values):
            pages = pool.unflatten(0, (-1, self.page_size))  # type: ignore[no-untyped-call]
            pages[new] = pages[old]

    def _free(self, count: int) -> list[int]:
        """The free pages, at least `count`; the pools grow if necessary."""
        if self._counts.count(0) < count:
            if count > self.free_pages:
                raise PentadError(f"{count} pages are needed; of {self.max_pages} pages {self.free_pages} are free")
            self._grow(count)
        return [page for page, holders in enumerate(self._counts) if not holders]

    def _grow(self, count: int) -> None:
        """Add at least `count` pages, and at least half of the current number, so that the pools seldom grow."""
        more = int(min(max(count, len(self._counts) // 2), max(count, self.max_pages - self.pages)))
        for pools in (self.keys, self.values):
            for i, pool in enumerate(pools):
                pools[i] = pool.new_empty(len(pool) + more * self.page_size, *pool.shape[1:])
                pools[i][: len(pool)] = pool
        self._counts += [0] * more

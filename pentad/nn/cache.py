"""The paged cache of keys and values.

For each layer there is one pool of keys and one of values. A sequence owns a table of pages, in logical order; its keys
are stored after RoPE at their absolute positions, so a page can be shared by sequences that begin alike, moved, and
dropped once no window reaches it (the rolling buffer of Mistral 7B, arXiv:2310.06825, section 2, in units of pages: a
sequence of T tokens holds min(T, window + the chunk at hand + a page) of them).

Legend: N tokens in the batch, P pages, S tokens a page, G key/value heads, D numbers a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from pentad.errors import PentadError
from pentad.nn.batch import Batch, PagedKV, SequenceLayout


@dataclass(eq=False)
class CachedSequence:
    """One sequence's place in a `PagedCache`.

    Attributes:
        pages: ids of its pages, in logical order.
        length: tokens it has so far, dropped ones included; also the next token's position.
        dropped: tokens before ``pages[0]``, which are outside every window (a multiple of the page size).
        rope_length: the length its RoPE is scaled for, fixed when it is opened: cached keys can't be rotated anew.
    """

    rope_length: int = 0
    pages: list[int] = field(default_factory=list)
    length: int = 0
    dropped: int = 0

    @property
    def held(self) -> int:
        """Tokens that its pages hold."""
        return self.length - self.dropped


class PagedCache:
    """Keys and values of many sequences, in pages that are counted.

    Pages are reserved before a step, so the step itself never allocates: ``batch`` reserves, the network runs,
    ``advance`` says how many of the reserved tokens are kept (fewer than were run, where drafts were rejected).

    Args:
        layers: number of layers, each with a pool of its own.
        kv_heads, head_dim: G and D.
        page_size: S.
        pages: P to begin with; the pools grow (by copying) when more are needed.
        window: the widest window of any layer, in tokens, or None where a layer sees everything.
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
    ) -> None:
        self.page_size = page_size
        self.window = window
        # Memory that is not written yet costs nothing on a CPU: the system maps pages when they are touched.
        self.keys = [
            torch.empty(pages * page_size, kv_heads, head_dim, dtype=dtype, device=device) for _ in range(layers)
        ]
        self.values = [torch.empty_like(k) for k in self.keys]
        self._counts = [0] * pages  # how many sequences hold each page

    @property
    def nbytes(self) -> int:
        return sum(pool.nbytes for pool in (*self.keys, *self.values))

    def open(self, rope_length: int = 0) -> CachedSequence:
        """A new, empty sequence."""
        return CachedSequence(rope_length)

    def fork(self, sequence: CachedSequence) -> CachedSequence:
        """A second sequence that begins as `sequence` does, sharing its pages."""
        filled = sequence.pages[: self._pages_for(sequence.held)]  # not what is only reserved
        for page in filled:
            self._counts[page] += 1
        return CachedSequence(sequence.rope_length, filled, sequence.length, sequence.dropped)

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def close(self, sequence: CachedSequence) -> None:
        """Give all pages back."""
        self._release(sequence, slice(None))
        sequence.length = sequence.dropped = 0

    def can_truncate(self, sequence: CachedSequence, length: int) -> bool:
        """Whether a window that ends at `length` tokens reaches only tokens whose pages are still there."""
        return not sequence.dropped or sequence.dropped <= length - (self.window or 0) + 1

    def truncate(self, sequence: CachedSequence, length: int) -> None:
        """Forget all tokens from position `length` on.

        Raises:
            PentadError: `can_truncate` says no, or there are fewer tokens.
        """
        if length > sequence.length:
            raise PentadError(f"can't go back to token {length} of a sequence that has {sequence.length}")
        if not self.can_truncate(sequence, length):
            raise PentadError(f"can't go back to token {length}: tokens before {sequence.dropped} have left the cache")
        sequence.length = length
        self._release(sequence, slice(self._pages_for(sequence.held), None))

    def reserve(self, sequence: CachedSequence, tokens: int) -> None:
        """Make sure that `tokens` more fit, and that the page they begin in is this sequence's alone."""
        first = sequence.held // self.page_size  # index of the page that the next token goes to
        if first < len(sequence.pages) and self._counts[shared := sequence.pages[first]] > 1:
            own = self._free(1)[0]
            self._copy([shared], [own])
            self._counts[shared] -= 1
            self._counts[own] = 1
            sequence.pages[first] = own
        missing = self._pages_for(sequence.held + tokens) - len(sequence.pages)
        if missing > 0:
            self._extend(sequence, missing)

    def batch(self, work: Sequence[tuple[CachedSequence, int]]) -> Batch:
        """Reserve room for so many next tokens of some sequences, and lay them end to end."""
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
        """Keep `tokens` more of what was written, and take back pages that no window reaches any more."""
        sequence.length += tokens
        if self.window is not None:
            # Of the tokens that there are, the next query sees the last `window - 1`: its own key is one of its window.
            count = max(0, sequence.held - (self.window - 1)) // self.page_size
            self._release(sequence, slice(count))
            sequence.dropped += count * self.page_size

    def _release(self, sequence: CachedSequence, which: slice) -> None:
        for page in sequence.pages[which]:
            self._counts[page] -= 1
        del sequence.pages[which]

    def _extend(self, sequence: CachedSequence, count: int) -> None:
        """Give a sequence `count` pages more, so that all of them are neighbors, which attention reads without a copy.

        Where it can't grow in place it moves, which costs once what scattered pages cost in every step. They are
        scattered only where some are shared, or no place holds all of them.
        """
        held, free = sequence.pages, self._free(count)
        place = self._place(held, count)
        pages = held + free[:count] if place is None else list(place)
        if pages[: len(held)] != held:
            self._copy(held, pages[: len(held)])
        for page in held:
            self._counts[page] -= 1
        for page in pages:
            self._counts[page] += 1
        sequence.pages = pages

    def _place(self, held: list[int], count: int) -> range | None:
        """Neighboring pages, none of them another's, for `held` and `count` more: where `held` is now, if it can be."""
        total = len(held) + count
        if held:
            here = range(held[0], held[0] + total)
            if held == list(here[: len(held)]) and self._counts[here.start + len(held) : here.stop] == [0] * count:
                return here
        if any(self._counts[page] > 1 for page in held):
            return None  # what is shared stays where it is
        own, run = set(held), 0
        for page, holders in enumerate(self._counts):
            run = run + 1 if not holders or page in own else 0
            if run == total:
                return range(page + 1 - total, page + 1)
        return None

    def _copy(self, old: list[int], new: list[int]) -> None:
        """Copy pages, which may overlap."""
        for pool in (*self.keys, *self.values):
            pages = pool.unflatten(0, (-1, self.page_size))  # type: ignore[no-untyped-call]
            pages[new] = pages[old]

    def _free(self, count: int) -> list[int]:
        """The free pages, of which there are at least `count`."""
        if self._counts.count(0) < count:
            self._grow(count)
        return [page for page, holders in enumerate(self._counts) if not holders]

    def _grow(self, count: int) -> None:
        """Add at least `count` pages, and half as many as there are, so that growing stays rare."""
        more = max(count, len(self._counts) // 2)
        for pools in (self.keys, self.values):
            for i, pool in enumerate(pools):
                pools[i] = pool.new_empty(len(pool) + more * self.page_size, *pool.shape[1:])
                pools[i][: len(pool)] = pool
        self._counts += [0] * more

"""What a language model takes: rows of tokens, not rectangles.

Legend: N tokens in the batch, B sequences in it, P pages of S tokens in a cache, G key/value heads, D numbers a head.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class SequenceLayout:
    """Where sequences lie in rows laid end to end: sequence b has rows ``starts[b]:starts[b+1]``."""

    starts: tuple[int, ...]

    @classmethod
    def of(cls, lengths: Sequence[int]) -> SequenceLayout:
        return cls((0, *accumulate(lengths)))

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in pairwise(self.starts))

    def __len__(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """Each sequence's first row and number of rows."""
        return list(zip(self.starts, self.lengths, strict=False))

    def uniform(self) -> bool:
        """Whether all sequences have the same number of rows, so that they are a rectangle after all."""
        return len(set(self.lengths)) == 1

    def cu_seqlens(self, device: torch.device) -> Tensor:
        """``starts`` as int32 [B + 1] on `device`, as CUDA's kernels for ragged attention take them."""
        if device not in self._copies:
            self._copies[device] = torch.tensor(self.starts, dtype=torch.int32, device=device)
        return self._copies[device]

    @cached_property
    def _copies(self) -> dict[torch.device, Tensor]:
        return {}


@dataclass(frozen=True)
class PagedKV:
    """Where the keys and values of one batch are: what a `Batch` shows of a `PagedCache`.

    Attributes:
        keys, values: for each layer a pool [P * S, G, D].
        page_size: S.
        tables: for each sequence its pages, in logical order.
        lengths: for each sequence the tokens that its pages hold, this step's included.
        slots: int64 [N], the place of each of the batch's tokens in a pool.
    """

    keys: list[Tensor]
    values: list[Tensor]
    page_size: int
    tables: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]
    slots: Tensor

    def write(self, layer: int, k_NGD: Tensor, v_NGD: Tensor) -> tuple[Tensor, Tensor]:
        """Store the batch's own keys and values; returns the layer's pools."""
        k, v = self.keys[layer], self.values[layer]
        k.index_copy_(0, self.slots, k_NGD.to(k.dtype))
        v.index_copy_(0, self.slots, v_NGD.to(v.dtype))
        return k, v

    @cached_property
    def spans(self) -> list[tuple[int, int] | Tensor]:
        """Where each sequence's tokens are in a pool: first row and number of rows, which read without a copy, where
        its pages are neighbors; else int64 [tokens]."""
        return [self._span(table, length) for table, length in zip(self.tables, self.lengths, strict=True)]

    def _span(self, table: tuple[int, ...], length: int) -> tuple[int, int] | Tensor:
        if table == tuple(range(table[0], table[0] + len(table))):
            return table[0] * self.page_size, length
        pages = torch.tensor(table)[:, None] * self.page_size + torch.arange(self.page_size)
        return pages.flatten()[:length].to(self.slots.device)

    @cached_property
    def rows(self) -> SequenceLayout:
        """The tokens that the sequences' pages hold, as if they lay end to end."""
        return SequenceLayout.of(self.lengths)

    @cached_property
    def block_table(self) -> Tensor:
        """int32 [B, most pages a sequence] on the pools' device, as CUDA's kernels take it."""
        width = max(len(table) for table in self.tables)
        rows = [[*table, *[0] * (width - len(table))] for table in self.tables]
        return torch.tensor(rows, dtype=torch.int32).to(self.slots.device)

    @cached_property
    def used(self) -> Tensor:
        """`lengths` as int32 [B] on the pools' device."""
        return torch.tensor(self.lengths, dtype=torch.int32).to(self.slots.device)


@dataclass(frozen=True)
class EncodedSource:
    """What an encoder made of the source of each of a batch's sequences.

    Attributes:
        hidden_MD: [M, D], its hidden states.
        rows: which of the M rows are of which sequence's source.
    """

    hidden_MD: Tensor
    rows: SequenceLayout


@dataclass(frozen=True)
class Batch:
    """N tokens of any number of sequences, laid end to end; no padding, no batch axis, no mask.

    Training on packed documents, scoring, prefill (whole or in chunks), decoding of one or of many, and any mixture of
    these are all such batches.

    Attributes:
        ids: int64 [N], token ids.
        positions: int64 [N], each token's absolute position in its sequence.
        rows: which of the N rows belong to which sequence.
        pages: where in a paged cache the sequences' keys and values are; None where nothing is cached, and each
            sequence's rows see only each other.
        rope_lengths: [B], the length each sequence's RoPE is scaled for (only scalings that depend on length look).
        source: what an encoder-decoder's decoder looks at: the encoder's rows when training, pages that were written
            once and are only read when decoding.
    """

    ids: Tensor
    positions: Tensor
    rows: SequenceLayout
    pages: PagedKV | None = None
    rope_lengths: tuple[int, ...] = ()
    source: EncodedSource | PagedKV | None = None
    _memo: dict[Hashable, object] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, *sequences: Sequence[int], device: torch.device | str | None = None) -> Batch:
        """A batch of whole sequences without a cache, each from position 0."""
        rows = SequenceLayout.of([len(ids) for ids in sequences])
        ids = torch.tensor([i for ids in sequences for i in ids], dtype=torch.int64)
        positions = torch.tensor([p for ids in sequences for p in range(len(ids))], dtype=torch.int64)
        return cls(ids.to(device), positions.to(device), rows, None, rows.lengths)

    def memo(self, key: Hashable, make: Callable[[], T]) -> T:
        """What all layers need alike (RoPE's cosines) and only the first one computes."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]  # type: ignore[return-value]

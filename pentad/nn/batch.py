"""Ragged batches: the rows of any number of sequences, concatenated without padding.

Legend: N rows and B sequences in the batch, P pages of S tokens in the cache, G key/value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class SequenceLayout:
    """The assignment of rows to sequences: sequence b has rows ``cu_seqlens[b]:cu_seqlens[b+1]``.

    A layout made from lengths stores Python integers, for decoding. A layout made from a tensor stores the tensor, for
    training and `torch.compile`, and converts the tensor to Python integers on first use.

    Args:
        cu_seqlens: cumulative lengths, starting with 0: a tuple of B + 1 integers, or an int32 or int64 tensor [B + 1].
    """

    def __init__(self, cu_seqlens: tuple[int, ...] | Tensor) -> None:
        tensor = isinstance(cu_seqlens, Tensor)
        self._tensor: Tensor | None = cu_seqlens if tensor else None  # type: ignore[assignment]
        self._numbers: tuple[int, ...] | None = None if tensor else cu_seqlens  # type: ignore[assignment]

    @classmethod
    def of(cls, lengths: Sequence[int]) -> SequenceLayout:
        """The layout of sequences of these lengths."""
        return cls((0, *accumulate(lengths)))

    @property
    def cu_seqlens(self) -> tuple[int, ...]:
        """The B + 1 cumulative lengths as Python integers."""
        if self._numbers is None:
            assert self._tensor is not None
            self._numbers = tuple(self._tensor.tolist())
        return self._numbers

    def cu_seqlens_on(self, device: torch.device) -> Tensor:
        """The cumulative lengths as a tensor [B + 1] on `device`: int32 if made from lengths."""
        if self._tensor is None or self._tensor.device != device:
            self._tensor = torch.tensor(self.cu_seqlens, dtype=torch.int32, device=device)
        return self._tensor

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """The number of rows of each sequence."""
        return tuple(stop - start for start, stop in pairwise(self.cu_seqlens))

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """Each sequence's first row and number of rows."""
        return list(zip(self.cu_seqlens, self.lengths, strict=False))

    @cached_property
    def is_uniform(self) -> bool:
        """True if all sequences have the same length, so that the rows form a rectangle."""
        return len(set(self.lengths)) == 1

    def __len__(self) -> int:
        return len(self._numbers if self._tensor is None else self._tensor) - 1  # type: ignore[arg-type]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SequenceLayout) and self.cu_seqlens == other.cu_seqlens

    def __hash__(self) -> int:
        return hash(self.cu_seqlens)

    def __repr__(self) -> str:
        return f"SequenceLayout({self.cu_seqlens})"


@dataclass(frozen=True)
class PagedKV:
    """One batch's view of a `PagedCache`: the pools, and the rows that hold the batch's keys and values.

    Attributes:
        keys, values: each layer's pool [P * S, G, D].
        page_size: S.
        block_tables: each sequence's page ids, in logical order.
        lengths: the number of tokens in each sequence's pages, including this step's tokens.
        slot_mapping: int64 [N], the pool row of each token in the batch.
    """

    keys: list[Tensor]
    values: list[Tensor]
    page_size: int
    block_tables: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]
    slot_mapping: Tensor

    def write(self, layer: int, k_NGD: Tensor, v_NGD: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of the batch's tokens; returns the layer's pools."""
        k, v = self.keys[layer], self.values[layer]
        k.index_copy_(0, self.slot_mapping, k_NGD.to(k.dtype))
        v.index_copy_(0, self.slot_mapping, v_NGD.to(v.dtype))
        return k, v

    @cached_property
    def spans(self) -> list[tuple[int, int] | Tensor]:
        """The pool rows of each sequence's tokens.

        (first row, number of rows) if the pages are contiguous, so that no copy is needed; else int64 [tokens].
        """
        return [self._span(table, length) for table, length in zip(self.block_tables, self.lengths, strict=True)]

    def _span(self, block_table: tuple[int, ...], length: int) -> tuple[int, int] | Tensor:
        if block_table == tuple(range(block_table[0], block_table[0] + len(block_table))):
            return block_table[0] * self.page_size, length
        return self._rows(block_table, length).to(self.slot_mapping.device)

    def _rows(self, block_table: tuple[int, ...], length: int) -> Tensor:
        pages = torch.tensor(block_table)[:, None] * self.page_size + torch.arange(self.page_size)
        return pages.flatten()[:length]

    @cached_property
    def layout(self) -> SequenceLayout:
        """The layout of the cached tokens, as if concatenated."""
        return SequenceLayout.of(self.lengths)

    @cached_property
    def rows(self) -> Tensor:
        """The pool rows of all sequences' tokens, as int64 on the pools' device."""
        rows = [self._rows(table, length) for table, length in zip(self.block_tables, self.lengths, strict=True)]
        return torch.cat(rows).to(self.slot_mapping.device)

    @cached_property
    def padded_block_tables(self) -> Tensor:
        """int32 [B, max pages per sequence] on the pools' device, as CUDA kernels need it."""
        width = max(len(table) for table in self.block_tables)
        rows = [[*table, *[0] * (width - len(table))] for table in self.block_tables]
        return torch.tensor(rows, dtype=torch.int32).to(self.slot_mapping.device)

    @cached_property
    def seqused(self) -> Tensor:
        """`lengths` as int32 [B] on the pools' device."""
        return torch.tensor(self.lengths, dtype=torch.int32).to(self.slot_mapping.device)


@dataclass(frozen=True)
class Batch:
    """N rows of any number of sequences, concatenated; no padding, no batch axis, no mask.

    A batch can be packed training documents, texts to score, a prefill (whole or chunked), a decoding step, or any mix.
    The rows themselves (tokens, patches or latents) are a separate argument of the network. A batch stores no tensor
    that requires a gradient.

    Attributes:
        layout: the assignment of the N rows to sequences.
        positions: int64 [N], each row's absolute position in its sequence.
        kv: the sequences' keys and values in a paged cache. Without a cache (None) a row attends only to rows of its
            sequence in this batch.
        rope_lengths: the length that each sequence's RoPE is scaled for; used only by scalings that depend on the
            length. If empty, it is the sequence's length in this batch.
        context: for cross-attention, the layout of the context rows, or the pages that hold their keys and values.
        wanted: in the last block, the rows that are needed once all keys and values are written: their indices, and
            their batch. None for all rows.
    """

    layout: SequenceLayout
    positions: Tensor
    kv: PagedKV | None = None
    rope_lengths: tuple[int, ...] = ()
    context: SequenceLayout | PagedKV | None = None
    wanted: tuple[Tensor, Batch] | None = None
    _memo: dict[Hashable, object] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, *lengths: int, device: torch.device | str | None = None) -> Batch:
        """A batch of whole sequences of these lengths without a cache, each from position 0."""
        positions = torch.cat([torch.arange(length) for length in lengths]) if lengths else torch.arange(0)
        return cls(SequenceLayout.of(lengths), positions.to(device), rope_lengths=lengths)

    @classmethod
    def packed(cls, cu_seqlens: Tensor) -> Batch:
        """A batch of whole sequences without a cache, on the device of `cu_seqlens`, int32 or int64 [B + 1].

        For training: only the number of rows is read back from the device.
        """
        starts, lengths = cu_seqlens[:-1], cu_seqlens.diff()
        rows = torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
        positions = rows - starts.long().repeat_interleave(lengths, output_size=len(rows))
        return cls(SequenceLayout(cu_seqlens), positions)

    def want(self, rows: Sequence[int]) -> Batch:
        """This batch, which has a cache, with `wanted`: rows with ascending indices.

        In the batch of the wanted rows each run of consecutive rows is a sequence, with the tokens before it cached.
        """
        assert self.kv is not None
        sequence_of = [b for b, length in enumerate(self.layout.lengths) for _ in range(length)]
        lengths: list[int] = []
        ends: list[int] = []  # of each run: the row after it
        for row in rows:
            if ends and row == ends[-1] and sequence_of[row] == sequence_of[row - 1]:
                lengths[-1] += 1
                ends[-1] += 1
            else:
                lengths.append(1)
                ends.append(row + 1)
        owners = [sequence_of[end - 1] for end in ends]
        after = [self.layout.cu_seqlens[b + 1] - end for b, end in zip(owners, ends, strict=True)]
        at = torch.tensor(rows, dtype=torch.int64).to(self.positions.device)
        kv = replace(
            self.kv,
            block_tables=tuple(self.kv.block_tables[b] for b in owners),
            lengths=tuple(self.kv.lengths[b] - count for b, count in zip(owners, after, strict=True)),
            slot_mapping=self.kv.slot_mapping[at],
        )
        rope_lengths = tuple(self.rope_lengths[b] for b in owners)
        return replace(self, wanted=(at, Batch(SequenceLayout.of(lengths), self.positions[at], kv, rope_lengths)))

    def memo(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return a value that all layers share; the first layer makes it. (Inside `torch.compile` each layer makes it,
        and the compiler merges equal subexpressions.)"""
        if torch.compiler.is_compiling():
            return make()
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]  # type: ignore[return-value]


def pack(*sequences: Sequence[int], device: torch.device | str | None = None) -> tuple[Tensor, Batch]:
    """Concatenate whole sequences of token ids: int64 [N], and their batch, for ``network(*pack(ids))``."""
    ids = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int64)
    return ids.to(device), Batch.of(*map(len, sequences), device=device)

"""What a network computes on: rows of any number of sequences laid end to end, not rectangles.

Legend: N rows in the batch, B sequences in it, P pages of S tokens in a cache, G key/value heads, D numbers a head.
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


class SequenceLayout:
    """Which rows belong to which sequence: sequence b has rows ``cu_seqlens[b]:cu_seqlens[b+1]``.

    A layout made from lengths keeps Python numbers, as decoding needs them. One made from a tensor keeps the tensor,
    as training and `torch.compile` need it, and makes Python numbers of it when they are first asked for.

    Args:
        cu_seqlens: int32 or int64 [B + 1], from 0; as a tuple or a tensor.
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
        """The B + 1 bounds as Python numbers."""
        if self._numbers is None:
            assert self._tensor is not None
            self._numbers = tuple(self._tensor.tolist())
        return self._numbers

    def cu_seqlens_on(self, device: torch.device) -> Tensor:
        """The B + 1 bounds as a tensor on `device`: int32 if made from lengths."""
        if self._tensor is None or self._tensor.device != device:
            self._tensor = torch.tensor(self.cu_seqlens, dtype=torch.int32, device=device)
        return self._tensor

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """How many rows each sequence has."""
        return tuple(stop - start for start, stop in pairwise(self.cu_seqlens))

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """Each sequence's first row and number of rows."""
        return list(zip(self.cu_seqlens, self.lengths, strict=False))

    @cached_property
    def is_uniform(self) -> bool:
        """Whether all sequences have the same length, so that the rows form a rectangle."""
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
    """Where the keys and values of one batch are: a batch's view of a `PagedCache`.

    Attributes:
        keys, values: for each layer a pool [P * S, G, D].
        page_size: S.
        block_tables: for each sequence its pages, in logical order.
        lengths: for each sequence the tokens that its pages hold, this step's included.
        slot_mapping: int64 [N], the place of each of the batch's tokens in a pool.
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
        """Where each sequence's tokens are in a pool.

        For contiguous pages the first row and the number of rows, which are read without a copy; else int64 [tokens].
        """
        return [self._span(table, length) for table, length in zip(self.block_tables, self.lengths, strict=True)]

    def _span(self, block_table: tuple[int, ...], length: int) -> tuple[int, int] | Tensor:
        if block_table == tuple(range(block_table[0], block_table[0] + len(block_table))):
            return block_table[0] * self.page_size, length
        pages = torch.tensor(block_table)[:, None] * self.page_size + torch.arange(self.page_size)
        return pages.flatten()[:length].to(self.slot_mapping.device)

    @cached_property
    def layout(self) -> SequenceLayout:
        """The layout of the cached tokens if they were laid end to end."""
        return SequenceLayout.of(self.lengths)

    @cached_property
    def padded_block_tables(self) -> Tensor:
        """int32 [B, most pages of a sequence] on the pools' device, as CUDA's kernels need it."""
        width = max(len(table) for table in self.block_tables)
        rows = [[*table, *[0] * (width - len(table))] for table in self.block_tables]
        return torch.tensor(rows, dtype=torch.int32).to(self.slot_mapping.device)

    @cached_property
    def seqused(self) -> Tensor:
        """`lengths` as int32 [B] on the pools' device."""
        return torch.tensor(self.lengths, dtype=torch.int32).to(self.slot_mapping.device)


@dataclass(frozen=True)
class Batch:
    """N rows of any number of sequences, laid end to end; no padding, no batch axis, no mask.

    Training on packed documents, scoring, prefill (whole or in chunks), decoding one sequence or many, and any mixture
    of these are all such batches. The rows are tokens, patches or latents: the network takes them beside the batch.
    Nothing that carries a gradient is kept here.

    Attributes:
        layout: which of the N rows belong to which sequence.
        positions: int64 [N], each row's absolute position in its sequence.
        kv: the sequences' keys and values in a paged cache; None if nothing is cached, and each sequence's rows attend
            only to each other.
        rope_lengths: [B], the length that each sequence's RoPE is scaled for; only scalings that depend on the length
            read it. Empty: the sequence's own length.
        context: for cross-attention: the layout of the rows that are attended to, or the pages that hold their keys and
            values.
    """

    layout: SequenceLayout
    positions: Tensor
    kv: PagedKV | None = None
    rope_lengths: tuple[int, ...] = ()
    context: SequenceLayout | PagedKV | None = None
    _memo: dict[Hashable, object] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, *lengths: int, device: torch.device | str | None = None) -> Batch:
        """A batch of whole sequences of these lengths without a cache, each from position 0."""
        positions = torch.cat([torch.arange(length) for length in lengths]) if lengths else torch.arange(0)
        return cls(SequenceLayout.of(lengths), positions.to(device), rope_lengths=lengths)

    @classmethod
    def packed(cls, cu_seqlens: Tensor) -> Batch:
        """A batch of whole sequences without a cache, from their bounds int32 or int64 [B + 1], on their device.

        For training: no Python number is made of the tensor but the number of rows.
        """
        starts, lengths = cu_seqlens[:-1], cu_seqlens.diff()
        rows = torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
        positions = rows - starts.long().repeat_interleave(lengths, output_size=len(rows))
        return cls(SequenceLayout(cu_seqlens), positions)

    def memo(self, key: Hashable, make: Callable[[], T]) -> T:
        """What all layers share, made by the first one. (Inside `torch.compile` each layer makes it, and the compiler
        merges equal subexpressions.)"""
        if torch.compiler.is_compiling():
            return make()
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]  # type: ignore[return-value]


def pack(*sequences: Sequence[int], device: torch.device | str | None = None) -> tuple[Tensor, Batch]:
    """Lay whole sequences of token ids end to end: int64 [N], and their batch, for ``network(*pack(ids))``."""
    ids = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int64)
    return ids.to(device), Batch.of(*map(len, sequences), device=device)

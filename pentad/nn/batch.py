"""What a language model takes: rows of tokens, not rectangles.

Legend: N tokens in the batch, B sequences in it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pentad.nn.cache import Pages

T = TypeVar("T")


@dataclass(frozen=True)
class Rows:
    """Where sequences lie in rows laid end to end: sequence b has rows ``starts[b]:starts[b+1]``."""

    starts: tuple[int, ...]

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Rows:
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
    """

    ids: Tensor
    positions: Tensor
    rows: Rows
    pages: Pages | None = None
    rope_lengths: tuple[int, ...] = ()
    _shared: dict[Hashable, object] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, *sequences: Sequence[int], device: torch.device | str | None = None) -> Batch:
        """A batch of whole sequences without a cache, each from position 0."""
        rows = Rows.of([len(ids) for ids in sequences])
        ids = torch.tensor([i for ids in sequences for i in ids], dtype=torch.int64)
        positions = torch.tensor([p for ids in sequences for p in range(len(ids))], dtype=torch.int64)
        return cls(ids.to(device), positions.to(device), rows, None, rows.lengths)

    def shared(self, key: Hashable, make: Callable[[], T]) -> T:
        """What all layers need alike (RoPE's cosines, CUDA's page tables) and only the first one computes."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]  # type: ignore[return-value]

"""Micro-batches: the sequences of one forward pass, laid end to end without padding.

Legend: N tokens, B sequences, M target rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pentad.nn.batch import Batch


@dataclass(frozen=True)
class TokenBatch:
    """Sequences of tokens to learn from.

    Attributes:
        ids_N: int64, the token ids.
        batch: the layout of the sequences.
        rows_M: int64, the rows whose next token is a target.
        targets_M: int64, these next tokens.
        targets_per_sequence: the number of targets of each sequence, as rows of `rows_M` in order.
        examples: (source, number) of each example in the batch.
    """

    ids_N: Tensor
    batch: Batch
    rows_M: Tensor
    targets_M: Tensor
    targets_per_sequence: tuple[int, ...]
    examples: tuple[tuple[int, int], ...] = ()

    def sequence_sums(self, values_M: Tensor) -> Tensor:
        """Sum values of target rows by sequence: [B]."""
        return torch.stack([part.sum() for part in torch.split(values_M, list(self.targets_per_sequence))])


def collate(
    sequences: Sequence[tuple[np.ndarray, np.ndarray]],
    examples: Sequence[tuple[int, int]] = (),
    device: torch.device | str = "cpu",
) -> TokenBatch:
    """Concatenate sequences of (ids, targets); a sequence's first token is never a target."""
    lengths = [len(ids) for ids, _ in sequences]
    ids_N = torch.from_numpy(np.concatenate([ids for ids, _ in sequences]).astype(np.int64))
    is_target = np.concatenate([np.concatenate([targets[1:], [0]]) for _, targets in sequences]).astype(bool)
    rows_M = torch.from_numpy(np.flatnonzero(is_target))
    counts = tuple(int(np.count_nonzero(targets[1:])) for _, targets in sequences)
    batch = Batch.of(*lengths, device=device)
    targets_M = ids_N[rows_M + 1]
    return TokenBatch(ids_N.to(device), batch, rows_M.to(device), targets_M.to(device), counts, tuple(examples))

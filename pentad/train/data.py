"""The micro-batches of each step: a function of (seed, step), and the same rows on any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from pentad.datasets.batches import TokenBatch, collate
from pentad.datasets.order import Order, best_fit
from pentad.datasets.store import Examples


@dataclass(frozen=True)
class TokenData:
    """Batches of one or several stores of examples.

    Attributes:
        stores: the sources.
        weights: the share of each source, or None to draw from all as from one.
        batch_size: sequences (or pairs) a step, over all processes.
        seed: seed of the order.
        micro_batch_tokens: the most tokens of a micro-batch; a longer example goes alone.
        bin_size: pack examples into bins of this many tokens (for pairs: twice as many), which then count as sequences;
            None for no packing.
        rank, world: this process, and the number of processes.
        device: where batches go.
    """

    stores: Sequence[Examples]
    weights: Sequence[float] | None
    batch_size: int
    seed: int
    micro_batch_tokens: int
    bin_size: int | None = None
    rank: int = 0
    world: int = 1
    device: torch.device | str = "cpu"
    _units: list[Sequence[Sequence[int]]] = field(init=False, repr=False)
    _order: Order = field(init=False, repr=False)

    def __post_init__(self) -> None:
        units: list[Sequence[Sequence[int]]] = [
            [(number,) for number in range(len(store))]
            if self.bin_size is None
            else best_fit(store.lengths.tolist(), self.bin_size * store.sequences)
            for store in self.stores
        ]
        object.__setattr__(self, "_units", units)
        object.__setattr__(self, "_order", Order([len(source) for source in units], self.weights, self.seed))

    @property
    def units(self) -> int:
        """The number of sequences of an epoch."""
        return sum(map(len, self._units))

    def examples(self, step: int) -> list[tuple[int, int]]:
        """This process's (source, number) of a step's examples."""
        found = []
        for position in range(self.rank, self.batch_size, self.world):
            source, unit = self._order[step * self.batch_size + position]
            found += [(source, number) for number in self._units[source][unit]]
        return found

    def step(self, step: int) -> list[TokenBatch]:
        """This process's micro-batches of a step."""
        groups: list[list[tuple[int, int]]] = []
        room = 0
        for source, number in self.examples(step):
            length = int(self.stores[source].lengths[number])
            if not groups or length > room:
                groups.append([])
                room = self.micro_batch_tokens
            groups[-1].append((source, number))
            room -= length
        return [self._batch(group) for group in groups]

    def _batch(self, group: Sequence[tuple[int, int]]) -> TokenBatch:
        sequences = [sequence for source, number in group for sequence in self.stores[source][number]]
        return collate(sequences, group, self.device)

    def tokens(self, batch: TokenBatch) -> int:
        """The tokens of a micro-batch."""
        return len(batch.ids_N)

    def describe(self, batch: TokenBatch) -> str:
        """The files and lines of a micro-batch."""
        return ", ".join(self.stores[source].location(number) for source, number in batch.examples)

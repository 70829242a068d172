"""The micro-batches of each step: a function of (seed, step), and the same rows on any number of processes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from pentad.datasets.batches import TokenBatch, collate
from pentad.datasets.order import Order, best_fit
from pentad.datasets.store import Examples


@dataclass(frozen=True)
class Stage:
    """A part of the run with its own data.

    Attributes:
        stores: the sources.
        weights: the share of each source, or None to draw from all as from one.
        steps: its length.
    """

    stores: Sequence[Examples]
    weights: Sequence[float] | None
    steps: int


@dataclass(frozen=True)
class TokenData:
    """Batches of examples, stage after stage; the last stage doesn't end.

    Attributes:
        stages: at least one.
        batch_size: sequences (or pairs) a step, over all processes.
        seed: seed of the order.
        micro_batch_tokens: the most tokens of a micro-batch; a longer example goes alone.
        bin_size: pack examples into bins of this many tokens (for pairs: twice as many), which then count as sequences;
            None for no packing.
        rank, world: this process, and the number of processes.
        device: where batches go.
    """

    stages: Sequence[Stage]
    batch_size: int
    seed: int
    micro_batch_tokens: int
    bin_size: int | None = None
    rank: int = 0
    world: int = 1
    device: torch.device | str = "cpu"
    stores: list[Examples] = field(init=False, repr=False)
    _units: list[Sequence[Sequence[int]]] = field(init=False, repr=False)
    _orders: list[Order] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        stores = [store for stage in self.stages for store in stage.stores]
        units: list[Sequence[Sequence[int]]] = [
            [(number,) for number in range(len(store))]
            if self.bin_size is None
            else best_fit(store.lengths.tolist(), self.bin_size * store.sequences)
            for store in stores
        ]
        orders, sizes = [], iter(map(len, units))
        for number, stage in enumerate(self.stages):
            seed = self.seed if number == 0 else hash((self.seed, number)) & (2**63 - 1)
            orders.append(Order([next(sizes) for _ in stage.stores], stage.weights, seed))
        for name, value in (("stores", stores), ("_units", units), ("_orders", orders)):
            object.__setattr__(self, name, value)

    @property
    def units(self) -> int:
        """The number of sequences of an epoch of all stages."""
        return sum(map(len, self._units))

    def examples(self, step: int) -> list[tuple[int, int]]:
        """This process's (source, number) of a step's examples."""
        starts = list(accumulate((stage.steps for stage in self.stages[:-1]), initial=0))
        number = bisect_right(starts, step) - 1
        before = sum(len(stage.stores) for stage in self.stages[:number])
        found = []
        for position in range(self.rank, self.batch_size, self.world):
            source, unit = self._orders[number][(step - starts[number]) * self.batch_size + position]
            found += [(before + source, example) for example in self._units[before + source][unit]]
        return found

    def groups(self, step: int) -> list[list[tuple[int, int]]]:
        """The examples of each of this process's micro-batches of a step."""
        groups: list[list[tuple[int, int]]] = []
        room = 0
        for source, number in self.examples(step):
            length = int(self.stores[source].lengths[number])
            if not groups or length > room:
                groups.append([])
                room = self.micro_batch_tokens
            groups[-1].append((source, number))
            room -= length
        return groups

    def length(self, group: Sequence[tuple[int, int]]) -> int:
        """The tokens of a micro-batch, from the examples' lengths alone."""
        return sum(int(self.stores[source].lengths[number]) for source, number in group)

    def step(self, step: int) -> list[TokenBatch]:
        """This process's micro-batches of a step."""
        return [self._batch(group) for group in self.groups(step)]

    def _batch(self, group: Sequence[tuple[int, int]]) -> TokenBatch:
        sequences = [sequence for source, number in group for sequence in self.stores[source][number]]
        return collate(sequences, group, self.device)

    def tokens(self, batch: TokenBatch) -> int:
        """The tokens of a micro-batch."""
        return len(batch.ids_N)

    def rows(self, batch: TokenBatch) -> list[str]:
        """The files and lines of a micro-batch."""
        return [self.stores[source].location(number) for source, number in batch.examples]

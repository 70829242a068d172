"""Which examples a training step sees: pure functions of (seed, step), for any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

BLOCK = 1024  # positions over which a mixture's weights hold


class Order:
    """The order of one or several sources.

    Args:
        sizes: the number of units (examples or bins) of each source.
        weights: the share of each source; by default in proportion to `sizes`, which makes them one source.
        seed: the run's seed.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None, seed: int) -> None:
        self.sizes, self.seed = list(sizes), seed
        self.weights = None if weights is None else np.array(weights, float) / sum(weights)

    def __getitem__(self, position: int) -> tuple[int, int]:
        """The source and the unit at a position of the endless sequence of epochs."""
        if self.weights is None:
            number = self._unit(len(self.sizes), sum(self.sizes), position)
            bounds = np.cumsum(self.sizes)
            source = int(np.searchsorted(bounds, number, side="right"))
            return source, number - int(bounds[source] - self.sizes[source])
        block, at = divmod(position, BLOCK)
        sources, before = self._block(block)
        source = int(sources[at])
        drawn = int(before[source] + np.count_nonzero(sources[:at] == source))
        return source, self._unit(source, self.sizes[source], drawn)

    def _unit(self, source: int, size: int, position: int) -> int:
        epoch, index = divmod(position, size)
        return int(_permutation(self.seed, source, epoch, size)[index])

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The sources at a block's positions, and how often each was drawn before the block."""
        assert self.weights is not None
        edges = np.concatenate([[0.0], np.cumsum(self.weights)])
        edges[-1] = 1.0
        # Exact shares: source i holds the positions between rounded cumulative counts.
        before, after = (np.diff(np.round(edges * n * BLOCK)).astype(int) for n in (block, block + 1))
        counts = after - before
        while (counts < 0).any() or counts.sum() != BLOCK:  # rounding moved a position over an edge
            counts = np.maximum(counts, 0)
            counts[int(np.argmax(counts))] += BLOCK - counts.sum()
        sources = np.repeat(np.arange(len(counts)), counts)
        np.random.default_rng([self.seed, len(self.sizes), block]).shuffle(sources)
        return sources, before


@lru_cache(maxsize=8)
def _permutation(seed: int, source: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, source, epoch]).permutation(size)


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Pack items into bins of `size` by best-fit decreasing (arXiv:2404.10830); no item is cut.

    Args:
        lengths: the items' lengths, at most `size`.
        size: capacity of a bin.

    Returns:
        Each bin's items, by index.
    """
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(size + 1)]  # free tokens -> bins
    rooms = 0  # bit r is set if a bin has r free tokens
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[item]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            number = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, number = size, len(bins)
            bins.append([])
        bins[number].append(item)
        with_room[room - length].append(number)
        rooms |= 1 << (room - length)
    return bins

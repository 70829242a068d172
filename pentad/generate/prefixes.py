"""Kept prefixes: finished sequences stay in the cache, and new requests share their pages."""

from collections.abc import ItemsView, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pentad.generate.step import Step
from pentad.nn.cache import CachedSequence

Key = NDArray[np.int32]
"""The tokens of a sequence, after its source if it has one; see `Request.key`."""


class Prefix(NamedTuple):
    """The beginning of a sequence, which another sequence can share.

    Attributes:
        sequence: the sequence.
        tokens: the number of its first tokens that are shared.
    """

    sequence: CachedSequence
    tokens: int


class PrefixStore:
    """Finished sequences, the least recently used first.

    Args:
        step: the executor; its cache has the sequences' pages.
    """

    def __init__(self, step: Step) -> None:
        self._step = step
        self._kept: dict[CachedSequence, Key] = {}

    def items(self) -> ItemsView[CachedSequence, Key]:
        return self._kept.items()

    def __len__(self) -> int:
        return len(self._kept)

    def pages(self) -> set[int]:
        """The pages of all kept sequences."""
        return {page for sequence in self._kept for page in sequence.pages}

    @property
    def nbytes(self) -> int:
        """Bytes of the pages of all kept sequences."""
        return self._step.cache.held_bytes(*self._kept)

    def add(self, key: Key, sequence: CachedSequence) -> None:
        """Keep a sequence, unless a kept one begins with all its tokens; it replaces those that it begins with."""
        cache = self._step.cache
        cache.truncate(sequence, sequence.length)  # releases reserved pages
        for other, other_key in list(self._kept.items()):
            if self._covers(other, other_key, sequence, key):
                cache.close(sequence)
                self._kept[other] = self._kept.pop(other)
                return
            if self._covers(sequence, key, other, other_key):
                cache.close(other)
                del self._kept[other]
        self._kept[sequence] = key

    def _covers(self, longer: CachedSequence, longer_key: Key, shorter: CachedSequence, shorter_key: Key) -> bool:
        """True if a sequence can be truncated to another one."""
        scaling_key, cache = self._step.rope_scaling_key, self._step.cache
        return (
            len(shorter_key) <= len(longer_key)
            and np.array_equal(longer_key[: len(shorter_key)], shorter_key)
            and scaling_key(longer.rope_length) == scaling_key(shorter.rope_length)
            and cache.can_truncate(longer, shorter.length)
        )

    def share(self, prefix: Prefix) -> CachedSequence:
        """A sequence that begins with a prefix of a kept or of a running one."""
        sequence, tokens = prefix
        if sequence in self._kept:
            key = self._kept.pop(sequence)
            if tokens == sequence.length:
                return sequence
            self._kept[sequence] = key
        return self._step.cache.fork(sequence, tokens)

    def evict(self) -> bool:
        """Release the last page of the least recently used sequence; return False if nothing is kept."""
        if not self._kept:
            return False
        cache, (sequence, key) = self._step.cache, next(iter(self._kept.items()))
        length = sequence.dropped + (len(sequence.pages) - 1) * cache.page_size
        if len(sequence.pages) > 1 and cache.can_truncate(sequence, length):
            self._kept[sequence] = key[: len(key) - (sequence.length - length)]
            cache.truncate(sequence, length)
        else:
            cache.close(sequence)
            del self._kept[sequence]
        return True

    def clear(self) -> None:
        """Release all pages."""
        for sequence in self._kept:
            self._step.cache.close(sequence)
        self._kept.clear()


def common_length(one: Key, other: Key) -> int:
    """The length of the longest common prefix."""
    size = min(len(one), len(other))
    differ = one[:size] != other[:size]
    return int(differ.argmax()) if differ.any() else size


def key_of(key: Key, generated: Sequence[int]) -> Key:
    """A request's key with its generated tokens."""
    return np.concatenate((key, np.array(generated, dtype=np.int32))) if generated else key

"""How a server's memory is divided among its models."""

from collections.abc import Sequence
from typing import NamedTuple

from pentad.errors import BadInput

PROCESS_BYTES = 400 << 20  # Python, torch and pentad in a worker
MIN_CACHE_BYTES = 128 << 20


class Size(NamedTuple):
    """What a model needs, by its headers.

    Attributes:
        weights: bytes of the weights in memory, quantized as the options say.
        page: bytes of a page of its KV cache; of a vision model, what it needs to run.
        page_tokens: the number of tokens of a page; 0 for a vision model.
    """

    weights: int
    page: int
    page_tokens: int


class Share(NamedTuple):
    """The memory of one model in bytes.

    Attributes:
        weights: its weights.
        cache: its KV cache.
        cache_tokens: the number of tokens that the cache has room for.
    """

    weights: int
    cache: int
    cache_tokens: int

    @property
    def total(self) -> int:
        """The sum, with the worker's process."""
        return self.weights + self.cache + PROCESS_BYTES


def shares(names: Sequence[str], sizes: Sequence[Size], memory: int) -> list[Share]:
    """Divide `memory` equally; a model that needs more than its share takes more, and then they take turns.

    Raises:
        BadInput: a model doesn't fit at all.
    """
    found = []
    for name, (weights, page, page_tokens) in zip(names, sizes, strict=True):
        fixed = weights + PROCESS_BYTES
        total = max(memory // len(names) if page_tokens else 0, fixed + max(MIN_CACHE_BYTES, page))
        if total > memory:
            needed = f"needs {total / 1e9:.1f} GB of memory at least"
            raise BadInput(f"{name} {needed}, and {memory / 1e9:.1f} GB are for models; see --memory")
        pages = (total - fixed) // page
        found.append(Share(weights, pages * page, pages * page_tokens))
    return found

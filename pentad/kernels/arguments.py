"""The arguments of a step: tokens, the pools and pages of their keys and values, and RoPE tables."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pentad.kernels.binding import Type, limit
from pentad.kernels.weight import FLOATS

CACHE_TYPES = {**FLOATS, torch.int8: Type.I8}
"""The types of a KV cache."""


def pool_dim(head_dim: int, dtype: torch.dtype) -> int:
    """Elements per token and head in the cache: head_dim rounded up to a multiple of 16; int8 adds a 4-byte scale."""
    lanes = limit("LANES")
    return -(-head_dim // lanes) * lanes + (4 if dtype == torch.int8 else 0)


@dataclass
class CachePools:
    """The memory of a KV cache: for each layer a pool [pages * page_size, kv_heads, pool_dim(…)].

    attention.h defines the order of the numbers within a page.
    """

    keys: list[Tensor]
    values: list[Tensor]
    page_size: int

    def check(self, layers: int, kv_heads: int, head_dim: int) -> None:
        """Raise ValueError if these pools don't fit a program's shapes or each other."""
        if len(self.keys) != layers or len(self.values) != layers:
            raise ValueError(f"{len(self.keys)} pools of keys and {len(self.values)} of values; expected {layers} each")
        first = self.keys[0]
        for pool in (*self.keys, *self.values):
            if pool.shape != first.shape or pool.dtype != first.dtype or not pool.is_contiguous():
                raise ValueError("the pools differ in shape or dtype, or are not contiguous")
        shape = kv_heads, pool_dim(head_dim, first.dtype)
        if first.shape[1:] != shape or first.dtype not in CACHE_TYPES or first.device.type != "cpu":
            raise ValueError(
                f"a pool is {first.dtype} {tuple(first.shape)} on {first.device}; expected (…, {shape}) on cpu"
            )


@dataclass(slots=True)
class Tokens:
    """The next tokens of one sequence.

    Attributes:
        ids: the token ids.
        past: the number of tokens before them in the sequence.
        dropped: the number of past tokens that are no longer in the cache, a multiple of the page size.
        pages: the pages of the other past tokens and of the new ones.
        rotation: float32 [positions, 2, rotary_dim / 2], the cosines and sines of every position.
    """

    ids: Sequence[int]
    past: int
    dropped: int
    pages: Sequence[int]
    rotation: Tensor

    @property
    def length(self) -> int:
        return self.past + len(self.ids)

    def check(self, page_size: int, pool_pages: int) -> None:
        """Raise ValueError if the pages don't fit the tokens or the pool, or the rotation is too short.

        Args:
            page_size: tokens per page.
            pool_pages: pages in the pool.
        """
        if not 0 <= self.dropped <= self.past or self.dropped % page_size:
            raise ValueError(f"dropped is {self.dropped} of {self.past} tokens; expected whole pages of {page_size}")
        if len(self.pages) * page_size < self.length - self.dropped:
            raise ValueError(f"{len(self.pages)} pages of {page_size} can't hold {self.length - self.dropped} tokens")
        if self.pages and not 0 <= min(self.pages) <= max(self.pages) < pool_pages:
            raise ValueError(f"pages are {min(self.pages)} to {max(self.pages)}; expected 0 to {pool_pages - 1}")
        if self.rotation.shape[0] < self.length:
            raise ValueError(f"the rotation is {tuple(self.rotation.shape)}; expected at least {self.length} positions")


def narrowed(work: Sequence[Tokens], rows: Sequence[int]) -> list[Tokens]:
    """Only these rows of a step, ascending indices into its tokens. Each run of consecutive tokens becomes a sequence,
    with the tokens before it in the cache."""
    kept: list[Tokens] = []
    every = [(tokens, at) for tokens in work for at in range(len(tokens.ids))]
    for previous, row in zip([-2, *rows], rows, strict=False):
        tokens, at = every[row]
        if row == previous + 1 and at:
            kept[-1].ids = [*kept[-1].ids, tokens.ids[at]]
        else:
            kept.append(replace(tokens, ids=[tokens.ids[at]], past=tokens.past + at))
    return kept


def check_rotation(table: Tensor, rotary_dim: int) -> None:
    """Raise ValueError if a RoPE table has the wrong width, dtype, device or strides."""
    if table.shape[1:] != (2, rotary_dim // 2):
        raise ValueError(f"the rotation is {tuple(table.shape)}; expected (…, 2, {rotary_dim // 2})")
    if table.dtype != torch.float32 or table.device.type != "cpu" or not table.is_contiguous():
        raise ValueError(f"the rotation is {table.dtype} on {table.device}; expected contiguous float32 on cpu")

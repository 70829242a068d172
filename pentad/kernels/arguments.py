"""What a step is given: tokens, where their keys and values are, and by what they are rotated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pentad.kernels.weight import FLOATS

CACHE_TYPES = {**FLOATS, torch.int8: "i8"}
"""What keys and values may be kept in."""


def pool_dim(head_dim: int, dtype: torch.dtype) -> int:
    """Numbers of a token and head in the cache: rounded up to a multiple of 16; in int8 four more bytes, a scale."""
    return -(-head_dim // 16) * 16 + (4 if dtype == torch.int8 else 0)


@dataclass
class CachePools:
    """Memory for keys and values: for each layer a pool [pages * page_size, kv_heads, pool_dim(…)].

    Within a page the kernels have an order of their own (attention.h).
    """

    keys: list[Tensor]
    values: list[Tensor]
    page_size: int

    def check(self, layers: int, kv_heads: int, head_dim: int) -> None:
        """Raise ValueError where these pools don't fit a program's shapes, or each other."""
        if len(self.keys) != layers or len(self.values) != layers:
            raise ValueError(f"{len(self.keys)} pools of keys for {layers} layers")
        first = self.keys[0]
        for pool in (*self.keys, *self.values):
            if pool.shape != first.shape or pool.dtype != first.dtype or not pool.is_contiguous():
                raise ValueError("the pools differ, or are not contiguous")
        shape = kv_heads, pool_dim(head_dim, first.dtype)
        if first.shape[1:] != shape or first.dtype not in CACHE_TYPES or first.device.type != "cpu":
            raise ValueError(f"a pool of {first.dtype} {tuple(first.shape)}")


@dataclass(slots=True)
class Tokens:
    """The next tokens of one sequence.

    Attributes:
        ids: the tokens.
        past: how many tokens the sequence has before them.
        dropped: how many of those are no longer in the cache, a multiple of the page size.
        pages: where the others are, and these will be.
        rotation: float32 [positions, 2, rotary_dim / 2], cosines and sines for every position.
    """

    ids: Sequence[int]
    past: int
    dropped: int
    pages: Sequence[int]
    rotation: Tensor

    @property
    def length(self) -> int:
        return self.past + len(self.ids)

    def check(self, page_size: int, pool_pages: int, ahead: int) -> None:
        """Raise ValueError where these pages don't do, or the rotation is too short.

        Args:
            page_size, pool_pages: tokens of a page, pages of the pool.
            ahead: positions that queries may be ahead by.
        """
        if not 0 <= self.dropped <= self.past or self.dropped % page_size:
            raise ValueError(f"{self.dropped} tokens dropped of {self.past}, in pages of {page_size}")
        if len(self.pages) * page_size < self.length - self.dropped:
            raise ValueError(f"{len(self.pages)} pages don't hold {self.length - self.dropped} tokens")
        if self.pages and not 0 <= min(self.pages) <= max(self.pages) < pool_pages:
            raise ValueError(f"a page is outside the pool's {pool_pages}")
        if self.rotation.shape[0] < self.length + ahead:
            raise ValueError(f"a rotation of {tuple(self.rotation.shape)} for {self.length} positions")


def check_rotation(table: Tensor, rotary_dim: int) -> None:
    """Raise ValueError where a rotation is of another kind, or for heads of which other numbers rotate."""
    if table.shape[1:] != (2, rotary_dim // 2):
        raise ValueError(f"a rotation of {tuple(table.shape)} for {rotary_dim} numbers of a head")
    if table.dtype != torch.float32 or table.device.type != "cpu" or not table.is_contiguous():
        raise ValueError("a rotation is contiguous float32 on the CPU")

"""Quantized weights, kept as the blocks of their file.

A block holds 32 to 256 neighboring weights of one row: small integers, and the scales that make
numbers of them. The formats are ggml's: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from pentad.errors import PentadError
from pentad.weights.mapped import drop_pages

__all__ = ["BLOCKS", "Affine4", "QuantizedTensor"]

BLOCKS = {
    "q4_0": (32, 18),
    "q4_1": (32, 20),
    "q5_0": (32, 22),
    "q5_1": (32, 24),
    "q8_0": (32, 34),
    "q2_k": (256, 84),
    "q3_k": (256, 110),
    "q4_k": (256, 144),
    "q5_k": (256, 176),
    "q6_k": (256, 210),
    "iq2_xxs": (256, 66),
    "iq2_xs": (256, 74),
    "iq3_xxs": (256, 98),
    "iq1_s": (256, 50),
    "iq4_nl": (32, 18),
    "iq3_s": (256, 110),
    "iq2_s": (256, 82),
    "iq4_xs": (256, 136),
    "iq1_m": (256, 56),
    "tq1_0": (256, 54),
    "tq2_0": (256, 66),
    "mxfp4": (32, 17),
    "nvfp4": (64, 36),
}
"""Type name -> (weights a block, bytes a block), for every type that can be dequantized."""

AFFINE4 = ("q4_0", "q4_1", "q4_k")
"""Types whose weights are 4-bit integers with a scale and a minimum per 32."""

# Weights dequantized at a time: as float32 they stay in the caches, and fork-joins are few.
_SLAB = 1 << 19


class Affine4(NamedTuple):
    """Four-bit weights as integers: `value = q * scale + minimum`, groups of 32 sharing the two."""

    q: Tensor
    """int32 [*leading, columns], 0 to 15."""
    scale: Tensor
    """float32 [*leading, columns / 32]."""
    minimum: Tensor
    """float32 [*leading, columns / 32]."""


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A weight in the blocks of its file, most often a view of the mapped file itself.

    `stored` is uint8 [rows, bytes a row]; `type` a key of BLOCKS; `shape` the shape of the numbers
    in torch's order. Of a shape with more than two dimensions (stacked experts), all but the last
    are flattened into rows. `order` (int64) names the rows of `stored` that are meant, where they
    aren't all of them as they come. `mapped` says that `stored` is a view of a mapped file. Raises
    ValueError where these do not fit together.
    """

    stored: Tensor
    type: str
    shape: tuple[int, ...]
    order: Tensor | None = None
    mapped: bool = False

    def __post_init__(self) -> None:
        if self.type not in BLOCKS:
            raise ValueError(f"unknown quantization {self.type!r}: known are {', '.join(BLOCKS)}")
        size, nbytes = BLOCKS[self.type]
        rows, columns = math.prod(self.shape[:-1]), self.shape[-1]
        if columns % size:
            raise ValueError(f"{columns} columns are not whole {self.type} blocks of {size}")
        wanted = rows, columns // size * nbytes
        given = len(self.stored if self.order is None else self.order), *self.stored.shape[1:]
        if self.stored.dtype != torch.uint8 or given != wanted:
            raise ValueError(f"{self.type} blocks of {self.shape} are uint8 {wanted}, not {self.stored.dtype} {given}")

    def __eq__(self, other: object) -> bool:
        """Whether both are views of the same stored rows: one weight, of which one packed form will do."""
        if not isinstance(other, QuantizedTensor):
            return NotImplemented
        same_memory = self.stored is other.stored and self.order is other.order
        return same_memory and (self.type, self.shape) == (other.type, other.shape)

    def __hash__(self) -> int:
        return hash((id(self.stored), id(self.order), self.type, self.shape))

    @property
    def blocks(self) -> Tensor:
        """uint8 [rows, bytes a row]: `stored` itself, or a new copy of its rows in `order`."""
        return self.stored if self.order is None else self.stored.index_select(0, self.order)

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks."""
        size, nbytes = BLOCKS[self.type]
        return math.prod(self.shape) // size * nbytes

    @property
    def is_affine4(self) -> bool:
        """Whether `affine4` can be called: 4-bit integers with a scale and a minimum per 32."""
        return self.type in AFFINE4

    def rows(self, start: int, stop: int) -> QuantizedTensor:
        """Rows start to stop of the flattened rows, as a view: shape (stop - start, columns)."""
        if self.order is not None:
            return self.take_rows(torch.arange(start, min(stop, len(self.order)), device=self.order.device))
        stored = self.stored[start:stop]
        return replace(self, stored=stored, shape=(len(stored), self.shape[-1]))

    def chunk(self, count: int, dim: int = -2) -> tuple[QuantizedTensor, ...]:
        """As `Tensor.chunk`, along the rows: the matrix, or each of a stack, in `count` parts of equal height.

        Raises ValueError where its rows are not so many equal parts, or for another dimension.
        """
        *stack, rows, _ = self.shape
        if dim != -2 or rows % count:
            raise ValueError(f"{rows} rows are not {count} equal parts (dimension {dim})")
        index = torch.arange(math.prod(self.shape[:-1]), device=self.stored.device).view(*stack, count, rows // count)
        return tuple(self.take_rows(part) for part in index.unbind(-2))

    def take_rows(self, index: Tensor) -> QuantizedTensor:
        """The flattened rows that `index` (integers of any shape) names, as a view.

        The result's shape is (*index.shape, columns). Nothing is lost: a permutation of rows, or an
        embedding's gather. Raises IndexError for a row that is not there.
        """
        every = torch.arange(len(self.stored), device=self.stored.device) if self.order is None else self.order
        order = every.index_select(0, index.reshape(-1))
        return replace(self, order=order, shape=(*index.shape, self.shape[-1]))

    def release(self) -> None:
        """Let go of the memory that the blocks of a mapped file take; they are read again when they are wanted again.

        For whoever has made something else of them.
        """
        if self.mapped:
            drop_pages(self.stored)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers, as a tensor [*shape]: computed in float32, then rounded to `dtype`.

        Raises PentadError where the installed `gguf` is too old to know the type.
        """
        size, nbytes = BLOCKS[self.type]
        blocks = self.blocks.reshape(-1, nbytes)
        out = torch.empty(len(blocks), size, dtype=dtype, device=blocks.device)
        decode = _DECODERS.get(self.type)
        if decode is None:
            return out.copy_(_by_gguf(self.blocks, self.type).view(-1, size)).view(self.shape)
        count = max(1, _SLAB // size)
        for start in range(0, len(blocks), count):
            part = slice(start, start + count)
            out[part].copy_(decode(blocks[part]))
        return out.view(self.shape)

    def affine4(self) -> Affine4:
        """The exact 4-bit form of q4_0, q4_1 and q4_k. Raises ValueError for other types."""
        if not self.is_affine4:
            raise ValueError(f"{self.type} is not 4 bits with a scale and a minimum: dequantize it")
        nbytes = BLOCKS[self.type][1]
        blocks = self.blocks.reshape(-1, nbytes)
        if self.type == "q4_k":
            q, (scale, minimum) = _nibbles(blocks[:, 16:], 32), _q4_k_scales(blocks)
        else:
            scale = _halves(blocks, 0)
            minimum = _halves(blocks, 1) if self.type == "q4_1" else scale * -8
            q = _nibbles(blocks[:, nbytes - 16 :], 16)
        groups = (*self.shape[:-1], self.shape[-1] // 32)
        return Affine4(q.int().view(self.shape), scale.view(groups), minimum.view(groups))


def _halves(blocks: Tensor, index: int) -> Tensor:
    """The index-th float16 of each block: float32 [blocks, 1]."""
    return blocks.view(torch.float16)[:, index : index + 1].float()


def _nibbles(packed: Tensor, run: int) -> Tensor:
    """uint8 [blocks, bytes]: each run of bytes holds its low nibbles, then its high ones."""
    packed = packed.reshape(len(packed), -1, run)
    return torch.stack((packed & 15, packed >> 4), 2).flatten(1)


def _q4_0(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[:, 2:], 16).float().sub_(8).mul_(_halves(blocks, 0))


def _q4_1(blocks: Tensor) -> Tensor:
    q = _nibbles(blocks[:, 4:], 16).float()
    return q.mul_(_halves(blocks, 0)).add_(_halves(blocks, 1))


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).float().mul_(_halves(blocks, 0))


def _q4_k(blocks: Tensor) -> Tensor:
    scale, minimum = _q4_k_scales(blocks)
    q = _nibbles(blocks[:, 16:], 32).view(-1, 8, 32).float()
    return q.mul_(scale.unsqueeze(2)).add_(minimum.unsqueeze(2)).flatten(1)


def _q4_k_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minimums of the 8 groups of a q4_k block: float32 [blocks, 8] each.

    Both are 6-bit integers times a float16 of the block. Bytes 0-3 have the first four scales and,
    above them, the two high bits of the last four; bytes 4-7 the same of the minimums; bytes 8-11
    the four low bits of the last four scales and, above them, of the minimums (get_scale_min_k4 in
    ggml-quants.c).
    """
    d, m, low = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = torch.cat((d & 63, (low & 15) | (d >> 2 & 48)), 1)
    minimum = torch.cat((m & 63, (low >> 4) | (m >> 2 & 48)), 1)
    return scale.float() * _halves(blocks, 0), minimum.float() * -_halves(blocks, 1)


_DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q4_k": _q4_k,
    "q8_0": _q8_0,
}


def _by_gguf(blocks: Tensor, name: str) -> Tensor:
    """The numbers of any type, by ggml's own Python package: float32 [rows, columns]."""
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    try:
        kind = GGMLQuantizationType[name.upper()]
    except KeyError:
        raise PentadError(f"the installed gguf is too old for {name}: upgrade it") from None
    with np.errstate(all="ignore"):  # infinite and NaN scales are the caller's to notice
        return torch.from_numpy(dequantize(blocks.cpu().numpy(), kind))

"""Quantized weights, kept as the blocks of their file.

A block holds 32 to 256 neighboring weights of one row: small integers, and their scales. The formats are ggml's:
https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from pentad.errors import PentadError
from pentad.weights.mapped import drop_pages

# fmt: off
BLOCKS = {
    "q4_0": (32, 18), "q4_1": (32, 20), "q5_0": (32, 22), "q5_1": (32, 24), "q8_0": (32, 34),
    "q2_k": (256, 84), "q3_k": (256, 110), "q4_k": (256, 144), "q5_k": (256, 176), "q6_k": (256, 210),
    "iq2_xxs": (256, 66), "iq2_xs": (256, 74), "iq3_xxs": (256, 98), "iq1_s": (256, 50), "iq4_nl": (32, 18),
    "iq3_s": (256, 110), "iq2_s": (256, 82), "iq4_xs": (256, 136), "iq1_m": (256, 56),
    "tq1_0": (256, 54), "tq2_0": (256, 66), "mxfp4": (32, 17), "nvfp4": (64, 36),
}
# fmt: on
"""Type name -> (weights a block, bytes a block), for each type that can be dequantized."""

AFFINE4 = ("q4_0", "q4_1", "q4_k")
"""Types whose weights are 4-bit integers with a scale and a minimum per 32."""

SLAB = 1 << 19  # weights dequantized at a time: as float32 they fit in the CPU's caches


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A weight in the blocks of its file, usually a view of the mapped file.

    Attributes:
        stored: uint8 [rows, bytes a row].
        type: a key of BLOCKS.
        shape: of the dequantized weight, in torch's order. All dimensions but the last are flattened into rows.
        order: int64, the row of `stored` for each row of the weight; None if both are in the same order.
        mapped: True if `stored` is a view of a mapped file.

    Raises:
        ValueError: these do not fit together.
    """

    stored: Tensor
    type: str
    shape: tuple[int, ...]
    order: Tensor | None = None
    mapped: bool = False

    def __post_init__(self) -> None:
        if self.type not in BLOCKS:
            raise ValueError(f"unknown quantization {self.type!r}; known types: {', '.join(BLOCKS)}")
        size, nbytes = BLOCKS[self.type]
        rows, columns = math.prod(self.shape[:-1]), self.shape[-1]
        if columns % size:
            raise ValueError(f"{columns} columns are not whole {self.type} blocks of {size}")
        expected = rows, columns // size * nbytes
        found = len(self.stored if self.order is None else self.order), *self.stored.shape[1:]
        if self.stored.dtype != torch.uint8 or found != expected:
            blocks = f"{self.type} blocks of {self.shape}"
            raise ValueError(f"{blocks} are {self.stored.dtype} {found}; expected torch.uint8 {expected}")

    def __eq__(self, other: object) -> bool:
        """Return True if both are the same rows in the same memory, so that they can share a packed form."""
        if not isinstance(other, QuantizedTensor):
            return NotImplemented
        same_memory = self.stored is other.stored and self.order is other.order
        return same_memory and (self.type, self.shape) == (other.type, other.shape)

    def __hash__(self) -> int:
        return hash((id(self.stored), id(self.order), self.type, self.shape))

    @property
    def blocks(self) -> Tensor:
        """uint8 [rows, bytes a row]: `stored` itself, or a copy of its rows in `order`."""
        return self.stored if self.order is None else self.stored.index_select(0, self.order)

    def rows(self, start: int, stop: int) -> QuantizedTensor:
        """The flattened rows from start to stop, as a view of shape (stop - start, columns)."""
        if self.order is not None:
            order = self.order[start:stop]
            return replace(self, order=order, shape=(len(order), self.shape[-1]))
        stored = self.stored[start:stop]
        return replace(self, stored=stored, shape=(len(stored), self.shape[-1]))

    def chunk(self, count: int, dim: int = -2) -> tuple[QuantizedTensor, ...]:
        """Split the matrix, or each matrix of a stack, into `count` equal parts along its rows, as `Tensor.chunk`.

        Raises:
            ValueError: `count` does not divide the rows, or `dim` is another dimension.
        """
        *stack, rows, _ = self.shape
        if dim != -2 or rows % count:
            raise ValueError(f"{rows} rows are not {count} equal parts (dimension {dim})")
        index = torch.arange(math.prod(self.shape[:-1]), device=self.stored.device).view(*stack, count, rows // count)
        return tuple(self.take_rows(part) for part in index.unbind(-2))

    def take_rows(self, index: Tensor) -> QuantizedTensor:
        """The flattened rows at `index` (integers of any shape), as a view of shape (*index.shape, columns).

        Raises:
            IndexError: a row does not exist.
        """
        every = torch.arange(len(self.stored), device=self.stored.device) if self.order is None else self.order
        order = every.index_select(0, index.reshape(-1))
        return replace(self, order=order, shape=(*index.shape, self.shape[-1]))

    def release(self) -> None:
        """Free the memory of a mapped file's blocks, after a use: the next access reads the file again."""
        if self.mapped:
            drop_pages(self.stored)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers [*shape], computed in float32, then rounded to `dtype`.

        Raises:
            PentadError: the installed `gguf` is too old to know the type.
        """
        size, nbytes = BLOCKS[self.type]
        blocks = self.blocks.reshape(-1, nbytes)
        out = torch.empty(len(blocks), size, dtype=dtype, device=blocks.device)
        if out.is_meta:
            return out.view(self.shape)
        decode = _DECODERS.get(self.type)
        if decode is None:
            return out.copy_(_by_gguf(self.blocks, self.type).view(-1, size)).view(self.shape)
        count = max(1, SLAB // size)
        for start in range(0, len(blocks), count):
            part = slice(start, start + count)
            out[part].copy_(decode(blocks[part]))
        return out.view(self.shape)

    def affine4(self) -> tuple[Tensor, Tensor, Tensor]:
        """Integers q and the scales and minimums of groups of 32: the numbers are exactly `q * scale + minimum`.

        Returns:
            int32 [*shape], 0 to 15; float32 [*leading, columns / 32] twice.

        Raises:
            ValueError: the type is not in AFFINE4.
        """
        if self.type not in AFFINE4:
            raise ValueError(f"type is {self.type}; expected one of {', '.join(AFFINE4)}")
        q, scale, minimum = _affine(self.blocks.reshape(-1, BLOCKS[self.type][1]), self.type)
        groups = (*self.shape[:-1], self.shape[-1] // 32)
        return q.int().view(self.shape), scale.view(groups), minimum.view(groups)


def _halves(blocks: Tensor, index: int) -> Tensor:
    """The index-th float16 of each block: float32 [blocks, 1]."""
    return blocks.view(torch.float16)[:, index : index + 1].float()


def _nibbles(packed: Tensor, run: int) -> Tensor:
    """uint8 [blocks, bytes]: each run of bytes holds its low nibbles, then its high ones."""
    packed = packed.reshape(len(packed), -1, run)
    return torch.stack((packed & 15, packed >> 4), 2).flatten(1)


def _affine(blocks: Tensor, type: str) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 [blocks, weights a block], and the scales and minimums of groups of 32: float32 [blocks, groups]."""
    if type == "q4_k":
        return _nibbles(blocks[:, 16:], 32), *_q4_k_scales(blocks)
    scale = _halves(blocks, 0)
    return _nibbles(blocks[:, -16:], 16), scale, _halves(blocks, 1) if type == "q4_1" else scale * -8


def _decode_affine(blocks: Tensor, type: str) -> Tensor:
    q, scale, minimum = _affine(blocks, type)
    numbers = q.view(*scale.shape, 32).float()
    return numbers.mul_(scale.unsqueeze(2)).add_(minimum.unsqueeze(2)).flatten(1)


def _q4_0(blocks: Tensor) -> Tensor:  # the affine form gives the same numbers, but NaN if the scale is infinite
    return _nibbles(blocks[:, 2:], 16).float().sub_(8).mul_(_halves(blocks, 0))


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).float().mul_(_halves(blocks, 0))


def _q4_k_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minimums of the 8 groups of a q4_k block: float32 [blocks, 8] each.

    Both are 6-bit integers times a float16 of the block. Bytes 0-3 have the first four scales and, above them, the two
    high bits of the last four. Bytes 4-7 have the minimums in the same form. Bytes 8-11 have the four low bits of the
    last four scales and, above them, those of the last four minimums (get_scale_min_k4 in ggml-quants.c).
    """
    d, m, low = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = torch.cat((d & 63, (low & 15) | (d >> 2 & 48)), 1)
    minimum = torch.cat((m & 63, (low >> 4) | (m >> 2 & 48)), 1)
    return scale.float() * _halves(blocks, 0), minimum.float() * -_halves(blocks, 1)


_DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "q4_0": _q4_0,
    "q4_1": partial(_decode_affine, type="q4_1"),
    "q4_k": partial(_decode_affine, type="q4_k"),
    "q8_0": _q8_0,
}


def _by_gguf(blocks: Tensor, name: str) -> Tensor:
    """float32 [rows, columns] from blocks of any type, by ggml's own Python package."""
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    try:
        ggml_type = GGMLQuantizationType[name.upper()]
    except KeyError:
        raise PentadError(f"the installed gguf is too old for {name}: upgrade it") from None
    with np.errstate(all="ignore"):  # infinite and NaN scales give NaN; callers check for that
        return torch.from_numpy(dequantize(blocks.cpu().numpy(), ggml_type))

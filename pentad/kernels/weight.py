"""Weights as the kernels read them: floats where they lie, quantized blocks repacked into tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pentad.kernels.binding import TYPES, CMatrix, library

FLOATS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
MAX_SIZE = 1 << 30  # rows or columns: products of them with a block's bytes stay within 64 bits


@dataclass(frozen=True, eq=False)
class Weight:
    """A matrix [rows, columns] and perhaps a bias, or a stack of matrices, and the memory that they are in.

    Attributes:
        type: a key of `binding.TYPES`.
        data: the matrix itself, or uint8 tiles.
        bias: float32 [rows] or None.
        experts: how many matrices there are, one behind the other; 0: it is no stack.
    """

    type: str
    rows: int
    columns: int
    data: Tensor
    bias: Tensor | None = None
    experts: int = 0

    @classmethod
    def floats(cls, matrix: Tensor, bias: Tensor | None = None) -> Weight:
        """A matrix of floats or a stack of them, read where it lies; if it is a transposed one, a copy.

        Raises ValueError where the kernels can't read it.
        """
        about = f"{matrix.dtype} {tuple(matrix.shape)}"
        if matrix.ndim not in (2, 3) or matrix.dtype not in FLOATS or matrix.device.type != "cpu" or not matrix.numel():
            raise ValueError(f"a matrix of floats on the CPU is wanted, not {about}")
        *stack, rows, columns = matrix.shape
        if matrix.stride()[-2:] != (columns, 1):
            matrix = matrix.contiguous()
        return cls(FLOATS[matrix.dtype], rows, columns, matrix.detach(), _bias(bias, rows), *stack)

    @classmethod
    def packed(
        cls, blocks: Tensor, type: str, shape: Sequence[int], bias: Tensor | None = None, threads: int = 1
    ) -> Weight:
        """A quantized matrix or a stack of them, its blocks (uint8 [all rows, bytes a row]) repacked.

        Raises ValueError where the type is not known, or the three do not fit together.
        """
        *stack, rows, columns = shape
        if not packs(type, columns) or not all(0 < size <= MAX_SIZE for size in shape) or len(stack) > 1:
            raise ValueError(f"there is no kernel for {type} {list(shape)}")
        if blocks.dtype != torch.uint8 or blocks.device.type != "cpu" or not blocks.is_contiguous():
            raise ValueError("blocks are contiguous uint8 on the CPU")
        if blocks.shape != (math.prod(shape[:-1]), columns // BLOCKS[type][0] * BLOCKS[type][1]):
            raise ValueError(f"{type} blocks of {list(shape)} are not uint8 {tuple(blocks.shape)}")
        size = library().pentad_packed_bytes(TYPES[type], rows, columns)
        tiles = torch.empty(math.prod(stack), size, dtype=torch.uint8)
        for matrix, out in zip(blocks.view(len(tiles), rows, -1), tiles, strict=True):
            library().pentad_pack(TYPES[type], matrix.data_ptr(), rows, columns, out.data_ptr(), threads)
        return cls(type, rows, columns, tiles, _bias(bias, rows), *stack)

    def with_bias(self, bias: Tensor | None) -> Weight:
        """The same matrix, with another bias."""
        return replace(self, bias=_bias(bias, self.rows))

    def struct(self) -> CMatrix:
        bias = None if self.bias is None else self.bias.data_ptr()
        stride = self.data.stride(0) * self.data.element_size() if self.experts else 0
        return CMatrix(self.data.data_ptr(), bias, stride, TYPES[self.type], self.rows, self.columns)

    @property
    def is_quantized(self) -> bool:
        return self.type in BLOCKS

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


BLOCKS = {
    "q4_0": (32, 18),
    "q4_1": (32, 20),
    "q5_0": (32, 22),
    "q5_1": (32, 24),
    "q8_0": (32, 34),
    "q4_k": (256, 144),
    "q5_k": (256, 176),
    "q6_k": (256, 210),
}
"""Type -> (weights a block, bytes a block), for the types that the kernels take."""


def packs(type: str | None, columns: int) -> bool:
    """Whether `Weight.packed` takes such a matrix."""
    return type in BLOCKS and 0 < columns <= MAX_SIZE and columns % BLOCKS[type][0] == 0


def vector(values: Tensor, size: int) -> Tensor:
    """float32 [size] on the CPU; the same memory where it is that already. Raises ValueError for another size."""
    if math.prod(values.shape) != size or values.device.type != "cpu":
        raise ValueError(f"{size} numbers on the CPU are wanted, not {tuple(values.shape)} on {values.device}")
    return values.detach().float().contiguous()


def _bias(bias: Tensor | None, rows: int) -> Tensor | None:
    return None if bias is None else vector(bias, rows)

"""Weights as the kernels read them: floats where they lie, quantized blocks repacked into tiles."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pentad.kernels.binding import TYPES, CMatrix, library

FLOATS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
LARGEST = 1 << 30  # rows or columns: products of them with a block's bytes stay within 64 bits


@dataclass(frozen=True, eq=False)
class Weight:
    """A matrix [rows, columns] and perhaps a bias, and the memory that they are in.

    Attributes:
        type: a key of `binding.TYPES`.
        data: the matrix itself, or uint8 tiles.
        bias: float32 [rows] or None.
    """

    type: str
    rows: int
    columns: int
    data: Tensor
    bias: Tensor | None = None

    @classmethod
    def floats(cls, matrix: Tensor, bias: Tensor | None = None) -> Weight:
        """A matrix of floats, read where it lies. Raises ValueError where it can't be."""
        if matrix.ndim != 2 or matrix.dtype not in FLOATS or matrix.device.type != "cpu" or not matrix.is_contiguous():
            raise ValueError(f"a matrix of floats on the CPU is wanted, not {matrix.dtype} {tuple(matrix.shape)}")
        rows, columns = matrix.shape
        return cls(FLOATS[matrix.dtype], rows, columns, matrix.detach(), _bias(bias, rows))

    @classmethod
    def packed(
        cls, blocks: Tensor, type: str, shape: tuple[int, int], bias: Tensor | None = None, threads: int = 1
    ) -> Weight:
        """A quantized matrix, its blocks (uint8 [rows, bytes a row]) repacked.

        Raises ValueError where the type is not known, or the three do not fit together.
        """
        rows, columns = shape
        if not packs(type, columns) or not 0 < rows <= LARGEST:
            raise ValueError(f"there is no kernel for {type} [{rows}, {columns}]")
        if blocks.dtype != torch.uint8 or blocks.device.type != "cpu" or not blocks.is_contiguous():
            raise ValueError("blocks are contiguous uint8 on the CPU")
        if blocks.shape != (rows, columns // BLOCKS[type][0] * BLOCKS[type][1]):
            raise ValueError(f"{type} blocks of [{rows}, {columns}] are not uint8 {tuple(blocks.shape)}")
        size = library().pentad_packed_bytes(TYPES[type], rows, columns)
        tiles = torch.empty(size, dtype=torch.uint8)
        library().pentad_pack(TYPES[type], blocks.data_ptr(), rows, columns, tiles.data_ptr(), threads)
        return cls(type, rows, columns, tiles, _bias(bias, rows))

    def struct(self) -> CMatrix:
        bias = None if self.bias is None else self.bias.data_ptr()
        return CMatrix(self.data.data_ptr(), bias, TYPES[self.type], self.rows, self.columns, 0)

    @property
    def is_quantized(self) -> bool:
        return self.type in BLOCKS

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


BLOCKS = {"q4_0": (32, 18), "q4_1": (32, 20), "q8_0": (32, 34), "q4_k": (256, 144), "q6_k": (256, 210)}
"""Type -> (weights a block, bytes a block), for the types that the kernels take."""


def packs(type: str | None, columns: int) -> bool:
    """Whether `Weight.packed` takes such a matrix."""
    return type in BLOCKS and 0 < columns <= LARGEST and columns % BLOCKS[type][0] == 0


def vector(values: Tensor, size: int) -> Tensor:
    """float32 [size] on the CPU; the same memory where it is that already. Raises ValueError for another size."""
    if math.prod(values.shape) != size or values.device.type != "cpu":
        raise ValueError(f"{size} numbers on the CPU are wanted, not {tuple(values.shape)} on {values.device}")
    return values.detach().float().contiguous()


def _bias(bias: Tensor | None, rows: int) -> Tensor | None:
    return None if bias is None else vector(bias, rows)

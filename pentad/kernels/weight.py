"""Weights for the kernels: floats are read in place, quantized blocks are repacked into tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pentad.kernels.binding import CMatrix, Type, library, limit

FLOATS = {torch.float32: Type.F32, torch.bfloat16: Type.BF16, torch.float16: Type.F16}


@dataclass(frozen=True, eq=False)
class Weight:
    """A matrix [rows, columns] or a stack of them, with an optional bias.

    Attributes:
        type: the storage type.
        data: the matrix itself, or uint8 tiles.
        bias: float32 [rows] or None.
        experts: the number of matrices in a stack; 0 for a single matrix.
    """

    type: Type
    rows: int
    columns: int
    data: Tensor
    bias: Tensor | None = None
    experts: int = 0

    @classmethod
    def floats(cls, matrix: Tensor, bias: Tensor | None = None) -> Weight:
        """Wrap a float matrix or a stack of them without copying. A transposed matrix is copied.

        Raises:
            ValueError: the kernels can't read the matrix.
        """
        if matrix.ndim not in (2, 3) or matrix.dtype not in FLOATS or matrix.device.type != "cpu" or not matrix.numel():
            about = f"{matrix.dtype} {tuple(matrix.shape)} on {matrix.device}"
            raise ValueError(f"the matrix is {about}; expected float32, bfloat16 or float16 [rows, columns] on cpu")
        *stack, rows, columns = matrix.shape
        if matrix.stride()[-2:] != (columns, 1):
            matrix = matrix.contiguous()
        return cls(FLOATS[matrix.dtype], rows, columns, matrix.detach(), optional_vector(bias, rows), *stack)

    @classmethod
    def packed(
        cls, blocks: Tensor, type: str, shape: Sequence[int], bias: Tensor | None = None, threads: int = 1
    ) -> Weight:
        """Repack a quantized matrix or a stack of them.

        Args:
            blocks: uint8 [all rows, bytes per row], ggml's blocks.
            type: ggml's name of the type, in lower case.
            shape: [rows, columns] or [experts, rows, columns].
            bias: float [rows].
            threads: the number of threads that repack.

        Raises:
            ValueError: the kernels don't support the type, or the blocks don't have the shape.
        """
        *stack, rows, columns = shape
        if not packs(type, columns) or not all(0 < size <= limit("MAX_SIZE") for size in shape) or len(stack) > 1:
            raise ValueError(f"the kernels don't support {type} {list(shape)}")
        stored = Type[type.upper()]
        expected = math.prod(shape[:-1]), library().pentad_row_bytes(stored, columns)
        if blocks.dtype != torch.uint8 or blocks.device.type != "cpu" or not blocks.is_contiguous():
            raise ValueError(f"the blocks are {blocks.dtype} on {blocks.device}; expected contiguous uint8 on cpu")
        if blocks.shape != expected:
            raise ValueError(f"{type} blocks of {list(shape)} are {tuple(blocks.shape)}; expected {expected}")
        size = library().pentad_packed_bytes(stored, rows, columns)
        tiles = torch.empty(math.prod(stack), size, dtype=torch.uint8)
        for matrix, out in zip(blocks.view(len(tiles), rows, -1), tiles, strict=True):
            library().pentad_pack(stored, matrix.data_ptr(), rows, columns, out.data_ptr(), threads)
        return cls(stored, rows, columns, tiles, optional_vector(bias, rows), *stack)

    def with_bias(self, bias: Tensor | None) -> Weight:
        """Return the same matrix with another bias."""
        return replace(self, bias=optional_vector(bias, self.rows))

    def struct(self) -> CMatrix:
        bias = None if self.bias is None else self.bias.data_ptr()
        stride = self.data.stride(0) * self.data.element_size() if self.experts else 0
        return CMatrix(self.data.data_ptr(), bias, stride, self.type, self.rows, self.columns)

    @property
    def is_quantized(self) -> bool:
        return self.type not in FLOATS.values()

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


def packs(type: str | None, columns: int) -> bool:
    """Return True if `Weight.packed` supports this type with rows of `columns` numbers."""
    known = type is not None and type.upper() in Type.__members__ and 0 < columns <= limit("MAX_SIZE")
    return known and library().pentad_row_bytes(Type[str(type).upper()], columns) > 0


def optional_vector(values: Tensor | None, size: int) -> Tensor | None:
    """Return `vector(values, size)`, or None."""
    return None if values is None else vector(values, size)


def vector(values: Tensor, size: int) -> Tensor:
    """Return float32 [size] on the CPU, without a copy if possible. Raises ValueError for another size or device."""
    if math.prod(values.shape) != size or values.device.type != "cpu":
        raise ValueError(f"the vector is {tuple(values.shape)} on {values.device}; expected {size} numbers on cpu")
    return values.detach().float().contiguous()

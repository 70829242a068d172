"""Tensors on their way into a file, one at a time and in pieces, so that no file is ever in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pentad.errors import BadInput
from pentad.weights.quantized import BLOCKS, QuantizedTensor

__all__ = ["QUANTIZED", "PendingTensor", "pieces", "split"]

QUANTIZED = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
"""The types, of those in BLOCKS, that numbers can be quantized to."""

_SLAB = 1 << 20  # numbers at a time; as float32 4 MiB. A multiple of every block.


@dataclass(frozen=True)
class PendingTensor:
    """One tensor of a file that is being written.

    `shape` is in torch's order. `kind` is what the file is to have: a dtype, or (GGUF only) a key of BLOCKS. `make` is
    called once, when the tensor's turn comes, and what it gives is dropped once it is written: a tensor of `shape` in
    whatever floating-point dtype (or in `kind` itself, whatever that is), or quantized.
    """

    name: str
    shape: tuple[int, ...]
    kind: torch.dtype | str
    make: Callable[[], Tensor | QuantizedTensor]

    @property
    def nbytes(self) -> int:
        """Bytes in the file. BadInput where rows are not whole blocks of `kind`."""
        if isinstance(self.kind, torch.dtype):
            return math.prod(self.shape) * self.kind.itemsize
        size, nbytes = BLOCKS[self.kind]
        if not self.shape or self.shape[-1] % size:
            what = f"tensor {self.name!r} of {list(self.shape)}"
            raise BadInput(f"{what} can't be {self.kind}: rows are not whole blocks of {size}")
        return math.prod(self.shape) // size * nbytes


def split(tensors: Sequence[PendingTensor], shard_bytes: int | None) -> list[list[PendingTensor]]:
    """Tensors by file, in their order: each file takes those that fit into `shard_bytes`, and at least one."""
    shards: list[list[PendingTensor]] = [[]]
    left = shard_bytes
    for tensor in tensors:
        if left is not None and shard_bytes is not None:
            if shards[-1] and tensor.nbytes > left:
                shards.append([])
                left = shard_bytes
            left -= tensor.nbytes
        shards[-1].append(tensor)
    return shards


def pieces(tensor: PendingTensor) -> Iterator[memoryview]:
    """A tensor's bytes as the file has them, little endian: buffers of a few MiB, made as they are taken.

    Blocks that are of the wanted type already are passed on bit for bit.

    Raises:
        BadInput: a number is too large for `kind`, or is none (NaN) and it is a quantized one.
        ValueError: `make` gave another shape than it promised, or no numbers that `kind` can hold.
    """
    value = tensor.make()
    if tuple(value.shape) != tensor.shape:
        raise ValueError(f"tensor {tensor.name!r} was to be {tensor.shape}, and is {tuple(value.shape)}")
    if isinstance(value, QuantizedTensor):
        rows = max(1, _SLAB // value.shape[-1])
        for start in range(0, math.prod(value.shape[:-1]), rows):
            part = value.rows(start, start + rows)
            same = value.type == tensor.kind
            yield _bytes(part.blocks) if same else _encode(part.dequantize(), tensor.kind, tensor.name)
        return
    for slab in _slabs(value.detach()):
        yield _encode(slab, tensor.kind, tensor.name)


def _slabs(value: Tensor) -> Iterator[Tensor]:
    """A tensor in order, in views of at most _SLAB numbers, which end at the end of a row or of a block."""
    if value.numel() <= _SLAB:
        yield value
        return
    inner = value[0].numel()
    for part in value if inner > _SLAB else torch.split(value, _SLAB // inner):
        yield from _slabs(part)


def _encode(slab: Tensor, kind: torch.dtype | str, name: str) -> memoryview:
    """Numbers as the bytes of `kind`."""
    if slab.dtype == kind:
        return _bytes(slab)
    if not slab.is_floating_point() or (isinstance(kind, torch.dtype) and not kind.is_floating_point):
        raise ValueError(f"tensor {name!r} is {slab.dtype}, which {kind} does not hold")
    blocks = isinstance(kind, str)  # whose scale is a float16: one number that is none spoils all in its block
    limit = torch.finfo(torch.float16 if isinstance(kind, str) else kind).max
    if slab.numel() and (blocks or torch.finfo(slab.dtype).max > limit):
        largest = float(slab.float().abs().amax())
        if largest > limit or (blocks and math.isnan(largest)):
            raise BadInput(f"tensor {name!r} holds {largest:.3g}; {kind} holds numbers up to {limit:.5g}")
    return _bytes(slab.to(kind) if isinstance(kind, torch.dtype) else _blocks(slab, kind))


def _blocks(value: Tensor, kind: str) -> Tensor:
    """Numbers [*, columns] as uint8 [*, bytes a row], by ggml's own Python package."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    if kind not in QUANTIZED:
        raise BadInput(f"pentad quantizes to {', '.join(QUANTIZED)}, not to {kind}")
    with np.errstate(all="ignore"):  # a block of zeros is divided by its scale
        return torch.from_numpy(quantize(value.float().cpu().numpy(), GGMLQuantizationType[kind.upper()]))


def _bytes(value: Tensor) -> memoryview:
    return value.contiguous().view(-1).view(torch.uint8).cpu().numpy().data

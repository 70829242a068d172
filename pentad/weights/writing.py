"""Write tensors to files one at a time and in pieces, so that no whole file is in memory."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pentad.errors import BadInput
from pentad.weights.atomic import NewFile
from pentad.weights.quantized import BLOCKS, QuantizedTensor
from pentad.weights.quantizer import quantize

SLAB = 1 << 20  # numbers at a time; as float32 4 MiB. A multiple of every block.

SHARD_BYTES = 5_000_000_000  # transformers' default


@dataclass(frozen=True)
class PendingTensor:
    """One tensor of a file that is being written.

    Attributes:
        name: its name in the file.
        shape: in torch's order.
        type: the type in the file: a dtype, or (GGUF only) a key of BLOCKS.
        make: returns the tensor, of `shape`, in `type` or any floating-point dtype or quantization. It is called once,
            when the tensor is written, and its result is dropped afterwards.
    """

    name: str
    shape: tuple[int, ...]
    type: torch.dtype | str
    make: Callable[[], Tensor | QuantizedTensor]

    @property
    def nbytes(self) -> int:
        """Bytes in the file; BadInput if rows are not whole blocks of `type`."""
        if isinstance(self.type, torch.dtype):
            return math.prod(self.shape) * self.type.itemsize
        size, nbytes = BLOCKS[self.type]
        if not self.shape or self.shape[-1] % size:
            tensor = f"tensor {self.name!r} of {list(self.shape)}"
            raise BadInput(f"{tensor} can't be {self.type}: rows are not whole blocks of {size}")
        return math.prod(self.shape) // size * nbytes


def split(tensors: Sequence[PendingTensor], shard_bytes: int | None) -> list[list[PendingTensor]]:
    """Distribute tensors over files, in order. A file gets at least one tensor, and at most `shard_bytes` of them."""
    shards: list[list[PendingTensor]] = [[]]
    left = limit = math.inf if shard_bytes is None else shard_bytes
    for tensor in tensors:
        if shards[-1] and tensor.nbytes > left:
            shards.append([])
            left = limit
        left -= tensor.nbytes
        shards[-1].append(tensor)
    return shards


def file_of(path: Path, header: bytes, tensors: Sequence[PendingTensor], alignment: int = 1) -> NewFile:
    """A file of a header and tensors, each of them padded to a multiple of `alignment` bytes."""
    sizes = [len(header), *(tensor.nbytes for tensor in tensors)]

    def contents() -> Iterator[bytes | memoryview]:
        yield header + bytes(-len(header) % alignment)
        for tensor in tensors:
            yield from pieces(tensor)
            yield bytes(-tensor.nbytes % alignment)

    return NewFile(path, sum(size + -size % alignment for size in sizes), contents())


def pieces(tensor: PendingTensor) -> Iterator[memoryview]:
    """Yield a tensor's bytes as the file stores them, little endian, in buffers of a few MiB.

    Blocks that already have the right type are copied bit for bit.

    Raises:
        BadInput: a number is too large for `type`, or is NaN and to be quantized.
        ValueError: `make` gave another shape than described, or numbers that `type` can't hold.
    """
    value = tensor.make()
    if tuple(value.shape) != tensor.shape:
        raise ValueError(f"tensor {tensor.name!r} is {tuple(value.shape)}; expected {tensor.shape}")
    if isinstance(value, QuantizedTensor):
        rows = max(1, SLAB // value.shape[-1])
        for start in range(0, math.prod(value.shape[:-1]), rows):
            part = value.rows(start, start + rows)
            same = value.type == tensor.type
            yield _bytes(part.blocks) if same else _encode(part.dequantize(), tensor.type, tensor.name)
        return
    for slab in _slabs(value.detach()):
        yield _encode(slab, tensor.type, tensor.name)


def _slabs(value: Tensor) -> Iterator[Tensor]:
    """A tensor in order, in views of at most SLAB numbers that end at the end of a row or of a block."""
    if value.numel() <= SLAB:
        yield value
        return
    inner = value[0].numel()
    for part in value if inner > SLAB else torch.split(value, SLAB // inner):
        yield from _slabs(part)


def _encode(slab: Tensor, type: torch.dtype | str, name: str) -> memoryview:
    """Numbers as the bytes of `type`."""
    if slab.dtype == type:
        return _bytes(slab)
    if not slab.is_floating_point() or (isinstance(type, torch.dtype) and not type.is_floating_point):
        raise ValueError(f"tensor {name!r} is {slab.dtype}, which {type} does not hold")
    blocks = isinstance(type, str)  # a block's scale is a float16: one infinity or NaN spoils the whole block
    limit = torch.finfo(torch.float16 if isinstance(type, str) else type).max
    if slab.numel() and (blocks or torch.finfo(slab.dtype).max > limit):
        largest = float(slab.float().abs().amax())
        if largest > limit or (blocks and math.isnan(largest)):
            raise BadInput(f"tensor {name!r} holds {largest:.3g}; {type} holds numbers up to {limit:.5g}")
    return _bytes(slab.to(type) if isinstance(type, torch.dtype) else quantize(slab, type))


def _bytes(value: Tensor) -> memoryview:
    return value.contiguous().view(-1).view(torch.uint8).cpu().numpy().data

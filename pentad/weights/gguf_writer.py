"""Metadata and named tensors -> GGUF files, with one tensor in memory at a time.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3, little endian. Written by hand: the
writer of ggml's own package takes tensors as whole arrays, drops empty strings, and by NumPy's `tofile`, which does not
say why it failed, so that a full disk looks like any other error.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFValueType

from pentad.errors import PentadError
from pentad.weights.atomic import NewFile, write_files
from pentad.weights.writing import PendingTensor, pieces, split

if TYPE_CHECKING:
    from pentad.weights.cache import Progress

__all__ = ["write_gguf"]

_ALIGNMENT = "general.alignment"
_NUMBERS = {
    np.dtype("u1"): GGUFValueType.UINT8,
    np.dtype("i1"): GGUFValueType.INT8,
    np.dtype("<u2"): GGUFValueType.UINT16,
    np.dtype("<i2"): GGUFValueType.INT16,
    np.dtype("<u4"): GGUFValueType.UINT32,
    np.dtype("<i4"): GGUFValueType.INT32,
    np.dtype("<f4"): GGUFValueType.FLOAT32,
    np.dtype("?"): GGUFValueType.BOOL,
    np.dtype("<u8"): GGUFValueType.UINT64,
    np.dtype("<i8"): GGUFValueType.INT64,
    np.dtype("<f8"): GGUFValueType.FLOAT64,
}
_PLAIN = {
    torch.float32: GGMLQuantizationType.F32,
    torch.float16: GGMLQuantizationType.F16,
    torch.bfloat16: GGMLQuantizationType.BF16,
    torch.float64: GGMLQuantizationType.F64,
    torch.int8: GGMLQuantizationType.I8,
    torch.int16: GGMLQuantizationType.I16,
    torch.int32: GGMLQuantizationType.I32,
    torch.int64: GGMLQuantizationType.I64,
}


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Sequence[PendingTensor],
    *,
    shard_bytes: int | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Write one GGUF file or, where its tensors would be more than `shard_bytes`, parts NAME-00001-of-0000N.gguf.

    Args:
        path: the file; its folder is made if it is missing. Parts stand beside it, under its name without ".gguf".
        metadata: in the order of the file, `general.architecture` first as is usual. Numbers become what llama.cpp
            asks for: an int uint32 (int32 where it is negative, 64 bits where it needs them), a float float32; a list
            of ints int32, of numbers float32, of str or bool what it says. A NumPy scalar or array has the type that
            its dtype names. `general.alignment` is obeyed; what begins with "split." is left out and written anew.
        tensors: in the order of the file, of one to four dimensions.
        shard_bytes: the most that the tensors of one part take; one that is larger has a part to itself.
        progress: is told of the bytes written.

    Returns:
        The paths of all files.

    Raises:
        BadInput: a file of that name exists, rows are not whole blocks, or a number is too large for its type.
        PentadError: the disk is full or can't be written. Nothing is left of the files then.
        ValueError: a name is there twice, what `make` gives is not what was promised, or GGUF has no such value.
    """
    names = [tensor.name for tensor in tensors]
    if len(set(names)) < len(names):
        raise ValueError("a tensor is there twice")
    alignment = int(metadata.get(_ALIGNMENT, 32))
    keys = {key: value for key, value in metadata.items() if not key.startswith("split.")}
    parts = split(tensors, shard_bytes)
    if len(parts) == 1:
        return write_files([_file(path, keys, parts[0], alignment)], progress)
    stem, count = path.name.removesuffix(".gguf"), len(parts)
    files = []
    for number, part in enumerate(parts):
        # Their types are what llama.cpp asks for; only the first part has the rest of the metadata.
        own = {
            "split.no": np.uint16(number),
            "split.count": np.uint16(count),
            "split.tensors.count": np.int32(len(tensors)),
        }
        here = {**keys, **own} if number == 0 else own
        if _ALIGNMENT in keys:
            here[_ALIGNMENT] = keys[_ALIGNMENT]
        files.append(_file(path.with_name(f"{stem}-{number + 1:05}-of-{count:05}.gguf"), here, part, alignment))
    return write_files(files, progress)


def _file(path: Path, metadata: Mapping[str, Any], tensors: Sequence[PendingTensor], alignment: int) -> NewFile:
    start = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        start += _string(key) + _value(key, value)
    at = 0
    for tensor in tensors:
        if not 1 <= len(tensor.shape) <= 4:
            raise ValueError(f"tensor {tensor.name!r} has {len(tensor.shape)} dimensions: GGUF has 1 to 4")
        dims = reversed(tensor.shape)
        start += _string(tensor.name) + struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *dims)
        start += struct.pack("<IQ", _type(tensor), at)
        at += tensor.nbytes + _padding(tensor.nbytes, alignment)
    start += bytes(_padding(len(start), alignment))
    return NewFile(path, len(start) + at, _pieces(bytes(start), tensors, alignment))


def _pieces(start: bytes, tensors: Sequence[PendingTensor], alignment: int) -> Iterator[bytes | memoryview]:
    yield start
    for tensor in tensors:
        yield from pieces(tensor)
        yield bytes(_padding(tensor.nbytes, alignment))


def _padding(nbytes: int, alignment: int) -> int:
    return -nbytes % alignment


def _type(tensor: PendingTensor) -> int:
    """The number of a tensor's type, ggml_type of ggml.h."""
    if isinstance(tensor.kind, torch.dtype):
        if tensor.kind not in _PLAIN:
            raise ValueError(f"tensor {tensor.name!r}: GGUF has no {tensor.kind}")
        return int(_PLAIN[tensor.kind])
    try:
        return int(GGMLQuantizationType[tensor.kind.upper()])
    except KeyError:
        raise PentadError(f"the installed gguf is too old for {tensor.kind}: upgrade it") from None


def _string(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def _value(key: str, value: Any) -> bytes:
    """A value of the metadata: the number of its type, and its bytes."""
    if isinstance(value, str):
        return struct.pack("<I", GGUFValueType.STRING) + _string(value)
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        # An empty list is one of strings: published files have no others that may be empty.
        head = struct.pack("<IIQ", GGUFValueType.ARRAY, GGUFValueType.STRING, len(value))
        return head + b"".join(map(_string, value))
    numbers = _numbers(value)
    kind = _NUMBERS.get(numbers.dtype)
    if kind is None or numbers.ndim > 1:
        raise ValueError(f"metadata key {key!r}: GGUF has nothing for {str(value)[:100]!r}")
    if numbers.ndim == 0:
        return struct.pack("<I", kind) + numbers.tobytes()
    return struct.pack("<IIQ", GGUFValueType.ARRAY, kind, len(numbers)) + numbers.tobytes()


def _numbers(value: Any) -> np.ndarray[Any, Any]:
    """Python's numbers in the types that `write_gguf` promises; NumPy's as they are; object where they are none."""
    if isinstance(value, np.ndarray | np.generic):
        return np.asarray(value)
    items = value if isinstance(value, list | tuple) else [value]
    kinds = {type(item) for item in items}
    if kinds == {bool}:
        return np.array(value, np.bool_)
    if kinds == {int}:
        unsigned = items is not value and value >= 0
        for dtype in (np.uint32, np.uint64) if unsigned else (np.int32, np.int64):
            if np.iinfo(dtype).min <= min(items) and max(items) <= np.iinfo(dtype).max:
                return np.array(value, dtype)
    elif kinds <= {int, float}:
        return np.array(value, np.float32)
    return np.array(None)

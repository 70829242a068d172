"""Metadata and named tensors -> GGUF files, with one tensor in memory at a time.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3, little endian. The writer of ggml's
own package isn't used: it needs tensors as whole arrays, drops empty strings, and reports a full disk like any
other error.
"""

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pentad.weights.atomic import NewFile, write_files
from pentad.weights.cache import Progress
from pentad.weights.gguf import DTYPES, TYPES
from pentad.weights.gguf_header import ARRAY, MAGIC, NUMBERS, STRING
from pentad.weights.writing import PendingTensor, file_of, split

_ALIGNMENT = "general.alignment"
_TYPE_OF = {np.dtype(f"<{code}"): type for type, code in NUMBERS.items()}
_NUMBER_OF = {DTYPES.get(name, name): number for number, name in TYPES.items()}


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Sequence[PendingTensor],
    *,
    shard_bytes: int | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Write one GGUF file or, if its tensors take more than `shard_bytes`, parts NAME-00001-of-0000N.gguf.

    Args:
        path: the file; its folder is made if it is missing. Parts go beside it, under its name without ".gguf".
        metadata: in the order of the file, `general.architecture` first as is usual. Numbers get the types that
            llama.cpp expects: an int uint32 (int32 if negative, 64 bits if needed), a float float32; a list of ints
            int32, of numbers float32, of str or bool its own. A NumPy scalar or array gets the type of its dtype.
            `general.alignment` is obeyed; keys that begin with "split." are replaced.
        tensors: in the order of the file, of one to four dimensions.
        shard_bytes: limit for the tensors of one part; a larger tensor gets a part for itself.
        progress: receives the number of bytes written.

    Returns:
        The paths of all files.

    Raises:
        BadInput: a file of that name exists, rows are not whole blocks, or a number is too large for its type.
        PentadError: the disk is full or can't be written; no file is left then.
        ValueError: a duplicate name, a tensor that differs from its description, or a value that GGUF can't hold.
    """
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise ValueError("a tensor is there twice")
    alignment = int(metadata.get(_ALIGNMENT, 32))
    keys = {key: value for key, value in metadata.items() if not key.startswith("split.")}
    parts = split(tensors, shard_bytes)
    if len(parts) == 1:
        return write_files([_file(path, keys, parts[0], alignment)], progress)
    stem, count = path.name.removesuffix(".gguf"), len(parts)
    files = []
    for number, part in enumerate(parts):
        # llama.cpp expects these types; only the first part has the rest of the metadata.
        split_keys = {
            "split.no": np.uint16(number),
            "split.count": np.uint16(count),
            "split.tensors.count": np.int32(len(tensors)),
        }
        others = keys if number == 0 else {key: value for key, value in keys.items() if key == _ALIGNMENT}
        part_path = path.with_name(f"{stem}-{number + 1:05}-of-{count:05}.gguf")
        files.append(_file(part_path, {**others, **split_keys}, part, alignment))
    return write_files(files, progress)


def _file(path: Path, metadata: Mapping[str, Any], tensors: Sequence[PendingTensor], alignment: int) -> NewFile:
    header = bytearray(MAGIC + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        header += _string(key) + _value(key, value)
    offset = 0
    for tensor in tensors:
        n_dims = len(tensor.shape)
        if not 1 <= n_dims <= 4:
            raise ValueError(f"tensor {tensor.name!r} has {n_dims} dimensions; expected 1 to 4")
        if tensor.type not in _NUMBER_OF:
            raise ValueError(f"tensor {tensor.name!r}: GGUF has no {tensor.type}")
        header += _string(tensor.name) + struct.pack(f"<I{n_dims}Q", n_dims, *reversed(tensor.shape))
        header += struct.pack("<IQ", _NUMBER_OF[tensor.type], offset)
        offset += tensor.nbytes + -tensor.nbytes % alignment
    return file_of(path, bytes(header), tensors, alignment)


def _string(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def _value(key: str, value: Any) -> bytes:
    """A value of the metadata: the number of its type, and its bytes."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        # An empty list becomes a list of strings: published files have no other lists that may be empty.
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_string, value))
    numbers = _numbers(value)
    type = _TYPE_OF.get(numbers.dtype)
    if type is None or numbers.ndim > 1:
        raise ValueError(f"metadata key {key!r}: GGUF has no type for {str(value)[:100]!r}")
    head = struct.pack("<I", type) if numbers.ndim == 0 else struct.pack("<IIQ", ARRAY, type, len(numbers))
    return head + numbers.tobytes()


def _numbers(value: Any) -> np.ndarray[Any, Any]:
    """Python's numbers in the types that `write_gguf` documents, NumPy's unchanged; dtype object for anything else."""
    if isinstance(value, np.ndarray | np.generic):
        return np.asarray(value)
    items = value if isinstance(value, list | tuple) else [value]
    types = {type(item) for item in items}
    if types == {bool}:
        return np.array(value, np.bool_)
    if types == {int}:
        unsigned = items is not value and value >= 0
        for dtype in (np.uint32, np.uint64) if unsigned else (np.int32, np.int64):
            if np.iinfo(dtype).min <= min(items) and max(items) <= np.iinfo(dtype).max:
                return np.array(value, dtype)
    elif types <= {int, float}:
        return np.array(value, np.float32)
    return np.array(None)

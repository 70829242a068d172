"""Named tensors -> safetensors files, with one tensor in memory at a time (the library's own writer holds a file).

The format: https://github.com/huggingface/safetensors#format. Equal tensors give equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pentad.weights.atomic import NewFile, write_files
from pentad.weights.safetensors import DTYPES
from pentad.weights.shards import INDEX
from pentad.weights.writing import PendingTensor, pieces, split

if TYPE_CHECKING:
    from pentad.weights.cache import Progress

__all__ = ["write_safetensors"]

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_safetensors(
    folder: Path, stem: str, tensors: Sequence[PendingTensor], *, shard_bytes: int, progress: Progress | None = None
) -> list[Path]:
    """Write `stem`.safetensors or, where that would be more than `shard_bytes`, shards and their index.

    Those are called as transformers calls them: `stem`-00001-of-0000N.safetensors, `stem`.safetensors.index.json.

    Args:
        folder: where to; made if it is missing.
        stem: "model" of Hugging Face's layout, "consolidated" of Mistral's.
        tensors: in the order in which they are shared out; `kind` is a dtype.
        shard_bytes: the most that the tensors of one file take; one that is larger has a file to itself.
        progress: is told of the bytes written.

    Returns:
        The paths of all files.

    Raises:
        BadInput: a file of that name exists, or a number is too large for its dtype.
        PentadError: the disk is full or can't be written. Nothing is left of the files then.
        ValueError: a name is there twice, or what `make` gives is not what was promised.
    """
    weight_map: dict[str, str] = {}
    shards = split(tensors, shard_bytes)
    files = []
    for number, shard in enumerate(shards, 1):
        part = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        path = folder / f"{stem}{part}.safetensors"
        for tensor in shard:
            if tensor.name in weight_map or tensor.name == "__metadata__":
                raise ValueError(f"tensor {tensor.name!r} is there twice, or can't be called so")
            weight_map[tensor.name] = path.name
        files.append(_file(path, shard))
    if len(shards) > 1:
        metadata = {"total_size": sum(tensor.nbytes for tensor in tensors)}
        index = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
        files.append(NewFile(folder / f"{stem}.safetensors{INDEX}", len(index), [index.encode()]))
    return write_files(files, progress)


def _file(path: Path, tensors: Sequence[PendingTensor]) -> NewFile:
    # The widest numbers first, as the library has them: so all are aligned.
    ordered = sorted(tensors, key=lambda tensor: -_itemsize(tensor))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": _NAMES[tensor.kind],  # type: ignore[index]
            "shape": tensor.shape,
            "data_offsets": (start, end),
        }
    content = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    start_of_file = len(content).to_bytes(8, "little") + content
    return NewFile(path, len(start_of_file) + end, _pieces(start_of_file, ordered))


def _itemsize(tensor: PendingTensor) -> int:
    if not isinstance(tensor.kind, torch.dtype) or tensor.kind not in _NAMES:
        raise ValueError(f"tensor {tensor.name!r}: safetensors has no {tensor.kind}")
    return tensor.kind.itemsize


def _pieces(start: bytes, tensors: Sequence[PendingTensor]) -> Iterator[bytes | memoryview]:
    yield start
    for tensor in tensors:
        yield from pieces(tensor)

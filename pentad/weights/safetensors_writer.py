"""Named tensors -> safetensors files, with one tensor in memory at a time (the library's own writer holds a file).

The format: https://github.com/huggingface/safetensors#format. Equal tensors give equal bytes.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pentad.weights.atomic import NewFile, write_files
from pentad.weights.cache import Progress
from pentad.weights.safetensors import DTYPES
from pentad.weights.shards import INDEX
from pentad.weights.writing import PendingTensor, file_of, split

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_safetensors(
    folder: Path, stem: str, tensors: Sequence[PendingTensor], *, shard_bytes: int, progress: Progress | None = None
) -> list[Path]:
    """Write `stem`.safetensors or, if it would be larger than `shard_bytes`, shards and their index.

    Shards have transformers' names: `stem`-00001-of-0000N.safetensors, `stem`.safetensors.index.json.

    Args:
        folder: made if it is missing.
        stem: "model" in Hugging Face's layout, "consolidated" in the other.
        tensors: distributed over the shards in this order; each `type` is a dtype.
        shard_bytes: limit for the tensors of one file; a larger tensor gets a file for itself.
        progress: receives the number of bytes written.

    Returns:
        The paths of all files.

    Raises:
        BadInput: a file of that name exists, or a number is too large for its dtype.
        PentadError: the disk is full or can't be written; no file is left then.
        ValueError: a duplicate name, or a tensor that differs from its description.
    """
    weight_map: dict[str, str] = {}
    shards = split(tensors, shard_bytes)
    files = []
    for number, shard in enumerate(shards, 1):
        part = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        path = folder / f"{stem}{part}.safetensors"
        for tensor in shard:
            if tensor.name in weight_map or tensor.name == "__metadata__":
                raise ValueError(f"tensor {tensor.name!r} is there twice, or has a reserved name")
            weight_map[tensor.name] = path.name
        files.append(_file(path, shard))
    if len(shards) > 1:
        metadata = {"total_size": sum(tensor.nbytes for tensor in tensors)}
        index = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
        files.append(NewFile(folder / f"{stem}.safetensors{INDEX}", len(index), [index.encode()]))
    return write_files(files, progress)


def _file(path: Path, tensors: Sequence[PendingTensor]) -> NewFile:
    # The widest numbers first, as the library orders them, so that all are aligned.
    ordered = sorted(tensors, key=lambda tensor: -_dtype(tensor).itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {"dtype": _NAMES[_dtype(tensor)], "shape": tensor.shape, "data_offsets": (start, end)}
    content = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    return file_of(path, len(content).to_bytes(8, "little") + content, ordered)


def _dtype(tensor: PendingTensor) -> torch.dtype:
    if not isinstance(tensor.type, torch.dtype) or tensor.type not in _NAMES:
        raise ValueError(f"tensor {tensor.name!r}: safetensors has no {tensor.type}")
    return tensor.type

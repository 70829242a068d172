"""Hugging Face folders: config.json, generation_config.json, weights in one file or in shards."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pentad.weights.checkpoint import Checkpoint, TensorEntry
from pentad.weights.files import READABLE, read_json, refuse
from pentad.weights.gguf import first_part, open_gguf
from pentad.weights.pickled import read_pickled
from pentad.weights.safetensors import read_safetensors

__all__ = ["CONFIG", "open_config", "open_folder", "open_weights"]

Reader = Callable[[Path], dict[str, TensorEntry]]

CONFIG = "config.json"
_GENERATION = "generation_config.json"
_INDEX = ".index.json"
_PLAIN_NAME = re.compile(r"\w[\w.+@ -]*")  # no path, which might lead out of the folder
# In the order in which transformers looks for them.
_WEIGHTS: dict[str, Reader] = {
    "model.safetensors": read_safetensors,
    "pytorch_model.bin": read_pickled,
}


def open_folder(folder: Path) -> Checkpoint:
    """A folder's checkpoint: Hugging Face weights, else its only GGUF, else config.json alone."""
    for name, reader in _WEIGHTS.items():
        weights, index = folder / name, folder / (name + _INDEX)
        if weights.is_file() or weights.is_symlink():
            return _checkpoint(folder, reader(weights))
        if index.is_file() or index.is_symlink():
            return _checkpoint(folder, _read_shards(index, reader))
    ggufs = sorted({first_part(path) for path in folder.glob("*.gguf")})
    if len(ggufs) > 1:
        names = ", ".join(path.name for path in ggufs)
        refuse(folder, f"{len(ggufs)} GGUF files: name the one that is meant: {names}")
    if ggufs:
        return open_gguf(ggufs[0])
    return _checkpoint(folder, {})


def open_weights(path: Path, reader: Reader) -> Checkpoint:
    """The checkpoint that a weight file belongs to: every shard where an index names it."""
    for name, shard_reader in _WEIGHTS.items():
        index = path.with_name(name + _INDEX)
        if index.is_file() and path.name in _weight_map(index).values():
            return _checkpoint(path.parent, _read_shards(index, shard_reader))
    return _checkpoint(path.parent, reader(path))


def open_config(path: Path) -> Checkpoint:
    """A config.json, by whatever name, as a checkpoint without tensors."""
    return Checkpoint(path.parent, "hf", read_json(path), {}, {})


def _checkpoint(folder: Path, tensors: dict[str, TensorEntry]) -> Checkpoint:
    if not (folder / CONFIG).is_file():
        refuse(folder, f"no {CONFIG} there; {READABLE}")
    generation = folder / _GENERATION
    return Checkpoint(
        folder,
        "hf",
        read_json(folder / CONFIG),
        read_json(generation) if generation.is_file() else {},
        tensors,
    )


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, from an index; the files are checked to be of its own folder."""
    weight_map: Any = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        refuse(index, "no weight_map in it")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _PLAIN_NAME.fullmatch(file):
            refuse(index, f"tensor {name!r} is put in {file!r}, no file of this folder")
    return weight_map


def _read_shards(index: Path, reader: Reader) -> dict[str, TensorEntry]:
    weight_map = _weight_map(index)
    shards = {file: index.with_name(file) for file in sorted(set(weight_map.values()))}
    missing = [file for file, path in shards.items() if not path.is_file()]
    if missing:
        refuse(index, f"{len(missing)} of {len(shards)} files missing: {', '.join(missing[:8])}")
    tensors: dict[str, TensorEntry] = {}
    home: dict[str, str] = {}
    for file, path in shards.items():
        for name, entry in reader(path).items():
            if name in home:
                refuse(index, f"tensor {name!r} is both in {home[name]} and in {file}")
            home[name], tensors[name] = file, entry
    for name, file in weight_map.items():
        if home.get(name) != file:
            refuse(index, f"tensor {name!r} is not in {file}, where the index puts it")
    return tensors

"""Folders: which of the layouts one has, and the checkpoint that makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from pentad.weights.checkpoint import Checkpoint, TensorEntry
from pentad.weights.consolidated import PARAMS, find_sets, is_consolidated, read_consolidated
from pentad.weights.files import READABLE, read_json, refuse
from pentad.weights.gguf import first_part, open_gguf
from pentad.weights.pickled import read_pickled
from pentad.weights.safetensors import read_safetensors
from pentad.weights.shards import INDEX, Reader, read_index, read_shards

__all__ = ["CONFIG", "PARAMS", "open_config", "open_consolidated", "open_folder", "open_weights"]

CONFIG = "config.json"
_GENERATION = "generation_config.json"
# In the order in which transformers looks for them.
_WEIGHTS: dict[str, Reader] = {
    "model.safetensors": read_safetensors,
    "pytorch_model.bin": read_pickled,
}


def open_folder(folder: Path) -> Checkpoint:
    """A folder's checkpoint: Hugging Face weights, else consolidated ones, else its only GGUF, else a config alone.

    The folders of Mistral's repositories hold the weights twice, in the first two layouts.
    """
    for name, reader in _WEIGHTS.items():
        weights, index = folder / name, folder / (name + INDEX)
        if weights.is_file() or weights.is_symlink():
            return _hf(folder, reader(weights))
        if index.is_file() or index.is_symlink():
            return _hf(folder, read_shards(index, reader))
        shard = next(folder.glob(f"{weights.stem}-*-of-*{weights.suffix}"), None)
        if shard is not None:
            refuse(folder, f"{shard.name} is there, and {index.name}, which says what is in it, is not")
    if find_sets(folder):
        return open_consolidated(folder)
    ggufs = sorted({first_part(path) for path in folder.glob("*.gguf")})
    if len(ggufs) > 1:
        names = ", ".join(path.name for path in ggufs)
        refuse(folder, f"{len(ggufs)} GGUF files: name the one that is meant: {names}")
    if ggufs:
        return open_gguf(ggufs[0])
    if (folder / PARAMS).is_file() and not (folder / CONFIG).is_file():
        return open_consolidated(folder)
    return _hf(folder, {})


def open_consolidated(folder: Path, named: str | None = None) -> Checkpoint:
    """A folder in the layout of Mistral and Meta; `named` is the file in it that the user named.

    A params.json without weights is a checkpoint without tensors.
    """
    if not (folder / PARAMS).is_file():
        refuse(folder, f"consolidated weights, and no {PARAMS} that says what they are")
    params = read_json(folder / PARAMS)
    sets = find_sets(folder)
    tensors = read_consolidated(folder, params, sets, named) if sets else {}
    return Checkpoint(folder, "consolidated", params, _generation(folder), tensors)


def open_weights(path: Path, reader: Reader) -> Checkpoint:
    """The checkpoint that a weight file belongs to: every shard where an index names it."""
    if is_consolidated(path.name):
        return open_consolidated(path.parent, path.name)
    for name, shard_reader in _WEIGHTS.items():
        index = path.with_name(name + INDEX)
        if index.is_file() and path.name in read_index(index).values():
            return _hf(path.parent, read_shards(index, shard_reader))
    return _hf(path.parent, reader(path))


def open_config(path: Path) -> Checkpoint:
    """A config.json, by whatever name, as a checkpoint without tensors."""
    return Checkpoint(path.parent, "hf", read_json(path), {}, {})


def _hf(folder: Path, tensors: dict[str, TensorEntry]) -> Checkpoint:
    if not (folder / CONFIG).is_file():
        _refuse_without_config(folder)
    return Checkpoint(folder, "hf", read_json(folder / CONFIG), _generation(folder), tensors)


def _refuse_without_config(folder: Path) -> NoReturn:
    if (folder / PARAMS).is_file():
        refuse(
            folder,
            f"no {CONFIG} there, without which nobody knows what Hugging Face's weights are; {PARAMS} goes with "
            "consolidated ones",
        )
    refuse(folder, f"no {CONFIG} there; {READABLE}")


def _generation(folder: Path) -> dict[str, Any]:
    generation = folder / _GENERATION
    return read_json(generation) if generation.is_file() else {}

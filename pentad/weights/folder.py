"""Detect the layout of a folder, and open its checkpoint."""

from pathlib import Path
from typing import Any

from pentad.weights.checkpoint import Checkpoint, TensorEntry
from pentad.weights.consolidated import PARAMS as PARAMS
from pentad.weights.consolidated import find_sets, is_consolidated, read_consolidated
from pentad.weights.files import READABLE, read_json, refuse
from pentad.weights.gguf import first_part, open_gguf
from pentad.weights.pickled import read_pickled
from pentad.weights.safetensors import read_safetensors
from pentad.weights.shards import INDEX, Reader, read_index, read_shards

CONFIG = "config.json"
ADAPTER = "adapter_config.json"
_READERS: dict[str, Reader] = {"model.safetensors": read_safetensors, "pytorch_model.bin": read_pickled}
"""Weights in Hugging Face's layout, in the order in which transformers looks for them."""


def open_folder(folder: Path) -> Checkpoint:
    """A folder's checkpoint: Hugging Face's layout, else the consolidated one, else its only GGUF, else a config alone.

    Some repositories contain the first two layouts, each with all weights.
    """
    for name, reader in _READERS.items():
        weights, index = folder / name, folder / (name + INDEX)
        if weights.is_file() or weights.is_symlink():
            return _hf(folder, reader(weights))
        if index.is_file() or index.is_symlink():
            return _hf(folder, read_shards(index, reader))
        shard = next(folder.glob(f"{weights.stem}-*-of-*{weights.suffix}"), None)
        if shard is not None:
            refuse(folder, f"{shard.name} is there, but its index {index.name} is missing")
    if find_sets(folder):
        return open_consolidated(folder)
    ggufs = sorted({first_part(path) for path in folder.glob("*.gguf")})
    if len(ggufs) > 1:
        refuse(folder, f"{len(ggufs)} GGUF files; give the path of one: {', '.join(path.name for path in ggufs)}")
    if ggufs:
        return open_gguf(ggufs[0])
    if (folder / PARAMS).is_file() and not (folder / CONFIG).is_file():
        return open_consolidated(folder)
    return _hf(folder, {})


def open_consolidated(folder: Path, named: str | None = None) -> Checkpoint:
    """A folder in the consolidated layout; without weights in it, a checkpoint without tensors.

    Args:
        folder: with a params.json.
        named: the file in it that the user named.
    """
    if not (folder / PARAMS).is_file():
        refuse(folder, f"consolidated weights without the {PARAMS} that describes them")
    params = read_json(folder / PARAMS)
    sets = find_sets(folder)
    tensors = read_consolidated(folder, params, sets, named) if sets else {}
    return Checkpoint(folder, "consolidated", params, _generation(folder), tensors)


def open_weights(path: Path, reader: Reader) -> Checkpoint:
    """Open the checkpoint that a weight file belongs to, with all shards if an index names the file; without a config
    beside it, the file alone."""
    if is_consolidated(path.name):
        return open_consolidated(path.parent, path.name)
    for name, shard_reader in _READERS.items():
        index = path.with_name(name + INDEX)
        if index.is_file() and path.name in read_index(index).values():
            return _hf(path.parent, read_shards(index, shard_reader))
    if not any((path.parent / name).is_file() for name in (CONFIG, PARAMS, ADAPTER)):
        return Checkpoint(path, "state_dict", {}, {}, reader(path))
    return _hf(path.parent, reader(path))


def _hf(folder: Path, tensors: dict[str, TensorEntry]) -> Checkpoint:
    if not (folder / CONFIG).is_file():
        if (folder / ADAPTER).is_file():
            refuse(folder, f"an adapter, not a model; load its base model with --adapter {folder}")
        found = f"{PARAMS} describes only consolidated weights" if (folder / PARAMS).is_file() else READABLE
        refuse(folder, f"no {CONFIG} there; {found}")
    return Checkpoint(folder, "hf", read_json(folder / CONFIG), _generation(folder), tensors)


def _generation(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    return read_json(path) if path.is_file() else {}

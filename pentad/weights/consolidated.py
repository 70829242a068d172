"""Folders as Mistral and Meta publish them: params.json, and weights called consolidated.

One file (`consolidated.safetensors`, `consolidated.00.pth`), or several: numbered (`consolidated.00.pth`,
`consolidated.01.pth`, …) or in Hugging Face's manner (`consolidated-00001-of-00003.safetensors`, most often with an
index). Several hold different tensors (Mixtral, Mistral Large), or each holds a slice of every tensor, as Meta's do,
one for each GPU that the model was made to run on (Llama 2 13B: 2, 70B: 8).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pentad.weights.checkpoint import TensorEntry
from pentad.weights.files import refuse
from pentad.weights.pickled import read_pickled
from pentad.weights.safetensors import read_safetensors
from pentad.weights.shards import INDEX, Reader, read_index, read_shards

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PARAMS", "find_sets", "is_consolidated", "read_consolidated"]

PARAMS = "params.json"
"""What such a folder has for a config."""

_INDEX = f"consolidated.safetensors{INDEX}"
_WEIGHTS = re.compile(
    r"consolidated(?:\.(?P<number>\d\d)|-(?P<part>\d{5})-of-(?P<count>\d{5}))?(?P<suffix>\.safetensors|\.pth|\.pt)"
)
_READERS: dict[str, Reader] = {".safetensors": read_safetensors, ".pth": read_pickled, ".pt": read_pickled}
_EMBEDDING = "tok_embeddings.weight"
# What a slice has fewer columns of: fairscale's RowParallelLinear (an input is cut) and ParallelEmbedding.
_CUT_IN_COLUMNS = re.compile(r"tok_embeddings\.weight|.*\.(?:wo|w2)\.weight")


def is_consolidated(name: str) -> bool:
    """Whether a file of this name is such weights, or their index."""
    return name == _INDEX or _WEIGHTS.fullmatch(name) is not None


def find_sets(folder: Path) -> dict[str, list[Path]]:
    """A folder's sets of weights, each of which is a whole model by itself.

    From what all names of a set have in common (`consolidated.*.pth`; of a set with an index, the index's name) to its
    files in order, those that the index names and that are not there among them.
    """
    sets: dict[str, list[Path]] = {}
    index = folder / _INDEX
    indexed: list[str] = []
    if index.is_file() or index.is_symlink():
        indexed = sorted(set(read_index(index).values()))
        sets[_INDEX] = [folder / name for name in indexed]
    for path in sorted(folder.glob("consolidated*")):
        match = _WEIGHTS.fullmatch(path.name)
        if match and path.name not in indexed:
            changing = next((group for group in ("number", "part") if match[group]), None)
            start, end = match.span(changing) if changing else (0, 0)
            sets.setdefault(f"{path.name[:start]}*{path.name[end:]}" if changing else path.name, []).append(path)
    return sets


def read_consolidated(
    folder: Path, params: Mapping[str, Any], sets: Mapping[str, list[Path]], named: str | None
) -> dict[str, TensorEntry]:
    """The tensors of a folder's weights.

    Args:
        folder: where they are.
        params: params.json, by which slices are put together.
        sets: as `find_sets` gives them.
        named: the file that the user named, which says which set is meant; None: the only one.

    Raises:
        BadInput: two sets and no file named, missing files, or files that do not fit together.
    """
    chosen = [key for key, paths in sets.items() if named == key or named in [path.name for path in paths]] or [*sets]
    if len(chosen) > 1:
        names = ", ".join(sets[key][0].name for key in chosen)
        refuse(folder, f"{len(chosen)} sets of weights: name a file of the one that is meant: {names}")
    key, paths = chosen[0], sets[chosen[0]]
    if key == _INDEX:
        return read_shards(folder / _INDEX, read_safetensors)
    _check_names(folder, paths)
    shards = {path.name: _READERS[path.suffix](path) for path in paths}
    tensors = _unite(folder, shards, params)
    if "*" in key:
        _check_count(folder, len(paths), tensors, params)
    return tensors


def _check_names(folder: Path, paths: Sequence[Path]) -> None:
    """An error where the files' own numbers leave some out; how many those called 00, 01, … are, no name says."""
    matches = [match for path in paths if (match := _WEIGHTS.fullmatch(path.name))]
    first = matches[0]
    if first["number"]:
        count = int(matches[-1]["number"]) + 1
        wanted = [f"consolidated.{number:02}{first['suffix']}" for number in range(count)]
    elif first["count"]:
        count = int(first["count"])
        wanted = [f"consolidated-{number:05}-of-{first['count']}{first['suffix']}" for number in range(1, count + 1)]
    else:
        return
    there = {path.name for path in paths}
    missing = [name for name in wanted if name not in there]
    if missing:
        refuse(folder, f"{len(missing)} of {len(wanted)} files missing: {', '.join(missing[:8])}")


def _unite(
    folder: Path, shards: Mapping[str, dict[str, TensorEntry]], params: Mapping[str, Any]
) -> dict[str, TensorEntry]:
    """The tensors of files that hold different ones, or slices of the same."""
    homes: dict[str, list[str]] = {}
    for file, entries in shards.items():
        for name in entries:
            homes.setdefault(name, []).append(file)
    if all(len(files) == 1 for files in homes.values()):
        return {name: entry for entries in shards.values() for name, entry in entries.items()}
    for name, files in homes.items():
        if len(files) < len(shards):
            absent = next(file for file in shards if file not in files)
            shared = next(name for name, files in homes.items() if len(files) > 1)
            refuse(
                folder,
                f"tensor {name!r} is in {files[0]} and not in {absent}, {shared!r} in more than one: files of "
                "different models?",
            )
    return {name: _join(folder, name, {file: shards[file][name] for file in shards}, params) for name in homes}


def _join(folder: Path, name: str, slices: Mapping[str, TensorEntry], params: Mapping[str, Any]) -> TensorEntry:
    """One tensor from a slice of it in each file, put together when it is read.

    What is cut along what: https://github.com/meta-llama/llama/blob/main/llama/model.py, by the layers of
    https://github.com/facebookresearch/fairscale/blob/main/fairscale/nn/model_parallel/layers.py. Norms, and all else
    with one dimension (rope.freqs), are whole in every file. Llama 3 cuts the embedding into rows, Llama 2 into
    columns: the width in params.json tells them apart.
    """
    (first_file, first), *others = slices.items()
    for file, entry in others:
        if (entry.shape, entry.dtype) != (first.shape, first.dtype):
            refuse(
                folder,
                f"tensor {name!r} is {list(first.shape)} {first.dtype} in {first_file} and {list(entry.shape)} "
                f"{entry.dtype} in {file}: files of different models?",
            )
    if len(first.shape) < 2:
        return first
    in_rows = name == _EMBEDDING and first.shape[1] == params.get("dim")
    axis = 1 if _CUT_IN_COLUMNS.fullmatch(name) and not in_rows else 0
    shape = tuple(size * len(slices) if d == axis else size for d, size in enumerate(first.shape))
    read = partial(_read_joined, [entry.read for entry in slices.values()], axis)
    return TensorEntry(name, shape, first.dtype, None, first.nbytes * len(slices), read)


def _read_joined(reads: Sequence[Callable[[], Any]], axis: int) -> Tensor:
    return torch.cat([read() for read in reads], axis)


def _check_count(folder: Path, count: int, tensors: Mapping[str, TensorEntry], params: Mapping[str, Any]) -> None:
    """An error where the embedding is a fraction of what params.json says: the last slices are missing."""
    embedding = tensors.get(_EMBEDDING)
    for size, key in zip(embedding.shape if embedding else (), ("vocab_size", "dim"), strict=False):
        whole = params.get(key)
        if isinstance(whole, int) and 0 < size < whole and whole % size == 0:
            refuse(
                folder,
                f"only {count} of {count * whole // size} files are there: {_EMBEDDING} has {size} of the {whole} that "
                f"{PARAMS} gives as {key}",
            )

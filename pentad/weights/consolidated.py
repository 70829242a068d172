"""Weights in the consolidated layout: a params.json and files named consolidated.

One file (`consolidated.safetensors`, `consolidated.00.pth`), or several: numbered (`consolidated.00.pth`,
`consolidated.01.pth`, …) or counted (`consolidated-00001-of-00003.safetensors`, usually with an index). Several files
hold different tensors, or each holds a slice of every tensor, for one GPU each.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pentad.weights.checkpoint import TensorEntry
from pentad.weights.files import check_present, refuse
from pentad.weights.pickled import read_pickled
from pentad.weights.safetensors import read_safetensors
from pentad.weights.shards import INDEX, Reader, read_index, read_shards

PARAMS = "params.json"
"""The config of this layout."""

_INDEX = f"consolidated.safetensors{INDEX}"
_WEIGHTS = re.compile(r"consolidated(?:\.\d\d|-\d{5}-of-\d{5})?\.(?:safetensors|pth|pt)")
_NUMBER = re.compile(r"(?<=[.-])(\d+)(?:-of-(\d+))?")
_READERS: dict[str, Reader] = {".safetensors": read_safetensors, ".pth": read_pickled, ".pt": read_pickled}
_EMBEDDING = "tok_embeddings.weight"
_SLICED_COLUMNS = re.compile(r"tok_embeddings\.weight|.*\.(?:wo|w2)\.weight")
"""Tensors sliced along their columns: fairscale's RowParallelLinear (which slices the input) and ParallelEmbedding."""


def is_consolidated(name: str) -> bool:
    """Return True if `name` is a file of consolidated weights, or their index."""
    return name == _INDEX or _WEIGHTS.fullmatch(name) is not None


def find_sets(folder: Path) -> dict[str, list[Path]]:
    """Find a folder's sets of weights; each set is a whole model.

    Returns:
        Pattern of a set's file names (`consolidated.*.pth`; with an index, the index's name) -> the set's files in
        order. Files that an index names are included even if they are missing.
    """
    sets: dict[str, list[Path]] = {}
    index = folder / _INDEX
    indexed: list[str] = []
    if index.is_file() or index.is_symlink():
        indexed = sorted(set(read_index(index).values()))
        sets[_INDEX] = [folder / name for name in indexed]
    for path in sorted(folder.glob("consolidated*")):
        if _WEIGHTS.fullmatch(path.name) and path.name not in indexed:
            sets.setdefault(re.sub(r"(?<=[.-])\d+", "*", path.name, count=1), []).append(path)
    return sets


def read_consolidated(
    folder: Path, params: Mapping[str, Any], sets: Mapping[str, list[Path]], named: str | None
) -> dict[str, TensorEntry]:
    """The tensors of a folder's weights.

    Args:
        folder: holds them.
        params: the content of params.json, which determines how slices are joined.
        sets: from `find_sets`.
        named: the file that the user named, which selects a set; None selects the only set.

    Raises:
        BadInput: two sets and no file named, missing files, or files that do not fit together.
    """
    keys = [key for key, paths in sets.items() if named == key or named in [path.name for path in paths]] or [*sets]
    if len(keys) > 1:
        names = ", ".join(sets[key][0].name for key in keys)
        refuse(folder, f"{len(keys)} sets of weights; give the path of a file of one: {names}")
    key, paths = keys[0], sets[keys[0]]
    if key == _INDEX:
        return read_shards(folder / _INDEX, read_safetensors)
    check_present(folder, _expected(key, paths))
    tensors = _unite(folder, {path.name: _READERS[path.suffix](path) for path in paths}, params)
    if "*" in key:
        _check_count(folder, len(paths), tensors, params)
    return tensors


def _expected(pattern: str, paths: Sequence[Path]) -> list[Path]:
    """All files of a set; the names 00, 01, … do not tell how many follow the last one found."""
    last = _NUMBER.search(paths[-1].name)
    if last is None:
        return [*paths]
    number, count = last.groups()
    numbers = range(1, int(count) + 1) if count else range(int(number) + 1)
    return [paths[0].with_name(pattern.replace("*", f"{i:0{len(number)}}")) for i in numbers]


def _unite(
    folder: Path, shards: Mapping[str, dict[str, TensorEntry]], params: Mapping[str, Any]
) -> dict[str, TensorEntry]:
    """The tensors of files that hold different tensors, or slices of the same tensors."""
    files_of: dict[str, list[str]] = {}
    for file, entries in shards.items():
        for name in entries:
            files_of.setdefault(name, []).append(file)
    sliced = next((name for name, files in files_of.items() if len(files) > 1), None)
    if sliced is None:
        return {name: entry for entries in shards.values() for name, entry in entries.items()}
    for name, files in files_of.items():
        absent = next((file for file in shards if file not in files), None)
        if absent is not None:
            problem = f"tensor {name!r} is in {files[0]} and not in {absent}, {sliced!r} in more than one"
            refuse(folder, f"{problem}: files of different models?")
    return {name: _join(folder, name, {file: shards[file][name] for file in shards}, params) for name in files_of}


def _join(folder: Path, name: str, slices: Mapping[str, TensorEntry], params: Mapping[str, Any]) -> TensorEntry:
    """One tensor from a slice of it in each file, joined when it is read.

    The slices are those of https://github.com/meta-llama/llama/blob/main/llama/model.py, by the layers of
    https://github.com/facebookresearch/fairscale/blob/main/fairscale/nn/model_parallel/layers.py. Tensors with one
    dimension are whole in every file. Embeddings are sliced along their rows or their columns, depending on
    the width in params.json.
    """
    (first_file, first), *others = slices.items()
    for file, entry in others:
        if (entry.shape, entry.dtype) != (first.shape, first.dtype):
            first_is = f"{list(first.shape)} {first.dtype} in {first_file}"
            other_is = f"{list(entry.shape)} {entry.dtype} in {file}"
            refuse(folder, f"tensor {name!r} is {first_is} and {other_is}: files of different models?")
    if len(first.shape) < 2:
        return first
    whole_columns = name == _EMBEDDING and first.shape[1] == params.get("dim")
    axis = 1 if _SLICED_COLUMNS.fullmatch(name) and not whole_columns else 0
    shape = tuple(size * len(slices) if d == axis else size for d, size in enumerate(first.shape))
    reads: Any = [entry.read for entry in slices.values()]
    nbytes = first.nbytes * len(slices)
    return TensorEntry(name, shape, first.dtype, None, nbytes, lambda: torch.cat([read() for read in reads], axis))


def _check_count(folder: Path, count: int, tensors: Mapping[str, TensorEntry], params: Mapping[str, Any]) -> None:
    """Raise BadInput if the embedding is smaller than params.json says, because the last slices are missing."""
    embedding = tensors.get(_EMBEDDING)
    for size, key in zip(embedding.shape if embedding else (), ("vocab_size", "dim"), strict=False):
        whole = params.get(key)
        if isinstance(whole, int) and 0 < size < whole and whole % size == 0:
            found = f"{_EMBEDDING} has {size} of the {whole} in {PARAMS} ({key})"
            refuse(folder, f"only {count} of {count * whole // size} files are there: {found}")

"""Weights in several files, and the index that says which tensor is where."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pentad.weights.checkpoint import TensorEntry
from pentad.weights.files import read_json, refuse

__all__ = ["INDEX", "Reader", "read_index", "read_shards"]

Reader = Callable[[Path], dict[str, TensorEntry]]
"""Opens one file: its tensors by name."""

INDEX = ".index.json"
"""What follows the name that the weights would have in one file."""

_PLAIN_NAME = re.compile(r"\w[\w.+@ -]*")  # no path, which might lead out of the folder


def read_index(index: Path) -> dict[str, str]:
    """Tensor name -> file name, from an index; the files are checked to be of its own folder."""
    weight_map: Any = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        refuse(index, "no weight_map in it")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _PLAIN_NAME.fullmatch(file):
            refuse(index, f"tensor {name!r} is put in {file!r}, no file of this folder")
    return weight_map


def read_shards(index: Path, reader: Reader) -> dict[str, TensorEntry]:
    """The tensors of all files of an index. BadInput where it and the files disagree in anything."""
    weight_map = read_index(index)
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

"""Weights in several files, with an index that names the file of each tensor."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pentad.weights.checkpoint import TensorEntry
from pentad.weights.files import check_present, read_json, refuse

Reader = Callable[[Path], dict[str, TensorEntry]]
"""Opens one file: its tensors by name."""

INDEX = ".index.json"
"""An index's name is the name of the unsharded file, followed by this."""

_PLAIN_NAME = re.compile(r"\w[\w.+@ -]*")  # a path could lead out of the folder


def read_index(index: Path) -> dict[str, str]:
    """Tensor name -> file name, each checked to be a plain name in the index's folder."""
    weight_map: Any = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        refuse(index, "weight_map is missing or empty")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _PLAIN_NAME.fullmatch(file):
            refuse(index, f"tensor {name!r} is put in {file!r}, no file of this folder")
    return weight_map


def read_shards(index: Path, reader: Reader) -> dict[str, TensorEntry]:
    """The tensors of all files of an index; BadInput if the index and the files disagree."""
    weight_map = read_index(index)
    shards = {file: index.with_name(file) for file in sorted(set(weight_map.values()))}
    check_present(index, list(shards.values()))
    tensors: dict[str, TensorEntry] = {}
    file_of: dict[str, str] = {}
    for file, path in shards.items():
        for name, entry in reader(path).items():
            if name in file_of:
                refuse(index, f"tensor {name!r} is both in {file_of[name]} and in {file}")
            file_of[name], tensors[name] = file, entry
    for name, file in weight_map.items():
        if file_of.get(name) != file:
            refuse(index, f"tensor {name!r} is not in {file}, the file that the index names")
    return tensors

"""Files <-> named tensors, knowing no model.

Light to import: torch comes with the first file that is opened.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pentad.weights.checkpoint import Checkpoint

__all__ = ["open"]


def open(path: str | Path) -> Checkpoint:
    """Opens a checkpoint by what it holds: reads headers, maps weights, and reads none of them.

    `path` is a GGUF file (or any part of a split one); a folder as transformers saves it, or its
    config.json, weights or index; a folder as Mistral and Meta publish them, or its params.json,
    weights or index; a folder with one GGUF in it; or a configuration alone (config.json, by
    whatever name, or params.json, by that name), whose checkpoint has no tensors. Raises BadInput,
    in one line that names the file, for anything else and for whatever is wrong with them.
    """
    from pentad.weights.consolidated import is_consolidated
    from pentad.weights.files import READABLE, describe, read_start, refuse
    from pentad.weights.folder import CONFIG, PARAMS, open_config, open_consolidated, open_folder, open_weights
    from pentad.weights.gguf import MAGIC, open_gguf
    from pentad.weights.pickled import is_pickled, read_pickled
    from pentad.weights.safetensors import is_safetensors, read_safetensors

    path = Path(path)
    if path.is_dir():
        return open_folder(path)
    if path.exists() and not path.is_file():
        refuse(path, "neither a file nor a folder")
    start = read_start(path)
    if start.startswith(MAGIC):
        return open_gguf(path)
    if is_safetensors(start) or path.suffix == ".safetensors":
        return open_weights(path, read_safetensors)
    if is_pickled(start):
        return open_weights(path, read_pickled)
    if path.name == PARAMS or is_consolidated(path.name):
        return open_consolidated(path.parent, path.name)
    if path.name == CONFIG or path.name.endswith(".index.json"):
        return open_folder(path.parent)
    if path.suffix == ".json":
        return open_config(path)
    refuse(path, f"not a model but {describe(path)}; {READABLE}")

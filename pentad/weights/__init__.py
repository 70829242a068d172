"""Read and write files of named tensors, for any model.

Importing this package imports no torch; opening the first file does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pentad.weights.checkpoint import Checkpoint

__all__ = ["open"]


def open(path: str | Path) -> Checkpoint:
    """Open a checkpoint of any format: read its headers, and map its weights without reading them.

    Args:
        path: a GGUF file (or any part of a split one); a folder in Hugging Face's layout, or its config.json, weights
            or index; a folder in the consolidated layout, or its params.json, weights or index; a folder with one GGUF
            file or one .cfg; Darknet's .cfg or .weights, with the other beside it; weights alone (a state dict in one
            file); or a config alone (any .json file; consolidated only as params.json), which gives no tensors.

    Raises:
        BadInput: the path is none of these, or a file is damaged or incomplete; the message names the file.
    """
    from pentad.weights.checkpoint import Checkpoint
    from pentad.weights.consolidated import is_consolidated
    from pentad.weights.darknet import CFG, WEIGHTS, open_darknet
    from pentad.weights.files import READABLE, describe, read_json, read_start, refuse
    from pentad.weights.folder import CONFIG, PARAMS, open_consolidated, open_folder, open_weights
    from pentad.weights.gguf import open_gguf
    from pentad.weights.gguf_header import MAGIC
    from pentad.weights.pickled import is_pickled, read_pickled
    from pentad.weights.safetensors import is_safetensors, read_safetensors

    path = Path(path)
    if path.is_dir():
        networks = [] if (path / CONFIG).is_file() else [*path.glob(f"*{CFG}")]
        return open_darknet(networks[0]) if len(networks) == 1 else open_folder(path)
    if path.exists() and not path.is_file():
        refuse(path, "neither a file nor a folder")
    if path.suffix in (CFG, WEIGHTS):
        return open_darknet(path)
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
        return Checkpoint(path.parent, "hf", read_json(path), {}, {})
    refuse(path, f"not a model but {describe(path)}; {READABLE}")

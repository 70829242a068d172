"""An opened checkpoint: metadata, and named tensors that are not read yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from pentad.weights.quantized import QuantizedTensor


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file, as its header describes it.

    Attributes:
        name: its name in the file.
        shape: in torch's order, rows first.
        dtype: None if the tensor is quantized.
        quantization: a key of `pentad.weights.quantized.BLOCKS`; None if it isn't quantized.
        nbytes: its size in the file.
        read: returns the tensor: a view of the mapped file, or a new tensor joined from the slices in several files.
        mapped: True if `read` returns a view of a mapped file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    quantization: str | None
    nbytes: int
    read: Callable[[], torch.Tensor | QuantizedTensor]
    mapped: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's files, opened: only headers have been read.

    Attributes:
        path: the folder or, for GGUF, Darknet (.cfg) and state dicts, the file (the first part of a split one).
        format: "hf" (config.json beside the weights), "consolidated" (params.json), "gguf", "darknet", or "state_dict"
            (weights in one file, without a config).
        config: config.json, params.json, or a GGUF's metadata under the file's own keys; Darknet's texts (cfg, names)
            and header; empty for a state dict.
        generation: generation_config.json; empty if there is none.
        tensors: by name; empty for a config without weights.
    """

    path: Path
    format: str
    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]

"""What an opened checkpoint is: metadata, and named tensors that nobody has read yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from pentad.weights.quantized import QuantizedTensor

__all__ = ["Checkpoint", "TensorEntry"]


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file, described by its header.

    `shape` is in torch's order, rows first. Of `dtype` and `quantization` (a key of
    `pentad.weights.quantized.BLOCKS`) exactly one is None. `nbytes` is what it takes in the file.
    `read` gives the tensor: a view of the mapped file, or a new one where files hold slices of it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    quantization: str | None
    nbytes: int
    read: Callable[[], torch.Tensor | QuantizedTensor]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's files, opened; nothing but headers has been read.

    `format` is "hf" (as transformers saves), "consolidated" (as Mistral and Meta publish) or "gguf".
    `path` is the folder or, of GGUF, the file, of a split one the first. `config` is config.json,
    params.json, or the GGUF's metadata with its keys as they are in the file.
    `generation` is generation_config.json, empty where there is none. `tensors` is empty for a
    configuration without weights.
    """

    path: Path
    format: str
    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]

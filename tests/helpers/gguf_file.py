"""GGUF files of any architecture, written with ggml's own package."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from torch import nn


def stored(peer: nn.Module, type_name: str) -> dict[str, np.ndarray]:
    """Quantize a network's matrices to `type_name`, and put the dequantized values into `peer`.

    Returns:
        The arrays for the file, by name. A tied weight appears once, under its first name.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, parameter in peer.named_parameters():
        numbers = parameter.detach().float().contiguous().numpy()
        if numbers.ndim == 1:
            arrays[name] = numbers
            continue
        arrays[name] = quantize(numbers, GGMLQuantizationType[type_name])
        parameter.data.copy_(torch.from_numpy(np.array(dequantize(arrays[name], GGMLQuantizationType[type_name]))))
    return arrays


def write_file(
    path: Path,
    architecture: str,
    metadata: Mapping[str, int | float],
    tensors: Mapping[str, np.ndarray],
    type_name: str,
) -> None:
    """Write a GGUF. Keys of `metadata` lack the architecture's prefix; matrices of `tensors` are `type_name` blocks."""
    writer = GGUFWriter(path, architecture)
    for key, value in metadata.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{architecture}.{key}", value)
    for name, array in tensors.items():
        if array.ndim == 1:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, array, raw_dtype=GGMLQuantizationType[type_name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

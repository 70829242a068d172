"""Writes GGUF files of any architecture with ggml's own package."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from torch import nn


def stored(peer: nn.Module, kind: str) -> dict[str, np.ndarray]:
    """A network's tensors as a file has them, matrices in `kind`; `peer` then holds what they mean.

    A tied weight is there once, under its first name.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, parameter in peer.named_parameters():
        numbers = parameter.detach().float().contiguous().numpy()
        if numbers.ndim == 1:
            arrays[name] = numbers
            continue
        arrays[name] = quantize(numbers, GGMLQuantizationType[kind])
        parameter.data.copy_(torch.from_numpy(np.array(dequantize(arrays[name], GGMLQuantizationType[kind]))))
    return arrays


def write_file(
    path: Path, architecture: str, metadata: Mapping[str, int | float], tensors: Mapping[str, np.ndarray], kind: str
) -> None:
    """`metadata` without the architecture's name and the dot; matrices of `tensors` are blocks of `kind`."""
    writer = GGUFWriter(path, architecture)
    for key, value in metadata.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{architecture}.{key}", value)
    for name, array in tensors.items():
        if array.ndim == 1:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, array, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

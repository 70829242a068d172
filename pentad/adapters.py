"""Adapters of language models: the layers that have one, their files, and merging.

Files name modules of the published layout (see `pentad.weights.peft`); the network may stack or split their weights.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from pentad import build
from pentad.errors import BadInput
from pentad.models import family_of
from pentad.nn.decoder import Decoder
from pentad.nn.lora import lora_layers
from pentad.nn.moe.experts import GroupedLinear
from pentad.weights.checkpoint import Checkpoint, TensorEntry
from pentad.weights.keytable import LAYER, KeyTable, LastResult, Operation, Shape, Value
from pentad.weights.peft import LowRank, is_named, read_adapter, write_adapter
from pentad.weights.quantized import QuantizedTensor

_logger = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"


def target_layers(source: Checkpoint, targets: str | Sequence[str]) -> list[str]:
    """The names of the network's linear layers that get an adapter.

    Args:
        source: the base model's checkpoint.
        targets: "all-linear" for every linear layer of the blocks, or published names of modules, or ends of them.

    Raises:
        BadInput: a target names no linear layer of a block.
    """
    network = build.meta_decoder(source)
    shapes = {name: shape for name, shape in _linear_shapes(network).items() if LAYER.search(name)}
    if targets == ALL_LINEAR:
        return [name.removesuffix(".weight") for name in shapes]
    groups = [group for table in _layouts(source, network) for group in table.groups(shapes)]
    ends = [targets] if isinstance(targets, str) else targets
    chosen: set[str] = set()
    for end in ends:
        found = {name for ours, theirs, _ in groups if all(is_named(n, [end]) for n in theirs) for name in ours}
        if not found:
            leaves = {n.removesuffix(".weight").rpartition(".")[2]: None for group in groups for n in group.theirs}
            raise BadInput(f"lora.targets is {end!r}; expected {ALL_LINEAR!r}, or of {', '.join(leaves)}")
        chosen |= found
    return [name.removesuffix(".weight") for name in shapes if name in chosen]


def merged(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """A checkpoint whose weights have an adapter merged into them.

    A weight is changed when it is read: in float32, then rounded to its dtype. Quantized weights become float32.

    Args:
        checkpoint: the base model's, in any format.
        folder: the adapter's.

    Raises:
        BadInput: the adapter is broken, isn't a plain LoRA, or doesn't fit the model.
    """
    if not checkpoint.tensors:
        raise BadInput(f"{checkpoint.path}: there are no weights next to the config")
    network = build.meta_decoder(checkpoint)
    shapes = _linear_shapes(network)
    changes = read_adapter(folder).changes(_layouts(checkpoint, network), shapes)
    tensors, last, dequantized = dict(checkpoint.tensors), LastResult(), 0
    for ours, entries, operation in build.pairings(checkpoint, network):
        if any(name in changes for name in ours):
            deltas = partial(_deltas, operation, [(shapes[name], changes.get(name)) for name in ours])
            for i, entry in enumerate(entries):
                tensors[entry.name] = changed = _changed(entry, partial(last.get, deltas, i))
                dequantized += changed.nbytes if entry.quantization else 0
    if dequantized:
        _logger.warning(
            "%s: the matrices with an adapter are dequantized to float32, which takes %.0f MB",
            *(checkpoint.path, dequantized / 1e6),
        )
    return replace(checkpoint, tensors=tensors)


def save(
    network: Decoder, source: Checkpoint, folder: Path, *, alpha: float, rslora: bool, dropout: float, base: str
) -> None:
    """Write the low-rank layers of a network in PEFT's format.

    Args:
        network: a network with low-rank layers.
        source: the base model's checkpoint.
        folder, alpha, rslora, dropout, base: see `pentad.weights.peft.write_adapter`.
    """
    plain = build.meta_decoder(source)
    factors = {
        f"{name}.weight": LowRank(layer.lora_A.detach(), layer.lora_B.detach())
        for name, layer in lora_layers(network).items()
    }
    layouts, shapes = _layouts(source, plain), _linear_shapes(plain)
    write_adapter(folder, layouts, shapes, factors, alpha=alpha, rslora=rslora, dropout=dropout, base=base)


def _layouts(source: Checkpoint, network: Decoder) -> list[KeyTable]:
    return family_of(source).layouts(network.config, "hf")


def _linear_shapes(network: Decoder) -> dict[str, Shape]:
    """The shapes of the linear layers' weights by name, without a tied head."""
    return {
        f"{name}.weight": tuple(part.weight.shape)
        for name, part in network.named_modules()
        if isinstance(part, nn.Linear | GroupedLinear) and part.weight is not network.embed.weight
    }


def _deltas(operation: Operation, changes: list[tuple[Shape, LowRank | None]]) -> Sequence[Value]:
    return operation.store([torch.zeros(shape) if pair is None else pair.up @ pair.down for shape, pair in changes])


def _changed(entry: TensorEntry, delta: Callable[[], Value]) -> TensorEntry:
    dtype = entry.dtype or torch.float32

    def read() -> Tensor:
        value, change = entry.read(), delta()
        assert isinstance(change, Tensor)
        if isinstance(value, QuantizedTensor):
            total = value.dequantize() + change
            value.release()
            return total
        return (value.float() + change).to(dtype)

    nbytes = math.prod(entry.shape) * dtype.itemsize
    return replace(entry, dtype=dtype, quantization=None, nbytes=nbytes, read=read)

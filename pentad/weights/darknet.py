"""Darknet's checkpoints: a .cfg file, a .weights file, and the labels in a .names file beside them.

A .weights file is a header and float32 numbers in the order of the layers, without names. pentad names them
``layers.4.weight``, ``layers.4.bias`` or, with batch norm, ``layers.4.norm.bias``, ``layers.4.norm.running_mean`` …
"""

import math
import struct
from collections.abc import Iterable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pentad.errors import BadInput
from pentad.weights.atomic import NewFile, write_files
from pentad.weights.cache import Progress
from pentad.weights.checkpoint import Checkpoint, TensorEntry
from pentad.weights.darknet_cfg import HEADS, Network, parse
from pentad.weights.files import read_start, refuse
from pentad.weights.labels import COCO, VOC
from pentad.weights.mapped import map_file, own_storage
from pentad.weights.writing import PendingTensor, file_of

CFG, WEIGHTS, NAMES = ".cfg", ".weights", ".names"
_MAX_TEXT = 1_000_000  # bytes; the longest published file has 55,000
_NO_WEIGHTS = "not a Darknet .weights file: it doesn't begin with a version"


class Header(NamedTuple):
    """The start of a .weights file: its version, and the number of images that training has seen."""

    major: int = 0
    minor: int = 2
    revision: int = 5
    seen: int = 0

    def pack(self) -> bytes:
        """The header's bytes."""
        return struct.pack("<iii" + self.seen_type, *self)

    @property
    def seen_type(self) -> str:
        """The type of `seen`, which has 8 bytes since version 0.2."""
        return "q" if self.major * 10 + self.minor >= 2 else "i"

    @property
    def transposed(self) -> bool:
        """True if the matrices of connected layers are stored with inputs as rows."""
        return self.major > 1000 or self.minor > 1000


class Slice(NamedTuple):
    """One tensor of a .weights file."""

    name: str
    shape: tuple[int, ...]
    layer: int


def slices(network: Network) -> list[Slice]:
    """The tensors of a network's .weights file, in the file's order."""
    found = []
    for number, layer in enumerate(network.layers):
        name, outputs, inputs = f"layers.{number}", layer.shape[0], layer.input_shape[0]
        shapes: dict[str, tuple[int, ...]] = {}
        if layer.kind == "local":
            locations = layer.shape[1] * layer.shape[2]
            shapes = {"bias": layer.shape, "weight": (locations, outputs, inputs * layer.size**2)}
        elif layer.kind in ("convolutional", "connected"):
            normed = layer.batch_normalize
            norm = {f"norm.{leaf}": (outputs,) for leaf in ("weight", "running_mean", "running_var") if normed}
            bias = {"norm.bias" if normed else "bias": (outputs,)}
            if layer.kind == "connected":
                shapes = {**bias, "weight": (outputs, math.prod(layer.input_shape)), **norm}
            else:
                shapes = {**bias, **norm, "weight": (outputs, inputs // layer.groups, layer.size, layer.size)}
        found += [Slice(f"{name}.{leaf}", shape, number) for leaf, shape in shapes.items()]
    return found


def open_darknet(path: Path) -> Checkpoint:
    """Open a Darknet checkpoint, given its .cfg or its .weights file.

    The weights of ``x.cfg`` are ``x.weights``; without them the checkpoint has a config only. The labels are those of
    ``x.names``, else of a .names file of the folder that has as many as the network has classes, else COCO's for 80
    classes and Pascal VOC's for 20.

    Raises:
        BadInput: a file is damaged, or the .weights file has more or fewer numbers than the .cfg file asks for.
    """
    cfg, weights = path.with_suffix(CFG), path.with_suffix(WEIGHTS)
    if not cfg.is_file():
        refuse(path, f"{cfg.name}, which describes the network of {path.name}, is missing; put it beside it")
    text = _read_text(cfg)
    try:
        network = parse(text)
    except BadInput as error:
        refuse(cfg, str(error))
    config = {"cfg": text, "names": _labels(cfg, network)}
    if not weights.is_file():
        return Checkpoint(cfg, "darknet", config, {}, {})
    file = _WeightsFile(weights, network)
    return Checkpoint(cfg, "darknet", {**config, "header": file.header}, {}, file.entries())


class _WeightsFile:
    """A .weights file, mapped when its first tensor is read."""

    def __init__(self, path: Path, network: Network) -> None:
        self.path, self.network = path, network
        self.header, self.start = _read_header(path)

    @cached_property
    def content(self) -> Tensor:
        return map_file(self.path)

    def entries(self) -> dict[str, TensorEntry]:
        """The tensors by name; BadInput if the file has more or fewer numbers."""
        tensors, offset, size = {}, self.start, self.path.stat().st_size
        total = sum(math.prod(one.shape) for one in slices(self.network))
        for one in slices(self.network):
            layer, nbytes = self.network.layers[one.layer], 4 * math.prod(one.shape)
            if offset + nbytes > size:
                missing = total - (size - self.start) // 4
                where = f"it ends in layer {one.layer} ([{layer.kind}], line {layer.line} of the .cfg)"
                refuse(self.path, f"{missing:,} of {total:,} floats are missing: {where}")
            flipped = self.header.transposed and layer.kind == "connected" and len(one.shape) == 2
            read = partial(self._read, offset, one.shape, flipped)
            tensors[one.name] = TensorEntry(one.name, one.shape, torch.float32, None, nbytes, read, not flipped)
            offset += nbytes
        if offset < size:
            floats, rest = divmod(size - offset, 4)
            left = f"{floats:,} floats" + (f" and {rest} bytes" if rest else "")
            refuse(self.path, f"{left} are left after the {total:,} floats that the .cfg asks for")
        return tensors

    def _read(self, offset: int, shape: tuple[int, ...], flipped: bool) -> Tensor:
        flat = self.content[offset : offset + 4 * math.prod(shape)].view(torch.float32)
        return flat.view(shape[::-1]).T.contiguous() if flipped else own_storage(flat.view(shape))


def _read_header(path: Path) -> tuple[Header, int]:
    """The header of a .weights file, and its size in bytes."""
    start = read_start(path, 20)
    if len(start) < 16:
        refuse(path, f"{len(start)} bytes, too short for a Darknet .weights file")
    version = Header(*struct.unpack("<iii", start[:12]))
    if not all(0 <= number <= 65535 for number in version[:3]):
        refuse(path, _NO_WEIGHTS)
    size = 12 + struct.calcsize("<" + version.seen_type)
    if len(start) < size:
        refuse(path, f"{len(start)} bytes, too short for a Darknet .weights file")
    return version._replace(seen=struct.unpack("<" + version.seen_type, start[12:size])[0]), size


def _read_text(path: Path) -> str:
    content = read_start(path, _MAX_TEXT + 1)
    if len(content) > _MAX_TEXT:
        refuse(path, f"longer than {_MAX_TEXT:,} bytes, pentad's limit for Darknet's texts")
    return content.decode("utf-8", "replace")


def _labels(cfg: Path, network: Network) -> tuple[str, ...]:
    """The labels of a network's classes; empty if it has no detection layer."""
    counts = {layer.line: layer.classes for layer in network.layers if layer.kind in HEADS}
    if not counts:
        return ()
    count = next(iter(counts.values()))
    if len(set(counts.values())) > 1:
        lines = " and ".join(f"{classes} (line {line})" for line, classes in counts.items())
        refuse(cfg, f"classes is {lines}; expected the same number in all detection layers")
    own = cfg.with_suffix(NAMES)
    if own.is_file():
        names = _read_names(own)
        if len(names) != count:
            refuse(own, f"{len(names)} labels; expected {count}, the classes of {cfg.name}")
        return names
    found = [names for file in sorted(cfg.parent.glob("*.names")) if len(names := _read_names(file)) == count]
    known = {len(names): names for names in (COCO, VOC)}
    return (found or [known.get(count, tuple(f"class {number}" for number in range(count)))])[0]


def _read_names(path: Path) -> tuple[str, ...]:
    return tuple(line.strip() for line in _read_text(path).splitlines() if line.strip())


def write_darknet(
    cfg: Path,
    text: str,
    names: Iterable[str],
    tensors: Mapping[str, Tensor],
    *,
    header: Header | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Write a .cfg, a .weights and a .names file, all of them or none; Darknet and OpenCV read them.

    Args:
        cfg: the .cfg file; the others go beside it.
        text: the content of the .cfg file.
        names: the labels; without any there is no .names file.
        tensors: by the names of `slices`.
        header: the version and the number of images seen. Matrices are never stored transposed.

    Raises:
        BadInput: one of the files exists.
        PentadError: the disk is full or can't be written.
    """
    header = header or Header()
    if header.transposed:
        header = Header(seen=header.seen)
    pending = []
    for one in slices(parse(text)):
        pending.append(PendingTensor(one.name, one.shape, torch.float32, partial(tensors.__getitem__, one.name)))
    labels = "".join(f"{name}\n" for name in names).encode()
    files = [_text_file(cfg, text.encode()), file_of(cfg.with_suffix(WEIGHTS), header.pack(), pending)]
    files += [_text_file(cfg.with_suffix(NAMES), labels)] if labels else []
    return write_files(files, progress)


def _text_file(path: Path, content: bytes) -> NewFile:
    return NewFile(path, len(content), [content])

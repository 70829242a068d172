"""GGUF files: the tensor table is read defensively; tensors are views of the mapped file."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pentad.weights.checkpoint import Checkpoint, TensorEntry
from pentad.weights.files import check_present, refuse
from pentad.weights.gguf_header import HeaderReader, mapped_header
from pentad.weights.mapped import map_file, own_storage
from pentad.weights.quantized import BLOCKS, QuantizedTensor

# fmt: off
DTYPES = {
    "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "f64": torch.float64,
    "i8": torch.int8, "i16": torch.int16, "i32": torch.int32, "i64": torch.int64,
}
"""Names of tensor types that are not quantized."""
TYPES = {
    0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0", 10: "q2_k",
    11: "q3_k", 12: "q4_k", 13: "q5_k", 14: "q6_k", 16: "iq2_xxs", 17: "iq2_xs", 18: "iq3_xxs",
    19: "iq1_s", 20: "iq4_nl", 21: "iq3_s", 22: "iq2_s", 23: "iq4_xs", 24: "i8", 25: "i16",
    26: "i32", 27: "i64", 28: "f64", 29: "iq1_m", 30: "bf16", 34: "tq1_0", 35: "tq2_0",
    39: "mxfp4", 40: "nvfp4",
}
"""ggml_type of ggml.h -> name; the missing numbers were withdrawn, or never occur in files."""
# fmt: on

_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # an empty name, one dimension, a type, an offset
_PART = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class _Info:
    """One line of the tensor table; `start` is its first byte in the file."""

    name: str
    shape: tuple[int, ...]
    type: str
    start: int
    nbytes: int


_Header = tuple[dict[str, Any], list[_Info]]
"""Metadata and tensor table."""


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file, or all parts of a split one, given any of them.

    Raises:
        BadInput: the file, which the message names, is damaged, incomplete or of an unknown version or type.
    """
    metadata, infos = _read_header(path)
    parts = [(path, metadata, infos)]
    count = metadata.get("split.count") or 1
    match = _PART.fullmatch(path.name)
    if count != 1 or (match and int(match["count"]) != 1):
        parts = [(part, *_read_header(part)) for part in _split_paths(path, count)]
        _check_split(parts)
    tensors: dict[str, TensorEntry] = {}
    for part, _, infos in parts:
        for entry in _entries(part, infos):
            if entry.name in tensors:
                refuse(part, f"tensor {entry.name!r} is in another part of the split too")
            tensors[entry.name] = entry
    first_path, metadata, _ = parts[0]
    return Checkpoint(first_path, "gguf", metadata, {}, tensors)


def first_part(path: Path) -> Path:
    """The first part of a split GGUF file, from the name of any part; any other file is returned as it is."""
    match = _PART.fullmatch(path.name)
    return path.with_name(f"{match['stem']}-00001-of-{match['count']}.gguf") if match else path


def _split_paths(path: Path, count: object) -> list[Path]:
    """All parts of a split GGUF file in order, from any one of them."""
    match = _PART.fullmatch(path.name)
    if not match or int(match["count"]) != count:
        refuse(
            path, f"split.count is {count}; expected a file name NAME-00001-of-0000N.gguf with N = {count}: rename it"
        )
    names = (f"{match['stem']}-{number:05}-of-{match['count']}.gguf" for number in range(1, int(match["count"]) + 1))
    paths = [path.with_name(name) for name in names]
    check_present(path, paths)
    return paths


def _check_split(parts: list[tuple[Path, dict[str, Any], list[_Info]]]) -> None:
    for number, (path, metadata, _) in enumerate(parts):
        no, count = metadata.get("split.no"), metadata.get("split.count")
        if (no, count) != (number, len(parts)):
            expected = f"expected {number} and {len(parts)} by the file's name: a part of another model?"
            refuse(path, f"split.no and split.count are {no} and {count}; {expected}")
    first_path, metadata, _ = parts[0]
    total = sum(len(infos) for _, _, infos in parts)
    claimed = metadata.get("split.tensors.count", total)
    if claimed != total:
        refuse(first_path, f"split.tensors.count is {claimed}, the parts have {total} tensors")


def _entries(path: Path, infos: list[_Info]) -> Iterator[TensorEntry]:
    if not infos:
        return
    mapped = map_file(path)
    for info in infos:
        dtype = DTYPES.get(info.type)
        quantization = None if dtype else info.type
        read = partial(_read, mapped, info)
        yield TensorEntry(info.name, info.shape, dtype, quantization, info.nbytes, read, mapped=True)


def _read(mapped: Tensor, info: _Info) -> Tensor | QuantizedTensor:
    """One tensor, in the memory of the mapped file."""
    data = own_storage(mapped[info.start : info.start + info.nbytes])
    if info.type in DTYPES:
        return data.view(DTYPES[info.type]).view(info.shape)
    return QuantizedTensor(data.view(math.prod(info.shape[:-1]), -1), info.type, info.shape, mapped=True)


def _read_header(path: Path) -> _Header:
    with mapped_header(path) as data:
        return _TableReader(path, data).header()


class _TableReader(HeaderReader):
    """Reads the tensor table too."""

    def header(self) -> _Header:
        tensor_count, metadata = self.start()
        self.check_count(tensor_count, _MIN_TENSOR_BYTES, "tensors")
        infos: dict[str, _Info] = {}
        for _ in range(tensor_count):
            info = self.tensor()
            if info.name in infos:
                self.fail(f"tensor {info.name!r} is in the table twice")
            infos[info.name] = info
        return metadata, self.with_file_offsets(list(infos.values()), self.alignment(metadata))

    def alignment(self, metadata: Mapping[str, Any]) -> int:
        value = metadata.get("general.alignment", 32)
        if type(value) is not int or value < 8 or value & (value - 1):
            self.fail(f"general.alignment is {value!r}; expected a power of two of at least 8")
        return value

    def tensor(self) -> _Info:
        """One line of the tensor table; its `start` is still relative to the beginning of the data."""
        name = self.string("a tensor's name")
        label = f"tensor {name!r}"
        n_dims = self.u32(label)
        if not 1 <= n_dims <= 4:
            self.fail(f"{label} has {n_dims} dimensions; expected 1 to 4")
        dims = [self.u64(label) for _ in range(n_dims)]
        if min(dims) == 0 or math.prod(dims) >= 1 << 63:
            self.fail(f"{label} has absurd dimensions {dims}")
        number, start = self.u32(label), self.u64(label)
        if number not in TYPES:
            self.fail(f"{label} has ggml type {number}; pentad knows {', '.join(sorted(TYPES.values()))}")
        type = TYPES[number]
        block, block_bytes = (1, DTYPES[type].itemsize) if type in DTYPES else BLOCKS[type]
        if dims[0] % block:
            self.fail(f"{label}: rows of {dims[0]} are not whole {type} blocks of {block}")
        return _Info(name, tuple(reversed(dims)), type, start, math.prod(dims) // block * block_bytes)

    def with_file_offsets(self, infos: list[_Info], alignment: int) -> list[_Info]:
        """The table with each `start` relative to the beginning of the file, after checking it."""
        base = -(-self.at // alignment) * alignment
        end, previous = base, ""
        for info in sorted(infos, key=lambda info: info.start):
            start = base + info.start
            if start % alignment:
                self.fail(f"tensor {info.name!r} at offset {info.start} is not aligned to {alignment}")
            if start < end:
                self.fail(f"tensors {previous!r} and {info.name!r} overlap")
            end, previous = start + info.nbytes, info.name
        if infos and end > self.size:
            ends = f"tensor {previous!r} ends at byte {end}, the file at {self.size}"
            self.fail(f"{end - self.size} bytes are missing: {ends}: truncated; download it again")
        return [replace(info, start=base + info.start) for info in infos]

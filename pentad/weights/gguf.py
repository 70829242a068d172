"""GGUF files: metadata and tensor table, read defensively; tensors are views of the mapped file.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little
endian. Each size in a header is checked against the file before memory of that size is allocated.
"""

import math
import mmap
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from pentad.weights.checkpoint import Checkpoint, TensorEntry
from pentad.weights.files import check_present, refuse
from pentad.weights.mapped import map_file, own_storage
from pentad.weights.quantized import BLOCKS, QuantizedTensor

MAGIC = b"GGUF"
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
STRING, ARRAY = 8, 9
NUMBERS = {**dict(enumerate("BbHhIif?")), 10: "Q", 11: "q", 12: "d"}
"""Type of a metadata value -> code of the module struct."""

_U64 = struct.Struct("<Q")
_MIN_KEY_BYTES = 8 + 4 + 1  # an empty name, a type, a value of one byte
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # an empty name, one dimension, a type, an offset
_MAX_NUMBERS = 1 << 22  # in one array: as Python's numbers they take 30 times the bytes in the file
_MAX_NESTING = 8  # arrays of arrays; published files have none
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
        yield TensorEntry(info.name, info.shape, dtype, quantization, info.nbytes, partial(_read, mapped, info))


def _read(mapped: Tensor, info: _Info) -> Tensor | QuantizedTensor:
    """One tensor, in the memory of the mapped file."""
    data = own_storage(mapped[info.start : info.start + info.nbytes])
    if info.type in DTYPES:
        return data.view(DTYPES[info.type]).view(info.shape)
    return QuantizedTensor(data.view(math.prod(info.shape[:-1]), -1), info.type, info.shape, mapped=True)


def _read_header(path: Path) -> _Header:
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if size < 24:
                refuse(path, f"{size} bytes are too few for a GGUF file: a cut-off download?")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Parser(path, data).header()
    except OSError as error:
        refuse(path, f"cannot be read: {error.strerror or error}")


class _Parser:
    """A cursor over the mapped bytes of one file. In errors, `label` names the value that is being read."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.size, self.at = path, data, len(data), 0

    def fail(self, message: str) -> NoReturn:
        refuse(self.path, message)

    def header(self) -> _Header:
        if self.data[:4] != MAGIC:
            self.fail("not a GGUF file: it does not begin with GGUF")
        self.at = 4
        version = self.u32("the version")
        if version & 0xFFFF == 0:
            self.fail("a big-endian GGUF; pentad reads little-endian ones: convert it")
        if version not in (2, 3):
            self.fail(f"GGUF version {version}; pentad reads versions 2 and 3: convert the model again")
        tensor_count, key_count = self.u64("the number of tensors"), self.u64("the number of keys")
        self.check_count(key_count, _MIN_KEY_BYTES, "metadata keys")
        metadata = self.metadata(key_count)
        self.check_count(tensor_count, _MIN_TENSOR_BYTES, "tensors")
        infos: dict[str, _Info] = {}
        for _ in range(tensor_count):
            info = self.tensor()
            if info.name in infos:
                self.fail(f"tensor {info.name!r} is in the table twice")
            infos[info.name] = info
        return metadata, self.with_file_offsets(list(infos.values()), self.alignment(metadata))

    def skip(self, nbytes: int, label: str) -> int:
        """Move past `nbytes` bytes and return their start; BadInput if the file ends before."""
        start, self.at = self.at, self.at + nbytes
        if self.at > self.size:
            left = f"{self.size - start} are left: truncated or damaged; download it again"
            self.fail(f"{label} at byte {start} would take {nbytes} bytes, {left}")
        return start

    def u32(self, label: str) -> int:
        return int(self.numbers(4, 1, label)[0])

    def u64(self, label: str) -> int:
        return int(self.numbers(10, 1, label)[0])

    def check_count(self, count: int, min_bytes: int, label: str) -> None:
        """Raise BadInput if the rest of the file cannot hold `count` items of at least `min_bytes` each."""
        left = self.size - self.at
        if count * min_bytes > left:
            self.fail(f"the header claims {count} {label}, for which {left} bytes are not enough: damaged")

    def string(self, label: str) -> str:
        nbytes = self.u64(label)
        start = self.skip(nbytes, label)
        try:
            return str(self.data[start : self.at], "utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"{label} is not UTF-8: {error.reason} at byte {start + error.start}")

    def metadata(self, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for number in range(count):
            key = self.string(f"the name of metadata key {number}")
            if key in metadata:
                self.fail(f"metadata key {key!r} is there twice")
            metadata[key] = self.value(self.u32(f"the type of {key!r}"), f"the value of {key!r}")
        return metadata

    def value(self, type: int, label: str, depth: int = 0) -> Any:
        if type == STRING:
            return self.string(label)
        if type != ARRAY:
            return self.numbers(type, 1, label)[0]
        if depth == _MAX_NESTING:
            self.fail(f"{label} has arrays nested more than {_MAX_NESTING} deep")
        type, count = self.u32(label), self.u64(label)
        if type == STRING:
            self.check_count(count, 8, f"strings in {label}")
            return self.strings(count, label)
        if type == ARRAY:
            self.check_count(count, 12, f"arrays in {label}")
            return [self.value(ARRAY, label, depth + 1) for _ in range(count)]
        return list(self.numbers(type, count, label))

    def numbers(self, type: int, count: int, label: str) -> tuple[Any, ...]:
        if type not in NUMBERS:
            self.fail(f"{label} has type {type}, which GGUF does not have")
        size = struct.calcsize("<" + NUMBERS[type])
        start = self.skip(count * size, label)
        if count > _MAX_NUMBERS:
            self.fail(f"{label} has {count} numbers, more than any vocabulary: refused")
        return struct.unpack_from(f"<{count}{NUMBERS[type]}", self.data, start)

    def strings(self, count: int, label: str) -> list[str]:
        """`count` strings in one tight loop, since a vocabulary has a hundred thousand."""
        data, size, unpack, at = self.data, self.size, _U64.unpack_from, self.at
        strings = []
        try:
            for _ in range(count):
                start = at + 8
                at = start + unpack(data, at)[0]
                if at > size:
                    break
                strings.append(str(data[start:at], "utf-8"))
        except UnicodeDecodeError as error:
            self.fail(f"string {len(strings)} of {label} is not UTF-8: {error.reason}")
        except struct.error:
            at = size + 1
        if at > size:
            self.fail(f"string {len(strings)} of {label} ends past the end of the file: truncated")
        self.at = at
        return strings

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

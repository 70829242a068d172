"""GGUF files: metadata and tensor table, read defensively; tensors are views of the mapped file.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little
endian. Every size in a header is checked against the file before anything of that size is made.
"""

from __future__ import annotations

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
from pentad.weights.files import refuse
from pentad.weights.mapped import map_file
from pentad.weights.quantized import BLOCKS, QuantizedTensor

__all__ = ["MAGIC", "first_part", "open_gguf"]

MAGIC = b"GGUF"

_PLAIN = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f64": torch.float64,
    "i8": torch.int8,
    "i16": torch.int16,
    "i32": torch.int32,
    "i64": torch.int64,
}
# ggml_type of ggml.h; numbers that are not here were withdrawn, or are never in a file.
# fmt: off
_TYPES = {
    0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0", 10: "q2_k",
    11: "q3_k", 12: "q4_k", 13: "q5_k", 14: "q6_k", 16: "iq2_xxs", 17: "iq2_xs", 18: "iq3_xxs",
    19: "iq1_s", 20: "iq4_nl", 21: "iq3_s", 22: "iq2_s", 23: "iq4_xs", 24: "i8", 25: "i16",
    26: "i32", 27: "i64", 28: "f64", 29: "iq1_m", 30: "bf16", 34: "tq1_0", 35: "tq2_0",
    39: "mxfp4", 40: "nvfp4",
}
# fmt: on
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_STRING, _ARRAY = 8, 9
# Codes of the module struct, by the number of a metadata value's type.
_NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_KEY_BYTES = 8 + 4 + 1  # the least that a key and its value take: an empty name, a type, one byte
_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # an empty name, one dimension, a type, an offset
_MOST_NUMBERS = 1 << 22  # in one array: as Python's numbers they take 30 times what the file does
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


@dataclass(frozen=True)
class _Header:
    metadata: dict[str, Any]
    infos: list[_Info]


def open_gguf(path: Path) -> Checkpoint:
    """Opens a GGUF file, or all parts of a split one, given any of them.

    Raises BadInput, with one line that names the file, for whatever is wrong with it.
    """
    header = _read_header(path)
    parts = [(path, header)]
    count = header.metadata.get("split.count") or 1
    match = _PART.fullmatch(path.name)
    if count != 1 or (match and int(match["count"]) != 1):
        parts = [(part, _read_header(part)) for part in _split_paths(path, count)]
        _check_split(parts)
    tensors: dict[str, TensorEntry] = {}
    for part, part_header in parts:
        for entry in _entries(part, part_header):
            if entry.name in tensors:
                refuse(part, f"tensor {entry.name!r} is in another part of the split too")
            tensors[entry.name] = entry
    return Checkpoint(parts[0][0], "gguf", parts[0][1].metadata, {}, tensors)


def first_part(path: Path) -> Path:
    """The first file of the split GGUF that a file's name puts it in; else the file itself."""
    match = _PART.fullmatch(path.name)
    return path.with_name(f"{match['stem']}-00001-of-{match['count']}.gguf") if match else path


def _split_paths(path: Path, count: object) -> list[Path]:
    """The files of a split GGUF in order, from any one of them."""
    match = _PART.fullmatch(path.name)
    if not match or int(match["count"]) != count:
        refuse(
            path,
            f"split.count says that this is one of {count} files, which its name does not "
            f"(NAME-00001-of-0000N.gguf): give the files their names back",
        )
    stem, total = match["stem"], match["count"]
    names = (f"{stem}-{number:05}-of-{total}.gguf" for number in range(1, int(total) + 1))
    paths = [path.with_name(name) for name in names]
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        refuse(path, f"{len(missing)} of {count} parts missing: {', '.join(missing[:8])}")
    return paths


def _check_split(parts: list[tuple[Path, _Header]]) -> None:
    for number, (path, header) in enumerate(parts):
        said = header.metadata.get("split.no"), header.metadata.get("split.count")
        if said != (number, len(parts)):
            refuse(
                path,
                f"split.no and split.count are {said[0]} and {said[1]}, by the file's name "
                f"they are {number} and {len(parts)}: a part of another model?",
            )
    total = sum(len(header.infos) for _, header in parts)
    said_total = parts[0][1].metadata.get("split.tensors.count", total)
    if said_total != total:
        refuse(parts[0][0], f"split.tensors.count is {said_total}, the parts have {total} tensors")


def _entries(path: Path, header: _Header) -> Iterator[TensorEntry]:
    if not header.infos:
        return
    mapped = map_file(path)
    for info in header.infos:
        dtype = _PLAIN.get(info.type)
        quantization = None if dtype else info.type
        read = partial(_read, mapped, info)
        yield TensorEntry(info.name, info.shape, dtype, quantization, info.nbytes, read)


def _read(mapped: Tensor, info: _Info) -> Tensor | QuantizedTensor:
    """One tensor, as a view of the mapped file."""
    data = mapped[info.start : info.start + info.nbytes]
    if info.type in _PLAIN:
        return data.view(_PLAIN[info.type]).view(info.shape)
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
    """A cursor over the mapped bytes of one file."""

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
            self.fail(f"GGUF version {version}; pentad reads versions 2 and 3: convert the model anew")
        tensor_count, key_count = self.u64("the number of tensors"), self.u64("the number of keys")
        self.check_count(key_count, _KEY_BYTES, "metadata keys")
        metadata = self.metadata(key_count)
        self.check_count(tensor_count, _TENSOR_BYTES, "tensors")
        infos = [self.tensor() for _ in range(tensor_count)]
        self.check_names(infos)
        return _Header(metadata, self.place(infos, self.alignment(metadata)))

    def take(self, nbytes: int, what: str) -> int:
        """Moves past `nbytes` bytes and gives where they begin; what isn't there is an error."""
        start, self.at = self.at, self.at + nbytes
        if self.at > self.size:
            self.fail(
                f"{what} at byte {start} would take {nbytes} bytes, {self.size - start} are left: "
                f"truncated or damaged; download it again"
            )
        return start

    def u32(self, what: str) -> int:
        value: int = _U32.unpack_from(self.data, self.take(4, what))[0]
        return value

    def u64(self, what: str) -> int:
        value: int = _U64.unpack_from(self.data, self.take(8, what))[0]
        return value

    def check_count(self, count: int, least: int, what: str) -> None:
        """An error where so many, of at least `least` bytes each, cannot be in the file."""
        left = self.size - self.at
        if count * least > left:
            self.fail(f"the header claims {count} {what}, for which {left} bytes are not enough: damaged")

    def string(self, what: str) -> str:
        nbytes = self.u64(what)
        start = self.take(nbytes, what)
        try:
            return str(self.data[start : self.at], "utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not UTF-8: {error.reason} at byte {start + error.start}")

    def metadata(self, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for number in range(count):
            key = self.string(f"the name of metadata key {number}")
            if key in metadata:
                self.fail(f"metadata key {key!r} is there twice")
            metadata[key] = self.value(self.u32(f"the type of {key!r}"), f"the value of {key!r}")
        return metadata

    def value(self, kind: int, what: str) -> Any:
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self.array(what, 0)
        return self.numbers(kind, 1, what)[0]

    def array(self, what: str, depth: int) -> list[Any]:
        if depth == _MAX_NESTING:
            self.fail(f"{what} has arrays nested more than {_MAX_NESTING} deep")
        kind, count = self.u32(what), self.u64(what)
        if kind == _STRING:
            self.check_count(count, 8, f"strings in {what}")
            return self.strings(count, what)
        if kind == _ARRAY:
            self.check_count(count, 12, f"arrays in {what}")
            return [self.array(what, depth + 1) for _ in range(count)]
        return list(self.numbers(kind, count, what))

    def numbers(self, kind: int, count: int, what: str) -> tuple[Any, ...]:
        if kind not in _NUMBERS:
            self.fail(f"{what} has type {kind}, which GGUF does not have")
        size = struct.calcsize("<" + _NUMBERS[kind])
        start = self.take(count * size, what)
        if count > _MOST_NUMBERS:
            self.fail(f"{what} has {count} numbers, more than any vocabulary: refused")
        return struct.unpack_from(f"<{count}{_NUMBERS[kind]}", self.data, start)

    def strings(self, count: int, what: str) -> list[str]:
        """As `string`, `count` times: a vocabulary has a hundred thousand, so the loop is tight."""
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
            self.fail(f"string {len(strings)} of {what} is not UTF-8: {error.reason}")
        except struct.error:
            at = size + 1
        if at > size:
            self.fail(f"string {len(strings)} of {what} ends past the end of the file: truncated")
        self.at = at
        return strings

    def alignment(self, metadata: Mapping[str, Any]) -> int:
        value = metadata.get("general.alignment", 32)
        if type(value) is not int or value < 8 or value & (value - 1):
            self.fail(f"general.alignment is {value!r}: it should be a power of two, 8 or more")
        return value

    def tensor(self) -> _Info:
        """One line of the tensor table; `start` still counts from the beginning of the data."""
        name = self.string("a tensor's name")
        what = f"tensor {name!r}"
        n_dims = self.u32(what)
        if not 1 <= n_dims <= 4:
            self.fail(f"{what} has {n_dims} dimensions: GGUF has 1 to 4")
        dims = [self.u64(what) for _ in range(n_dims)]
        if min(dims) == 0 or math.prod(dims) >= 1 << 63:
            self.fail(f"{what} has absurd dimensions {dims}")
        kind, start = self.u32(what), self.u64(what)
        if kind not in _TYPES:
            self.fail(f"{what} has ggml type {kind}; pentad knows {', '.join(sorted(_TYPES.values()))}")
        type_name = _TYPES[kind]
        plain = _PLAIN.get(type_name)
        block, block_bytes = (1, plain.itemsize) if plain else BLOCKS[type_name]
        if dims[0] % block:
            self.fail(f"{what}: rows of {dims[0]} are not whole {type_name} blocks of {block}")
        nbytes = math.prod(dims) // block * block_bytes
        return _Info(name, tuple(reversed(dims)), type_name, start, nbytes)

    def check_names(self, infos: list[_Info]) -> None:
        seen: set[str] = set()
        for info in infos:
            if info.name in seen:
                self.fail(f"tensor {info.name!r} is in the table twice")
            seen.add(info.name)

    def place(self, infos: list[_Info], alignment: int) -> list[_Info]:
        """The table with `start` counted from the beginning of the file, once it is sound."""
        base = -(-self.at // alignment) * alignment
        end, before = base, ""
        for info in sorted(infos, key=lambda info: info.start):
            start = base + info.start
            if start % alignment:
                self.fail(f"tensor {info.name!r} at offset {info.start} is not aligned to {alignment}")
            if start < end:
                self.fail(f"tensors {before!r} and {info.name!r} overlap")
            end, before = start + info.nbytes, info.name
        if infos and end > self.size:
            self.fail(
                f"{end - self.size} bytes are missing: tensor {before!r} ends at byte {end}, the "
                f"file at {self.size}: truncated; download it again"
            )
        return [replace(info, start=base + info.start) for info in infos]

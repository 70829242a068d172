"""Metadata in the header of a GGUF file, read defensively and without torch.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little
endian. Each size in a header is checked against the file before memory of that size is allocated.
"""

import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from pentad.weights.files import refuse

MAGIC = b"GGUF"
STRING, ARRAY = 8, 9
NUMBERS = {**dict(enumerate("BbHhIif?")), 10: "Q", 11: "q", 12: "d"}
"""Type of a metadata value -> code of the module struct."""

_U64 = struct.Struct("<Q")
_MIN_KEY_BYTES = 8 + 4 + 1  # an empty name, a type, a value of one byte
_MAX_NUMBERS = 1 << 22  # in one array: as Python's numbers they take 30 times the bytes in the file
_MAX_NESTING = 8  # arrays of arrays; published files have none


def read_metadata(path: Path) -> dict[str, Any]:
    """Read a file's metadata under its own keys; the tensor table is not read.

    Raises:
        BadInput: the file, which the message names, is damaged, incomplete or of an unknown version.
    """
    with mapped_header(path) as data:
        return HeaderReader(path, data).start()[1]


@contextmanager
def mapped_header(path: Path) -> Iterator[mmap.mmap]:
    """Map a file while its header is read."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if size < 24:
                refuse(path, f"{size} bytes are too few for a GGUF file: a cut-off download?")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                yield data
    except OSError as error:
        refuse(path, f"cannot be read: {error.strerror or error}")


class HeaderReader:
    """A cursor over the mapped bytes of one file. In errors, `label` names the value that is being read."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.size, self.at = path, data, len(data), 0

    def fail(self, message: str) -> NoReturn:
        refuse(self.path, message)

    def start(self) -> tuple[int, dict[str, Any]]:
        """The number of tensors, and the metadata."""
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
        return tensor_count, self.metadata(key_count)

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

"""Damaged GGUF files: each gives one line that names the problem."""

import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pentad.errors import BadInput
from pentad.weights.gguf import open_gguf

ARRAY, STRING, U32, U64 = 9, 8, 4, 10
F32, Q4_0 = 0, 2


def string(text: str | bytes) -> bytes:
    content = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(content)) + content


def key(name: str | bytes, value_type: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", value_type) + value


def array(value_type: int, count: int, values: bytes) -> bytes:
    return struct.pack("<IQ", value_type, count) + values


def tensor(name: str | bytes = "x", dims: tuple[int, ...] = (8,), value_type: int = F32, offset: int = 0) -> bytes:
    fields = f"<I{len(dims)}QIQ"
    return string(name) + struct.pack(fields, len(dims), *dims, value_type, offset)


KEYS = [
    key("general.architecture", STRING, string("llama")),
    key("words", ARRAY, array(STRING, 3, string("a") + string("") + string("é"))),
    key("nested", ARRAY, array(ARRAY, 1, array(U32, 2, struct.pack("<2I", 1, 2)))),
    key("general.alignment", U32, struct.pack("<I", 32)),
]
TENSORS = [tensor("x"), tensor("y", (32, 2), Q4_0, 32), tensor("z", (2, 2), F32, 96)]


def build(
    keys: list[bytes] = KEYS,
    tensors: list[bytes] = TENSORS,
    *,
    data: int = 160,
    magic: bytes = b"GGUF",
    version: int = 3,
    **claims: int,
) -> bytes:
    """Build a file, valid with the default arguments; `claims` replaces the counts in the header."""
    header = magic + struct.pack(
        "<IQQ", version, claims.get("tensor_count", len(tensors)), claims.get("key_count", len(keys))
    )
    header += b"".join(keys) + b"".join(tensors)
    return header + bytes(-len(header) % 32) + bytes(data)


VALID = build()
MANY = 10**12

BAD: dict[str, tuple[bytes, str]] = {
    "magic": (build(magic=b"GGML"), "does not begin with GGUF"),
    "version 1": (build(version=1), "GGUF version 1; pentad reads versions 2 and 3"),
    "version 4": (build(version=4), "GGUF version 4"),
    "big-endian": (build(version=3 << 24), "a big-endian GGUF"),
    "short": (VALID[:20], "20 bytes are too few"),
    "tensors": (build(tensor_count=MANY), f"the header claims {MANY} tensors"),
    "keys": (build(key_count=MANY), f"the header claims {MANY} metadata keys"),
    "name of a key": (build([struct.pack("<Q", MANY)]), "metadata key 0 .* would take"),
    "key not UTF-8": (build([key(b"\xff", U32, bytes(4))]), "key 0 is not UTF-8"),
    "key twice": (build([KEYS[0], KEYS[0]]), "'general.architecture' is there twice"),
    "value not UTF-8": (build([key("k", STRING, string(b"\xff"))]), "'k' is not UTF-8"),
    "value's type": (build([key("k", 13, bytes(8))]), "value of 'k' has type 13"),
    "value too long": (build([key("k", STRING, struct.pack("<Q", MANY))]), "would take 10+ bytes"),
    "numbers": (build([key("k", ARRAY, array(U64, MANY, b""))]), "value of 'k' .* would take 8"),
    "huge numbers": (build([key("k", ARRAY, array(U64, 2**64 - 1, b""))]), "value of 'k'"),
    "strings": (build([key("k", ARRAY, array(STRING, MANY, b""))]), "claims 10+ strings in"),
    "string of an array": (
        build([key("k", ARRAY, array(STRING, 2, string("a") + struct.pack("<Q", MANY)))]),
        "string 1 of the value of 'k' ends past the end",
    ),
    "string of an array not UTF-8": (
        build([key("k", ARRAY, array(STRING, 2, string("a") + string(b"\x80")))]),
        "string 1 of the value of 'k' is not UTF-8",
    ),
    "arrays": (build([key("k", ARRAY, array(ARRAY, MANY, b""))]), "claims 10+ arrays in"),
    "type of an array": (build([key("k", ARRAY, array(99, 1, b""))]), "'k' has type 99"),
    "nesting": (build([key("k", ARRAY, array(ARRAY, 1, b"") * 5000)]), "nested more than 8 deep"),
    "alignment 0": (build([key("general.alignment", U32, bytes(4))]), "general.alignment is 0"),
    "alignment 24": (build([key("general.alignment", U32, b"\x18\0\0\0")]), "alignment is 24"),
    "alignment is text": (build([key("general.alignment", STRING, string("x"))]), "is 'x'"),
    "no dimensions": (build(tensors=[tensor(dims=())]), "'x' has 0 dimensions"),
    "five dimensions": (build(tensors=[tensor(dims=(1,) * 5)]), "'x' has 5 dimensions"),
    "huge dimensions": (build(tensors=[tensor(dims=(2**62, 2**62))]), "absurd dimensions"),
    "overflow to 0": (build(tensors=[tensor(dims=(2**32, 2**32))]), "absurd dimensions"),
    "empty dimension": (build(tensors=[tensor(dims=(8, 0))]), r"absurd dimensions \[8, 0\]"),
    "large dimensions": (build(tensors=[tensor(dims=(MANY,))]), "bytes are missing: tensor 'x'"),
    "part of a block": (build(tensors=[tensor(dims=(33,), value_type=Q4_0)]), "33 are not whole q4_0"),
    "type": (build(tensors=[tensor(value_type=4)]), "ggml type 4; pentad knows bf16, f16"),
    "misaligned": (build(tensors=[tensor(offset=4)]), "offset 4 is not aligned to 32"),
    "far away": (build(tensors=[tensor(offset=2**63)]), "bytes are missing: tensor 'x'"),
    "overlapping": (build(tensors=[tensor("x", (16,)), tensor("y", offset=32)]), "tensors 'x' and 'y' overlap"),
    "name twice": (build(tensors=[tensor(), tensor(offset=32)]), "'x' is in the table twice"),
    "name not UTF-8": (build(tensors=[tensor(b"\xff")]), "a tensor's name is not UTF-8"),
    "missing data": (VALID[:-100], "52 bytes are missing: tensor 'z' ends at byte"),
}


def refused(path: Path) -> str | None:
    """The error message for a file; None if it opens and can be read to the last byte."""
    try:
        checkpoint = open_gguf(path)
    except BadInput as error:
        return str(error)
    for entry in checkpoint.tensors.values():
        value = entry.read()
        assert value.shape == entry.shape
        blocks = value if isinstance(value, torch.Tensor) else value.blocks
        assert blocks.nbytes == entry.nbytes
        blocks.view(torch.uint8).sum()
    return None


def assert_refused(path: Path) -> None:
    message = refused(path)
    assert message is not None
    assert message.startswith(str(path))
    assert "\n" not in message


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf") / "model.gguf"


def test_the_valid_file_opens(path: Path) -> None:
    path.write_bytes(VALID)
    assert refused(path) is None
    checkpoint = open_gguf(path)
    shapes = {name: entry.shape for name, entry in checkpoint.tensors.items()}
    assert shapes == {"x": (8,), "y": (2, 32), "z": (2, 2)}
    assert checkpoint.config == {
        "general.architecture": "llama",
        "words": ["a", "", "é"],
        "nested": [[1, 2]],
        "general.alignment": 32,
    }


@pytest.mark.parametrize("case", BAD)
def test_errors_name_the_problem(path: Path, case: str) -> None:
    content, message = BAD[case]
    path.write_bytes(content)
    with pytest.raises(BadInput, match=message):
        open_gguf(path)
    assert_refused(path)


def test_every_truncation_is_refused(path: Path) -> None:
    for size in range(len(VALID) - 48):  # the last 48 bytes are padding
        path.write_bytes(VALID[:size])
        assert_refused(path)


def test_error_messages_are_short(path: Path) -> None:
    path.write_bytes(build(tensors=[tensor("x" * 100_000, dims=())]))
    assert len(str(refused(path))) < 1000 + len(str(path))


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"absent\.gguf: .*No such file"):
        open_gguf(tmp_path / "absent.gguf")


def peak_bytes(path: Path) -> int:
    """Peak memory while a file is opened, successfully or not."""
    tracemalloc.start()
    try:
        message = refused(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert message is None or "\n" not in message
    return peak


def test_memory_for_many_small_values_is_proportional_to_the_file(path: Path) -> None:
    values = array(2, 500_000, bytes(range(256)) * 3906 + bytes(64))
    path.write_bytes(build([key("k", ARRAY, values)]))
    assert peak_bytes(path) < 40 * path.stat().st_size


NUMBERS = st.sampled_from([0, 1, 7, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, MANY])


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """The valid file with changed bytes and integers, removed or repeated parts, or a truncated end."""
    content = bytearray(VALID)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        match draw(st.sampled_from(["byte", "u64", "u32", "cut", "double", "end"])):
            case "byte":
                content[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case "u64":
                content[at : at + 8] = draw(NUMBERS).to_bytes(8, "little")
            case "u32":
                content[at : at + 4] = draw(st.integers(0, 64)).to_bytes(4, "little")
            case "cut":
                del content[at : at + draw(st.integers(1, 40))]
            case "double":
                content[at:at] = content[at : at + draw(st.integers(1, 40))]
            case "end":
                del content[at:]
    return bytes(content)


@settings(max_examples=500)
@given(content=damaged() | st.binary(max_size=200).map(lambda tail: VALID[:8] + tail))
def test_fuzz(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert peak_bytes(path) < 100_000 + 40 * len(content)

"""pentad reads files that the safetensors library writes, and refuses damaged files."""

import json
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pentad.errors import BadInput
from pentad.weights.safetensors import DTYPES, read_safetensors


def build(header: Any, data: int = 0, length: int | None = None) -> bytes:
    """Build a file with any header; `length` replaces the header's length."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(content) if length is None else length).to_bytes(8, "little") + content + bytes(data)


def info(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


VALID = build({"__metadata__": {"format": "pt"}, "x": info(), "y": info("BF16", (2, 2), (8, 16))}, 16)

BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a safetensors file but an empty file"),
    "no model": (b"\x89PNG\r\n\x1a\n" * 9, "not a safetensors file but a picture"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    "header past the end": (VALID[:40], "truncated: the header alone takes"),
    "header too large": (build(b"{", length=10**12), "claims 10+ bytes, the format allows 100000000"),
    "truncated": (VALID[:-3], "truncated: 3 of .* bytes are missing"),
    "dtype": (build({"x": info("F13")}, 8), "tensor 'x': dtype 'F13' is not one of BOOL, U8"),
    "dtype that torch lacks": (build({"x": info("F4", (16,))}, 8), "tensor 'x': dtype 'F4' is not"),
    "shape": (build({"x": info(shape=(3,))}, 8), r"'x' of \[3\] F32 takes 12 bytes, its offsets"),
    "absurd shape": (build({"x": info(shape=(10**12, 10**12))}, 8), "'x' of .* takes 40+ bytes"),
    "outside": (build({"x": info(offsets=(10**12, 10**12 + 8))}, 8), "of 10+.* bytes are missing"),
    "overlap": (build({"x": info(), "y": info(offsets=(4, 12))}, 12), "invalid offset"),
    "gap": (build({"x": info(), "y": info(offsets=(12, 20))}, 20), "offset"),
    "negative": (build({"x": info(offsets=(-8, 0))}, 8), "JSON"),
    "a dtype of a megabyte": (build({"x": info("F\n" * 500_000)}, 8), "tensor 'x': dtype 'F"),
    "no table": (build({"x": 1}), "header"),
    "no JSON": (build(b"{" * 50), "JSON"),
    "nesting": (build(b'{"a":' * 100_000), "JSON"),
    "not UTF-8": (build(b'{"\xff":1}'), "header"),
}


def refused(path: Path) -> str | None:
    """The error message for a file; None if it opens and can be read to the last byte."""
    try:
        entries = read_safetensors(path)
    except BadInput as error:
        return str(error)
    for entry in entries.values():
        tensor = entry.read()
        assert isinstance(tensor, torch.Tensor)
        assert tensor.nbytes == entry.nbytes
        tensor.flatten().view(torch.uint8).sum()
    return None


def assert_refused(path: Path) -> None:
    message = refused(path)
    assert message is not None
    assert message.startswith(str(path))
    assert len(message) < 1000
    assert "\n" not in message


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("safetensors") / "model.safetensors"


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype(path: Path, dtype: torch.dtype) -> None:
    values = torch.randint(0, 2, (2, 3, 4)).to(dtype)
    save_file({"x": values, "scalar": values[0, 0, 0].clone()}, path)
    entries = read_safetensors(path)
    assert entries["scalar"].shape == ()
    entry = entries["x"]
    assert (entry.shape, entry.dtype, entry.quantization) == ((2, 3, 4), dtype, None)
    assert entry.nbytes == 24 * dtype.itemsize
    tensor = entry.read()
    assert isinstance(tensor, torch.Tensor)
    assert torch.equal(tensor.view(torch.uint8), values.view(torch.uint8))


def test_tensors_are_views_of_the_mapping(path: Path) -> None:
    save_file({"x": torch.randn(64)}, path)
    entry = read_safetensors(path)["x"]
    first, second = entry.read(), entry.read()
    assert isinstance(first, torch.Tensor)
    assert isinstance(second, torch.Tensor)
    assert first.data_ptr() == second.data_ptr()


def test_pickled_tensors_exclude_the_rest_of_the_file(path: Path) -> None:
    save_file({"x": torch.randn(64).bfloat16(), "z": torch.zeros(10_000)}, path)
    x = read_safetensors(path)["x"].read()
    assert torch.equal(pickle.loads(pickle.dumps(x)), x)
    assert len(pickle.dumps(x)) < 10_000


def test_the_valid_file_opens(path: Path) -> None:
    path.write_bytes(VALID)
    assert refused(path) is None
    assert list(read_safetensors(path)) == ["x", "y"]


@pytest.mark.parametrize("case", BAD)
def test_errors_name_the_problem(path: Path, case: str) -> None:
    content, message = BAD[case]
    path.write_bytes(content)
    with pytest.raises(BadInput, match=message):
        read_safetensors(path)
    assert_refused(path)


def test_every_truncation_is_refused(path: Path) -> None:
    for size in range(len(VALID)):
        path.write_bytes(VALID[:size])
        assert_refused(path)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    content = bytearray(VALID)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        match draw(st.sampled_from(["byte", "digit", "cut", "double", "end"])):
            case "byte":
                content[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case "digit":
                content[at : at + 1] = str(draw(st.integers(-1, 10**20))).encode()
            case "cut":
                del content[at : at + draw(st.integers(1, 40))]
            case "double":
                content[at:at] = content[at : at + draw(st.integers(1, 40))]
            case "end":
                del content[at:]
    if draw(st.booleans()):  # the header's length fits the damaged content
        content[:8] = (len(content) - 24).to_bytes(8, "little", signed=True)
    return bytes(content)


@settings(max_examples=500)
@given(content=damaged() | st.binary(max_size=200))
def test_fuzz(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    tracemalloc.start()
    try:
        message = refused(path)
        assert tracemalloc.get_traced_memory()[1] < 100_000 + 40 * len(content)
    finally:
        tracemalloc.stop()
    assert message is None or "\n" not in message

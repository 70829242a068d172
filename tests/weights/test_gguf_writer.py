"""GGUF files that pentad writes, read by ggml's own package and by pentad."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pentad.weights
from pentad.errors import BadInput
from pentad.weights.gguf_writer import write_gguf
from pentad.weights.quantized import BLOCKS, QuantizedTensor
from pentad.weights.quantizer import QUANTIZED, quantize
from pentad.weights.writing import PendingTensor

Value = Tensor | QuantizedTensor
ARCHITECTURE = {"general.architecture": "llama"}


def pending_tensors(tensors: dict[str, Value]) -> list[PendingTensor]:
    return [
        PendingTensor(name, tuple(v.shape), v.type if isinstance(v, QuantizedTensor) else v.dtype, lambda v=v: v)  # type: ignore[misc]
        for name, v in tensors.items()
    ]


def raw(value: Value) -> bytes:
    tensor = value.blocks if isinstance(value, QuantizedTensor) else value
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def assert_holds(path: Path, tensors: dict[str, Value]) -> None:
    """Check that pentad reads all tensors, given a file or any part of a split file."""
    entries = pentad.weights.open(path).tensors
    assert list(entries) == list(tensors)
    for name, entry in entries.items():
        value = tensors[name]
        assert entry.shape == tuple(value.shape)
        assert (entry.dtype, entry.quantization) == (
            (None, value.type) if isinstance(value, QuantizedTensor) else (value.dtype, None)
        )
        assert raw(entry.read()) == raw(value)


@st.composite
def named_tensors(draw: st.DrawFn) -> dict[str, Value]:
    tensors: dict[str, Value] = {}
    plain = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
    plain += [torch.int8, torch.int16, torch.int32, torch.int64]
    for name in draw(st.lists(st.text(st.characters(codec="utf-8"), max_size=8), unique=True, max_size=5)):
        ggml_type = draw(st.sampled_from([*plain, *BLOCKS]))
        rows = draw(st.lists(st.integers(1, 3), max_size=3))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        if isinstance(ggml_type, str):
            size, nbytes = BLOCKS[ggml_type]
            blocks = torch.randint(256, (int(np.prod(rows)), 2 * nbytes), dtype=torch.uint8, generator=generator)
            tensors[name] = QuantizedTensor(blocks, ggml_type, (*rows, 2 * size))
        else:
            shape = (*rows, draw(st.integers(1, 9)))
            tensors[name] = torch.randint(-9, 9, shape, generator=generator).to(ggml_type)
    return tensors


@settings(max_examples=100)
@given(tensors=named_tensors(), shard_bytes=st.none() | st.integers(1, 300))
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Value], shard_bytes: int | None
) -> None:
    folder = tmp_path_factory.mktemp("written")
    paths = write_gguf(folder / "m.gguf", ARCHITECTURE, pending_tensors(tensors), shard_bytes=shard_bytes)
    assert sorted(paths) == sorted(folder.iterdir())
    assert_holds(paths[-1], tensors)
    written = [tensor for path in paths for tensor in GGUFReader(path).tensors]
    assert [tensor.name for tensor in written] == list(tensors)
    for tensor in written:
        value = tensors[tensor.name]
        assert tuple(reversed(tensor.shape.tolist())) == tuple(value.shape)
        assert tensor.data.tobytes() == raw(value)


def test_bytes_equal_ggmls_writer(tmp_path: Path) -> None:
    metadata: dict[str, Any] = {"general.architecture": "llama", "llama.block_count": 2, "a.list": [1, 2], "b": 0.5}
    tensors: dict[str, Value] = {"x": torch.randn(3, 5), "y": torch.arange(7, dtype=torch.int32), "z": torch.ones(2, 2)}
    writer = GGUFWriter(tmp_path / "theirs.gguf", "llama")
    writer.add_block_count(2)
    writer.add_array("a.list", [1, 2])
    writer.add_float32("b", 0.5)
    for name, tensor in tensors.items():
        assert isinstance(tensor, Tensor)
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    write_gguf(tmp_path / "ours.gguf", metadata, pending_tensors(tensors))
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


@pytest.mark.parametrize(
    ("value", "types"),
    [
        (3, [GGUFValueType.UINT32]),
        (2**32 - 1, [GGUFValueType.UINT32]),
        (2**32, [GGUFValueType.UINT64]),
        (-1, [GGUFValueType.INT32]),
        (-(2**40), [GGUFValueType.INT64]),
        (0.25, [GGUFValueType.FLOAT32]),
        (True, [GGUFValueType.BOOL]),
        ("", [GGUFValueType.STRING]),
        ("naïve 🦙\n", [GGUFValueType.STRING]),
        ([1, 2, 3], [GGUFValueType.ARRAY, GGUFValueType.INT32]),
        ([1, -(2**33)], [GGUFValueType.ARRAY, GGUFValueType.INT64]),
        ([0.5, 2], [GGUFValueType.ARRAY, GGUFValueType.FLOAT32]),
        ([True, False], [GGUFValueType.ARRAY, GGUFValueType.BOOL]),
        (["a", "", "ß"], [GGUFValueType.ARRAY, GGUFValueType.STRING]),
        (("a",), [GGUFValueType.ARRAY, GGUFValueType.STRING]),
        (np.uint16(7), [GGUFValueType.UINT16]),
        (np.int8(-7), [GGUFValueType.INT8]),
        (np.float64(1e300), [GGUFValueType.FLOAT64]),
        (np.bool_(True), [GGUFValueType.BOOL]),
        (np.array([1, 2], np.uint64), [GGUFValueType.ARRAY, GGUFValueType.UINT64]),
        (np.array([], np.float32), None),
        ([], None),
    ],
    ids=str,
)
def test_metadata(tmp_path: Path, value: Any, types: list[GGUFValueType] | None) -> None:
    (path,) = write_gguf(tmp_path / "m.gguf", {**ARCHITECTURE, "k": value, "after": 1}, [])
    ours = pentad.weights.open(path).config
    plain = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    plain = list(plain) if isinstance(plain, tuple) else plain
    assert ours == {**ARCHITECTURE, "k": plain, "after": 1}
    if types is not None:  # ggml's package drops the type of empty arrays
        field = GGUFReader(path).get_field("k")
        assert field is not None
        assert (field.types, field.contents()) == (types, plain)


@pytest.mark.parametrize("value", [None, {}, [1, "a"], [True, 2], [[1], [2]], 1j, b"x", 2**70, np.array(["a"]), [None]])
def test_metadata_that_gguf_cannot_store_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ValueError, match="metadata key 'k'"):
        write_gguf(tmp_path / "m.gguf", {"k": value}, [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ggml_type", [*QUANTIZED, torch.float16, torch.bfloat16], ids=str)
def test_tensors_are_quantized_while_writing(tmp_path: Path, ggml_type: str | torch.dtype) -> None:
    value = torch.randn(6, 256)
    (path,) = write_gguf(tmp_path / "m.gguf", ARCHITECTURE, [PendingTensor("x", (6, 256), ggml_type, lambda: value)])
    if isinstance(ggml_type, torch.dtype):
        assert_holds(path, {"x": value.to(ggml_type)})
    else:
        assert_holds(path, {"x": QuantizedTensor(quantize(value, ggml_type), ggml_type, (6, 256))})


def test_split_files(tmp_path: Path) -> None:
    metadata = {**ARCHITECTURE, "llama.block_count": 2, "split.count": 9, "general.alignment": 64}
    tensors: dict[str, Value] = {name: torch.randn(3, 7) for name in "abcde"}
    paths = write_gguf(tmp_path / "m.Q8_0.gguf", metadata, pending_tensors(tensors), shard_bytes=170)
    assert [path.name for path in paths] == [f"m.Q8_0-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
    for number, path in enumerate(paths):
        checkpoint = pentad.weights.open(path)
        assert checkpoint.path == paths[0]
        assert checkpoint.config["llama.block_count"] == 2
        assert_holds(path, tensors)
        reader = GGUFReader(path)
        types = {
            "split.no": (GGUFValueType.UINT16, number),
            "split.count": (GGUFValueType.UINT16, 3),
            "split.tensors.count": (GGUFValueType.INT32, 5),
        }
        for key, (ggml_type, value) in types.items():
            field = reader.get_field(key)
            assert field is not None
            assert (field.types, field.contents()) == ([ggml_type], value)
    (path,) = write_gguf(tmp_path / "one.gguf", metadata, pending_tensors(tensors), shard_bytes=420)
    assert "split.count" not in pentad.weights.open(path).config
    assert path == tmp_path / "one.gguf"
    assert_holds(path, tensors)


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ([PendingTensor("x", (32,), torch.float32, lambda: torch.ones(32))] * 2, ValueError, "twice"),
        ([PendingTensor("x", (), torch.float32, lambda: torch.ones(()))], ValueError, "'x' has 0 dimensions"),
        ([PendingTensor("x", (1,) * 5, torch.float32, lambda: torch.ones(()))], ValueError, "'x' has 5 dimensions"),
        ([PendingTensor("x", (2,), torch.uint8, lambda: torch.ones(()))], ValueError, "'x': .*torch.uint8"),
        ([PendingTensor("x", (40,), "q4_0", lambda: torch.ones(40))], BadInput, "'x' .*blocks of 32"),
        ([PendingTensor("x", (256,), "q5_k", lambda: torch.ones(256))], BadInput, "quantizes to .*q5_k"),
    ],
)
def test_invalid_tensors_are_refused(
    tmp_path: Path, tensors: list[PendingTensor], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        write_gguf(tmp_path / "m.gguf", ARCHITECTURE, tensors)
    assert not list(tmp_path.iterdir())

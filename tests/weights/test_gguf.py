"""GGUF files that ggml's own package writes, read by pentad."""

import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from gguf.quants import dequantize, quantize

import pentad.weights
from pentad.errors import BadInput
from pentad.weights.quantized import BLOCKS, QuantizedTensor


def write(path: Path, fill: Callable[[GGUFWriter], None]) -> Path:
    """Write a GGUF file that `fill(writer)` fills."""
    writer = GGUFWriter(path, "llama")
    fill(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantized_blocks(name: str, rows: int, columns: int) -> np.ndarray:
    """Quantize with ggml's package, or make random blocks of types that it can't quantize to."""
    rng = np.random.default_rng(0)
    ggml_type = GGMLQuantizationType[name.upper()]
    try:
        return quantize(rng.standard_normal((rows, columns)).astype(np.float32), ggml_type)
    except NotImplementedError:
        size, nbytes = BLOCKS[name]
        return rng.integers(0, 256, (rows, columns // size * nbytes), dtype=np.uint8)


def test_metadata_of_every_type(tmp_path: Path) -> None:
    scalars = {
        GGUFValueType.UINT8: 255,
        GGUFValueType.INT8: -128,
        GGUFValueType.UINT16: 65535,
        GGUFValueType.INT16: -32768,
        GGUFValueType.UINT32: 2**32 - 1,
        GGUFValueType.INT32: -(2**31),
        GGUFValueType.FLOAT32: 0.25,
        GGUFValueType.BOOL: True,
        GGUFValueType.STRING: "naïve 🦙\n",
        GGUFValueType.UINT64: 2**64 - 1,
        GGUFValueType.INT64: -(2**63),
        GGUFValueType.FLOAT64: 1e300,
    }

    def fill(writer: GGUFWriter) -> None:
        for ggml_type, value in scalars.items():
            writer.add_key_value(f"one.{ggml_type.name}", value, ggml_type)
            writer.add_key_value(f"many.{ggml_type.name}", [value, value], GGUFValueType.ARRAY, sub_type=ggml_type)
        writer.add_array("nested", [[1, 2], [3]])
        writer.add_array("words", ["", "a", "ein längeres"])

    config = pentad.weights.open(write(tmp_path / "m.gguf", fill)).config
    assert config["general.architecture"] == "llama"
    for ggml_type, value in scalars.items():
        assert config[f"one.{ggml_type.name}"] == value
        assert type(config[f"one.{ggml_type.name}"]) is type(value)
        assert config[f"many.{ggml_type.name}"] == [value, value]
    assert config["nested"] == [[1, 2], [3]]
    assert config["words"] == ["", "a", "ein längeres"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "int8", "int16", "int32", "int64"])
def test_plain_tensors(tmp_path: Path, dtype: str) -> None:
    array = (np.arange(24).reshape(2, 3, 4) - 7).astype(dtype)
    path = write(tmp_path / "m.gguf", lambda writer: writer.add_tensor("x", array))
    entry = pentad.weights.open(path).tensors["x"]
    assert (entry.shape, entry.dtype, entry.quantization) == ((2, 3, 4), getattr(torch, dtype), None)
    assert entry.nbytes == array.nbytes
    tensor = entry.read()
    assert isinstance(tensor, torch.Tensor)
    assert torch.equal(tensor, torch.from_numpy(array))


def test_bfloat16(tmp_path: Path) -> None:
    values = torch.randn(3, 8).bfloat16()
    path = write(
        tmp_path / "m.gguf",
        lambda writer: writer.add_tensor("x", values.view(torch.uint8).numpy(), raw_dtype=GGMLQuantizationType.BF16),
    )
    tensor = pentad.weights.open(path).tensors["x"].read()
    assert isinstance(tensor, torch.Tensor)
    assert torch.equal(tensor, values)


@pytest.mark.parametrize("name", BLOCKS)
def test_quantized_tensors(tmp_path: Path, name: str) -> None:
    blocks = quantized_blocks(name, 6, 512)
    ggml_type = GGMLQuantizationType[name.upper()]

    def fill(writer: GGUFWriter) -> None:
        writer.add_tensor("before", np.zeros(3, np.float32))
        writer.add_tensor("x", blocks, raw_dtype=ggml_type)
        writer.add_tensor("experts", blocks.reshape(2, 3, -1), raw_dtype=ggml_type)

    tensors = pentad.weights.open(write(tmp_path / "m.gguf", fill)).tensors
    entry = tensors["x"]
    assert (entry.shape, entry.dtype, entry.quantization) == ((6, 512), None, name)
    tensor, experts = entry.read(), tensors["experts"].read()
    assert isinstance(tensor, QuantizedTensor)
    assert isinstance(experts, QuantizedTensor)
    assert (tensor.type, tensor.shape, experts.shape) == (name, (6, 512), (2, 3, 512))
    assert entry.nbytes == tensor.blocks.nbytes == blocks.nbytes
    np.testing.assert_array_equal(tensor.blocks.numpy(), blocks)
    np.testing.assert_array_equal(experts.blocks.numpy(), blocks)
    with np.errstate(all="ignore"):
        expected = dequantize(blocks, ggml_type)
    np.testing.assert_array_equal(tensor.dequantize().numpy(), expected)


def test_version_2_and_an_alignment(tmp_path: Path) -> None:
    def fill(writer: GGUFWriter) -> None:
        writer.add_custom_alignment(64)
        writer.add_tensor("x", np.arange(5, dtype=np.float32))
        writer.add_tensor("y", np.arange(5, 8, dtype=np.float32))

    path = write(tmp_path / "m.gguf", fill)
    content = bytearray(path.read_bytes())
    content[4:8] = struct.pack("<I", 2)
    path.write_bytes(content)
    tensors = pentad.weights.open(path).tensors
    assert [entry.read().tolist() for entry in tensors.values()] == [[0, 1, 2, 3, 4], [5, 6, 7]]


def test_tensors_share_one_private_mapping(tmp_path: Path) -> None:
    def fill(writer: GGUFWriter) -> None:
        writer.add_tensor("x", np.arange(64, dtype=np.float32))
        writer.add_tensor("y", quantized_blocks("q4_0", 4, 64), raw_dtype=GGMLQuantizationType.Q4_0)

    path = write(tmp_path / "m.gguf", fill)
    content = path.read_bytes()
    tensors = pentad.weights.open(path).tensors
    x, y = tensors["x"].read(), tensors["y"].read()
    assert isinstance(x, torch.Tensor)
    assert isinstance(y, QuantizedTensor)
    assert y.blocks.data_ptr() - x.data_ptr() == content.index(y.blocks.numpy().tobytes()) - content.index(
        x.numpy().tobytes()
    )
    if sys.platform == "linux":
        maps = Path("/proc/self/maps").read_text().splitlines()
        (line,) = (line for line in maps if line.endswith(str(path)))
        start, end = (int(address, 16) for address in line.split()[0].split("-"))
        assert start <= x.data_ptr() < y.blocks.data_ptr() < end
    x.zero_()
    assert path.read_bytes() == content


def test_saved_and_pickled_tensors_exclude_the_rest_of_the_file(tmp_path: Path) -> None:
    def fill(writer: GGUFWriter) -> None:
        writer.add_tensor("x", np.arange(64, dtype=np.float32))
        writer.add_tensor("y", quantized_blocks("q4_0", 4, 64), raw_dtype=GGMLQuantizationType.Q4_0)
        writer.add_tensor("z", np.zeros(10_000, np.float32))

    tensors = pentad.weights.open(write(tmp_path / "m.gguf", fill)).tensors
    x, y = tensors["x"].read(), tensors["y"].read()
    assert isinstance(y, QuantizedTensor)
    torch.save({"x": x, "y": y.blocks}, tmp_path / "saved")
    saved = torch.load(tmp_path / "saved")
    assert torch.equal(saved["x"], x)
    assert torch.equal(saved["y"], y.blocks)
    assert (tmp_path / "saved").stat().st_size < 10_000
    assert len(pickle.dumps((x, y.blocks))) < 10_000


def test_a_file_with_a_vocabulary_only(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", lambda writer: writer.add_token_list(["a", "b"]))
    checkpoint = pentad.weights.open(path)
    assert checkpoint.config["tokenizer.ggml.tokens"] == ["a", "b"]
    assert not checkpoint.tensors


def write_part(folder: Path, number: int, *, count: int = 3, total: int = 3) -> Path:
    def fill(writer: GGUFWriter) -> None:
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", total)
        if number == 0:
            writer.add_uint32("llama.block_count", 7)
        writer.add_tensor(f"x.{number}", np.full(4, number, np.float32))

    return write(folder / f"m-{number + 1:05}-of-00003.gguf", fill)


def test_a_split_file_opens_from_any_part(tmp_path: Path) -> None:
    parts = [write_part(tmp_path, number) for number in range(3)]
    for path in (*parts, tmp_path):
        checkpoint = pentad.weights.open(path)
        assert checkpoint.path == parts[0]
        assert checkpoint.config["llama.block_count"] == 7
        values = {name: entry.read().tolist() for name, entry in checkpoint.tensors.items()}
        assert values == {"x.0": [0] * 4, "x.1": [1] * 4, "x.2": [2] * 4}


def test_inconsistent_split_files_are_refused(tmp_path: Path) -> None:
    parts = [write_part(tmp_path, number) for number in range(3)]
    parts[1].rename(tmp_path / "away")
    with pytest.raises(BadInput, match=r"1 of 3 .*missing: m-00002-of-00003\.gguf"):
        pentad.weights.open(parts[2])
    parts[0].rename(tmp_path / "m.gguf")
    with pytest.raises(BadInput, match=r"m\.gguf: split\.count is 3"):
        pentad.weights.open(tmp_path / "m.gguf")
    for number in range(3):
        write_part(tmp_path, number, total=4)
    with pytest.raises(BadInput, match=r"split\.tensors\.count is 4\b.*\b3 tensors"):
        pentad.weights.open(parts[0])
    write_part(tmp_path, 0).rename(parts[1])
    write_part(tmp_path, 0)
    with pytest.raises(BadInput, match=r"00002-of-00003\.gguf: split\.no and split\.count are 0"):
        pentad.weights.open(parts[0])
    write_part(tmp_path, 1, count=2)
    with pytest.raises(BadInput, match="are 1 and 2; expected 1 and 3"):
        pentad.weights.open(parts[0])


def test_a_tensor_in_two_parts_is_refused(tmp_path: Path) -> None:
    parts = [write_part(tmp_path, number) for number in range(3)]
    parts[1].write_bytes(parts[1].read_bytes().replace(b"x.1", b"x.0"))
    with pytest.raises(BadInput, match=r"'x\.0' is in another part"):
        pentad.weights.open(parts[0])


def test_a_file_that_cannot_be_mapped_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "m.gguf", lambda writer: writer.add_tensor("x", np.zeros(3)))

    def no_memory(*_: object, **__: object) -> None:
        raise RuntimeError("unable to mmap 96 bytes: Cannot allocate memory\nmore")

    monkeypatch.setattr(torch, "from_file", no_memory)  # happens for a file larger than memory
    assert torch.equal(pentad.weights.open(path).tensors["x"].read(), torch.zeros(3, dtype=torch.float64))


def test_a_file_without_tensors_needs_no_padding(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", lambda writer: writer.add_string("k", "odd"))
    content = path.read_bytes().rstrip(b"\0")
    path.write_bytes(content)
    checkpoint = pentad.weights.open(path)
    assert checkpoint.config["k"] == "odd"
    assert not checkpoint.tensors


def test_smollm2(smollm2: Path) -> None:
    checkpoint = pentad.weights.open(smollm2)
    assert checkpoint.format == "gguf"
    assert checkpoint.config["llama.block_count"] == 30
    assert len(checkpoint.config["tokenizer.ggml.tokens"]) == 49152
    types = [entry.quantization for entry in checkpoint.tensors.values()]
    assert {ggml_type: types.count(ggml_type) for ggml_type in types} == {"q8_0": 1, "q4_1": 210, None: 61}


def test_opening_does_not_import_gguf(smollm2: Path) -> None:
    code = "import sys, pentad.weights; pentad.weights.open(sys.argv[1]); assert 'gguf' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error", "-c", code, str(smollm2)], check=True)

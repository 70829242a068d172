"""Tensors as pieces of a file's bytes, for all types; quantization is compared with ggml's package."""

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize as by_gguf
from torch import Tensor

from pentad.errors import BadInput
from pentad.weights import writing
from pentad.weights.quantized import BLOCKS, QuantizedTensor
from pentad.weights.quantizer import QUANTIZED
from pentad.weights.writing import PendingTensor, pieces, split


def content(value: Tensor | QuantizedTensor, target: torch.dtype | str) -> bytes:
    return b"".join(pieces(PendingTensor("x", tuple(value.shape), target, lambda: value)))


def raw(value: Tensor) -> bytes:
    return value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def quantized(value: Tensor, target: str) -> QuantizedTensor:
    blocks = torch.frombuffer(bytearray(expected(value, target)), dtype=torch.uint8)
    return QuantizedTensor(blocks.view(value.shape[:-1].numel(), -1), target, tuple(value.shape))


def expected(value: Tensor, target: str) -> bytes:
    return by_gguf(value.float().numpy(), GGMLQuantizationType[target.upper()]).tobytes()


@pytest.fixture
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "SLAB", 256)


SHAPES = [(), (5,), (0,), (3, 0), (300,), (2, 1000), (700, 2), (3, 5, 64), (2, 3, 300), (1, 1, 257)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("small_slabs")
def test_pieces_are_small_and_join_to_the_tensor(shape: tuple[int, ...]) -> None:
    value = torch.randn(shape)
    got = list(pieces(PendingTensor("x", shape, torch.float32, lambda: value)))
    assert b"".join(got) == raw(value)
    assert max(len(piece) for piece in got) <= 256 * 4
    assert content(value, torch.bfloat16) == raw(value.bfloat16())


@pytest.mark.usefixtures("small_slabs")
def test_views_that_are_not_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    value = torch.randn(6, 70, 5).permute(2, 0, 1)
    assert content(value, torch.float32) == raw(value)
    assert content(value.half()[:, ::2], torch.float16) == raw(value.half()[:, ::2])


@pytest.mark.parametrize("target", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn], ids=str)
def test_dtypes_are_rounded_as_torch_rounds(target: torch.dtype) -> None:
    for source in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e5m2):
        value = torch.randn(4, 40).to(source)
        assert content(value, target) == raw(value.to(target))


def test_bfloat16_is_rounded_as_ggml_rounds() -> None:
    value = torch.cat((torch.randn(4096), torch.tensor([0.0, -0.0, 1e-45, 3e38, -3e38, 1.00390625, 1.01171875])))
    assert content(value, torch.bfloat16) == expected(value, "bf16")
    assert content(value.clamp(-60000, 60000), torch.float16) == expected(value.clamp(-60000, 60000), "f16")


def test_integers_are_copied_and_not_converted() -> None:
    for value in (torch.arange(7), torch.tensor([True, False]), torch.tensor([2, 3], dtype=torch.uint8)):
        assert content(value, value.dtype) == raw(value)
    with pytest.raises(ValueError, match=r"'x' is torch\.int64, .*torch\.float32"):
        content(torch.arange(7), torch.float32)
    with pytest.raises(ValueError, match=r"'x' is torch\.float32, .*torch\.int8"):
        content(torch.ones(7), torch.int8)


@pytest.mark.parametrize("target", [name for name in QUANTIZED if name != "q4_k"])  # see test_quantizer.py
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("small_slabs")
def test_quantized_blocks_equal_ggmls(target: str, source: torch.dtype) -> None:
    for shape in ((32,), (7, 96), (2, 640), (3, 5, 64)):
        value = torch.randn(shape).to(source)
        value.view(-1)[:32] = 0
        assert content(value, target) == expected(value, target)
        assert content(quantized(value, target), target) == expected(value, target)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.usefixtures("small_slabs")
def test_blocks_of_every_type_are_copied(name: str) -> None:
    size, nbytes = BLOCKS[name]
    blocks = torch.randint(256, (6, 3 * nbytes), dtype=torch.uint8)
    assert content(QuantizedTensor(blocks, name, (2, 3, 3 * size)), name) == raw(blocks)


@pytest.mark.usefixtures("small_slabs")
def test_blocks_are_requantized_to_another_type() -> None:
    value = quantized(torch.randn(6, 320), "q8_0")
    numbers = value.dequantize()
    assert content(value, torch.float16) == raw(numbers.half())
    assert content(value, "q4_1") == expected(numbers, "q4_1")


@pytest.mark.parametrize("target", [torch.float16, *QUANTIZED], ids=str)
def test_values_that_are_too_large_are_refused(target: torch.dtype | str) -> None:
    value = torch.ones(2, 256)
    value[1, 3] = -7e5
    name = str(target)
    with pytest.raises(BadInput, match=f"'x' .*7e\\+05; {name} .*65504"):
        content(value, target)
    content(value * 0.01, target)


@pytest.mark.parametrize("target", QUANTIZED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nan_is_refused_because_it_damages_its_block(target: str, dtype: torch.dtype) -> None:
    value = torch.ones(1, 256, dtype=dtype)
    value[0, 3] = torch.nan
    with pytest.raises(BadInput, match=f"'x' .*nan; {target} .*65504"):
        content(value, target)
    assert content(value, torch.float32) == raw(value.float())


def test_rows_that_are_not_whole_blocks_are_refused() -> None:
    for shape in ((4, 33), (31,), ()):
        with pytest.raises(BadInput, match=r"'x' of \[.*\] .*q4_0: .*blocks of 32"):
            _ = PendingTensor("x", shape, "q4_0", lambda: torch.ones(1)).nbytes


def test_other_quantized_types_are_refused() -> None:
    for target in ("q5_k", "iq4_nl"):
        with pytest.raises(BadInput, match=f"q4_0, q4_1, q4_k, q5_0, q5_1, q8_0, .*{target}"):
            content(torch.ones(256), target)


def test_a_tensor_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'x' is \(3, 2\); expected \(2, 3\)"):
        list(pieces(PendingTensor("x", (2, 3), torch.float32, lambda: torch.ones(3, 2))))


def test_tensors_are_split_into_shards_in_order() -> None:
    def names(shard_bytes: int | None, *sizes: int) -> list[str]:
        tensors = [PendingTensor(f"{i}", (size,), torch.uint8, lambda: torch.ones(0)) for i, size in enumerate(sizes)]
        return ["".join(tensor.name for tensor in shard) for shard in split(tensors, shard_bytes)]

    assert names(10, 4, 6, 1, 9, 1) == ["01", "23", "4"]
    assert names(10, 11, 1, 25, 5, 5) == ["0", "1", "2", "34"]
    assert names(10, 10) == ["0"]
    assert names(None, 10, 20) == ["01"]
    assert names(10) == [""]


def test_quantizing_makes_no_float32_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "SLAB", 256)
    seen: list[int] = []
    monkeypatch.setattr("gguf.quants.quantize", lambda data, target: seen.append(data.size) or by_gguf(data, target))
    content(torch.randn(40, 96).bfloat16(), "q4_0")
    assert sum(seen) == 40 * 96
    assert max(seen) <= 256

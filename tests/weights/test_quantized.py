"""Dequantizing, compared bit by bit with ggml's Python package."""

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from pentad.errors import PentadError
from pentad.weights import quantized
from pentad.weights.quantized import AFFINE4, BLOCKS, QuantizedTensor

AFFINE = ["q4_0", "q4_1", "q4_k"]
FAST = [*AFFINE, "q8_0"]


def random_blocks(name: str, rows: int, blocks_a_row: int, seed: int = 0) -> torch.Tensor:
    """Make blocks of random bits: float16 scales of all sizes, including subnormal, infinite and NaN."""
    generator = torch.Generator().manual_seed(seed)
    nbytes = blocks_a_row * BLOCKS[name][1]
    return torch.randint(0, 256, (rows, nbytes), dtype=torch.uint8, generator=generator)


def random_tensor(name: str, rows: int = 6, blocks_a_row: int = 3) -> QuantizedTensor:
    shape = (rows, blocks_a_row * BLOCKS[name][0])
    return QuantizedTensor(random_blocks(name, rows, blocks_a_row), name, shape)


def by_gguf(blocks: torch.Tensor, name: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return dequantize(blocks.numpy(), GGMLQuantizationType[name.upper()])


def assert_same_bits(ours: torch.Tensor, theirs: np.ndarray) -> None:
    numbers = ours.numpy()
    assert numbers.dtype == theirs.dtype == np.float32
    assert numbers.shape == theirs.shape
    nan = np.isnan(theirs)
    np.testing.assert_array_equal(np.isnan(numbers), nan)
    np.testing.assert_array_equal(numbers.view(np.int32)[~nan], theirs.view(np.int32)[~nan])


def test_block_sizes_equal_ggmls() -> None:
    for name, sizes in BLOCKS.items():
        assert GGML_QUANT_SIZES[GGMLQuantizationType[name.upper()]] == sizes


@pytest.mark.parametrize("name", BLOCKS)
def test_random_blocks_dequantize_as_in_ggml(name: str) -> None:
    tensor = random_tensor(name, rows=64)
    assert_same_bits(tensor.dequantize(), by_gguf(tensor.blocks, name))


@pytest.mark.parametrize("name", FAST)
def test_extreme_scales(name: str) -> None:
    tensor = random_tensor(name, rows=64)
    halves = tensor.blocks.view(-1, BLOCKS[name][1]).view(torch.float16)
    info = torch.finfo(torch.float16)
    extremes = torch.tensor([0.0, -0.0, info.max, info.min, 6e-8, -6e-8, info.tiny, torch.inf])
    for column in (0, 1) if name in ("q4_1", "q4_k") else (0,):
        halves[:, column] = extremes.half()[torch.randint(8, (len(halves),))]
    assert_same_bits(tensor.dequantize(), by_gguf(tensor.blocks, name))


@pytest.mark.parametrize("name", FAST)
def test_a_weight_of_many_slabs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = random_tensor(name, rows=10, blocks_a_row=5)
    whole = tensor.dequantize(torch.bfloat16)
    monkeypatch.setattr(quantized, "SLAB", 3 * BLOCKS[name][0])
    assert torch.equal(tensor.dequantize(torch.bfloat16).view(torch.int16), whole.view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["q4_1", "q6_k"])
def test_other_dtypes_are_float32_rounded(name: str, dtype: torch.dtype) -> None:
    tensor = random_tensor(name)
    numbers, expected = tensor.dequantize(dtype), tensor.dequantize().to(dtype)
    assert numbers.dtype == dtype
    torch.testing.assert_close(numbers, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", AFFINE)
def test_affine_form_is_exact(name: str) -> None:
    tensor = random_tensor(name, rows=32)
    expected = tensor.dequantize()
    q, scale, minimum = tensor.affine4()
    assert q.dtype == torch.int32
    assert scale.shape == minimum.shape == (32, tensor.shape[1] // 32)
    numbers = q.unflatten(1, (-1, 32)) * scale.unsqueeze(2) + minimum.unsqueeze(2)
    finite = expected.isfinite()
    assert torch.equal(numbers.flatten(1)[finite], expected[finite])
    assert (q.min(), q.max()) == (0, 15)


def test_only_four_bit_types_are_affine() -> None:
    assert list(AFFINE4) == AFFINE
    with pytest.raises(ValueError, match="q8_0; expected one of q4_0"):
        random_tensor("q8_0").affine4()


@pytest.mark.parametrize("name", ["q4_0", "q6_k"])
def test_rows_and_permuted_rows(name: str) -> None:
    tensor = random_tensor(name)
    numbers = tensor.dequantize()
    index = torch.tensor([[5, 0, 0], [2, 1, 4]])
    selected = tensor.take_rows(index)
    assert selected.shape == (2, 3, tensor.shape[1])
    torch.testing.assert_close(selected.dequantize(), numbers[index], rtol=0, atol=0, equal_nan=True)
    part = tensor.rows(2, 5)
    assert part.blocks.data_ptr() == tensor.blocks[2].data_ptr()
    assert part.shape == (3, tensor.shape[1])
    torch.testing.assert_close(part.dequantize(), numbers[2:5], rtol=0, atol=0, equal_nan=True)
    with pytest.raises(IndexError):
        tensor.take_rows(torch.tensor([6]))


def test_stacked_experts_keep_their_shape() -> None:
    experts = QuantizedTensor(random_blocks("q4_1", 12, 2), "q4_1", (3, 4, 64))
    flat = QuantizedTensor(experts.blocks, "q4_1", (12, 64))
    assert experts.dequantize().shape == experts.affine4()[0].shape == (3, 4, 64)
    torch.testing.assert_close(experts.dequantize()[1], flat.rows(4, 8).dequantize(), rtol=0, atol=0, equal_nan=True)


def test_a_type_that_the_installed_gguf_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BLOCKS, "q9_0", (32, 18))
    with pytest.raises(PentadError, match=r"gguf .*q9_0"):
        random_tensor("q9_0").dequantize()


@pytest.mark.parametrize(
    ("blocks", "name", "shape", "message"),
    [
        (torch.zeros(2, 20, dtype=torch.uint8), "q9", (2, 32), "unknown quantization 'q9'"),
        (torch.zeros(2, 20, dtype=torch.uint8), "q4_1", (2, 33), "33 columns .*q4_1"),
        (torch.zeros(2, 20, dtype=torch.uint8), "q4_1", (2, 64), r"expected torch\.uint8 \(2, 40\)"),
        (torch.zeros(2, 20), "q4_1", (2, 32), r"are torch\.float32"),
    ],
)
def test_inconsistent_blocks_and_shapes_are_refused(
    blocks: torch.Tensor, name: str, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizedTensor(blocks, name, shape)

"""Matmuls, embeddings and norms, against float64 on the dequantized weights."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pentad import kernels
from pentad.kernels import Buffer, Norm, Weight
from tests.helpers.blocks import HALVES, dequantized, random_blocks
from tests.helpers.programs import every_isa, needs_kernels, packed, product, program, run_rows

pytestmark = needs_kernels
FLOATS = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
TYPES = [*HALVES, *FLOATS]


def random_x(rows: int, columns: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def weight_of(type_name: str, rows: int, columns: int, seed: int = 0) -> tuple[Weight, Tensor]:
    """A weight for the kernels, and the same weight in float64."""
    if type_name in FLOATS:
        numbers = random_x(rows, columns, seed).to(FLOATS[type_name])
        return Weight.floats(numbers), numbers.double()
    blocks = random_blocks(type_name, rows, columns, seed)
    return packed(blocks), dequantized(blocks)


def bound(x_NK: Tensor, w_MK: Tensor, fast: bool) -> Tensor:
    """Error bounds [N, M]: rounding moves each activation by at most half a step of its block's integers, and float32
    sums have an error of a few units in the last place of the sum of absolute products."""
    x, w = x_NK.double(), w_MK.double()
    size, steps = (16, 127) if fast else (32, 32512)
    padded = torch.nn.functional.pad(x.abs(), (0, -x.shape[1] % size))
    largest = padded.unflatten(1, (-1, size)).amax(2).repeat_interleave(size, 1)[:, : x.shape[1]]
    rounding = (0.51 * largest / steps + 1e-30) @ w.abs().T
    return rounding + 3e-6 * (x.abs() @ w.abs().T)


def assert_product(y: Tensor, x: Tensor, w: Tensor, fast: bool) -> None:
    assert y.dtype == torch.float32
    assert ((y.double() - x.double() @ w.T).abs() <= bound(x, w, fast)).all()


@every_isa
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("type_name", TYPES)
def test_products_match_float64(type_name: str, fast: bool, isa: str) -> None:
    for rows, columns, n in ((16, 256, 1), (37, 512, 7), (130, 256, 130), (1, 768, 3)):
        weight, numbers = weight_of(type_name, rows, columns)
        x = random_x(n, columns)
        assert_product(product(x, weight, isa=isa, fast=fast), x, numbers, fast)


@settings(max_examples=40)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    type_name = data.draw(st.sampled_from(TYPES))
    step = 1 if type_name in FLOATS else 256 if type_name.endswith("k") else 32
    columns = step * data.draw(st.integers(1, 300 if step == 1 else 4))
    rows, n = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 130))
    fast, isa = data.draw(st.booleans()), data.draw(st.sampled_from(list(kernels.isas())))
    weight, numbers = weight_of(type_name, rows, columns, data.draw(st.integers(0, 99)))
    x = random_x(n, columns) * 10.0 ** data.draw(st.integers(-6, 6))
    assert_product(product(x, weight, isa=isa, fast=fast), x, numbers, fast)


@every_isa
@pytest.mark.parametrize("type_name", TYPES)
def test_a_row_does_not_depend_on_the_batch(type_name: str, isa: str) -> None:
    weight, _ = weight_of(type_name, 53, 512)
    x = random_x(130, 512)
    for fast in (False, True):
        whole = product(x, weight, isa=isa, fast=fast)
        for rows in ([0], [129], range(5, 8), range(3, 26), [7, 100, 7]):
            assert torch.equal(product(x, weight, isa=isa, fast=fast, rows=rows), whole[list(rows)])
        for threads in (1, 3, 5):
            assert torch.equal(product(x, weight, isa=isa, fast=fast, threads=threads), whole)


@every_isa
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("type_name", HALVES)
def test_extreme_activations(type_name: str, fast: bool, isa: str) -> None:
    weight, numbers = weight_of(type_name, 32, 256)
    for scale in (0.0, 1e-42, 1e-35, 1e-28, 1e28):
        x = random_x(4, 256) * scale
        assert_product(product(x, weight, isa=isa, fast=fast), x, numbers, fast)
    x = random_x(4, 256)
    x[:, 17] = 1e4  # much larger than the rest of its block
    x[:, 32:64] = 0
    assert_product(product(x, weight, isa=isa, fast=fast), x, numbers, fast)


@every_isa
@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_stay_in_their_row(type_name: str, bad: float, isa: str) -> None:
    weight, numbers = weight_of(type_name, 20, 256)
    x = random_x(5, 256)
    x[2, 40] = bad
    for fast in (False, True):
        y = product(x, weight, isa=isa, fast=fast)
        assert not torch.isfinite(y[2]).any()
        rest = [0, 1, 3, 4]
        assert_product(y[rest], x[rest], numbers, fast)


@every_isa
@pytest.mark.parametrize("type_name", HALVES)
def test_a_damaged_scale_stays_in_its_column(type_name: str, isa: str) -> None:
    blocks = random_blocks(type_name, 20, 256)
    halves = blocks.blocks.view(
        20, -1, blocks.blocks.shape[1] * 32 // 256 if type_name[-1] != "k" else blocks.blocks.shape[1]
    )
    halves[3, 0].view(torch.float16)[HALVES[type_name][0]] = math.nan
    y = product(random_x(3, 256), packed(blocks), isa=isa)
    assert y[:, 3].isnan().all()
    assert torch.isfinite(y[:, [i for i in range(20) if i != 3]]).all()


@every_isa
def test_largest_integers_do_not_overflow(isa: str) -> None:
    """All weights and activations at the limits of their ranges."""
    for type_name in HALVES:
        blocks = random_blocks(type_name, 16, 256)
        integers = torch.full_like(blocks.blocks, 255 if type_name != "q8_0" else 127)
        halves = blocks.blocks.view(torch.float16).view(16, -1)
        kept = halves.clone()
        blocks.blocks.copy_(integers)
        size = halves.shape[1] if type_name.endswith("k") else halves.shape[1] // 8
        for index in HALVES[type_name]:
            halves[:, index::size] = kept[:, index::size]
        numbers = dequantized(blocks)
        for sign in (1, -1):
            x = torch.full((3, 256), 3.0 * sign)
            assert_product(product(x, packed(blocks), isa=isa), x, numbers, False)


@every_isa
def test_several_weights_in_one_product(isa: str) -> None:
    """The weights have different types and numbers of rows; one has a bias."""
    blocks, other = random_blocks("q4_1", 40, 256), random_blocks("q8_0", 9, 256)
    bias, floats = random_x(1, 40)[0], random_x(23, 256)
    x = random_x(11, 256)
    y = product(x, packed(blocks, bias), packed(other), Weight.floats(floats), isa=isa)
    assert y.shape == (11, 72)
    assert_product(y[:, :40] - bias, x, dequantized(blocks), False)
    assert_product(y[:, 40:49], x, dequantized(other), False)
    assert_product(y[:, 49:], x, floats.double(), False)


@every_isa
@pytest.mark.parametrize("type_name", TYPES)
def test_embedding(type_name: str, isa: str) -> None:
    weight, numbers = weight_of(type_name, 50, 256)
    made = program(isa=isa)
    made.embed(weight, Buffer.LOGITS)
    ids = [0, 49, 17, 17, 3, *range(50)]
    assert (run_rows(made, ids).double() - numbers[ids]).abs().max() <= 1e-6 * numbers.abs().max()


@every_isa
@pytest.mark.parametrize("width", [8, 24, 96, 576])
def test_norm(width: int, isa: str) -> None:
    """Only the wanted rows are normalized."""
    x, weight = random_x(40, width), random_x(1, width, seed=2)[0]
    made = program(isa=isa)
    made.embed(Weight.floats(x))
    made.norm(Norm(weight, 1e-5), quantize=width % 32 == 0, wanted=True)
    made.matmul([Weight.floats(torch.eye(width))], Buffer.NORMED, Buffer.LOGITS, wanted=True)
    wanted = [0, 39, 5]
    y = run_rows(made, range(40), wanted)
    exact = torch.rms_norm(x[wanted].double(), (width,), eps=1e-5) * weight.double()
    assert (y.double() - exact).abs().max() <= 1e-5


@every_isa
@pytest.mark.parametrize("type_name", ["q4_1", "f32"])
def test_gated_and_added(type_name: str, isa: str) -> None:
    """x + down(silu(gate(x)) * up(x))."""
    (gate, g), (up, u), (down, d) = (
        weight_of(type_name, *shape, seed=i) for i, shape in enumerate([(96, 64), (96, 64), (64, 96)])
    )
    x = random_x(19, 64)
    made = program(isa=isa)
    made.embed(Weight.floats(x))
    made.quantize(Buffer.RESIDUAL)
    made.gated([gate, up], Buffer.RESIDUAL)
    made.quantize(Buffer.GATES)
    made.matmul([down], Buffer.GATES, Buffer.RESIDUAL, add=True)
    made.matmul([Weight.floats(torch.eye(64))], Buffer.RESIDUAL, Buffer.LOGITS)
    y = run_rows(made, range(19)).double()
    gates = x.double() @ g.T
    exact = x + (gates * gates.sigmoid() * (x.double() @ u.T)) @ d.T
    assert (y - exact).abs().max() <= 1e-3 * exact.abs().max()

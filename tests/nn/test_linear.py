"""Linear layers of quantized blocks, against float32 on the dequantized weight."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pentad.nn.linear
from pentad.nn.linear import QuantizedLinear, project
from pentad.weights.quantized import BLOCKS, QuantizedTensor
from tests.helpers.tiny import rms

KINDS = ["q4_0", "q4_1", "q4_k"]


def random_weight(kind: str, rows: int, columns: int, seed: int = 0) -> QuantizedTensor:
    """Random nibbles, with scales of a size that weights have."""
    size, nbytes = BLOCKS[kind]
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (rows * columns // size, nbytes), generator=generator)
    blocks = blocks.to(torch.uint8)
    halves = blocks.view(torch.float16)
    halves[:, : 1 if kind == "q4_0" else 2] = 0.02 + 0.01 * torch.rand(len(blocks), 1, generator=generator)
    return QuantizedTensor(blocks.view(rows, -1), kind, (rows, columns))


def random_x(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).bfloat16()


def assert_near(y: Tensor, exact: Tensor) -> None:
    """As bfloat16 rounds weights, scales, and sums."""
    assert y.dtype == torch.bfloat16
    assert y.shape == exact.shape
    assert rms(y.float() - exact) <= 0.01 * rms(exact)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 5, 16, 128, 129, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_is_the_product_with_the_dequantized_weight(kind: str, rows: int, bias: bool) -> None:
    weight, x = random_weight(kind, 48, 256), random_x(rows, 256)
    added = nn.Parameter(torch.randn(48).bfloat16(), requires_grad=False) if bias else None
    layer = QuantizedLinear(weight, added)
    exact = F.linear(x.float(), weight.dequantize(), None if added is None else added.float())
    assert_near(layer(x), exact)
    assert_near(layer(x), exact)
    assert torch.equal(layer(x), layer(x))


def test_few_and_many_rows_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = random_weight("q4_1", 32, 128), random_x(20, 128)
    layer = QuantizedLinear(weight)
    few = layer(x)
    monkeypatch.setattr(pentad.nn.linear, "FEW_ROWS", 0)
    assert rms(layer(x).float() - few.float()) <= 0.01 * rms(few)


def test_no_rows() -> None:
    assert QuantizedLinear(random_weight("q4_0", 32, 64))(random_x(0, 64)).shape == (0, 32)


def side_by_side(x: Tensor, *layers: nn.Module) -> Tensor:
    return torch.cat([*project(x, *layers)], -1)


def exact_project(x: Tensor, *weights: QuantizedTensor) -> Tensor:
    return torch.cat([F.linear(x.float(), weight.dequantize()) for weight in weights], -1)


@pytest.mark.parametrize("rows", [0, 1, 7, 200])
def test_project_is_each_alone_side_by_side(rows: int) -> None:
    weights = [random_weight("q4_1", out, 128, seed=out) for out in (48, 16, 32)]
    x = random_x(rows, 128)
    together = side_by_side(x, *(QuantizedLinear(weight) for weight in weights))
    alone = torch.cat([QuantizedLinear(weight)(x) for weight in weights], -1)
    assert together.shape == (rows, 96)
    if rows:
        assert_near(together, exact_project(x, *weights))
        assert rms(together.float() - alone.float()) <= 0.01 * rms(alone)


def test_project_of_layers_that_do_not_join() -> None:
    """A plain one, or one with a bias, among them."""
    weight, x = random_weight("q4_0", 16, 64), random_x(3, 64)
    bias = nn.Parameter(torch.randn(16).bfloat16(), requires_grad=False)
    layers = [QuantizedLinear(weight, bias), QuantizedLinear(weight), nn.Linear(64, 8).bfloat16()]
    assert torch.equal(side_by_side(x, *layers), torch.cat([layer(x) for layer in layers], -1))
    a, b, z = nn.Linear(4, 2), nn.Linear(4, 3), torch.randn(5, 4)
    assert torch.equal(side_by_side(z, a, b), torch.cat((a(z), b(z)), -1))


def test_a_hook_on_a_projected_layer_is_called() -> None:
    layers = [QuantizedLinear(random_weight("q4_1", 16, 64, seed=i)) for i in range(2)]
    heard: list[torch.Size] = []
    layers[1].register_forward_hook(lambda layer, inputs, y: heard.append(y.shape))
    project(random_x(3, 64), *layers)
    assert heard == [(3, 16)]


@pytest.mark.parametrize("alone_first", [True, False])
def test_a_projected_layer_can_still_be_called_alone(alone_first: bool) -> None:
    """In either order: an adapter or a probe may do so."""
    weights = [random_weight("q4_1", out, 128, seed=out) for out in (48, 16)]
    layers, x = [QuantizedLinear(weight) for weight in weights], random_x(3, 128)
    if alone_first:
        layers[0](x)
    assert_near(side_by_side(x, *layers), exact_project(x, *weights))
    for layer, weight in zip(layers, weights, strict=True):
        assert_near(layer(x), exact_project(x, weight))
    assert_near(side_by_side(x, *layers), exact_project(x, *weights))


@pytest.mark.parametrize(
    ("kind", "shape", "dtype", "takes"),
    [
        ("q4_0", (32, 64), torch.bfloat16, True),
        ("q4_1", (16, 32), torch.bfloat16, True),
        ("q4_k", (16, 256), torch.bfloat16, True),
        ("q4_1", (16, 32), torch.float32, False),
        ("q4_1", (16, 32), torch.float16, False),
        ("q4_1", (24, 32), torch.bfloat16, False),
        ("q8_0", (32, 64), torch.bfloat16, False),
        ("q4_0", (4, 32, 64), torch.bfloat16, False),
        (None, (32, 64), torch.bfloat16, False),
    ],
)
def test_what_is_kept_in_blocks(kind: str, shape: tuple[int, int], dtype: torch.dtype, takes: bool) -> None:
    assert QuantizedLinear.takes(kind, shape, dtype, torch.device("cpu")) == takes
    assert not QuantizedLinear.takes(kind, shape, dtype, torch.device("meta"))

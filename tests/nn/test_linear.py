"""Quantized layers against float32 on the dequantized weight: products, hooks, and when weights are dequantized."""

import re
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pentad.nn.linear
from pentad.nn.linear import QuantizedLinear, cache_dequantized, project
from pentad.weights.quantized import QuantizedTensor
from tests.helpers.blocks import random_blocks
from tests.helpers.linear import assert_near, exact_project, frozen_bias, random_x, side_by_side
from tests.helpers.tiny import rms

TYPES = ["q4_0", "q4_1", "q4_k"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 5, 16, 128, 129, 300])
@pytest.mark.parametrize("name", TYPES)
def test_linear_multiplies_by_the_dequantized_weight(name: str, rows: int, bias: bool) -> None:
    weight, x = random_blocks(name, 48, 256), random_x(rows, 256)
    added = frozen_bias(48) if bias else None
    layer = QuantizedLinear(weight, added)
    exact = F.linear(x.float(), weight.dequantize(), None if added is None else added.float())
    assert_near(layer(x), exact)
    assert_near(layer(x), exact)
    assert torch.equal(layer(x), layer(x))


def test_few_and_many_rows_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = random_blocks("q4_1", 32, 128), random_x(20, 128)
    layer = QuantizedLinear(weight)
    few = layer(x)
    monkeypatch.setattr(pentad.nn.linear, "FEW_ROWS", 0)
    assert rms(layer(x).float() - few.float()) <= 0.01 * rms(few)


def test_no_rows() -> None:
    assert QuantizedLinear(random_blocks("q4_0", 32, 64))(random_x(0, 64)).shape == (0, 32)


@pytest.mark.parametrize("rows", [0, 1, 7, 200])
def test_project_concatenates_the_layers_products(rows: int) -> None:
    weights = [random_blocks("q4_1", out, 128, seed=out) for out in (48, 16, 32)]
    x = random_x(rows, 128)
    fused = side_by_side(x, *(QuantizedLinear(weight) for weight in weights))
    separate = torch.cat([QuantizedLinear(weight)(x) for weight in weights], -1)
    assert fused.shape == (rows, 96)
    if rows:
        assert_near(fused, exact_project(x, *weights))
        assert rms(fused.float() - separate.float()) <= 0.01 * rms(separate)


def test_project_of_layers_that_cannot_be_fused() -> None:
    """One layer has a bias, one is not quantized."""
    weight, x = random_blocks("q4_0", 16, 64), random_x(3, 64)
    layers = [QuantizedLinear(weight, frozen_bias(16)), QuantizedLinear(weight), nn.Linear(64, 8).bfloat16()]
    assert torch.equal(side_by_side(x, *layers), torch.cat([layer(x) for layer in layers], -1))
    a, b, z = nn.Linear(4, 2), nn.Linear(4, 3), torch.randn(5, 4)
    assert torch.equal(side_by_side(z, a, b), torch.cat((a(z), b(z)), -1))


def test_a_hook_on_a_projected_layer_is_called() -> None:
    layers = [QuantizedLinear(random_blocks("q4_1", 16, 64, seed=i)) for i in range(2)]
    called: list[torch.Size] = []
    layers[1].register_forward_hook(lambda layer, inputs, y: called.append(y.shape))
    project(random_x(3, 64), *layers)
    assert called == [(3, 16)]
    layers[0].register_full_backward_hook(lambda layer, inputs, outputs: called.append(outputs[0].shape))
    project(random_x(5, 64).requires_grad_(), *layers)[0].sum().backward()
    assert called == [(3, 16), (5, 16), (5, 16)]


@pytest.mark.parametrize("alone_first", [True, False])
def test_a_projected_layer_can_still_be_called_alone(alone_first: bool) -> None:
    """Adapters and probes call layers before or after `project` does."""
    weights = [random_blocks("q4_1", out, 128, seed=out) for out in (48, 16)]
    layers, x = [QuantizedLinear(weight) for weight in weights], random_x(3, 128)
    if alone_first:
        layers[0](x)
    assert_near(side_by_side(x, *layers), exact_project(x, *weights))
    for layer, weight in zip(layers, weights, strict=True):
        assert_near(layer(x), exact_project(x, weight))
    assert_near(side_by_side(x, *layers), exact_project(x, *weights))


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "has_operator"),
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
def test_has_operator(name: str, shape: tuple[int, int], dtype: torch.dtype, has_operator: bool) -> None:
    assert QuantizedLinear.has_operator(name, shape, dtype, torch.device("cpu")) == has_operator
    assert not QuantizedLinear.has_operator(name, shape, dtype, torch.device("meta"))


def test_weights_are_dequantized_once_or_in_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = QuantizedLinear(random_blocks("q8_0", 1024, 1024)), QuantizedLinear(random_blocks("q4_1", 32, 1024))
    network, x = nn.Sequential(*layers), random_x(3, 1024)
    y, calls, dequantize = network(x), [], QuantizedTensor.dequantize

    def counted(weight: QuantizedTensor, *dtype: torch.dtype) -> Tensor:
        calls.append(weight.shape)
        return dequantize(weight, *dtype)

    monkeypatch.setattr(QuantizedTensor, "dequantize", counted)
    nbytes = 1024 * 1024 * 2  # of the q8_0 layer: the q4_1 layer has an operator
    assert re.search("again .* 2 MB", cache_dequantized(network, torch.bfloat16, nbytes - 1))
    assert torch.equal(network(x), y)
    assert torch.equal(network(x), y)
    assert calls == [(1024, 1024)] * 2
    assert re.search("kept .* 2 MB", cache_dequantized(network, torch.bfloat16, nbytes))
    assert torch.equal(network(x), y)
    assert torch.equal(network(x), y)
    assert calls == [(1024, 1024)] * 3
    assert cache_dequantized(nn.Sequential(layers[1], nn.Linear(4, 4)), torch.bfloat16, sys.maxsize) == ""

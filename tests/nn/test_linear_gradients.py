"""Gradients through quantized layers equal those of the dequantized layers."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from pentad.nn.linear import QuantizedLinear
from pentad.nn.moe.experts import QuantizedGroupedLinear
from pentad.weights.quantized import QuantizedTensor
from tests.helpers.blocks import random_blocks
from tests.helpers.linear import random_x, side_by_side
from tests.helpers.tiny import rms


def saved_by(compute: Callable[[], Tensor]) -> list[Tensor]:
    """The tensors that autograd saves for the backward pass."""
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        compute()
    return saved


def assert_equal_gradients(ours: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    for one, other in zip(ours, exact, strict=True):
        assert one.dtype == dtype
        assert rms((one - other).float()) <= (1e-6 if dtype == torch.float32 else 0.01) * rms(other.float())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 100, 200])
@pytest.mark.parametrize("name", ["q4_0", "q8_0"])
def test_gradients_are_those_of_the_dequantized_layer(name: str, rows: int, dtype: torch.dtype, bias: bool) -> None:
    weight, x = random_blocks(name, 48, 64), random_x(rows, 64).to(dtype).requires_grad_()
    added = nn.Parameter(torch.randn(48, dtype=dtype)) if bias else None
    layer, inputs = QuantizedLinear(weight, added), [x] if added is None else [x, added]
    direction = torch.randn(rows, 48, dtype=dtype)
    exact = torch.autograd.grad(F.linear(x, weight.dequantize(dtype), added), inputs, direction)
    assert_equal_gradients([*torch.autograd.grad(layer(x), inputs, direction)], [*exact], dtype)
    layer.cache_dequantized(dtype)
    assert_equal_gradients([*torch.autograd.grad(layer(x), inputs, direction)], [*exact], dtype)
    again = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False), inputs, direction)
    assert_equal_gradients([*again], [*exact], dtype)
    assert saved_by(lambda: layer(x)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 100, 200])
def test_gradients_of_a_fused_product(rows: int, dtype: torch.dtype) -> None:
    weights = [random_blocks("q4_1", out, 64, seed=out) for out in (48, 16, 32)]
    layers, x = [QuantizedLinear(weight) for weight in weights], random_x(rows, 64).to(dtype).requires_grad_()
    plain = [weight.dequantize(dtype) for weight in weights]
    direction = torch.randn(rows, 96, dtype=dtype)
    (exact,) = torch.autograd.grad(torch.cat([F.linear(x, part) for part in plain], -1), x, direction)
    (ours,) = torch.autograd.grad(side_by_side(x, *layers), x, direction)
    assert_equal_gradients([ours], [exact], dtype)
    (ours,) = torch.autograd.grad(checkpoint(lambda x: side_by_side(x, *layers), x, use_reentrant=False), x, direction)
    assert_equal_gradients([ours], [exact], dtype)
    assert saved_by(lambda: side_by_side(x, *layers)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_grouped_experts(dtype: torch.dtype) -> None:
    blocks = random_blocks("q4_1", 5 * 24, 64).blocks
    weight = QuantizedTensor(blocks, "q4_1", (5, 24, 64))
    layer, counts = QuantizedGroupedLinear(weight), [3, 0, 150, 0, 1]
    x, ends = random_x(154, 64).to(dtype).requires_grad_(), torch.tensor(counts).cumsum(0).int()
    experts = zip(torch.split(x, counts), weight.dequantize(dtype), strict=True)
    direction = torch.randn(154, 24, dtype=dtype)
    (exact,) = torch.autograd.grad(torch.cat([F.linear(rows, matrix) for rows, matrix in experts]), x, direction)
    (ours,) = torch.autograd.grad(layer(x, ends), x, direction)
    assert_equal_gradients([ours], [exact], dtype)
    assert saved_by(lambda: layer(x, ends)) == []
    (of_some,) = torch.autograd.grad(layer(x[3:153], ends[1:4] - 3, slice(1, 4)), x, direction[3:153])
    assert_equal_gradients([of_some[3:153]], [exact[3:153]], dtype)


def test_tensors_cached_in_inference_mode_can_be_used_in_training() -> None:
    layers, x = [QuantizedLinear(random_blocks("q4_1", 16, 64, seed=i)) for i in range(2)], random_x(3, 64)
    layers[1].cache_dequantized(torch.float32)
    with torch.inference_mode():
        y, z = side_by_side(x, *layers), layers[1](x.float())
    x.requires_grad_()
    assert torch.equal(side_by_side(x, *layers), y)
    (gradient,) = torch.autograd.grad(side_by_side(x, *layers).sum(), x)
    assert gradient.isfinite().all()
    assert torch.equal(layers[1](x.float()), z)
    torch.autograd.grad(layers[1](x.float()).sum(), x)

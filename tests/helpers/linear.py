"""Inputs of quantized layers, and their exact products."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pentad.nn.linear import project
from pentad.weights.quantized import QuantizedTensor
from tests.helpers.tiny import rms


def random_x(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).bfloat16()


def frozen_bias(size: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(size).bfloat16(), requires_grad=False)


def assert_near(y: Tensor, exact: Tensor) -> None:
    """Check that y equals `exact` up to rounding weights, scales and sums to bfloat16."""
    assert y.dtype == torch.bfloat16
    assert y.shape == exact.shape
    assert rms(y.float() - exact) <= 0.01 * rms(exact)


def side_by_side(x: Tensor, *layers: nn.Module) -> Tensor:
    return torch.cat([*project(x, *layers)], -1)


def exact_project(x: Tensor, *weights: QuantizedTensor) -> Tensor:
    return torch.cat([F.linear(x.float(), weight.dequantize()) for weight in weights], -1)

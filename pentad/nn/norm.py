"""Normalization."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root mean square layer normalization (arXiv:1910.07467): x / rms(x) * weight, in float32.

    The input is the float32 residual stream; the output has the weight's dtype.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x_ND: Tensor) -> Tensor:
        weight = self.weight
        return (torch.rms_norm(x_ND, (self.dim,), eps=self.eps) * weight).to(weight.dtype)


class LayerNorm(nn.Module):
    """Layer normalization (arXiv:1607.06450): (x - mean(x)) / std(x) * weight + bias, in float32.

    The input is the float32 residual stream; the output has the weight's dtype.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x_ND: Tensor) -> Tensor:
        weight = self.weight
        return (F.layer_norm(x_ND.float(), (self.dim,), eps=self.eps) * weight + self.bias).to(weight.dtype)

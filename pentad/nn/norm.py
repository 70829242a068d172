"""Normalization."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root mean square layer normalization (arXiv:1910.07467): x / rms(x) * weight, in float32.

    From the residual stream, which is float32, to the dtype of the weights.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x_ND: Tensor) -> Tensor:
        normal_ND = F.rms_norm(x_ND.float(), (self.dim,), eps=self.eps)
        return (normal_ND * self.weight).to(self.weight.dtype)

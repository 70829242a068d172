"""Feed-forward layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pentad.nn.batch import Batch
from pentad.nn.linear import project


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): the gated linear unit of "GLU Variants Improve Transformer" (arXiv:2002.05202)."""

    def __init__(self, dim: int, hidden_dim: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x_ND: Tensor, batch: Batch) -> tuple[Tensor, None]:
        """[N, dim] -> [N, dim], and no router's decisions, since there is no router."""
        gate, up = project(x_ND, self.gate_proj, self.up_proj)
        return self.down_proj(F.silu(gate) * up), None


class GeluMLP(nn.Module):
    """down(gelu(up(x))), with biases: GPT-2's feed-forward layer, with GELU (arXiv:1606.08415) as it approximates it,
    by tanh (published as ``gelu_new``)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(dim, hidden_dim)
        self.down_proj = nn.Linear(hidden_dim, dim)

    def forward(self, x_ND: Tensor, batch: Batch) -> tuple[Tensor, None]:
        """[N, dim] -> [N, dim], and no router's decisions, since there is no router."""
        return self.down_proj(F.gelu(self.up_proj(x_ND), approximate="tanh")), None

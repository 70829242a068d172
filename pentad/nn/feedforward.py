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


class ReluMLP(nn.Module):
    """down(relu(up(x))), without biases: the feed-forward layer of T5 (arXiv:1910.10683)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x_ND: Tensor, batch: Batch) -> tuple[Tensor, None]:
        """[N, dim] -> [N, dim], and no router's decisions, since there is no router."""
        return self.down_proj(F.relu(self.up_proj(x_ND))), None


class GatedSwiGLU(nn.Module):
    """down(a * silu(b) * up(x)) with the halves a, b of gate(x): a SwiGLU (arXiv:2002.05202) that is itself a gate.

    So OpenMoE computes: "swiglu" is what its gate's activation is called, and takes one half of it for a gate of the
    other (ColossalAI's modeling_openmoe.py, `OpenMoeMLP` and `SwiGLU`).
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x_ND: Tensor, batch: Batch) -> tuple[Tensor, None]:
        """[N, dim] -> [N, dim], and no router's decisions, since there is no router."""
        gates, up = project(x_ND, self.gate_proj, self.up_proj)
        a, b = gates.chunk(2, -1)
        return self.down_proj(a * F.silu(b) * up), None

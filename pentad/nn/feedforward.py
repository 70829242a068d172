"""Feed-forward layers."""

import torch.nn.functional as F
from torch import Tensor, nn

from pentad.nn.linear import project


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): the gated linear unit of "GLU Variants Improve Transformer" (arXiv:2002.05202)."""

    def __init__(self, dim: int, hidden_dim: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x_ND: Tensor) -> Tensor:
        """[N, dim] -> [N, dim]."""
        gate, up = project(x_ND, self.gate_proj, self.up_proj)
        out_ND: Tensor = self.down_proj(F.silu(gate) * up)
        return out_ND


class GeluMLP(nn.Module):
    """down(gelu(up(x))), with biases: GPT-2's feed-forward layer.

    GELU (arXiv:1606.08415) is approximated by tanh, published as ``gelu_new``.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(dim, hidden_dim)
        self.down_proj = nn.Linear(hidden_dim, dim)

    def forward(self, x_ND: Tensor) -> Tensor:
        """[N, dim] -> [N, dim]."""
        out_ND: Tensor = self.down_proj(F.gelu(self.up_proj(x_ND), approximate="tanh"))
        return out_ND


class ReluMLP(nn.Module):
    """down(relu(up(x))), without biases: the feed-forward layer of T5 (arXiv:1910.10683)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        """[N, dim] -> [N, dim]."""
        out_ND: Tensor = self.down_proj(F.relu(self.up_proj(x_ND)))
        return out_ND


class GatedSwiGLU(nn.Module):
    """down(a * silu(b) * up(x)) with the halves a, b of gate(x): a SwiGLU (arXiv:2002.05202) that is itself a gate.

    OpenMoE's layer: the activation of its gate, called "swiglu", multiplies one half by SiLU of the other (ColossalAI's
    modeling_openmoe.py, `OpenMoeMLP` and `SwiGLU`).
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        """[N, dim] -> [N, dim]."""
        gates, up = project(x_ND, self.gate_proj, self.up_proj)
        a, b = gates.chunk(2, -1)
        out_ND: Tensor = self.down_proj(a * F.silu(b) * up)
        return out_ND

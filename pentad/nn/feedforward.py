"""Feed-forward layers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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
        out_ND: Tensor
        if type(self.down_proj) is nn.Linear and _learns_plainly(self.down_proj, gate):
            out_ND = _GatedLinear.apply(gate, up, self.down_proj.weight, self.down_proj.bias)  # type: ignore[no-untyped-call]
        else:
            out_ND = self.down_proj(F.silu(gate) * up)
        return out_ND


def _learns_plainly(linear: nn.Linear, like: Tensor) -> bool:
    """True if gradients are recorded, and a layer is only a matmul in the weight's dtype: no hooks, no autocast."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # the compiler fuses by itself
        return False
    hooks = linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks
    return not hooks and like.dtype == linear.weight.dtype and not torch.is_autocast_enabled(like.device.type)


class _GatedLinear(torch.autograd.Function):
    """``linear(silu(gate) * up)``; backward recomputes the product, so that two tensors are kept instead of four."""

    @staticmethod
    def forward(ctx: Any, gate_NF: Tensor, up_NF: Tensor, weight_DF: Tensor, bias_D: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate_NF, up_NF, weight_DF)
        return F.linear(F.silu(gate_NF) * up_NF, weight_DF, bias_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_ND: Tensor) -> tuple[Tensor | None, ...]:
        gate_NF, up_NF, weight_DF = ctx.saved_tensors
        silu_NF = F.silu(gate_NF)
        weight = out_ND.T @ (silu_NF * up_NF) if ctx.needs_input_grad[2] else None
        bias = out_ND.sum(0) if ctx.needs_input_grad[3] else None
        product_NF = out_ND @ weight_DF
        gate = torch.ops.aten.silu_backward(product_NF * up_NF, gate_NF)
        return gate, product_NF.mul_(silu_NF), weight, bias


class GeluMLP(nn.Module):
    """down(gelu(up(x))), with biases: the feed-forward layer of GPT-2, ViT and CLIP.

    Args:
        dim, hidden_dim: widths.
        approximate: "none" for GELU (arXiv:1606.08415), "tanh" for its approximation published as ``gelu_new``, or
            "sigmoid" for x * sigmoid(1.702 * x), published as ``quick_gelu``.
    """

    def __init__(self, dim: int, hidden_dim: int, *, approximate: str = "tanh") -> None:
        super().__init__()
        self.approximate = approximate
        self.up_proj = nn.Linear(dim, hidden_dim)
        self.down_proj = nn.Linear(hidden_dim, dim)

    def forward(self, x_ND: Tensor) -> Tensor:
        """[N, dim] -> [N, dim]."""
        up_NF = self.up_proj(x_ND)
        quick = self.approximate == "sigmoid"
        gelu_NF = up_NF * torch.sigmoid(1.702 * up_NF) if quick else F.gelu(up_NF, approximate=self.approximate)
        out_ND: Tensor = self.down_proj(gelu_NF)
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

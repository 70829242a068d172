"""Normalization."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


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
        wide = x_ND.dtype == weight.dtype and weight.dtype.itemsize >= 4
        if wide and torch.is_grad_enabled() and not torch.compiler.is_compiling():  # the compiler fuses by itself
            learned_ND: Tensor = _RMSNorm.apply(x_ND, weight, self.eps)  # type: ignore[no-untyped-call]
            return learned_ND
        return (torch.rms_norm(x_ND, (self.dim,), eps=self.eps) * weight).to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    """``rms_norm(x) * weight``; only x is kept for backward."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x_ND, weight_D)
        ctx.eps = eps
        return torch.rms_norm(x_ND, weight_D.shape, eps=eps).mul_(weight_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight_D = ctx.saved_tensors
        scale_N1 = (torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True).square_() / x_ND.shape[-1] + ctx.eps).rsqrt_()
        unit_ND = x_ND * scale_N1
        weight = None
        if ctx.needs_input_grad[1]:
            weight = (out_ND * unit_ND).flatten(0, -2).sum(0)
        if not ctx.needs_input_grad[0]:
            return None, weight, None
        unit_grad_ND = out_ND * weight_D
        along_N1 = torch.linalg.vecdot(unit_grad_ND, unit_ND)[..., None] / x_ND.shape[-1]
        return unit_grad_ND.sub_(unit_ND.mul_(along_N1)).mul_(scale_N1), weight, None


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
        y_ND = F.layer_norm(x_ND.float(), (self.dim,), weight.float(), self.bias.float(), self.eps)
        return y_ND.to(weight.dtype)


class LayerNorm2d(LayerNorm):
    """`LayerNorm` over the channels of maps [B, C, H, W]."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return super().forward(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

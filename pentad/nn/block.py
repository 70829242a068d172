"""The few shapes of residual block; a family's file chooses the parts."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pentad.nn.batch import Batch


class PreNormBlock(nn.Module):
    """x + attention(norm(x)), then x + feedforward(norm(x)): GPT-2's and Llama's block."""

    def __init__(
        self,
        attention_norm: nn.Module,
        attention: nn.Module,
        feedforward_norm: nn.Module,
        feedforward: nn.Module,
    ) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.attention = attention
        self.feedforward_norm = feedforward_norm
        self.feedforward = feedforward

    def forward(self, x_ND: Tensor, batch: Batch) -> tuple[Tensor, Any]:
        """float32 [N, dim] -> the same, and what a mixture's router decided for each token (None for a dense block)."""
        x_ND = x_ND + self.attention(self.attention_norm(x_ND), batch)
        y_ND, aux = self.feedforward(self.feedforward_norm(x_ND), batch)
        return x_ND + y_ND, aux


class ParallelBlock(nn.Module):
    """x + attention(y) + feedforward(y), both of the same y = norm(x): GPT-J's and phi's block."""

    def __init__(self, norm: nn.Module, attention: nn.Module, feedforward: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.attention = attention
        self.feedforward = feedforward

    def forward(self, x_ND: Tensor, batch: Batch) -> tuple[Tensor, Any]:
        """float32 [N, dim] -> the same, and what a mixture's router decided for each token (None for a dense block)."""
        y_ND = self.norm(x_ND)
        z_ND, aux = self.feedforward(y_ND, batch)
        return x_ND + self.attention(y_ND, batch) + z_ND, aux

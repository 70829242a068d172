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


class ExtraFeedforwardBlock(PreNormBlock):
    """`PreNormBlock`, and then x + extra_feedforward(extra_norm(x)): OpenMoE's block where the feed-forward layer is a
    mixture, so that a token which every expert drops still passes through one.

    One after the other, each with its norm, as in the checkpoints (ColossalAI's modeling_openmoe.py,
    `OpenMoeDecoderLayer`); the paper has both side by side (arXiv:2402.01739, equation 4).
    """

    def __init__(
        self,
        attention_norm: nn.Module,
        attention: nn.Module,
        feedforward_norm: nn.Module,
        feedforward: nn.Module,
        extra_norm: nn.Module,
        extra_feedforward: nn.Module,
    ) -> None:
        super().__init__(attention_norm, attention, feedforward_norm, feedforward)
        self.extra_norm = extra_norm
        self.extra_feedforward = extra_feedforward

    def forward(self, x_ND: Tensor, batch: Batch) -> tuple[Tensor, Any]:
        """float32 [N, dim] -> the same, and what the mixture's router decided for each token."""
        x_ND, aux = super().forward(x_ND, batch)
        y_ND, _ = self.extra_feedforward(self.extra_norm(x_ND), batch)
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

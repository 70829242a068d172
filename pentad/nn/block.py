"""The few shapes of residual block; a family's file chooses the parts.

Legend: N rows, D width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pentad.nn.batch import Batch
from pentad.nn.moe.layer import MixtureOfExperts

if TYPE_CHECKING:
    from pentad.nn.moe.routers import Routing

CHECKPOINTING = ("none", "blocks")


def run_blocks(
    blocks: Iterable[nn.Module], x_ND: Tensor, *arguments: object, checkpointing: str = "none"
) -> tuple[Tensor, tuple[Routing | None, ...]]:
    """Run a stack of blocks, ``block(x_ND, *arguments)``.

    Args:
        blocks: dense ones give a tensor, mixtures a tensor and their router's decisions.
        x_ND: the residual stream.
        arguments: the same for each block: a batch, and what cross-attention attends to.
        checkpointing: "blocks" keeps only each block's input for backward and computes the rest again
            (arXiv:1604.06174); "none" keeps everything.

    Returns:
        The residual stream, and for each block the decisions of its router (None for a dense one).

    Raises:
        ValueError: another `checkpointing`.
    """
    if checkpointing not in CHECKPOINTING:
        raise ValueError(f"checkpointing is {checkpointing!r}; expected one of {', '.join(CHECKPOINTING)}")
    routings: list[Routing | None] = []
    for block in blocks:
        if checkpointing == "blocks":
            out = checkpoint(block, x_ND, *arguments, use_reentrant=False)
        else:
            out = block(x_ND, *arguments)
        x_ND, routing = out if isinstance(out, tuple) else (out, None)
        routings.append(routing)
    return x_ND, tuple(routings)


def _feed(part: nn.Module, y_ND: Tensor, batch: Batch) -> tuple[Tensor, Routing | None]:
    """The output of a feed-forward layer, and its router's decisions if it is a mixture."""
    if isinstance(part, MixtureOfExperts):
        out_ND, routing = part(y_ND, batch)
        return out_ND, routing
    return part(y_ND), None


def _with_routing(x_ND: Tensor, routing: Routing | None) -> Tensor | tuple[Tensor, Routing]:
    return x_ND if routing is None else (x_ND, routing)


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

    def forward(self, x_ND: Tensor, batch: Batch) -> Tensor | tuple[Tensor, Routing]:
        """[N, D] -> the same; a mixture gives its router's decisions beside it."""
        x_ND = x_ND + self.attention(self.attention_norm(x_ND), batch)
        y_ND, routing = _feed(self.feedforward, self.feedforward_norm(x_ND), batch)
        return _with_routing(x_ND + y_ND, routing)


class ExtraFeedforwardBlock(PreNormBlock):
    """`PreNormBlock`, then x + extra_feedforward(extra_norm(x)): OpenMoE's block with a mixture.

    A token that every expert drops still passes through the extra layer. One layer comes after the other, each with its
    norm, as in the checkpoints (ColossalAI's modeling_openmoe.py, `OpenMoeDecoderLayer`); the paper has both side by
    side (arXiv:2402.01739, equation 4).
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

    def forward(self, x_ND: Tensor, batch: Batch) -> Tensor | tuple[Tensor, Routing]:
        """[N, D] -> the same, and the router's decisions."""
        x_ND = x_ND + self.attention(self.attention_norm(x_ND), batch)
        y_ND, routing = _feed(self.feedforward, self.feedforward_norm(x_ND), batch)
        x_ND = x_ND + y_ND
        return _with_routing(x_ND + self.extra_feedforward(self.extra_norm(x_ND)), routing)


class ParallelBlock(nn.Module):
    """x + attention(y) + feedforward(y), both of the same y = norm(x): GPT-J's and phi's block."""

    def __init__(self, norm: nn.Module, attention: nn.Module, feedforward: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.attention = attention
        self.feedforward = feedforward

    def forward(self, x_ND: Tensor, batch: Batch) -> Tensor | tuple[Tensor, Routing]:
        """[N, D] -> the same; a mixture gives its router's decisions beside it."""
        y_ND = self.norm(x_ND)
        z_ND, routing = _feed(self.feedforward, y_ND, batch)
        return _with_routing(x_ND + self.attention(y_ND, batch) + z_ND, routing)


class CrossAttentionBlock(nn.Module):
    """x + attention(norm(x)), x + cross_attention(norm(x)), x + feedforward(norm(x)): a Transformer decoder's block
    (arXiv:1706.03762, section 3.1), with T5's norms first."""

    def __init__(
        self,
        attention_norm: nn.Module,
        attention: nn.Module,
        cross_attention_norm: nn.Module,
        cross_attention: nn.Module,
        feedforward_norm: nn.Module,
        feedforward: nn.Module,
    ) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.attention = attention
        self.cross_attention_norm = cross_attention_norm
        self.cross_attention = cross_attention
        self.feedforward_norm = feedforward_norm
        self.feedforward = feedforward

    def forward(self, x_ND: Tensor, batch: Batch, context_MD: Tensor | None = None) -> Tensor | tuple[Tensor, Routing]:
        """[N, D] -> the same; `context_MD` as of `Attention`. A mixture gives its router's decisions beside it."""
        x_ND = x_ND + self.attention(self.attention_norm(x_ND), batch)
        x_ND = x_ND + self.cross_attention(self.cross_attention_norm(x_ND), batch, context_MD)
        y_ND, routing = _feed(self.feedforward, self.feedforward_norm(x_ND), batch)
        return _with_routing(x_ND + y_ND, routing)

"""The frame of every language model; a family's file chooses the parts.

Legend: N tokens in the batch, M rows that are attended to or whose logits are wanted, D width of the residual stream,
V vocabulary.
"""

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from pentad.nn.batch import Batch
from pentad.nn.block import run_blocks
from pentad.nn.moe.routers import Routing


class Config(Protocol):
    """The fields that every language model's config has."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...


class Stack(nn.Module):
    """An embedding, blocks and a last norm: ``network(ids, batch)`` gives hidden states.

    Args:
        embed: V rows of D numbers.
        layers: blocks, as `run_blocks` takes them.
        norm: the last one.
        residual_dtype: of the residual stream, whatever the weights are.
    """

    def __init__(
        self,
        embed: nn.Embedding,
        layers: Iterable[nn.Module],
        norm: nn.Module,
        *,
        residual_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.embed = embed
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.residual_dtype = residual_dtype

    def forward(
        self, ids_N: Tensor, batch: Batch, context_MD: Tensor | None = None, *, checkpointing: str = "none"
    ) -> Tensor:
        """Compute hidden states.

        Args:
            ids_N: int64 [N], token ids.
            batch: says which rows are whose.
            context_MD: for blocks with cross-attention, the rows that they attend to; see `Attention`.
            checkpointing: activation checkpointing, "none" or "blocks"; see `run_blocks`.

        Returns:
            [N, D], after the last norm.
        """
        return self.forward_with_routing(ids_N, batch, context_MD, checkpointing=checkpointing)[0]

    def forward_with_routing(
        self, ids_N: Tensor, batch: Batch, context_MD: Tensor | None = None, *, checkpointing: str = "none"
    ) -> tuple[Tensor, tuple[Routing | None, ...]]:
        """`forward`, and for each layer its router's decisions (None for a dense one)."""
        x_ND = self.embed(ids_N).to(self.residual_dtype)
        arguments = (batch,) if context_MD is None else (batch, context_MD)
        x_ND, routings = run_blocks(self.layers, x_ND, *arguments, checkpointing=checkpointing)
        return self.norm(x_ND), routings

    @property
    def device(self) -> torch.device:
        """The device of the weights; batch and cache must be there."""
        return self.get_parameter("norm.weight").device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, and of all computation outside the residual stream and the norms."""
        return self.get_parameter("norm.weight").dtype


class Decoder(Stack):
    """A stack with a head: ``network.head(hidden)`` gives the logits of the rows that are wanted.

    Args:
        embed, layers, norm, residual_dtype: as of `Stack`.
        head: from D to V.
        tied: whether the head's weight is the embedding's.
        config: the family's.
    """

    def __init__(
        self,
        embed: nn.Embedding,
        layers: Iterable[nn.Module],
        norm: nn.Module,
        head: nn.Linear,
        *,
        tied: bool,
        config: Config,
        residual_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(embed, layers, norm, residual_dtype=residual_dtype)
        self.config = config
        self.head = head
        if tied:
            self.head.weight = self.embed.weight

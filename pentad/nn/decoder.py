"""The structure of every language model; each family's file supplies the parts.

Legend: N tokens in the batch, M context rows for cross-attention, D width of the residual stream, V vocabulary size.
"""

from collections.abc import Iterable, Sequence
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
    @property
    def context_length(self) -> int: ...


class Stack(nn.Module):
    """An embedding, blocks and a final norm: ``network(ids, batch)`` computes hidden states.

    Args:
        embed: the token embedding [V, D].
        layers: the blocks; see `run_blocks`.
        norm: the final norm.
        residual_dtype: dtype of the residual stream, independent of the weights' dtype.
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
            batch: the layout of the rows.
            context_MD: the context rows of blocks with cross-attention; see `Attention`.
            checkpointing: activation checkpointing, "none" or "blocks"; see `run_blocks`.

        Returns:
            [N, D], after the final norm.
        """
        return self.forward_with_routing(ids_N, batch, context_MD, checkpointing=checkpointing)[0]

    def forward_with_routing(
        self, ids_N: Tensor, batch: Batch, context_MD: Tensor | None = None, *, checkpointing: str = "none"
    ) -> tuple[Tensor, tuple[Routing | None, ...]]:
        """Like `forward`; also return each layer's routing (None for a dense layer)."""
        x_ND = self.embed(ids_N).to(self.residual_dtype)
        arguments = (batch,) if context_MD is None else (batch, context_MD)
        x_ND, routings = run_blocks(self.layers, x_ND, *arguments, checkpointing=checkpointing)
        return self.norm(x_ND), routings

    def forward_rows(self, ids_N: Tensor, batch: Batch, rows: Sequence[int]) -> Tensor:
        """What `forward` gives for some rows of a batch with a cache, ascending indices: [len(rows), D].

        The last block, one of those that know `Batch.wanted`, computes only keys and values of the others.
        """
        *blocks, last = self.layers
        x_ND, _ = run_blocks(blocks, self.embed(ids_N).to(self.residual_dtype), batch)
        x_MD, _ = run_blocks([last], x_ND, batch.want(rows))
        hidden_MD: Tensor = self.norm(x_MD)
        return hidden_MD

    @property
    def device(self) -> torch.device:
        """The device of the weights; the batch and the cache must be on it."""
        return self.get_parameter("norm.weight").device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, and of all computation outside the residual stream and the norms."""
        return self.get_parameter("norm.weight").dtype


class Decoder(Stack):
    """A stack with a language model head: ``network.head(hidden)`` computes the logits of the given rows.

    Args:
        embed, layers, norm, residual_dtype: see `Stack`.
        head: a linear layer from D to V.
        tied: share the embedding's weight with the head (tied embedding).
        config: the family's config.
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

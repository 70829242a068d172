"""The frame of every decoder-only language model; a family's file chooses the parts.

Legend: N tokens in the batch, M rows whose logits are wanted, D width of the residual stream, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pentad.nn.batch import Batch


class Config(Protocol):
    """What is asked of any family's config."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...


class Decoder(nn.Module):
    """``model(batch)`` gives hidden states, ``model.head(hidden)`` the logits of those rows that are wanted.

    Args:
        embed: V rows of D numbers.
        layers: blocks, ``block(x, batch) -> (x, aux)``.
        norm: the last one.
        head: from D to V.
        tied: whether the head's weight is the embedding's.
        config: the family's, kept beside.
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
    ) -> None:
        super().__init__()
        self.config = config
        self.embed = embed
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.head = head
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, batch: Batch) -> tuple[Tensor, tuple[Any, ...]]:
        """Hidden states [N, D] after the last norm, and each layer's `aux`."""
        x_ND = self.embed(batch.ids).float()  # the residual stream is float32, whatever the weights are
        aux = []
        for block in self.layers:
            x_ND, a = block(x_ND, batch)
            aux.append(a)
        return self.norm(x_ND), tuple(aux)

    @property
    def device(self) -> torch.device:
        """Where the batch and the cache have to be."""
        return self.get_parameter("norm.weight").device

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in between the float32 of the residual stream and of the norms."""
        return self.get_parameter("norm.weight").dtype

"""The result of an objective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from torch import Tensor

from pentad.datasets.batches import TokenBatch
from pentad.nn.decoder import Decoder


class Loss(NamedTuple):
    """A sum that the loop divides by the count of a whole optimizer step, over micro-batches and processes.

    Attributes:
        sum: scalar with a gradient.
        metrics: name -> scalar sum without a gradient, divided by the same count.
    """

    sum: Tensor
    metrics: Mapping[str, Tensor]


class Objective(Protocol):
    """An objective."""

    @property
    def learns(self) -> str:
        """What it learns from; see `pentad.datasets.examples`."""

    def count(self, batch: TokenBatch) -> int:
        """The number of terms in the loss's sum: target tokens, or pairs."""

    def __call__(self, network: Decoder, batch: TokenBatch, *, checkpointing: str = "none") -> Loss:
        """Compute the loss."""

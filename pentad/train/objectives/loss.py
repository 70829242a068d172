"""The result of an objective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Loss(NamedTuple):
    """A sum that the loop divides by the count of a whole optimizer step, over micro-batches and processes.

    Attributes:
        sum: scalar with a gradient.
        metrics: name -> scalar sum without a gradient, divided by the same count.
    """

    sum: Tensor
    metrics: Mapping[str, Tensor]


class Objective(Protocol):
    """An objective, for a network and batches of one kind: text, pictures or video."""

    @property
    def learns(self) -> str:
        """The data that it needs; for text see `pentad.datasets.examples`."""

    def count(self, batch: Any) -> int:
        """The number of terms in the loss's sum: target tokens, or pairs."""

    def __call__(self, network: Any, batch: Any, *, checkpointing: str = "none") -> Loss:
        """Compute the loss."""

"""The result of an objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Loss(NamedTuple):
    """A micro-batch's share of a step's loss; the shares of all micro-batches and processes add up to the loss.

    Attributes:
        share: scalar with a gradient.
        metrics: name -> scalar share without a gradient.
    """

    share: Tensor
    metrics: Mapping[str, Tensor]


class Objective(Protocol):
    """An objective, for a network and batches of one kind: text, pictures or video."""

    def totals(self, network: Any, batch: Any) -> Sequence[float]:
        """A micro-batch's part of what a loss needs to know of the whole step, such as the number of target tokens.

        The loop calls it without gradients, and adds up the numbers of all micro-batches and processes.
        """

    def __call__(self, network: Any, batch: Any, totals: Sequence[float], *, checkpointing: str = "none") -> Loss:
        """Compute the loss of a micro-batch, given the step's totals."""

"""The loss and metrics of held-out data."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pentad.train.data import TokenData
from pentad.train.loop import Loop
from pentad.train.objectives.loss import Objective
from pentad.train.processes import sum_over_processes


@dataclass(frozen=True)
class Validation:
    """Held-out data.

    Attributes:
        data: its first step has all rows.
        objective: the run's, for this data.
    """

    data: TokenData
    objective: Objective

    def measure(self, loop: Loop) -> dict[str, float]:
        """The loss and the objective's metrics with the parameters as they are; all processes take part."""
        batches, network = self.data.step(0), loop.network
        network.eval()
        with torch.no_grad(), loop.autocast():
            parts = [self.objective.totals(network, batch) for batch in batches]
            totals = sum_over_processes([sum(column) for column in zip(*parts, strict=True)])
            sums: dict[str, float] = {}
            for batch in batches:
                loss = self.objective(network, batch, totals)
                for name, value in {"loss": loss.share, **loss.metrics}.items():
                    sums[name] = sums.get(name, 0.0) + float(value)
        network.train()
        return dict(zip(sums, sum_over_processes(list(sums.values())), strict=True))

"""The loss and metrics of held-out data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from pentad.train.loop import Data, Loop
from pentad.train.processes import rank, sum_over_processes
from pentad.weights.atomic import disk_errors


@dataclass(frozen=True)
class Validation:
    """Held-out data.

    Attributes:
        data: its first step has all rows.
        file: receives one line of JSON for each measurement.
        every: steps between measurements; 0 for none between the first and the last.
        steps: of the run.
    """

    data: Data
    file: Path
    every: int
    steps: int

    def after_step(self, loop: Loop, step: int) -> None:
        """Measure, if it is time for it; `step` is the number of steps done."""
        if not (step in (0, self.steps) or (self.every and step % self.every == 0)):
            return
        measured = self.measure(loop)
        if rank() == 0:
            with disk_errors(self.file):
                lines = self.file.read_text().splitlines() if self.file.exists() else []
                kept = [line for line in lines if json.loads(line)["step"] < step]  # not those of steps that ran again
                self.file.write_text("\n".join([*kept, json.dumps({"step": step, **measured})]) + "\n")

    def measure(self, loop: Loop) -> dict[str, float]:
        """The loss and the objective's metrics with the parameters as they are; all processes take part."""
        batches, network = self.data.step(0), loop.network
        network.eval()
        with torch.no_grad(), loop.autocast():
            _, *totals = loop.totals(0, batches)
            sums: dict[str, float] = {}
            for number, batch in enumerate(batches):
                loop.reseed(0, number)  # draws what `totals` drew
                loss = loop.objective(network, batch, totals)
                for name, value in {"loss": loss.share, **loss.metrics}.items():
                    sums[name] = sums.get(name, 0.0) + float(value)
        network.train()
        return dict(zip(sums, sum_over_processes(list(sums.values())), strict=True))

"""The training loop, for every objective.

All that a run remembers is its parameters, the optimizer's state and the number of steps done: data and randomness are
functions of (seed, step, micro-batch).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pentad.errors import PentadError
from pentad.nn.moe.layer import MixtureOfExperts
from pentad.train.objectives.loss import Objective
from pentad.train.optimizers import Optimizers


class StepRecord(NamedTuple):
    """What `log.jsonl` has of a step.

    Attributes:
        step: from 1.
        loss: mean over the step's targets (or pairs).
        tokens: tokens of the step, over all processes.
        learning_rate: of this step.
        grad_norm: before clipping.
        seconds: wall time of the step.
        metrics: the objective's own, means like the loss.
    """

    step: int
    loss: float
    tokens: int
    learning_rate: float
    grad_norm: float
    seconds: float
    metrics: Mapping[str, float]


class Data(Protocol):
    """The micro-batches of a step: a pure function of the step."""

    def step(self, step: int) -> Sequence[Any]:
        """This process's micro-batches of a step, counted from 0."""

    def tokens(self, batch: Any) -> int:
        """The tokens (or patches, or latents) of a micro-batch."""

    def describe(self, batch: Any) -> str:
        """Where the rows of a micro-batch come from, for an error."""


@dataclass(frozen=True)
class Loop:
    """One run's loop.

    Attributes:
        network: a network with trainable parameters.
        objective: what it is trained for.
        data: its micro-batches.
        optimizers: updates the parameters.
        learning_rate: a function of the step.
        seed: the run's seed.
        max_grad_norm: the gradient's norm is clipped to this.
        dtype: dtype of the computation; float32 or, by autocast, bfloat16.
        checkpointing: "none" or "blocks".
    """

    network: nn.Module
    objective: Objective
    data: Data
    optimizers: Optimizers
    learning_rate: Callable[[int], float]
    seed: int = 0
    max_grad_norm: float = 1.0
    dtype: torch.dtype = torch.float32
    checkpointing: str = "none"

    def run(self, first: int, steps: int, after_step: Callable[[StepRecord], None]) -> None:
        """Run the steps `first` to `steps` - 1; `after_step` may save, log or stop (by an exception).

        Raises:
            PentadError: a loss or gradient isn't finite. The parameters are those before the step.
        """
        for step in range(first, steps):
            after_step(self.step(step))

    def step(self, step: int) -> StepRecord:
        """Run one optimizer step."""
        started, batches = time.perf_counter(), self.data.step(step)
        parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        tokens, *totals = self._totals(step, batches)
        sums: dict[str, float] = {"loss": 0.0}
        for number, batch in enumerate(batches):
            self._seed(step, number)
            with self._autocast():
                loss = self.objective(self.network, batch, totals, checkpointing=self.checkpointing)
            loss.share.backward()  # type: ignore[no-untyped-call]
            for name, value in {"loss": loss.share, **loss.metrics}.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach())
        names = sorted(sums)
        means = dict(zip(names, _sum_over_processes([sums[name] for name in names]), strict=True))
        _sum_gradients(parameters)
        norm = float(nn.utils.clip_grad_norm_(parameters, self.max_grad_norm))
        if not (math.isfinite(means["loss"]) and math.isfinite(norm)):
            rows = "; ".join(map(self.data.describe, batches))
            raise PentadError(f"step {step + 1}: the loss is {means['loss']}, the gradient's norm {norm}; rows: {rows}")
        lr = self.learning_rate(step)
        self.optimizers.step(lr)
        seconds = time.perf_counter() - started
        return StepRecord(step + 1, means.pop("loss"), int(tokens), lr, norm, seconds, means)

    def _totals(self, step: int, batches: Sequence[Any]) -> list[float]:
        """The step's tokens, and the objective's totals."""
        parts = []
        for number, batch in enumerate(batches):
            self._seed(step, number)
            with torch.no_grad(), self._autocast():
                parts.append([self.data.tokens(batch), *self.objective.totals(self.network, batch)])
        return _sum_over_processes([sum(column) for column in zip(*parts, strict=True)])

    def _autocast(self) -> torch.autocast:
        device = next(self.network.parameters()).device.type
        return torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32)

    def _seed(self, step: int, number: int) -> None:
        """Seed dropout and router noise, as a function of the seed, the step, the micro-batch and the process."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        seed = hash((self.seed, step, number, rank)) & (2**63 - 1)  # of integers, so the same in every process
        torch.manual_seed(seed)
        for part in self.network.modules():
            if isinstance(part, MixtureOfExperts) and part.generator is not None:
                part.generator.manual_seed(seed)


def _sum_over_processes(values: Sequence[float]) -> list[float]:
    if not dist.is_initialized():
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return [float(value) for value in total]


def _sum_gradients(parameters: Sequence[Tensor]) -> None:
    """Add up the gradients of all processes; each holds its part of the step's mean already."""
    if dist.is_initialized():
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

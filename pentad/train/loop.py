"""The training loop, for every objective.

All that a run remembers is its parameters, the optimizer's state and the number of steps done: data and randomness are
functions of (seed, step, micro-batch).
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from pentad.errors import PentadError
from pentad.memory import process_bytes
from pentad.nn.moe.layer import MixtureOfExperts
from pentad.train.objectives.loss import Objective
from pentad.train.optimizers import MovingAverage, Optimizers, clip_adaptively
from pentad.train.processes import rank, sum_gradients, sum_over_processes

HISTORY, MIN_HISTORY = 50, 10  # the numbers of steps whose medians tell what a spike is


class StepRecord(NamedTuple):
    """What `log.jsonl` has of a step.

    Attributes:
        step: from 1.
        loss: mean over the step's targets (or pairs).
        tokens: tokens of the step, over all processes.
        learning_rate: of this step.
        grad_norm: before clipping.
        seconds: wall time of the step.
        peak_bytes: the most memory that this process has had so far; on CUDA, in tensors there.
        metrics: the objective's own, means like the loss.
    """

    step: int
    loss: float
    tokens: int
    learning_rate: float
    grad_norm: float
    seconds: float
    peak_bytes: int
    metrics: Mapping[str, float]

    def as_json(self) -> dict[str, float]:
        """All fields as one flat object."""
        fields: dict[str, float] = self._asdict()
        del fields["metrics"]
        return {**fields, **self.metrics}


class BadStep(PentadError):
    """A loss or gradient that isn't finite, or a spike. The parameters are those before the step.

    Attributes:
        step: from 1.
        batches: this process's micro-batches of the step.
    """

    def __init__(self, message: str, step: int, batches: Sequence[Any]) -> None:
        super().__init__(message)
        self.step, self.batches = step, batches


class Data(Protocol):
    """The micro-batches of a step, as a function of the step."""

    def step(self, step: int) -> Sequence[Any]:
        """This process's micro-batches of a step, counted from 0."""

    def tokens(self, batch: Any) -> int:
        """The tokens (or patches, or latents) of a micro-batch."""

    def rows(self, batch: Any) -> list[str]:
        """Where the rows of a micro-batch come from, for an error."""


@dataclass(frozen=True)
class Loop:
    """The loop of a run.

    Attributes:
        network: a network with trainable parameters.
        objective: what it is trained for.
        data: its micro-batches.
        optimizers: updates the parameters.
        learning_rate: a function of the step.
        seed: the run's seed.
        max_grad_norm: the gradient's norm is clipped to this.
        adaptive_clip: see the recipe.
        dtype: dtype of the computation; float32 or, by autocast, bfloat16.
        checkpointing: "none" or "blocks".
        average: a moving average of the parameters, or None.
        max_spike: see the recipe; 0 for no limit.
        history: the losses and gradient norms of the last steps.
    """

    network: nn.Module
    objective: Objective
    data: Data
    optimizers: Optimizers
    learning_rate: Callable[[int], float]
    seed: int = 0
    max_grad_norm: float = 1.0
    adaptive_clip: float = 0.0
    dtype: torch.dtype = torch.float32
    checkpointing: str = "none"
    average: MovingAverage | None = None
    max_spike: float = 0.0
    history: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=HISTORY))

    def run(self, first: int, steps: int, after_step: Callable[[StepRecord], None]) -> None:
        """Run the steps `first` to `steps` - 1; `after_step` may save, log or stop (by an exception).

        Raises:
            BadStep: a loss or gradient isn't finite, or a spike.
        """
        for step in range(first, steps):
            after_step(self.step(step))

    def step(self, step: int) -> StepRecord:
        """Run one optimizer step."""
        started, batches = time.perf_counter(), self.data.step(step)
        parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        tokens, *totals = self.totals(step, batches)
        sums: dict[str, float] = {"loss": 0.0}
        for number, batch in enumerate(batches):
            self.reseed(step, number)
            with self.autocast():
                loss = self.objective(self.network, batch, totals, checkpointing=self.checkpointing)
            loss.share.backward()  # type: ignore[no-untyped-call]
            for name, value in {"loss": loss.share, **loss.metrics}.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach())
        names = sorted(sums)
        means = dict(zip(names, sum_over_processes([sums[name] for name in names]), strict=True))
        sum_gradients(parameters)
        if self.adaptive_clip:
            body = (
                p for name, p in self.network.named_parameters() if p.requires_grad and not name.startswith("head.")
            )
            clip_adaptively(body, self.adaptive_clip)
        norm = float(nn.utils.clip_grad_norm_(parameters, self.max_grad_norm))
        self._check(step, means["loss"], norm, batches)
        lr = self.learning_rate(step)
        self.optimizers.step(lr)
        if self.average is not None:
            self.average.update()
        seconds = time.perf_counter() - started
        peak = process_bytes(self.device)
        return StepRecord(step + 1, means.pop("loss"), int(tokens), lr, norm, seconds, peak, means)

    def _check(self, step: int, loss: float, norm: float, batches: Sequence[Any]) -> None:
        """Stop before the optimizer's step if a number isn't finite or is a spike."""
        for number, past in ((loss, [loss for loss, _ in self.history]), (norm, [norm for _, norm in self.history])):
            usual = median(past) if self.max_spike and len(past) >= MIN_HISTORY else math.inf
            limit = math.inf if math.isinf(usual) else usual + self.max_spike * max(1.0, usual)
            if math.isfinite(number) and number <= limit:
                continue
            spike = f", a spike over {usual:.4g}" if math.isfinite(number) else ""
            rows = ", ".join(row for batch in batches for row in self.data.rows(batch))
            text = f"step {step + 1}: the loss is {loss:.4g}, the gradient's norm {norm:.4g}{spike}; rows: {rows}"
            raise BadStep(text, step + 1, batches)
        self.history.append((loss, norm))

    def totals(self, step: int, batches: Sequence[Any]) -> list[float]:
        """The step's tokens, and the objective's totals."""
        parts = []
        for number, batch in enumerate(batches):
            self.reseed(step, number)
            with torch.no_grad(), self.autocast():
                parts.append([self.data.tokens(batch), *self.objective.totals(self.network, batch)])
        return sum_over_processes([sum(column) for column in zip(*parts, strict=True)])

    def autocast(self) -> torch.autocast:
        """A context in which matmuls run in `dtype`."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @property
    def device(self) -> torch.device:
        """The network's device."""
        return next(self.network.parameters()).device

    def reseed(self, step: int, number: int) -> None:
        """Seed dropout and router noise, as a function of the seed, the step, the micro-batch and the process."""
        seed = hash((self.seed, step, number, rank())) & (2**63 - 1)  # of integers, so the same in every process
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 10 ms: it formats the stack each time
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        for part in self.network.modules():
            if isinstance(part, MixtureOfExperts) and part.generator is not None:
                part.generator.manual_seed(seed)

"""The objective on pairs of a chosen and a rejected reply: one loss, or a weighted sum of several.

Legend: P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pentad.datasets.batches import TokenBatch
from pentad.nn.decoder import Decoder
from pentad.train.objectives.causal import reply_log_probs
from pentad.train.objectives.dpo import hinge_loss, ipo_loss, robust_loss, sigmoid_loss
from pentad.train.objectives.loss import Loss
from pentad.train.objectives.orpo import odds_ratio_loss
from pentad.train.objectives.references import values_of
from pentad.train.objectives.simpo import simpo_loss
from pentad.train.recipe import Preference


@dataclass(frozen=True)
class Pairs:
    """The pairs of a micro-batch.

    Attributes:
        log_probs_P2: log-probabilities of the chosen and the rejected reply, sums over tokens.
        references_P2: the reference model's; zeros if no loss needs it.
        tokens_P2: the number of tokens of each reply.
        step_pairs: pairs of the whole step.
        step_tokens: tokens of the whole step's chosen replies.
    """

    log_probs_P2: Tensor
    references_P2: Tensor
    tokens_P2: Tensor
    step_pairs: float
    step_tokens: float

    @property
    def margin_P(self) -> Tensor:
        """See `pentad.train.objectives.dpo`."""
        return _difference(self.log_probs_P2 - self.references_P2)

    @property
    def mean_margin_P(self) -> Tensor:
        """The margin of means over a reply's tokens."""
        return _difference((self.log_probs_P2 - self.references_P2) / self.tokens_P2)

    @property
    def means_P2(self) -> Tensor:
        """Mean log-probabilities of a reply's tokens."""
        return self.log_probs_P2 / self.tokens_P2

    @property
    def chosen_loss(self) -> Tensor:
        """The share of the mean cross-entropy of the chosen replies' tokens."""
        return -self.log_probs_P2[:, 0].sum() / self.step_tokens

    def share(self, values_P: Tensor) -> Tensor:
        """The share of a mean over the step's pairs."""
        return values_P.sum() / self.step_pairs


def _difference(values_P2: Tensor) -> Tensor:
    return values_P2[:, 0] - values_P2[:, 1]


LOSSES: dict[str, Callable[[Pairs, Preference, float], Tensor]] = {
    "dpo": lambda p, o, beta: p.share(sigmoid_loss(p.margin_P, beta, o.label_smoothing)),
    "ipo": lambda p, o, beta: p.share(ipo_loss(p.mean_margin_P, beta)),
    "ipo_sum": lambda p, o, beta: p.share(ipo_loss(p.margin_P, beta)),
    "hinge": lambda p, o, beta: p.share(hinge_loss(p.margin_P, beta)),
    "robust": lambda p, o, beta: p.share(robust_loss(p.margin_P, beta, o.label_smoothing)),
    "simpo": lambda p, o, beta: p.share(simpo_loss(p.means_P2, beta, o.simpo_gamma, o.label_smoothing)),
    "orpo": lambda p, o, beta: p.share(odds_ratio_loss(p.means_P2, beta)) + p.chosen_loss,
    "sft": lambda p, o, beta: p.chosen_loss,
}
"""Name of a loss -> function of pairs, options and beta."""

REFERENCE_FREE = {"simpo", "orpo", "sft"}
"""The losses without a reference model."""


@dataclass(frozen=True)
class PairObjective:
    """A weighted sum of losses of pairs.

    Attributes:
        weights: names in `LOSSES` -> their factors.
        options: see the losses; `beta` is 0.1 by default, and 2.0 for SimPO, as in their papers.
        references: see `reference_log_probs`; empty if no loss needs it.
    """

    weights: Mapping[str, float]
    options: Preference
    references: Sequence[np.ndarray] = ()

    def totals(self, network: Decoder, batch: TokenBatch) -> list[float]:
        """The numbers of pairs, and of tokens in chosen replies."""
        return [len(batch.targets_per_sequence) // 2, sum(batch.targets_per_sequence[::2])]

    def __call__(
        self, network: Decoder, batch: TokenBatch, totals: Sequence[float], *, checkpointing: str = "none"
    ) -> Loss:
        """The share of the means over pairs (of `chosen_loss`: over tokens)."""
        beta = self.options.beta or (2.0 if "simpo" in self.weights else 0.1)
        log_probs_P2 = reply_log_probs(network, batch, checkpointing=checkpointing).view(-1, 2)
        references_P2 = values_of(self.references, batch) if self.references else torch.zeros_like(log_probs_P2)
        tokens_P2 = log_probs_P2.new_tensor(batch.targets_per_sequence).view(-1, 2)
        pairs = Pairs(log_probs_P2, references_P2, tokens_P2, totals[0], totals[1])
        share = torch.stack([weight * LOSSES[name](pairs, self.options, beta) for name, weight in self.weights.items()])
        rewards_P2 = beta * (log_probs_P2 - references_P2 if self.references else pairs.means_P2).detach()
        metrics = {
            "accuracy": pairs.share((_difference(rewards_P2) > 0).float()),
            "reward_chosen": pairs.share(rewards_P2[:, 0]),
            "reward_rejected": pairs.share(rewards_P2[:, 1]),
        }
        return Loss(share.sum(), metrics)

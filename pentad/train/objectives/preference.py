"""The objective on pairs of a chosen and a rejected reply: one loss, or a weighted sum of several.

Legend: P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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


class Pairs(NamedTuple):
    """What the losses of pairs are functions of.

    Attributes:
        margin_P: see `pentad.train.objectives.dpo`.
        mean_margin_P: the margin of means over a reply's tokens.
        means_P2: the mean log-probability of a token of the chosen and of the rejected reply.
        chosen_P: the chosen reply's cross-entropy, scaled so that the mean over pairs is the mean over tokens.
    """

    margin_P: Tensor
    mean_margin_P: Tensor
    means_P2: Tensor
    chosen_P: Tensor


LOSSES: dict[str, Callable[[Pairs, Preference, float], Tensor]] = {
    "dpo": lambda p, o, beta: sigmoid_loss(p.margin_P, beta, o.label_smoothing),
    "ipo": lambda p, o, beta: ipo_loss(p.mean_margin_P, beta),
    "ipo_sum": lambda p, o, beta: ipo_loss(p.margin_P, beta),
    "hinge": lambda p, o, beta: hinge_loss(p.margin_P, beta),
    "robust": lambda p, o, beta: robust_loss(p.margin_P, beta, o.label_smoothing),
    "simpo": lambda p, o, beta: simpo_loss(p.means_P2, beta, o.simpo_gamma, o.label_smoothing),
    "orpo": lambda p, o, beta: odds_ratio_loss(p.means_P2, beta) + p.chosen_P,
    "sft": lambda p, o, beta: p.chosen_P,
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
        """The share of the mean over pairs."""
        beta = self.options.beta or (2.0 if "simpo" in self.weights else 0.1)
        log_probs_P2 = reply_log_probs(network, batch, checkpointing=checkpointing).view(-1, 2)
        tokens_P2 = log_probs_P2.new_tensor(batch.targets_per_sequence).view(-1, 2)
        ratios_P2 = log_probs_P2 - values_of(self.references, batch) if self.references else log_probs_P2
        means_P2 = log_probs_P2 / tokens_P2
        chosen_P = -log_probs_P2[:, 0] * totals[0] / totals[1]
        pairs = Pairs(difference(ratios_P2), difference(ratios_P2 / tokens_P2), means_P2, chosen_P)
        losses = [weight * LOSSES[name](pairs, self.options, beta).sum() for name, weight in self.weights.items()]
        rewards_P2 = beta * (ratios_P2 if self.references else means_P2)
        return Loss(torch.stack(losses).sum() / totals[0], metrics_of(rewards_P2, totals[0]))


def difference(values_P2: Tensor) -> Tensor:
    """Chosen minus rejected."""
    return values_P2[:, 0] - values_P2[:, 1]


def metrics_of(rewards_P2: Tensor, step_pairs: float) -> dict[str, Tensor]:
    """The metrics of pairs, by the rewards of their replies."""
    chosen_P, rejected_P = rewards_P2.detach().unbind(1)
    sums = {"accuracy": chosen_P > rejected_P, "reward_chosen": chosen_P, "reward_rejected": rejected_P}
    return {name: values_P.float().sum() / step_pairs for name, values_P in sums.items()}

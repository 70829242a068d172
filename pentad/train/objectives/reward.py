"""Reward models: a score of a conversation, learned from pairs (Bradley-Terry; arXiv:2203.02155, equation 1).

The score is a linear function of the last token's hidden state, as in transformers' sequence classifiers.

Legend: D width, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pentad.datasets.batches import TokenBatch
from pentad.nn.decoder import Decoder
from pentad.train.objectives.loss import Loss
from pentad.train.objectives.preference import difference, metrics_of
from pentad.train.objectives.references import values_of


def reward_loss(rewards_P2: Tensor, margin_P: Tensor) -> Tensor:
    """``-log sigmoid(chosen - rejected - margin)``; the margin is Llama 2's (arXiv:2307.09288, equation 2)."""
    return -F.logsigmoid(difference(rewards_P2) - margin_P)


def reward_head(network: Decoder) -> nn.Linear:
    """A new head with one output, initialized as in transformers."""
    head = nn.Linear(network.embed.weight.shape[1], 1, bias=False)
    nn.init.normal_(head.weight, std=getattr(network.config, "initializer_range", 0.02))
    return head.to(network.device)


@dataclass(frozen=True)
class RewardObjective:
    """The mean loss of pairs.

    Attributes:
        margins: for each store [examples, 2], whose first column is the pair's margin.
        center_rewards_coefficient: factor of ``(chosen + rejected)^2``, which keeps rewards around 0
            (arXiv:2312.09244).
    """

    margins: Sequence[np.ndarray]
    center_rewards_coefficient: float = 0.0

    def totals(self, network: Decoder, batch: TokenBatch) -> list[float]:
        """The number of pairs."""
        return [len(batch.examples)]

    def __call__(
        self, network: Decoder, batch: TokenBatch, totals: Sequence[float], *, checkpointing: str = "none"
    ) -> Loss:
        """The share of the mean over pairs."""
        hidden_ND = network(batch.ids_N, batch.batch, checkpointing=checkpointing)
        last_B = batch.batch.layout.cu_seqlens_on(hidden_ND.device)[1:].long() - 1
        with torch.autocast(hidden_ND.device.type, enabled=False):
            rewards_P2 = network.head(hidden_ND[last_B].float()).view(-1, 2)
        losses_P = reward_loss(rewards_P2, values_of(self.margins, batch)[:, 0])
        losses_P = losses_P + self.center_rewards_coefficient * rewards_P2.sum(1) ** 2
        return Loss(losses_P.sum() / totals[0], metrics_of(rewards_P2, totals[0]))

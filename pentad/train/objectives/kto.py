"""KTO: rows with one reply, labelled desirable or not (arXiv:2402.01306).

The paper compares a reply's reward with KL(pi || ref), estimated by replies to other prompts. Here a row's other reply
is always that of the next row with another prompt, so that the reference's part is computed once. The estimate is a
mean over the whole step, independent of micro-batches and processes. (TRL rolls replies within a process's batch.)

Legend: B rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pentad.datasets.batches import TokenBatch, collate
from pentad.datasets.store import Examples, Tokens
from pentad.errors import BadInput
from pentad.nn.decoder import Decoder
from pentad.train.objectives.causal import reply_log_probs
from pentad.train.objectives.loss import Loss
from pentad.train.objectives.references import values_of


def kto_loss(ratios_B: Tensor, desirable_B: Tensor, kl: float, beta: float) -> Tensor:
    """``1 - sigmoid(beta * (log pi / ref - KL))``, with the opposite sign for undesirable replies (equation 7)."""
    return torch.sigmoid(torch.where(desirable_B, kl - ratios_B, ratios_B - kl) * beta)


@dataclass(frozen=True)
class KTO:
    """The mean KTO loss of rows.

    Attributes:
        stores: the data; an example's score is 1 if it is desirable, else 0.
        references: for each store [examples, 2]: the reference's log-probabilities of the example and of `mismatched`.
        sequence_length: the most tokens of a mismatched sequence.
        beta, desirable_weight, undesirable_weight: see the paper.
    """

    stores: Sequence[Examples]
    references: Sequence[np.ndarray]
    sequence_length: int
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def totals(self, network: Decoder, batch: TokenBatch) -> list[float]:
        """The number of rows, the sum of their estimates of KL, and the number of desirable rows."""
        sequences = [mismatched(self.stores[source], n, self.sequence_length) for source, n in batch.examples]
        log_probs_B = reply_log_probs(network, collate(sequences, device=batch.ids_N.device))
        kl_B = log_probs_B - values_of(self.references, batch)[:, 1]
        return [len(sequences), float(kl_B.sum()), float(self._desirable(batch).sum())]

    def __call__(
        self, network: Decoder, batch: TokenBatch, totals: Sequence[float], *, checkpointing: str = "none"
    ) -> Loss:
        """The share of the mean over rows."""
        rows, kl_sum, desirable = totals
        kl, desirable_B = max(0.0, kl_sum / rows), self._desirable(batch)
        log_probs_B = reply_log_probs(network, batch, checkpointing=checkpointing)
        ratios_B = log_probs_B - values_of(self.references, batch)[:, 0]
        weights_B = torch.where(desirable_B, self.desirable_weight, self.undesirable_weight)
        rewards_B = self.beta * ratios_B.detach()
        metrics = {
            "kl": rewards_B.new_tensor(kl * len(rewards_B) / rows),
            "reward_chosen": rewards_B[desirable_B].sum() / max(1, desirable),
            "reward_rejected": rewards_B[~desirable_B].sum() / max(1, rows - desirable),
        }
        return Loss((weights_B * kto_loss(ratios_B, desirable_B, kl, self.beta)).sum() / rows, metrics)

    def _desirable(self, batch: TokenBatch) -> Tensor:
        return values_of([store.scores for store in self.stores], batch)[:, 0] > 0


def mismatched(store: Examples, number: int, sequence_length: int) -> Tokens:
    """An example's prompt with the reply of the next example that has another prompt; cut to `sequence_length`.

    Raises:
        BadInput: all prompts are equal.
    """
    prompt, _ = _parts(store, number)
    for other in range(number + 1, number + len(store)):
        other_prompt, (reply, targets) = _parts(store, other % len(store))
        if not np.array_equal(prompt, other_prompt):
            ids = np.concatenate([prompt, reply])[:sequence_length]
            return ids, np.concatenate([np.zeros(len(prompt), np.uint8), targets])[:sequence_length]
    raise BadInput(f"{store.location(number)}: every row has this prompt; KTO needs at least two prompts")


def _parts(store: Examples, number: int) -> tuple[np.ndarray, Tokens]:
    """The prompt of an example, and its reply with targets."""
    [(ids, targets)] = store[number]
    first = int(targets.argmax())
    return ids[:first], (ids[first:], targets[first:])

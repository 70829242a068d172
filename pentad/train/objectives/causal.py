"""Next-token prediction: pretraining, and supervised fine-tuning on replies."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pentad.datasets.batches import TokenBatch
from pentad.nn.decoder import Decoder
from pentad.nn.linear_loss import linear_cross_entropy, linear_log_probs
from pentad.nn.moe.losses import mixtral_balance_loss
from pentad.train.objectives.loss import Loss


@dataclass(frozen=True)
class CausalLM:
    """Mean cross-entropy of the target tokens. The head runs on rows with a target only.

    Attributes:
        router_aux_loss_coef: factor of a mixture's load-balancing loss over the tokens of the whole step
            (arXiv:2501.11873, section 3). Its expert counts take another forward pass.
    """

    router_aux_loss_coef: float = 0.0

    def totals(self, network: Decoder, batch: TokenBatch) -> list[float]:
        """The numbers of target tokens and, for the load-balancing loss, of routed tokens and of each expert's."""
        targets = len(batch.targets_M)
        if not self.router_aux_loss_coef:
            return [targets]
        routings = [r for r in network.forward_with_routing(batch.ids_N, batch.batch)[1] if r is not None]
        chosen = torch.cat([routing.experts.flatten() for routing in routings])
        counts_E = chosen.bincount(minlength=routings[0].logits.shape[1])
        return [targets, len(batch.ids_N) * len(routings), *counts_E.tolist()]

    def __call__(
        self, network: Decoder, batch: TokenBatch, totals: Sequence[float], *, checkpointing: str = "none"
    ) -> Loss:
        """The share of the mean over target tokens."""
        hidden_ND, routings = network.forward_with_routing(batch.ids_N, batch.batch, checkpointing=checkpointing)
        head = network.head
        loss = linear_cross_entropy(hidden_ND[batch.rows_M], head.weight, head.bias, batch.targets_M) / totals[0]
        if not self.router_aux_loss_coef:
            return Loss(loss, {})
        mixtures = [routing for routing in routings if routing is not None]
        fraction_E = mixtures[0].logits.new_tensor(totals[2:]) / totals[1]
        share = len(batch.ids_N) * len(mixtures) / totals[1]
        balance = mixtral_balance_loss(mixtures, fraction_E) * share
        return Loss(loss + self.router_aux_loss_coef * balance, {"router_aux_loss": balance.detach()})


def reply_log_probs(network: Decoder, batch: TokenBatch, *, checkpointing: str = "none") -> Tensor:
    """The log-probability of each sequence's targets: [B]."""
    hidden_MD = network(batch.ids_N, batch.batch, checkpointing=checkpointing)[batch.rows_M]
    return batch.sequence_sums(linear_log_probs(hidden_MD, network.head.weight, network.head.bias, batch.targets_M))

"""Statistics of a mixture's expert usage, as sums over tokens, so that a text can be processed in chunks.

Legend: N tokens, E experts, K experts of a token, T token ids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pentad.nn.moe.routers import Routing


@dataclass(frozen=True)
class Usage:
    """The usage of one layer's experts by some tokens; the usages of two chunks of a text can be added.

    Attributes:
        tokens: N.
        chosen: int64 [E], the number of tokens that chose each expert.
        kept: int64 [E], the number of these tokens that were within the expert's capacity.
        entropy_sum: the entropy of a token's probabilities over all experts, in nats, summed over tokens.
    """

    tokens: int
    chosen: Tensor
    kept: Tensor
    entropy_sum: float

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.tokens + other.tokens,
            self.chosen + other.chosen,
            self.kept + other.kept,
            self.entropy_sum + other.entropy_sum,
        )

    @property
    def load(self) -> Tensor:
        """float64 [E], each expert's share of the kept pairs; the shares add up to 1, or to 0 if nothing was kept."""
        return self.kept / self.kept.sum().clamp(min=1)

    @property
    def evenness(self) -> float:
        """The entropy of `load` divided by its maximum, log E: 1 if the load is even, 0 if one expert has all."""
        experts = len(self.kept)
        return float(torch.special.entr(self.load).sum()) / math.log(experts) if experts > 1 else 1.0

    @property
    def router_entropy(self) -> float:
        """The mean entropy of the router's probabilities, in nats: log E if all experts are equally likely."""
        return self.entropy_sum / max(1, self.tokens)

    @property
    def drop_rate(self) -> float:
        """The share of pairs that were dropped because they exceeded an expert's capacity."""
        chosen = int(self.chosen.sum())
        return 1 - int(self.kept.sum()) / chosen if chosen else 0.0


def usage(routing: Routing) -> Usage:
    """The `Usage` of one layer, on the CPU.

    Expert choice's routing names every expert of every token, so the pairs that were not chosen count as dropped.
    """
    experts = routing.logits.shape[1]
    probability_NE = routing.logits.cpu().double().softmax(-1)
    return Usage(
        len(routing.logits),
        routing.experts.flatten().bincount(minlength=experts).cpu(),
        routing.experts[routing.kept].bincount(minlength=experts).cpu(),
        float(torch.special.entr(probability_NE).sum()),
    )


def usage_by_token(routing: Routing, ids_N: Tensor, wanted_T: Tensor) -> Tensor:
    """Count the tokens of each expert: OpenMoE's view of what experts specialize in (arXiv:2402.01739, section 4).

    Args:
        routing: of N tokens.
        ids_N: int64 [N], their ids.
        wanted_T: int64 [T], the ids to count, each once.

    Returns:
        int64 [T, E] on the CPU, how often each expert took each id.
    """
    kept_NE = torch.zeros(routing.logits.shape, dtype=torch.float64)
    kept_NE.scatter_(1, routing.experts.cpu(), routing.kept.cpu().double())
    matches_TN = wanted_T.cpu()[:, None] == ids_N.cpu()
    return (matches_TN.double() @ kept_NE).long()

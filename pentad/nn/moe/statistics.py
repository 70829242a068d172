"""How a mixture's experts are used: sums over tokens of what a router decided, so that a text may come in pieces.

Legend: N tokens, E experts, K experts of a token, T kinds of token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pentad.nn.moe.routers import Routing


@dataclass(frozen=True)
class Usage:
    """What one layer's experts did for some tokens; of two pieces of a text it is the sum.

    Attributes:
        tokens: N.
        chosen: int64 [E], the pairs of a token and one of its experts, by expert.
        kept: int64 [E], those of them that the expert had room for.
        doubt: the entropy of a token's probabilities over all experts, in nats, summed over tokens.
    """

    tokens: int
    chosen: Tensor
    kept: Tensor
    doubt: float

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.tokens + other.tokens, self.chosen + other.chosen, self.kept + other.kept, self.doubt + other.doubt
        )

    @property
    def load(self) -> Tensor:
        """float64 [E], each expert's share of all that was kept; they add up to 1 (or to 0 where nothing was)."""
        return self.kept / self.kept.sum().clamp(min=1)

    @property
    def evenness(self) -> float:
        """The entropy of `load` as a part of the largest possible, log E: 1 where it is even, 0 where one has all."""
        experts = len(self.kept)
        return float(torch.special.entr(self.load).sum()) / math.log(experts) if experts > 1 else 1.0

    @property
    def router_entropy(self) -> float:
        """How undecided the router is about a token, in nats: log E where all experts are alike to it."""
        return self.doubt / max(1, self.tokens)

    @property
    def drop_rate(self) -> float:
        """What part of the pairs was dropped: over an expert's capacity."""
        chosen = int(self.chosen.sum())
        return 1 - int(self.kept.sum()) / chosen if chosen else 0.0


def usage(routing: Routing) -> Usage:
    """The `Usage` of one layer, on the CPU.

    A routing of expert choice names every expert of every token: what it calls dropped is what was not chosen.
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
    """Which experts took which tokens: OpenMoE's view of what experts specialize in (arXiv:2402.01739, section 4).

    Args:
        routing: of N tokens.
        ids_N: int64 [N], their ids.
        wanted_T: int64 [T], the ids to look at, each once.

    Returns:
        int64 [T, E] on the CPU, how often each expert took each of them.
    """
    kept_NE = torch.zeros(routing.logits.shape, dtype=torch.float64)
    kept_NE.scatter_(1, routing.experts.cpu(), routing.kept.cpu().double())
    is_TN = wanted_T.cpu()[:, None] == ids_N.cpu()
    return (is_TN.double() @ kept_NE).long()

"""Losses that balance the load of a mixture's experts, without their coefficients.

Each function takes the `Routing` of one layer (for Mixtral, of all layers) and returns a float32 scalar with a gradient
for the router. A batch has no padding, so nothing is masked.

Legend: N tokens, E experts, K experts of a token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pentad.nn.batch import SequenceLayout
from pentad.nn.moe.routers import Routing


def importance_loss(routing: Routing) -> Tensor:
    """CV(importance)^2; an expert's importance is the sum of its weights over the batch (arXiv:1701.06538, section 4,
    equations 6 and 7).

    0 if all experts are equal; E - 1 if one expert has all weights. The paper's coefficient: 0.1.
    """
    importance_E = routing.logits.new_zeros(routing.logits.shape[1])
    return _squared_variation(importance_E.index_add(0, routing.experts.flatten(), routing.weights.flatten()))


def load_loss(routing: Routing) -> Tensor:
    """CV(load)^2 of `load` (arXiv:1701.06538, appendix A, equations 10 and 11).

    The paper's coefficient: 0.1.
    """
    return _squared_variation(load(routing))


def load(routing: Routing) -> Tensor:
    """The expected number of tokens of each expert, a smooth function of noisy top-k's logits: float32 [E].

    For expert i this is the sum of each token's probability to be routed to i if only i's noise were resampled. The
    noisy logit must then exceed the k-th largest of the other noisy logits (arXiv:1701.06538, appendix A, equations 8
    to 10).

    Raises:
        ValueError: the routing isn't from `noisy_top_k`, or every token goes to every expert.
    """
    noisy_NE, k = routing.logits, routing.experts.shape[1]
    if routing.clean is None or routing.noise_std is None:
        raise ValueError("the routing has no noise; expected a routing of noisy_top_k")
    if k == noisy_NE.shape[1]:
        raise ValueError(f"each token goes to all {k} experts, so there is no load to balance")
    top_NK = noisy_NE.topk(k + 1).values
    # If i is among the k largest of all, the k-th largest of the others is the (k+1)-th of all.
    chosen_NE = torch.zeros_like(noisy_NE, dtype=torch.bool).scatter(1, routing.experts, True)
    threshold_NE = torch.where(chosen_NE, top_NK[:, k, None], top_NK[:, k - 1, None])
    probability_NE: Tensor = torch.special.ndtr((routing.clean - threshold_NE) / routing.noise_std)
    return probability_NE.sum(0)


def gshard_balance_loss(routing: Routing, groups: SequenceLayout) -> Tensor:
    """Mean over groups of 1/E sum_e c_e/S m_e (arXiv:2006.16668, algorithm 1, line 13).

    c_e/S is the fraction of tokens whose first choice is e, and m_e the mean gate of e. The loss is 1 / E^2 if both are
    even; 1 / E if one expert has all tokens.
    """
    losses = []
    for start, count in groups.spans:
        part = slice(start, start + count)
        group = routing._replace(logits=routing.logits[part], experts=routing.experts[part])
        losses.append(switch_balance_loss(group))
    return torch.stack(losses).mean() / routing.logits.shape[1] ** 2


def switch_balance_loss(routing: Routing) -> Tensor:
    """E sum_e f_e P_e (arXiv:2101.03961, section 2.2, equations 4 to 6).

    f_e is the fraction of tokens whose first choice is e, dropped or not, and P_e the mean probability of e. The loss
    is 1 if both are even; E if one expert has all tokens. The paper's coefficient alpha: 0.01.
    """
    return mixtral_balance_loss([routing._replace(experts=routing.experts[:, :1])])


def mixtral_balance_loss(routings: Sequence[Routing], fraction_E: Tensor | None = None) -> Tensor:
    """E sum_e f_e P_e over the tokens of all layers, where f counts each of a token's K choices, as in transformers'
    Mixtral (`load_balancing_loss_func`).

    K if both are even; E if the same K experts have all tokens. (MegaBlocks divides the loss by K.) The coefficient of
    Mixtral's release: 0.02.

    Args:
        routings: of each layer.
        fraction_E: f, if these tokens are part of a larger batch.
    """
    logits_NE = torch.cat([routing.logits for routing in routings])
    tokens, experts = logits_NE.shape
    if fraction_E is None:
        fraction_E = torch.cat([routing.experts for routing in routings]).flatten().bincount(minlength=experts) / tokens
    return experts * (fraction_E * logits_NE.softmax(-1).mean(0)).sum()


def router_z_loss(routing: Routing) -> Tensor:
    """Mean of logsumexp(logits)^2, which keeps logits small (ST-MoE, arXiv:2202.08906, section 3, equation 5).

    log(E)^2 if all logits are 0. The paper's coefficient: 0.001.
    """
    return routing.logits.logsumexp(-1).square().mean()


def _squared_variation(x_E: Tensor) -> Tensor:
    """The squared coefficient of variation, with the variance of a population, as in the paper's code."""
    return x_E.var(correction=0) / (x_E.mean().square() + 1e-10)

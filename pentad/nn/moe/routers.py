"""Routers: functions from router logits to each token's experts and their weights.

All routers have the signature ``route(logits, k, groups, generator)``; some arguments are used only by some routers:

* logits: float32 [N, E], the router logits;
* k: the number of experts per token;
* groups: the rows of each group, for routers that compare tokens; by default all rows are one group;
* generator: the source of randomness when training, on the logits' device; None turns randomness off.

Legend: N tokens, E experts, K experts of a token.
"""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pentad.nn.batch import SequenceLayout


class Routing(NamedTuple):
    """A router's decisions for each token; losses and statistics are computed from them.

    Attributes:
        logits: float32 [N, E], the router logits, including noise.
        experts: int64 [N, K], the experts of each token, first choice first.
        weights: float32 [N, K], the weights of the experts' outputs.
        kept: bool [N, K]; false if the (token, expert) pair was dropped.
        all_kept: true only if every pair is kept, so that `kept` need not be read from the device.
        clean, noise_std: float32 [N, E], only for noisy top-k: the logits without noise, and the noise's deviation.
    """

    logits: Tensor
    experts: Tensor
    weights: Tensor
    kept: Tensor
    all_kept: bool = True
    clean: Tensor | None = None
    noise_std: Tensor | None = None


class Route(Protocol):
    """The type of the routers below."""

    def __call__(
        self,
        logits_NE: Tensor,
        k: int,
        groups: SequenceLayout | None = None,
        generator: torch.Generator | None = None,
        /,
    ) -> Routing: ...


def noisy_top_k(
    logits_N2E: Tensor, k: int, groups: SequenceLayout | None = None, generator: torch.Generator | None = None
) -> Routing:
    """Sparsely-Gated Mixture-of-Experts (arXiv:1701.06538, section 2.1, equations 3 to 5).

    Gaussian noise is added to the logits, with a standard deviation from a second projection of the token; the weights
    are the softmax over the k largest.

    Args:
        logits_N2E: float32 [N, 2 E], both projections: x W_g, then x W_noise. Both weights are initialized to zeros
            (appendix A), so that all experts are equally likely.
    """
    clean_NE, raw_NE = logits_N2E.chunk(2, -1)
    noise_std_NE = F.softplus(raw_NE)
    noisy_NE = clean_NE
    if generator is not None:
        noise_NE = torch.randn(clean_NE.shape, generator=generator, device=clean_NE.device)
        noisy_NE = clean_NE + noise_NE * noise_std_NE
    top_NK, experts_NK = noisy_NE.topk(k)
    return _all_kept(noisy_NE, experts_NK, top_NK.softmax(-1))._replace(clean=clean_NE, noise_std=noise_std_NE)


def gshard_top_2(
    logits_NE: Tensor, k: int = 2, groups: SequenceLayout | None = None, generator: torch.Generator | None = None
) -> Routing:
    """GShard (arXiv:2006.16668, section 2.2, algorithm 1): the two largest gates, normalized to a sum of 1.

    When training, the second expert is kept with a probability of twice its weight; dropping it doesn't change the
    first expert's weight. `pentad.nn.moe.dispatch.within_capacity` implements the rest of the algorithm.

    Raises:
        ValueError: k is not 2.
    """
    if k != 2:
        raise ValueError(f"k is {k}; expected 2 for GShard's router")
    gates_N2, experts_N2 = logits_NE.softmax(-1).topk(2)
    routing = _all_kept(logits_NE, experts_N2, gates_N2 / gates_N2.sum(-1, keepdim=True))
    if generator is None:
        return routing
    drawn_N = torch.rand(len(logits_NE), generator=generator, device=logits_NE.device)
    second_N = 2 * routing.weights[:, 1] > drawn_N
    return routing._replace(kept=torch.stack((torch.ones_like(second_N), second_N), 1), all_kept=False)


def softmax_top_k(
    logits_NE: Tensor, k: int, groups: SequenceLayout | None = None, generator: torch.Generator | None = None
) -> Routing:
    """The k largest of the softmax over all experts, not normalized: their sum stays below 1.

    k = 1 is Switch Transformer's router (arXiv:2101.03961, section 2.1, equations 1 and 2); training also jitters the
    router's input (`pentad.nn.moe.layer.MixtureOfExperts`). k = 2 is OpenMoE's router (arXiv:2402.01739).
    """
    weights_NK, experts_NK = logits_NE.softmax(-1).topk(k)
    return _all_kept(logits_NE, experts_NK, weights_NK)


def mixtral_top_k(
    logits_NE: Tensor, k: int, groups: SequenceLayout | None = None, generator: torch.Generator | None = None
) -> Routing:
    """Mixtral of Experts (arXiv:2401.04088, section 2.1): softmax over the k largest logits.

    It equals the k largest of the softmax over all experts, divided by their sum.
    """
    top_NK, experts_NK = logits_NE.topk(k)
    return _all_kept(logits_NE, experts_NK, top_NK.softmax(-1))


def expert_choice(
    logits_NE: Tensor, k: int, groups: SequenceLayout | None = None, generator: torch.Generator | None = None
) -> Routing:
    """Expert choice (arXiv:2202.09368, section 3): each expert takes the tokens of a group with the highest gates.

    An expert takes n k / E of n tokens, rounded down but at least one, so a token has k experts on average and may have
    none. Unlike with all other routers, a token's experts depend on later tokens of its group.

    Returns:
        A routing with K = E: every expert of every token; `kept` is true where the expert chose the token.
    """
    gates_NE = logits_NE.softmax(-1)
    tokens, experts = gates_NE.shape
    kept_NE = torch.zeros_like(gates_NE, dtype=torch.bool)
    for start, count in (groups or SequenceLayout((0, tokens))).spans:
        tokens_each = min(count, max(1, count * k // experts))
        rows_TE = gates_NE[start : start + count].topk(tokens_each, dim=0).indices if count else kept_NE[:0].long()
        kept_NE[start : start + count].scatter_(0, rows_TE, True)
    experts_NE = torch.arange(experts, device=gates_NE.device).expand(tokens, experts)
    return Routing(logits_NE, experts_NE, gates_NE, kept_NE, all_kept=False)


def _all_kept(logits_NE: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Routing:
    return Routing(logits_NE, experts_NK, weights_NK, torch.ones_like(experts_NK, dtype=torch.bool))

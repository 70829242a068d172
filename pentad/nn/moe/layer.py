"""The mixture of experts: a feed-forward layer with many experts; each token uses a few."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pentad.nn.batch import Batch
from pentad.nn.moe.dispatch import dispatch, groups_of, within_capacity
from pentad.nn.moe.experts import Experts
from pentad.nn.moe.routers import Route, Routing


class Router(nn.Linear):
    """Router logits, always computed in float32: Switch's selective precision (arXiv:2101.03961, section 2.4)."""

    def __init__(self, dim: int, scores: int) -> None:
        super().__init__(dim, scores, bias=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        return F.linear(x_ND.float(), self.weight.float())


class MixtureOfExperts(nn.Module):
    """A router and its experts; without a capacity no token is dropped.

    Args:
        router: computes a token's router logits; for noisy top-k also the scale of their noise.
        experts: E feed-forward layers.
        route: a function of `pentad.nn.moe.routers`.
        top_k: number of experts per token.
        capacity: a group's number of tokens -> the maximum number that an expert takes; None for no limit.
        training_capacity: replaces `capacity` when training, unless None.
        group_size: tokens in a group; None if each sequence is a group.
        jitter: when training, the router's input is multiplied by random factors within 1 +- `jitter` (Switch,
            appendix C: 0.01).

    Attributes:
        generator: the source of randomness when training, on the weights' device; None turns randomness off.

    Raises:
        ValueError: `top_k` is below 1 or above the number of experts.
    """

    def __init__(
        self,
        router: nn.Linear,
        experts: Experts,
        route: Route,
        *,
        top_k: int,
        capacity: Callable[[int], int] | None = None,
        training_capacity: Callable[[int], int] | None = None,
        group_size: int | None = None,
        jitter: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 < top_k <= experts.count:
            raise ValueError(f"top_k is {top_k}; expected 1 to {experts.count}, the number of experts")
        self.router = router
        self.experts = experts
        self.route = route
        self.top_k = top_k
        self.capacity = capacity
        self.training_capacity = training_capacity
        self.group_size = group_size
        self.jitter = jitter
        self.generator: torch.Generator | None = None

    def forward(self, x_ND: Tensor, batch: Batch) -> tuple[Tensor, Routing]:
        """[N, D] -> float32 [N, D], and the routing. The output is 0 for a token dropped by all its experts."""
        generator = self.generator if self.training else None
        groups = batch.layout if self.group_size is None else groups_of(batch.layout, self.group_size)
        routing = self.route(self._logits(x_ND, generator), self.top_k, groups, generator)
        capacity = (self.training_capacity if self.training else None) or self.capacity
        if capacity is not None:
            routing = within_capacity(routing, self.experts.count, groups, capacity)
        return dispatch(x_ND, routing, self.experts.count, self.experts), routing

    def _logits(self, x_ND: Tensor, generator: torch.Generator | None) -> Tensor:
        if self.jitter and generator is not None:
            noise_ND = torch.rand(x_ND.shape, generator=generator, device=x_ND.device)
            x_ND = x_ND * (1 + self.jitter * (2 * noise_ND - 1))
        logits: Tensor = self.router(x_ND).float()
        return logits

    @property
    def idle_parameters(self) -> int:
        """The number of parameters that a token doesn't use."""
        total = sum(parameter.numel() for parameter in self.experts.parameters())
        return total // self.experts.count * (self.experts.count - self.top_k)

    def extra_repr(self) -> str:
        return f"top_k={self.top_k}"

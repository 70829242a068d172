"""LoRA (arXiv:2106.09685): trained low-rank layers beside frozen linear layers, of experts too.

Legend: E experts, R rank, I input features, O output features, N rows, S rows sorted by expert.
"""

import math
from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pentad.nn.moe.experts import ALL, GroupedLinear, grouped_linear


class LoRA(nn.Module):
    """y = W x + scale * B(A(dropout(x))). B starts at zero, so the layer starts as W x.

    Args:
        base: the layer with W; its parameters are frozen.
        rank: R.
        scale: alpha / R; with rsLoRA (arXiv:2312.03732) alpha / sqrt(R).
        dropout: probability of dropping an input of A while training.
        generator: draws A, uniformly as PEFT and the paper's code do; the paper draws normal numbers.

    Attributes:
        lora_A: [R, I]; of a grouped layer [E, R, I].
        lora_B: [O, R]; of a grouped layer [E, O, R].
    """

    base: nn.Module

    def __init__(
        self,
        base: nn.Linear | GroupedLinear,
        *,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = scale
        self.dropout = dropout
        weight = base.weight
        *experts, out_features, in_features = weight.shape
        bound = 1 / math.sqrt(in_features)
        drawn = torch.empty(*experts, rank, in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(drawn.to(weight))
        self.lora_B = nn.Parameter(weight.new_zeros(*experts, out_features, rank))

    def merged(self) -> Tensor:
        """W + scale * B A, in the dtype of W."""
        weight = self.base.get_parameter("weight").detach()
        return (weight.float() + self.scale * (self.lora_B.float() @ self.lora_A.float())).detach().to(weight.dtype)

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def extra_repr(self) -> str:
        return f"rank={self.lora_A.shape[-2]}, scale={self.scale:g}, dropout={self.dropout:g}"


class LoRALinear(LoRA):
    """`LoRA` beside a linear layer."""

    def forward(self, x_NI: Tensor) -> Tensor:
        """[N, I] -> [N, O]."""
        y_NO: Tensor = self.base(x_NI)
        return y_NO + self.scale * F.linear(F.linear(self._dropped(x_NI), self.lora_A), self.lora_B)


class LoRAGroupedLinear(LoRA):
    """`LoRA` beside a linear layer for each expert: each has an A and a B of its own."""

    def forward(self, x_SI: Tensor, ends_E: Tensor, selected: slice = ALL) -> Tensor:
        """See `GroupedLinear.forward`."""
        y_SO: Tensor = self.base(x_SI, ends_E, selected)
        low_SR = grouped_linear(self._dropped(x_SI), self.lora_A[selected], ends_E)
        return y_SO + self.scale * grouped_linear(low_SR, self.lora_B[selected], ends_E)


def add_lora(
    network: nn.Module, names: Collection[str], *, rank: int, scale: float, dropout: float = 0.0, seed: int = 0
) -> None:
    """Freeze a network, and put low-rank layers beside some of its linear layers.

    Args:
        network: changed in place.
        names: the layers' names in the network.
        rank, scale, dropout: see `LoRA`.
        seed: equal seeds give equal layers.
    """
    network.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        base = network.get_submodule(name)
        assert isinstance(base, nn.Linear | GroupedLinear)
        layer = LoRALinear if isinstance(base, nn.Linear) else LoRAGroupedLinear
        network.set_submodule(name, layer(base, rank=rank, scale=scale, dropout=dropout, generator=generator))


def lora_layers(network: nn.Module) -> dict[str, LoRA]:
    """The low-rank layers of a network, by the names of the layers beside which they are."""
    return {name: part for name, part in network.named_modules() if isinstance(part, LoRA)}


def merged_parameters(network: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """The parameters of a network as it is without low-rank layers; each function returns the merged value."""
    layers = lora_layers(network)
    values: dict[str, Callable[[], Tensor]] = {}
    for name, parameter in network.named_parameters():
        owner, _, leaf = name.rpartition(".")
        layer = owner.removesuffix(".base")
        if layer not in layers:
            values[name] = parameter.detach
        elif layer != owner:
            values[f"{layer}.{leaf}"] = layers[layer].merged if leaf == "weight" else parameter.detach
    return values

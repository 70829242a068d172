"""Optimizers of torch, and which parameters they get."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pentad.train.recipe import Optimizer


class Optimizers:
    """One optimizer, or Muon for the matrices inside blocks and AdamW for the rest (Muon's author's advice).

    Norms and biases have no weight decay.
    """

    def __init__(self, network: nn.Module, options: Optimizer) -> None:
        named = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
        hidden = {name for name, p in named.items() if p.dim() == 2 and name.startswith("layers.")}
        self._optimizers: list[torch.optim.Optimizer] = []
        self._owners: dict[str, tuple[torch.optim.Optimizer, Tensor]] = {}  # by the parameter's name
        if options.name == "muon":
            self._add(torch.optim.Muon, {n: p for n, p in named.items() if n in hidden}, options, lr=options.lr)
            named = {name: parameter for name, parameter in named.items() if name not in hidden}
        if options.name == "adafactor":
            self._add(torch.optim.Adafactor, named, options, lr=options.lr)
        else:
            betas = (options.betas[0], options.betas[1])
            self._add(torch.optim.AdamW, named, options, lr=options.lr, betas=betas, eps=options.eps, fused=True)

    def _add(self, kind: type, named: Mapping[str, Tensor], options: Optimizer, **arguments: object) -> None:
        decayed = [parameter for parameter in named.values() if parameter.dim() > 1]
        plain = [parameter for parameter in named.values() if parameter.dim() <= 1]
        groups = [
            {"params": parameters, "weight_decay": decay}
            for parameters, decay in ((decayed, options.weight_decay), (plain, 0.0))
            if parameters
        ]
        if groups:
            optimizer = kind(groups, **arguments)
            self._optimizers.append(optimizer)
            self._owners |= {name: (optimizer, parameter) for name, parameter in named.items()}

    def step(self, lr: float) -> None:
        """Update the parameters with this learning rate, then drop the gradients."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """All state as named tensors; the tensors are not copies."""
        return {
            f"{name}/{key}": value
            for name, (optimizer, parameter) in self._owners.items()
            for key, value in optimizer.state[parameter].items()
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned."""
        for name, tensor in tensors.items():
            name, _, key = name.rpartition("/")
            optimizer, parameter = self._owners[name]
            optimizer.state[parameter][key] = tensor.clone()

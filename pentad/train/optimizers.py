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
        self._names: list[list[str]] = []
        self._optimizers: list[torch.optim.Optimizer] = []
        if options.name == "muon":
            self._add(torch.optim.Muon, {n: p for n, p in named.items() if n in hidden}, options, lr=options.lr)
            named = {name: parameter for name, parameter in named.items() if name not in hidden}
        if options.name == "adafactor":
            self._add(torch.optim.Adafactor, named, options, lr=options.lr)
        else:
            betas = (options.betas[0], options.betas[1])
            self._add(torch.optim.AdamW, named, options, lr=options.lr, betas=betas, eps=options.eps, fused=True)

    def _add(self, kind: type, named: Mapping[str, Tensor], options: Optimizer, **arguments: object) -> None:
        decayed = [name for name, parameter in named.items() if parameter.dim() > 1]
        plain = [name for name in named if name not in set(decayed)]
        groups = [
            {"params": [named[name] for name in names], "weight_decay": decay}
            for names, decay in ((decayed, options.weight_decay), (plain, 0.0))
            if names
        ]
        if groups:
            self._optimizers.append(kind(groups, **arguments))
            self._names.append([*decayed, *plain])

    def step(self, lr: float) -> None:
        """Update the parameters with this learning rate, then drop the gradients."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """All state as named tensors; the tensors are not copies."""
        tensors = {}
        for names, optimizer in zip(self._names, self._optimizers, strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for name, parameter in zip(names, parameters, strict=True):
                for key, value in optimizer.state[parameter].items():
                    tensors[f"{name}/{key}"] = value
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned."""
        for names, optimizer in zip(self._names, self._optimizers, strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for name, parameter in zip(names, parameters, strict=True):
                prefix = f"{name}/"
                state = {key.removeprefix(prefix): t.clone() for key, t in tensors.items() if key.startswith(prefix)}
                optimizer.state[parameter] = state

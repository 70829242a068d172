"""Optimizers of torch, which parameters they get, and a moving average of the parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from pentad.errors import BadInput
from pentad.train.recipe import Group, Optimizer


class Optimizers:
    """One optimizer, or Muon for the matrices inside blocks and AdamW for the rest (Muon's author's advice).

    Norms and biases have no weight decay, unless a group gives them one.

    Args:
        network: parameters of groups with a learning rate of 0 are frozen.
        options: the recipe's.

    Attributes:
        owners: name of a parameter -> the optimizer that updates it, and the parameter.

    Raises:
        BadInput: a group's pattern matches no parameter, or everything is frozen.
    """

    def __init__(self, network: nn.Module, options: Optimizer) -> None:
        self._groups = _groups(network, options)
        self._prefix = "image_encoder." if hasattr(network, "image_encoder") else ""  # of the network that has blocks
        self._layers = len(getattr(getattr(network, "image_encoder", network), "layers", ()))
        named = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
        if not named:
            raise BadInput("optimizer.groups freezes all parameters; nothing would be trained")
        hidden = {name for name, p in named.items() if p.dim() == 2 and name.startswith(f"{self._prefix}layers.")}
        self._optimizers: list[torch.optim.Optimizer] = []
        self.owners: dict[str, tuple[torch.optim.Optimizer, Tensor]] = {}
        if options.name == "muon":
            self._add(torch.optim.Muon, {n: p for n, p in named.items() if n in hidden}, options, lr=options.lr)
            named = {name: parameter for name, parameter in named.items() if name not in hidden}
        if options.name == "sgd":
            self._add(torch.optim.SGD, named, options, lr=options.lr, momentum=options.betas[0], nesterov=True)
        elif options.name == "adafactor":
            self._add(torch.optim.Adafactor, named, options, lr=options.lr)
        else:
            betas = (options.betas[0], options.betas[1])
            self._add(torch.optim.AdamW, named, options, lr=options.lr, betas=betas, eps=options.eps, fused=True)

    def _add(self, kind: type, named: Mapping[str, Tensor], options: Optimizer, **arguments: object) -> None:
        settings: dict[tuple[float, float], list[Tensor]] = {}  # factor of the learning rate, weight decay
        for name, parameter in named.items():
            group = self._groups.get(name, Group(parameters=name))
            decay = options.weight_decay if parameter.dim() > 1 else 0.0
            decay = decay if group.weight_decay is None else group.weight_decay
            scale = group.lr_scale * options.layer_decay ** self._layers_above(name)
            settings.setdefault((scale, decay), []).append(parameter)
        if settings:
            groups = [
                {"params": parameters, "lr_scale": scale, "weight_decay": decay}
                for (scale, decay), parameters in settings.items()
            ]
            optimizer = kind(groups, **arguments)
            self._optimizers.append(optimizer)
            self.owners |= {name: (optimizer, parameter) for name, parameter in named.items()}

    def _layers_above(self, name: str) -> int:
        """The number of blocks from a parameter to the head: 0 for all that follows the blocks."""
        if not name.startswith(self._prefix):
            return 0
        part, _, rest = name.removeprefix(self._prefix).partition(".")
        if part == "layers":
            return self._layers - int(rest.partition(".")[0])
        return 0 if part in ("norm", "head", "neck") else self._layers + 1

    def step(self, lr: float) -> None:
        """Update the parameters with this learning rate, then drop the gradients."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """All state as named tensors; the tensors are not copies."""
        return {
            f"{name}/{key}": value
            for name, (optimizer, parameter) in self.owners.items()
            for key, value in optimizer.state[parameter].items()
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned."""
        for name, tensor in tensors.items():
            name, _, key = name.rpartition("/")
            optimizer, parameter = self.owners[name]
            optimizer.state[parameter][key] = _like(tensor, parameter)


def _like(state: Tensor, parameter: Tensor) -> Tensor:
    """A copy beside a parameter, with its strides: another order of elements would round differently."""
    if state.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=state.dtype, requires_grad=False).copy_(state)
    return state.to(parameter.device, copy=True)


def _groups(network: nn.Module, options: Optimizer) -> dict[str, Group]:
    """The group of each parameter that has one."""
    found: dict[str, Group] = {}
    for group in options.groups:
        matching = [name for name, _ in network.named_parameters() if fnmatchcase(name, group.parameters)]
        if not matching:
            names = ", ".join(name for name, _ in [*network.named_parameters()][:4])
            raise BadInput(f"optimizer.groups: {group.parameters!r} matches no parameter; names are {names}, …")
        for name in matching:
            found.setdefault(name, group)
    for name, group in found.items():
        if group.lr_scale == 0:
            network.get_parameter(name).requires_grad_(False)
    return found


def statistics(network: nn.Module) -> dict[str, Tensor]:
    """The floating-point buffers that a checkpoint stores: the statistics of batch norms."""
    names = {name for name, _ in network.named_buffers()}
    return {n: t for n, t in network.state_dict().items() if n in names and t.is_floating_point()}


class MovingAverage:
    """An exponential moving average of a network's trainable parameters (Polyak averaging), and of its statistics.

    Attributes:
        decay: ``average = decay * average + (1 - decay) * parameter`` after each step.
        tensors: the averages, by name.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self._parameters = {name: p for name, p in network.named_parameters() if p.requires_grad} | statistics(network)
        self.tensors = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters after a step."""
        torch._foreach_lerp_(list(self.tensors.values()), list(self._parameters.values()), 1 - self.decay)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over `tensors` of another average."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])

    @torch.no_grad()
    def apply(self) -> None:
        """Replace the network's parameters by their averages."""
        for name, tensor in self.tensors.items():
            self._parameters[name].copy_(tensor)


@torch.no_grad()
def clip_adaptively(parameters: Iterable[nn.Parameter], clip_factor: float = 0.01, eps: float = 1e-3) -> None:
    """Adaptive gradient clipping (arXiv:2102.06171): limit each output unit's gradient to a part of the unit's norm.

    Args:
        parameters: weights with gradients; a unit is the first dimension of a matrix or kernel, or a whole vector.
        clip_factor: largest ratio of the norms.
        eps: least norm of a unit.
    """
    for parameter in parameters:
        if parameter.grad is None:
            continue
        limit = _unit_norms(parameter).clamp_(min=eps).mul_(clip_factor)
        norms = _unit_norms(parameter.grad)
        parameter.grad.mul_(torch.where(norms < limit, 1.0, limit / norms.clamp(min=1e-6)))


def _unit_norms(x: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim())) or None, keepdim=True)
    return norms

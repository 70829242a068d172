"""Reading a network's parts, and noticing when they are no longer what was read."""

from __future__ import annotations

from operator import getitem, is_
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from pentad.nn.linear import QuantizedWeight

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class UnsupportedByKernels(Exception):
    """The reason that the kernels don't run a network; plain torch does."""


def has_hooks(part: nn.Module) -> bool:
    """Whether a module's call does more than its class's ``forward``."""
    return "forward" in vars(part) or any(getattr(part, hooks) for hooks in HOOKS)


class Guards:
    """Whether a network still is what was read: the same parts and types, attributes and tensors, and no hooks."""

    def __init__(self) -> None:
        self._places: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._values: list[object] = []
        self._parts: dict[int, nn.Module] = {}
        self._types: list[type[nn.Module]] = []
        self._own: list[dict[str, Any]] = []
        self._hooks: list[dict[Any, Any]] = [
            hooks
            for name, hooks in vars(torch_module).items()
            if name.startswith("_global_") and isinstance(hooks, dict)
        ]
        self._tensors: dict[int, Tensor] = {}
        self._versions: list[int] = []

    def read(self, part: nn.Module, *names: str) -> Any:
        """The attributes of a part, noted; one alone, or a tuple of several."""
        if "forward" in vars(part):
            raise UnsupportedByKernels(f"{type(part).__name__}.forward was replaced")
        if id(part) not in self._parts:
            self._parts[id(part)] = part
            self._types.append(type(part))
            self._own.append(vars(part))
            self._hooks += [getattr(part, hooks) for hooks in HOOKS]
        values = [self._read(part, name) for name in names]
        return values[0] if len(values) == 1 else tuple(values)

    def _read(self, part: nn.Module, name: str) -> object:
        if isinstance(part, QuantizedWeight) and name == "weight":
            self._read(part, "blocks")
            self._read(part, "row_order")
            return part.weight
        for place in (part._modules, part._parameters, part._buffers, vars(part)):
            if name in place:
                break
        else:
            raise UnsupportedByKernels(f"{type(part).__name__} has no {name}")
        value = place[name]
        self._places.append(place)
        self._names.append(name)
        self._values.append(value)
        if isinstance(value, Tensor) and not value.is_inference():
            base = value if value._base is None else value._base  # views count changes together
            if id(base) not in self._tensors:
                self._tensors[id(base)] = base
                self._versions.append(base._version)
        return value

    def unchanged(self) -> bool:
        try:
            return (
                not any(self._hooks)
                and not any("forward" in own for own in self._own)
                and all(map(is_, map(type, self._parts.values()), self._types))
                and all(map(is_, map(getitem, self._places, self._names), self._values))
                and [tensor._version for tensor in self._tensors.values()] == self._versions
            )
        except KeyError:
            return False

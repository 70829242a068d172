"""Guards record the parts read from a network, and detect later changes."""

from operator import getitem, is_
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from pentad.nn.linear import QuantizedWeight

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class UnsupportedByKernels(Exception):
    """Why the kernels can't run a network; plain torch runs it instead."""


def has_hooks(part: nn.Module) -> bool:
    """True if calling a module runs more than its class's ``forward``."""
    return "forward" in vars(part) or any(getattr(part, hooks) for hooks in HOOKS)


class Guards:
    """Records parts of a network as they are read. `unchanged` compares types, attributes, tensors and hooks."""

    def __init__(self) -> None:
        self._namespaces: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._values: list[object] = []
        self._parts: dict[int, nn.Module] = {}
        self._types: list[type[nn.Module]] = []
        global_hooks = (hooks for name, hooks in vars(torch_module).items() if name.startswith("_global_"))
        self._hooks: list[dict[Any, Any]] = [hooks for hooks in global_hooks if isinstance(hooks, dict)]
        self._tensors: dict[int, Tensor] = {}
        self._versions: list[int] = []

    def read(self, part: nn.Module, *names: str) -> Any:
        """Read and record attributes of a part: one value, or a tuple for several names."""
        if "forward" in vars(part):
            raise UnsupportedByKernels(f"{type(part).__name__}.forward was replaced")
        if id(part) not in self._parts:
            self._parts[id(part)] = part
            self._types.append(type(part))
            self._hooks += [getattr(part, hooks) for hooks in HOOKS]
        values = [self._read(part, name) for name in names]
        return values[0] if len(values) == 1 else tuple(values)

    def _read(self, part: nn.Module, name: str) -> object:
        if isinstance(part, QuantizedWeight) and name == "weight":
            self._read(part, "blocks")
            self._read(part, "row_order")
            return part.weight
        namespaces = (part._modules, part._parameters, part._buffers, vars(part))
        namespace = next((namespace for namespace in namespaces if name in namespace), None)
        if namespace is None:
            raise UnsupportedByKernels(f"{type(part).__name__} has no {name}")
        value = namespace[name]
        self._namespaces.append(namespace)
        self._names.append(name)
        self._values.append(value)
        if isinstance(value, Tensor) and not value.is_inference():
            base = value if value._base is None else value._base  # a tensor and its views share a version counter
            if id(base) not in self._tensors:
                self._tensors[id(base)] = base
                self._versions.append(base._version)
        return value

    def unchanged(self) -> bool:
        """True if the network still is as it was read, and has no hooks."""
        try:
            return (
                not any(self._hooks)
                and not any("forward" in vars(part) for part in self._parts.values())
                and all(map(is_, map(type, self._parts.values()), self._types))
                and all(map(is_, map(getitem, self._namespaces, self._names), self._values))
                and [tensor._version for tensor in self._tensors.values()] == self._versions
            )
        except KeyError:
            return False

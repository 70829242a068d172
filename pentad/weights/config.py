"""Reading published configs into typed ones."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pentad.errors import BadInput

C = TypeVar("C")

MAX_SIZE = 2**27  # no published size comes near; a larger one is a broken file, and would ask for absurd memory
MAX_LAYERS = 1000  # layers


def read_config(cls: type[C], values: Mapping[str, Any], source: object) -> C:
    """Make the dataclass `cls` from those of `values` that it has fields for; `source` begins an error's line.

    Numbers are more than 0, or at least a field's ``metadata["least"]``.

    Raises:
        BadInput: fields without a default are missing, or a value has the wrong type or an impossible size.
    """
    hints = get_type_hints(cls)
    found: dict[str, Any] = {}
    missing = []
    for field in fields(cls):  # type: ignore[arg-type]
        value = values.get(field.name)
        if value is not None:
            found[field.name] = _checked(
                value, hints[field.name], f"{source}: {field.name}", field.metadata.get("least")
            )
        elif field.default is MISSING and field.default_factory is MISSING:
            missing.append(field.name)
    if missing:
        raise BadInput(f"{source}: the config lacks {', '.join(missing)}")
    if found.get("num_hidden_layers", 0) > MAX_LAYERS:
        raise BadInput(f"{source}: num_hidden_layers is {found['num_hidden_layers']}, which is not a possible depth")
    return cls(**found)


def _checked(value: Any, hint: Any, name: str, least: float | None = None) -> Any:
    """A value as the type that a field asks for."""
    kinds = [kind for kind in _alternatives(hint) if kind is not type(None)]
    for kind in kinds:
        if get_origin(kind) is tuple and isinstance(value, list | tuple):
            return tuple(_checked(item, get_args(kind)[0], name) for item in value)
        if kind in (int, float) and isinstance(value, int | float) and not isinstance(value, bool):
            enough = value > 0 if least is None else value >= least
            if not enough or not value < (MAX_SIZE if kind is int else 1e30):  # also refuses NaN
                raise BadInput(f"{name} is {str(value)[:40]}, which is not a possible size")
            if kind is float or int(value) == value:
                return kind(value)
        plain = get_origin(kind) or kind
        if plain not in (int, float, tuple) and isinstance(value, plain):
            return value
    wanted = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
    raise BadInput(f"{name} is {str(value)[:40]!r}, not of type {wanted}")


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)

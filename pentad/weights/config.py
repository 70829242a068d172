"""Reading published configs into dataclasses."""

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pentad.errors import BadInput

C = TypeVar("C")

MAX_SIZE = 2**27  # far above any published size; a larger one is a broken file and would allocate absurd memory
MAX_LAYERS = 1000


def read_config(cls: type[C], values: Mapping[str, Any], source: object) -> C:
    """Make a dataclass from the config values that match its fields.

    Args:
        cls: a dataclass, whose fields may be dataclasses. Its numbers must be above 0, or at least a field's
            ``metadata["least"]``.
        values: by field name; others are ignored.
        source: names the file in errors.

    Raises:
        BadInput: fields without a default are missing, or a value has the wrong type or an impossible size.
    """
    hints = get_type_hints(cls)
    found: dict[str, Any] = {}
    missing = []
    for field in fields(cls):  # type: ignore[arg-type]
        value, name = values.get(field.name), f"{source}: {field.name}"
        if value is not None:
            found[field.name] = _checked(value, hints[field.name], name, field.metadata.get("least"))
        elif field.default is MISSING and field.default_factory is MISSING:
            missing.append(field.name)
    if missing:
        raise BadInput(f"{source}: the config lacks {', '.join(missing)}")
    if found.get("num_hidden_layers", 0) > MAX_LAYERS:
        raise BadInput(f"{source}: num_hidden_layers is {found['num_hidden_layers']}; expected at most {MAX_LAYERS}")
    return cls(**found)


def _checked(value: Any, hint: Any, name: str, least: float | None = None) -> Any:
    """A value converted to the type of its field."""
    alternatives = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    expected = [alternative for alternative in alternatives if alternative is not type(None)]
    for cls in expected:
        if get_origin(cls) is tuple and isinstance(value, list | tuple):
            return tuple(_checked(item, get_args(cls)[0], name, least) for item in value)
        if cls in (int, float) and isinstance(value, int | float) and not isinstance(value, bool):
            enough = value > 0 if least is None else value >= least
            if not enough or not value < (MAX_SIZE if cls is int else 1e30):  # also refuses NaN
                raise BadInput(f"{name} is {str(value)[:40]}, which is not a possible size")
            if cls is float or isinstance(value, int):
                return cls(value)
        if isinstance(cls, type) and is_dataclass(cls) and isinstance(value, Mapping):
            return read_config(cls, value, name)
        plain = get_origin(cls) or cls
        if plain not in (int, float, tuple) and isinstance(value, plain):
            return value
    names = " or ".join(getattr(cls, "__name__", str(cls)) for cls in expected)
    raise BadInput(f"{name} is {str(value)[:40]!r}, not of type {names}")

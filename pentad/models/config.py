"""Reading published configs into typed ones."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pentad.errors import BadInput

C = TypeVar("C")

LARGEST = 2**31  # no published size comes near; a larger one is a broken file, and would ask for absurd memory


def read_config(cls: type[C], values: Mapping[str, Any], source: object) -> C:
    """Make the dataclass `cls` from those of `values` that it has fields for.

    Raises:
        BadInput: fields without a default are missing, or a value has the wrong type or an impossible size.
    """
    hints = get_type_hints(cls)
    found: dict[str, Any] = {}
    missing = []
    for field in fields(cls):  # type: ignore[arg-type]
        value = values.get(field.name)
        if value is None:
            if field.default is MISSING and field.default_factory is MISSING:
                missing.append(field.name)
            continue
        found[field.name] = _checked(value, hints[field.name], field.name, source)
    if missing:
        raise BadInput(f"{source}: the config lacks {', '.join(missing)}")
    return cls(**found)


def _checked(value: Any, hint: Any, name: str, source: object) -> Any:
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    kinds = tuple(get_origin(kind) or kind for kind in kinds if kind is not type(None))
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise BadInput(f"{source}: {name} is {str(value)[:60]!r}, not of type {getattr(hint, '__name__', hint)}")
    if isinstance(value, int | float) and not isinstance(value, bool) and not 0 < value < LARGEST:
        raise BadInput(f"{source}: {name} is {value}, which is not a possible size")
    return value

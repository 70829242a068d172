"""The part of JSON Schema that is enforced. Everything else is refused by name."""

import math
from collections.abc import Iterator, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from pentad.errors import BadInput

__all__ = ["check_schema"]

MAX_MULTIPLE = 20_000  # the automaton has a state for each remainder

_DIALECTS = (
    *(f"https://json-schema.org/draft/{draft}/schema" for draft in ("2020-12", "2019-09")),
    *(f"http://json-schema.org/draft-0{number}/schema" for number in (7, 6, 4)),
)
_ONE = frozenset({"additionalItems", "additionalProperties", "items"})  # the value is a schema
_SEVERAL = frozenset({"allOf", "anyOf", "items", "oneOf", "prefixItems"})  # a list of schemas
_NAMED = frozenset({"$defs", "definitions", "patternProperties", "properties"})  # a mapping of names to schemas
_ENFORCED = frozenset(
    {
        *("$ref", "const", "enum", "type", "format", "pattern", "required", "multipleOf"),
        *("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    }
)
_ANNOTATIONS = frozenset(
    {
        *("$comment", "title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly"),
        *("contentEncoding", "contentMediaType", "discriminator"),
    }
)
_OF_ROOT = frozenset({"$id", "$schema"})  # inside they would change the meaning of references
_KNOWN = _ONE | _SEVERAL | _NAMED | _ENFORCED | _ANNOTATIONS


def check_schema(schema: Any, path: str = "schema") -> None:
    """Raise BadInput if a schema has a keyword that is not enforced; the message begins with `path`."""
    if not isinstance(schema, Mapping):
        raise BadInput(f"{path} is {_shown(schema)}; expected an object")
    dialect = schema.get("$schema", _DIALECTS[0])
    if not isinstance(dialect, str) or dialect.rstrip("#") not in _DIALECTS:
        raise BadInput(f"{path}.$schema is {_shown(dialect)}; expected a draft of JSON Schema: {', '.join(_DIALECTS)}")
    multiples = []
    try:
        for at, part in _parts({key: value for key, value in schema.items() if key not in _OF_ROOT}, path):
            if unknown := next((key for key in part if key not in _KNOWN), None):
                raise BadInput(f"{at}.{unknown} is not supported, as it would not be enforced; remove it")
            _check_least_properties(part, at)
            multiples.append(part.get("multipleOf", 1))
    except RecursionError:
        raise BadInput(f"{path} is nested too deeply") from None
    _check_multiples(multiples, path)


def _parts(schema: Any, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """A schema and all schemas in it, with their paths."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise BadInput(f"{path} is {_shown(schema)}; expected a JSON schema")
    yield path, schema
    for key, value in schema.items():
        at = f"{path}.{key}"
        if key in _NAMED and not isinstance(value, Mapping):
            raise BadInput(f"{at} is {_shown(value)}; expected an object")
        if key in _NAMED:
            several = value.items()
        elif key in _SEVERAL and isinstance(value, list):
            several = enumerate(value)
        else:
            several = []
            if key in _ONE:
                yield from _parts(value, at)
        for name, part in several:
            yield from _parts(part, f"{at}.{name}")


def _check_least_properties(schema: Mapping[str, Any], path: str) -> None:
    """Names of additional properties may repeat, and then an object has fewer properties than were generated."""
    least, required = schema.get("minProperties", 0), schema.get("required", [])
    if isinstance(least, int) and isinstance(required, list) and least > len(required) + 1:
        where = f"{path}.minProperties is {least}, of {len(required)} required"
        raise BadInput(f"{where}; expected at most one more than those in required")


def _check_multiples(values: list[Any], path: str) -> None:
    """Bound the least common multiple of all values of multipleOf, as they may apply to the same number."""
    try:
        numbers = [Decimal(str(value)) for value in {*values} if value]
        digits = max((-int(number.as_tuple().exponent) for number in numbers), default=0)
        multiple = math.lcm(*(int(number.scaleb(max(0, digits))) for number in numbers))
    except (InvalidOperation, TypeError, ValueError, OverflowError):
        raise BadInput(f"{path}: multipleOf is not a number of usual size") from None
    if multiple > MAX_MULTIPLE:
        raise BadInput(f"{path}: multipleOf has too many digits; expected at most {MAX_MULTIPLE} without a point")


def _shown(value: Any) -> str:
    return "an object" if isinstance(value, Mapping) else "a list" if isinstance(value, list) else repr(value)[:60]

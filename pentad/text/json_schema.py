"""The part of JSON Schema that is enforced. Everything else is refused by name."""

import json
import math
from collections.abc import Iterator, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from pentad.errors import BadInput

__all__ = ["checked_schema"]

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


# llguidance's own patterns allow the 29th of February in any year, and leap seconds at any time.
_LEAP = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_YEAR = "(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_LONG, _SHORT = "(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])", "(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
_DATE = f"(?:{_YEAR}-(?:{_LONG}|{_SHORT}|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP}-02-29)"
_HOUR = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_HOUR}:[0-5][0-9](?:\.[0-9]{{1,9}})?(?:[zZ]|[+-]{_HOUR})"
_FORMATS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}[tT]{_TIME}$"}


def checked_schema(schema: Any, path: str = "schema") -> dict[str, Any]:
    """Copy a schema, with the formats of dates and times as patterns.

    Raises:
        BadInput: it has a keyword that is not enforced; the message begins with `path`.
    """
    _check_schema(schema, path)
    try:
        copied: dict[str, Any] = json.loads(json.dumps(schema, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        raise BadInput(f"{path} is not JSON; expected a JSON schema") from None
    for _, part in _parts(copied, path):
        if isinstance(form := part.get("format"), str) and form in _FORMATS:
            del part["format"]
            part["allOf"] = [*part.get("allOf", ()), {"pattern": _FORMATS[form]}]
    return copied


def _check_schema(schema: Any, path: str) -> None:
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


def _parts(schema: Any, path: str) -> Iterator[tuple[str, Any]]:
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

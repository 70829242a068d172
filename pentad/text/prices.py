"""What the work of a chat template costs: see `sandbox`. A unit is about a byte read or written."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.runtime import Undefined
from jinja2.utils import Namespace

__all__ = [
    "COMPARING",
    "FILTERS",
    "ITEM",
    "METHODS",
    "STEP",
    "Budget",
    "Price",
    "binop_size",
    "deep",
    "format_price",
    "percent_price",
    "shallow",
    "size",
    "span",
]

STEP = 64  # what a call of a filter, test or function costs, whatever it does
ITEM = 64  # what an item of a list costs, about its bytes
Price = Callable[..., None]  # (budget, value, *args, **kwargs)

_MAX_INTEGER_BITS = 4096
_MAX_INDENTING = 1 << 23


class Budget:
    """The work that one rendering may still do, in units: `left`."""

    def __init__(self, units: int) -> None:
        self.left = units

    def charge(self, units: int) -> None:
        """Takes `units` off; raises `SecurityError` where there aren't so many."""
        self.left -= max(units, 0)
        if self.left < 0:
            raise SecurityError("it does more work than its messages warrant (endless loop? huge output?)")

    def charge_all(self, value: Any) -> None:
        """Charges everything that is in `value`."""
        self.charge(size(value, self.left + 1))


# Sizes, in units of the budget.


def span(value: Any) -> int:
    """What a value costs, not counting what is in it."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Collection):
        return ITEM * len(value)
    if isinstance(value, int) and value.bit_length() > _MAX_INTEGER_BITS:
        raise SecurityError("a number is too large")
    return 1


def size(value: Any, limit: int) -> int:
    """What a value costs with all that is in it, each time it occurs; stops past `limit`."""
    total, stack = 0, [value]
    while stack and total <= limit:
        item = stack.pop()
        total += span(item) + 1
        if isinstance(item, dict):
            stack += [*item.keys(), *item.values()]
        elif isinstance(item, Collection) and not isinstance(item, str):
            stack += item
        elif isinstance(item, Namespace):
            stack += [item._Namespace__attrs]  # its repr shows them
    return total


def binop_size(operator: str, left: Any, right: Any) -> int:
    match operator, left, right:
        case "*", int(), int():
            bits = left.bit_length() + right.bit_length()
        case "**", int(), int():
            bits = left.bit_length() * abs(right)
        case "*", _, int():
            return span(left) * max(right, 0)
        case "*", int(), _:
            return span(right) * max(left, 0)
        case "+", _, _:
            return span(left) + span(right)
        case _:
            return 1
    if bits > _MAX_INTEGER_BITS:
        raise SecurityError("a number is too large")
    return 1


# Prices: charge what a filter, test or method is about to do, from its arguments.


def shallow(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> None:
    """Reads its value once, or is quicker than that."""
    budget.charge(span(value) + sum(map(span, args)))


def _listing(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> None:
    """Makes items of what it is given, of a string's characters too."""
    budget.charge(ITEM * len(value) if hasattr(value, "__len__") else 1)


def deep(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> None:
    """Reads everything that is in its value and arguments."""
    for item in (value, *args, *kwargs.values()):
        budget.charge_all(item)


def _free(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> None:
    """Takes no time to speak of, whatever the value's size."""


def _escaping(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> None:
    """Writes up to twelve characters for one."""
    budget.charge(12 * size(value, budget.left + 1))


def _keyed(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> None:
    """Hashes a key, which reads all of it."""
    for key in args[:1]:
        budget.charge_all(key)


def _ordering(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> None:
    """Compares items with one another, n log n times."""
    for _ in range(len(value).bit_length() if hasattr(value, "__len__") else 1):
        budget.charge_all(list(value) if isinstance(value, str | range) else value)


def _replace(budget: Budget, text: Any, old: Any = "", new: Any = "", *args: Any, **kwargs: Any) -> None:
    text, old, new = str(text), str(old), str(new)
    budget.charge(len(text) + text.count(old) * len(new))


def _join(budget: Budget, value: Any, d: Any = "", *args: Any, **kwargs: Any) -> None:
    deep(budget, value)
    budget.charge((len(value) if hasattr(value, "__len__") else 1) * (1 + len(str(d))))


def _method_join(budget: Budget, separator: str, items: Any = (), *args: Any) -> None:
    if isinstance(items, Iterator | Undefined):
        raise SecurityError("str.join takes a list here: use the filter join")
    _join(budget, items, separator)


def _padded(budget: Budget, text: Any, width: Any = 80, *args: Any, **kwargs: Any) -> None:
    budget.charge(span(text) + max(_int(width), 0))


def _indent(budget: Budget, text: Any, width: Any = 4, *args: Any, **kwargs: Any) -> None:
    wide = len(width) if isinstance(width, str) else max(_int(width), 0)
    budget.charge(len(text) + (text.count("\n") + 1) * (wide + 1) + wide)


def _chunked(budget: Budget, value: Any, size: Any = 1, *args: Any, **kwargs: Any) -> None:
    _listing(budget, value)
    budget.charge(ITEM * max(_int(size), 0))


def _json_price(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> None:
    deep(budget, value, *args, **kwargs)
    indent = kwargs.get("indent", args[1] if len(args) > 1 else None)
    wide = len(indent) if isinstance(indent, str) else _int(indent or 0)
    if wide > 16:
        raise SecurityError(f"an indent of {wide} is too wide")
    if wide > 0:
        budget.charge_all(_depths(value, wide))


def _depths(value: Any, wide: int) -> list[str]:
    """One string, as long as the white space that indents `value`."""
    total, stack = 0, [(value, 1)]
    while stack:
        item, depth = stack.pop()
        if isinstance(item, dict | list | tuple):
            items = list(item.values()) if isinstance(item, dict) else list(item)
            total += wide * depth * (len(items) + 1)
            stack += [(child, depth + 1) for child in items]
        if total > _MAX_INDENTING:
            raise SecurityError("its JSON is indented too deeply")
    return [" " * total]


def percent_price(budget: Budget, text: Any, *args: Any, **kwargs: Any) -> None:
    text = str(text)
    if re.search(r"%[^%a-zA-Z]*(\*|\d{4})", text):
        raise SecurityError("a format is too wide")
    for item in (*args, *kwargs.values()):
        budget.charge(size(item, budget.left + 1) * (1 + text.count("%")))


def format_price(budget: Budget, text: str, *args: Any, **kwargs: Any) -> None:
    """Charges `text.format(…)`, whose fields may each repeat a value."""
    if re.search(r"\d{4}|\{[^{}]*:[^{}]*\{", text):
        raise SecurityError("a format is too wide")
    deep(budget, text)
    for item in (*args, *kwargs.values()):
        budget.charge(size(item, budget.left + 1) * (1 + text.count("{")))


def _round_price(budget: Budget, value: Any, precision: Any = 0, *args: Any, **kwargs: Any) -> None:
    if abs(_int(precision)) > 300:
        raise SecurityError("a number is too large")


def _sum_price(budget: Budget, value: Any, attribute: Any = None, start: Any = 0) -> None:
    if not isinstance(start, int | float):
        raise SecurityError("sum is for numbers")
    deep(budget, value)


def _number_price(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> None:
    if isinstance(value, str) and len(value) > 1000:
        raise SecurityError("a number is too large")


def _backward(budget: Budget, text: str, sub: Any = "", *args: Any, **kwargs: Any) -> None:
    # Python searches backwards in quadratic time.
    budget.charge(len(text) * (1 + span(sub) // 4))


def _split_price(budget: Budget, text: str, sep: Any = None, *args: Any, **kwargs: Any) -> None:
    parts = text.count(sep) + 1 if isinstance(sep, str) and sep else len(text) // 2 + 1
    budget.charge(len(text) + ITEM * parts)
    if isinstance(sep, str):
        _backward(budget, text, sep)


def _lines_price(budget: Budget, text: str, *args: Any, **kwargs: Any) -> None:
    # Ten characters end a line; counting them is cheaper than splitting.
    ends = sum(text.count(end) for end in "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029")
    budget.charge(len(text) + ITEM * (ends + 1))


def _tabs_price(budget: Budget, text: str, tabsize: Any = 8) -> None:
    budget.charge(len(text) + text.count("\t") * max(_int(tabsize), 0))


def _int(value: Any) -> int:
    if not isinstance(value, int | float):
        raise SecurityError(f"a number was expected, not {type(value).__name__}")
    return int(value)


def _at(price: Price, names: str) -> dict[str, Price]:
    return dict.fromkeys(names.split(), price)


FILTERS: dict[str, Price] = {
    **_at(_free, "default d length count first last attr abs safe"),
    **_at(shallow, "capitalize lower upper title trim"),
    **_at(shallow, "select selectattr reject rejectattr map items"),
    **_at(deep, "string truncate"),
    **_at(_listing, "list reverse wordcount"),
    **_at(_ordering, "sort unique groupby dictsort max min"),
    **_at(_chunked, "batch slice"),
    **_at(_escaping, "e escape urlencode"),
    **_at(_number_price, "int float"),
    "center": _padded,
    "format": percent_price,
    "indent": _indent,
    "join": _join,
    "replace": _replace,
    "round": _round_price,
    "sum": _sum_price,
    "tojson": _json_price,
}

# Tests that look into what they are given.
COMPARING = frozenset(_at(deep, "eq equalto == ne != gt greaterthan > ge >= lt lessthan < le <= in"))

METHODS: dict[type, dict[str, Price]] = {
    str: {
        **_at(shallow, "capitalize casefold lower swapcase title upper lstrip rstrip strip"),
        **_at(shallow, "count endswith find index partition removeprefix removesuffix startswith"),
        **_at(shallow, "isalnum isalpha isascii isdecimal isdigit isidentifier islower isnumeric"),
        **_at(shallow, "isprintable isspace istitle isupper"),
        **_at(_backward, "rfind rindex rpartition"),
        **_at(_padded, "center ljust rjust zfill"),
        **_at(_split_price, "split rsplit"),
        "expandtabs": _tabs_price,
        "join": _method_join,
        "replace": _replace,
        "splitlines": _lines_price,
    },
    dict: {**_at(_free, "items keys values"), "get": _keyed, "copy": _listing},
    list: {**_at(deep, "index count"), "copy": _listing},
    tuple: _at(deep, "index count"),
}

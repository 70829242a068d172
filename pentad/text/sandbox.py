"""A jinja environment for untrusted templates: it hides Python internals and limits time and memory.

Jinja's sandbox hides unsafe attributes and methods, but a template may still loop forever or fill the memory. Here
each rendering has a budget, and every step is charged to it before the step runs. A unit is about one byte read or
written, or half a node of the template. `_Generator` adds charges to constructs that jinja compiles to plain Python
(blocks, loop tests, comparisons, slices, `~`, dict keys). `Sandbox` charges for those that call the environment
(operators, calls, filters, tests, output). Filters and functions that no chat template needs are left out.
"""

import functools
import itertools
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame, MacroRef
from jinja2.exceptions import SecurityError
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Cycler, Joiner, Namespace, pass_context

__all__ = ["Sandbox"]

_BUDGET = 1 << 22  # units for any template
_BUDGET_PER_UNIT = 200  # additional units for each unit of the variables
_NODE, _ITEM, _CALL = 2, 64, 64  # units of a template node, an item of a list, a call
_MAX_BITS = 4096  # of an integer
_MAX_DEPTH = 500  # of nested lists: Python hashes nested tuples without checking its stack


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_FILTERS = _names(
    "abs attr batch capitalize center count d default dictsort e escape first float format groupby indent int items "
    "join last length list lower map max min reject rejectattr replace reverse round safe select selectattr slice sort "
    "string sum title trim truncate unique upper urlencode wordcount"
)
_SHALLOW = _names(  # filters and tests that don't read the items of their value
    "abs attr batch count d default first items last length list map reject rejectattr reverse select selectattr slice "
    "boolean callable defined escaped false integer iterable mapping none number sameas sequence true undefined"
)
# These sort, write up to twelve characters for each character, or split a text into words.
_SLOW = _names("dictsort e escape groupby max min sort splitlines title unique urlencode wordcount")
_UNSAFE_METHODS = _names("encode maketrans striptags translate unescape")
_METHOD_OWNERS = (str, dict, list, tuple, LoopContext, Cycler)
_CALLABLE = (BlockReference, Cycler, Joiner, LoopContext, Undefined)


class _Generator(CodeGenerator):
    """A compiler that adds charges to the code that jinja compiles to plain Python."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._charged: dict[int, str] = {}  # id of a node -> the call that its value is wrapped in

    def blockvisit(self, nodes: Iterable[nodes.Node], frame: Frame) -> None:
        statements = list(nodes)
        self.writeline(f"environment.{_charge(statements)}")
        super().blockvisit(statements, frame)

    def macro_body(self, node: nodes.Macro | nodes.CallBlock, frame: Frame) -> tuple[Frame, MacroRef]:
        node.body.insert(0, nodes.ExprStmt(nodes.EnvironmentAttribute(_charge(node.defaults)), lineno=node.lineno))
        return super().macro_body(node, frame)

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> None:
        match node:
            case nodes.For(test=nodes.Expr() as test):  # the test also runs for items that it drops
                node.test = nodes.Or(nodes.EnvironmentAttribute(_charge([test])), test, lineno=node.lineno)
            case nodes.Concat():
                self._charged |= {id(part): "environment.finalize(context, " for part in node.nodes}
            case nodes.Compare():
                self._charged[id(node.expr)] = "environment.read("
                for operand in node.ops:
                    method = "search" if operand.op in ("in", "notin") else "read"
                    self._charged[id(operand.expr)] = f"environment.{method}("
            case nodes.Getitem():
                self._charged[id(node.arg)] = "environment.read("  # hashing reads the whole key
            case nodes.Dict():
                self._charged |= {id(pair.key): "environment.read(" for pair in node.items}
            case nodes.Const(value=int() as number) if number.bit_length() > _MAX_BITS:
                raise SecurityError("a number is too large")
            case nodes.ScopedEvalContextModifier():
                raise SecurityError("{% autoescape %} is not allowed in a chat template")
        calls = "" if isinstance(node, nodes.Const | nodes.Slice) else self._charged.pop(id(node), "")
        if isinstance(node, nodes.Concat) or isinstance(getattr(node, "arg", None), nodes.Slice):
            calls += "environment.made("
        self.write(calls)
        super().visit(node, *args, **kwargs)
        self.write(")" * calls.count("("))


def _charge(statements: Iterable[nodes.Node]) -> str:
    """Write the call that charges for one run of `statements`, excluding their inner blocks."""
    return f"charge({_NODE * (1 + sum(map(_count, statements)))})"


def _count(node: nodes.Node) -> int:
    return 1 + sum(map(_count, node.iter_child_nodes(exclude=("body", "else_"))))


class Sandbox(ImmutableSandboxedEnvironment):
    """A jinja environment for one rendering with a limited budget."""

    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self, variables: Mapping[str, Any], **options: Any) -> None:
        """Make an environment. The size of `variables` sets the budget; `options` go to `jinja2.Environment`."""
        super().__init__(**options, optimized=False, finalize=self._finalize)
        self._left = _BUDGET + _BUDGET_PER_UNIT * _size(variables)
        filters: dict[str, Any] = self.filters
        tests: dict[str, Any] = self.tests
        self.filters = {name: self._limited(name, filters[name]) for name in _FILTERS}
        self.filters["tojson"] = self._tojson
        self.tests = {name: self._limited(name, test) for name, test in tests.items()}
        self.globals = {"range": safe_range, "dict": dict, "namespace": Namespace, "cycler": Cycler, "joiner": Joiner}

    def charge(self, units: int) -> None:
        """Subtract `units` from the budget. Raises `SecurityError` when the budget is spent."""
        self._left -= units
        if self._left < 0:
            raise SecurityError("the work limit is exceeded; is there an endless loop, or a huge output?")

    def read(self, value: Any) -> Any:
        """Charge for reading all of `value`, and return `value`."""
        self.charge(len(value) + 1 if isinstance(value, str) else _size(value, self._left))
        return value

    def search(self, container: Any) -> Any:
        """Charge for a search in `container`, and return `container`."""
        return container if isinstance(container, dict) else self.read(_items(container))

    def made(self, value: Any) -> Any:
        """Charge for a new value without its items, and return the value. An iterator is charged later, by item."""
        self.charge(_span(value))
        return self._each(value) if isinstance(value, Iterator) else value

    def _each(self, items: Iterator[Any]) -> Iterator[Any]:
        for item in items:
            self.charge(_ITEM)
            yield item

    def concat(self, texts: Iterable[str]) -> str:
        """Charge for each text, then join the texts."""
        return "".join([self.made(text) for text in texts])

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        items, times = (right, left) if isinstance(left, int) else (left, right)
        if operator == "*" and isinstance(times, int) and not isinstance(items, int):
            self.charge(_span(items) * max(times, 0))
        elif operator == "**" and isinstance(left, int) and left.bit_length() * abs(right) > _MAX_BITS:
            raise SecurityError("a number is too large")
        elif operator == "%" and isinstance(left, str):
            self.charge(_growth("%", self.read(left), [self.read(right)]))
        return self.made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(__obj, "__wrapped__", __obj)  # jinja wraps str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if not isinstance(__obj, Macro):
            args = tuple(map(_items, args))
        values = [*args, *(value for key, value in kwargs.items() if key not in ("_loop_vars", "_block_vars"))]
        __self.charge(_CALL + len(values))
        if not isinstance(__obj, Macro):
            allowed = isinstance(owner, _METHOD_OWNERS) and name not in _UNSAFE_METHODS
            if not (allowed or isinstance(__obj, _CALLABLE) or any(__obj is f for f in __self.globals.values())):
                raise SecurityError(f"{name or type(__obj).__name__} may not be called in a chat template")
            for value in (*values, owner if isinstance(owner, str | list | tuple) else None):
                __self.read(value)
        if isinstance(owner, str):
            __self.charge(_growth(name, owner, values))
        return __self.made(super().call(__context, __obj, *args, **kwargs))

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__} is unsafe")

    @pass_context  # without the context, jinja would call it at compile time
    def _finalize(self, context: Context, value: Any) -> str:
        return value if isinstance(value, str) else str(self.read(value))

    def _limited(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a filter or test in charges for its work and its result."""
        first = hasattr(function, "jinja_pass_arg")  # True: the first argument is the context or the environment

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            head, value, others = args[:first], args[first], args[first + 1 :]
            self.charge(_CALL)
            if name not in _SHALLOW:
                value = self.read(_items(value))
            values = [self.read(other) for other in (*others, *kwargs.values())]
            self.charge(_growth("%" if name == "format" else name, value, values))
            return self.made(function(*head, value, *others, **kwargs))

        return run

    def _tojson(
        self, value: Any, ensure_ascii: Any = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        """Write JSON without HTML escapes. Private-use characters aren't escaped: the sentinel is one of them."""
        if (len(indent) if isinstance(indent, str) else indent or 0) > 16:
            raise SecurityError("the JSON indent is too wide; expected at most 16")
        encoder = json.JSONEncoder(ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
        if indent is None and separators is None:
            text = encoder.encode(self.read(value))
        else:
            text = self.concat(encoder.iterencode(value))
        if ensure_ascii:
            text = re.sub(r"[^\x00-\x7f\ue000-\uf8ff]", lambda match: json.dumps(match[0])[1:-1], text)
        return text


def _growth(name: str, value: Any, args: Sequence[Any]) -> int:
    """An upper bound of the units of a filter, test or string method, excluding one reading of its arguments."""
    sizes = (abs(item) if isinstance(item, int) else len(item) if isinstance(item, Collection) else 1 for item in args)
    length, largest = len(value) if isinstance(value, Collection) else 1, max(sizes, default=0)
    match name:
        case "divisibleby" | "even" | "odd" | "round" if isinstance(value, str):
            raise SecurityError(f"{name} expects a number, not text")
        case "float" | "int" if isinstance(value, str) and length > 1000:
            raise SecurityError("a number is too large")
        case "sum" if any(isinstance(arg, list | tuple) for arg in args):
            raise SecurityError("sum expects numbers")
        case "map" | "rejectattr" | "selectattr" if any(isinstance(arg, str) and arg.count(".") > 100 for arg in args):
            raise SecurityError(f"{name} follows more than 100 attributes")
        case "batch" | "center" | "list" | "ljust" | "reverse" | "rjust" | "round" | "slice" | "zfill":
            return _ITEM * (length + largest)
        case "expandtabs" | "indent" | "join":
            return length * largest
        case "lstrip" | "rfind" | "rindex" | "rpartition" | "rstrip" | "strip" | "trim":
            return length * largest // 4  # Python searches backwards in quadratic time
        case "rsplit" | "split":
            separated = args and isinstance(args[0], str) and args[0]
            return length * largest // 4 + _ITEM * (value.count(args[0]) if separated else length // 2)
        case "replace":
            texts = [str(arg) for arg in args]
            return max((str(value).count(old) * len(new) for old in texts for new in texts), default=0)
        case "%" | "format" | "format_map":  # each field may repeat an argument, and pad it
            mark, width = ("%", r"[%)][^%)a-zA-Z]*(\*|\d{4})") if name == "%" else ("{", r":[^:{}]*(\{|\d{4})")
            if re.search(width, str(value)):
                raise SecurityError("a format is too wide; expected a constant width below 1000")
            return str(value).count(mark) * (1000 + _size(args))
    return _ITEM // 2 * _size(value) + length * largest if name in _SLOW else 0


def _span(value: Any) -> int:
    """Count the units of a value without its items."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise SecurityError("a number is too large")
    return _ITEM * len(value) if not isinstance(value, int) and isinstance(value, Collection) else 1


def _size(value: Any, limit: int = 1 << 62) -> int:
    """Count the units of a value and of every occurrence of its items; stop when they exceed `limit`."""
    total, level = 0, [value]
    for _ in range(_MAX_DEPTH):
        for item in level:
            total += _span(item) + 1
        if total > limit:
            return total
        level = [part for item in level if not isinstance(item, str | int) for part in _parts(item)]
        if not level:
            return total
    raise SecurityError(f"a value is nested more than {_MAX_DEPTH} deep")


def _items(value: Any) -> Any:
    return list(value) if isinstance(value, Iterator) else value


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, Namespace):
        return (value._Namespace__attrs,)  # its repr shows them
    if isinstance(value, dict):
        return itertools.chain(value, value.values())
    return value if isinstance(value, Collection) and not isinstance(value, str) else ()

"""Running a stranger's jinja template: nothing of Python's insides is in reach, and its work is
bounded.

Jinja's sandbox keeps a template from attributes and methods that it shouldn't touch, but not from
looping for ever or filling the memory. Here every step is charged to a budget before it is made: a
unit is about one byte read or written, or one node of the template run. To that end the parsed
template is rewritten (`_Charged`), the operators, filters, tests and methods that can do much work
are given prices, and those that no chat template needs are left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from functools import partial
from types import CodeType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Cycler, Joiner, Namespace, pass_context
from jinja2.visitor import NodeTransformer

from pentad.errors import BadInput
from pentad.text.prices import (
    COMPARING,
    FILTERS,
    ITEM,
    METHODS,
    STEP,
    Budget,
    Price,
    binop_size,
    deep,
    format_price,
    percent_price,
    shallow,
    size,
    span,
)

__all__ = ["compile_template", "render"]

_MAX_SOURCE = 1 << 18  # characters; the longest published templates have some 30,000
_BUDGET = 1 << 22  # for a template alone
_NODE, _OUTPUT = 2, 8  # to run a node, to write a value out
_BUDGET_PER_UNIT = 200  # more for each unit of what is rendered


def compile_template(source: str) -> tuple[CodeType, frozenset[str]]:
    """Jinja source -> code for `render`, and the strings that the template is written with.

    Raises `BadInput` for a syntax error, an unknown filter, a source past 256 KB.
    """
    if len(source) > _MAX_SOURCE:
        raise BadInput(f"chat template: {len(source)} characters: pentad takes up to {_MAX_SOURCE}")
    sandbox = Sandbox(_BUDGET)
    try:
        tree = sandbox.parse(source)
        words = frozenset(node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str))
        return sandbox.compile(_Charged(sandbox).visit(tree)), words
    except jinja2.TemplateSyntaxError as error:
        raise BadInput(f"chat template, line {error.lineno}: {_one_line(error)}") from None
    except (jinja2.TemplateError, SyntaxError, RecursionError, MemoryError, ValueError) as error:
        raise BadInput(f"chat template: {_one_line(error)}") from None


def render(code: CodeType, variables: Mapping[str, Any]) -> str:
    """Runs compiled code with `variables`. Raises `BadInput` with the template's own message where
    it raises one.
    """
    sandbox = Sandbox(_BUDGET)
    sandbox.budget.left += _BUDGET_PER_UNIT * size(dict(variables), 1 << 40)
    template = jinja2.Template.from_code(sandbox, code, sandbox.make_globals(None))
    pieces = []
    try:
        for piece in template.root_render_func(template.new_context(dict(variables))):
            sandbox.budget.charge(len(piece))
            pieces.append(piece)
    except Exception as error:  # a template can raise anything
        raise BadInput(f"chat template: {_one_line(error)}") from None
    return "".join(pieces)


def _one_line(error: BaseException) -> str:
    message = " ".join(str(error).split()) or type(error).__name__
    return message if len(message) <= 500 else message[:500] + "…"


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks what an assistant said; for rendering it is only
    a scope.
    """

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class Sandbox(ImmutableSandboxedEnvironment):
    """A jinja environment for one rendering, with `left` units of work."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self, budget: int) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=[_Generation, loopcontrols],
        )
        self.budget = Budget(budget)
        self.finalize = self._finalize
        self.concat = self._concat  # type: ignore[method-assign]
        filters: dict[str, Callable[..., Any]] = {**self.filters, "tojson": _tojson}
        self.filters = {name: self._priced(filters[name], price) for name, price in FILTERS.items()}
        self.filters |= {
            "~tick": self._tick,
            "~concat": self._joined,
            "~made": self._made,
            "~read": self._read,
        }
        tests: Mapping[str, Any] = self.tests
        self.tests = {name: self._priced(test, deep if name in COMPARING else shallow) for name, test in tests.items()}
        self.globals = {
            "range": safe_range,
            "dict": _dict,
            "namespace": Namespace,
            "cycler": Cycler,
            "joiner": Joiner,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    # What `_Charged` puts into a template.

    @pass_context
    def _tick(self, context: Context, value: Any, count: int) -> Any:
        self.budget.charge(_NODE * count)
        return value

    @pass_context
    def _made(self, context: Context, value: Any) -> Any:
        self.budget.charge(span(value))
        return value

    @pass_context
    def _read(self, context: Context, value: Any, contained_in: bool) -> Any:
        if contained_in and isinstance(value, dict):
            return value
        self.budget.charge(STEP)
        self.budget.charge_all(value)
        return self._watched(value)

    @pass_context
    def _joined(self, context: Context, *values: Any) -> str:
        return self._concat(self._text(value) for value in values)

    # What jinja calls.

    @pass_context
    def _finalize(self, context: Context, value: Any) -> Any:
        self.budget.charge(_OUTPUT)
        return self._text(value)

    def _text(self, value: Any) -> str:
        if not isinstance(value, str):
            self.budget.charge_all(value)
        return str(value)

    def _concat(self, values: Any) -> str:
        texts = []
        for text in values:
            self.budget.charge(len(text))
            texts.append(text)
        return "".join(texts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.budget.charge(binop_size(operator, left, right))
        if operator == "%" and isinstance(left, str):
            percent_price(self.budget, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        given = {name: value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars")}
        owner = getattr(__obj, "__self__", None)
        kind = next((kind for kind in METHODS if isinstance(owner, kind)), None)
        if kind is not None:
            name = __obj.__name__
            if name not in METHODS[kind]:
                raise SecurityError(f"{kind.__name__}.{name} is not for chat templates")
            METHODS[kind][name](__self.budget, owner, *args, **given)
        elif isinstance(__obj, _CALLABLE) or isinstance(owner, _CALLABLE) or any(__obj is f for f in _FUNCTIONS):
            deep(__self.budget, None, *args, *given.values())
        else:
            raise SecurityError(f"a {type(__obj).__name__} can't be called")
        result = super().call(__context, __obj, *args, **kwargs)
        __self.budget.charge(STEP + span(result))
        return __self._watched(result)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__} is unsafe")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        run = super().wrap_str_format(value)
        return None if run is None else _Formatting(self.budget, value.__self__, run)

    def _priced(self, function: Callable[..., Any], price: Price) -> Callable[..., Any]:
        """`function`, a filter or test, charged by `price` before it runs, by its result after."""
        passes = hasattr(function, "jinja_pass_arg")

        def run(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
            price(self.budget, value, *args, **kwargs)
            first = _passed(function, context, self) if passes else ()
            result = function(*first, self._watched(value), *args, **kwargs)
            self.budget.charge(STEP + span(result))
            return self._watched(result)

        return pass_context(run)

    def _watched(self, value: Any) -> Any:
        """`value`; where it is an iterator, one that charges for each item that is taken."""
        return self._each(value) if isinstance(value, Iterator) else value

    def _each(self, items: Iterator[Any]) -> Iterator[Any]:
        for item in items:
            self.budget.charge(ITEM)
            yield item


def _passed(function: Any, context: Context, sandbox: Sandbox) -> tuple[Any]:
    kind = function.jinja_pass_arg.name
    return ({"context": context, "eval_context": context.eval_ctx, "environment": sandbox}[kind],)


class _Charged(NodeTransformer):
    """Rewrites a parsed template so that what jinja compiles to plain Python is charged too."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        result = super().visit(node, *args, **kwargs)
        if isinstance(result, nodes.Template):
            result.set_environment(self._sandbox)
            result.set_lineno(1)
        return result

    def _filter(self, value: nodes.Expr, name: str, *args: object) -> nodes.Filter:
        constants: list[nodes.Expr] = [nodes.Const(arg) for arg in args]
        return nodes.Filter(value, name, constants, [], None, None, lineno=value.lineno)

    def _ticking(self, node: Any) -> Any:
        count = sum(1 for _ in node.find_all(nodes.Node))
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(self._filter(nodes.Const(True), "~tick", count)))
        return node

    visit_Macro = visit_CallBlock = visit_Block = _ticking

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self._ticking(node)
        if node.test is not None:
            count = sum(1 for _ in node.test.find_all(nodes.Node))
            node.test = nodes.And(self._filter(nodes.Const(True), "~tick", count), node.test)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        first, *others = node.nodes
        return nodes.Filter(first, "~concat", others, [], None, None, lineno=node.lineno)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.expr, nodes.Const):
            node.expr = self._filter(node.expr, "~read", False)
        for operand in node.ops:
            if not isinstance(operand.expr, nodes.Const):
                operand.expr = self._filter(operand.expr, "~read", operand.op in ("in", "notin"))
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return self._filter(node, "~made")
        if not isinstance(node.arg, nodes.Const):
            node.arg = self._filter(node.arg, "~read", False)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.key, nodes.Const):  # hashing a key reads all of it
            node.key = self._filter(node.key, "~read", False)
        return node

    def visit_ScopedEvalContextModifier(self, node: nodes.Node) -> nodes.Node:
        raise SecurityError("{% autoescape %} is not for chat templates")


# What a template may call, besides methods.


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    if len(form) > 100 or re.search(r"\d{3}", form):
        raise SecurityError("strftime_now: the format is too long")
    return datetime.now().strftime(form)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without HTML's escapes. Private-use characters stay, escaped or not: one of them is the
    sentinel.
    """
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    escaped = partial(re.sub, r"[^\x00-\x7f\ue000-\uf8ff]", lambda match: json.dumps(match[0])[1:-1])
    return escaped(text) if ensure_ascii else text


class _Formatting:
    """A `str.format`, charged."""

    def __init__(self, budget: Budget, text: str, run: Callable[..., str]) -> None:
        self._budget, self._text, self._run = budget, text, run

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        format_price(self._budget, self._text, *args, **kwargs)
        return self._run(*args, **kwargs)


_CALLABLE = (_Formatting, Macro, LoopContext, BlockReference, Cycler, Joiner, Undefined)
_FUNCTIONS: tuple[Any, ...] = (
    _raise_exception,
    _strftime_now,
    _dict,
    safe_range,
    Namespace,
    Cycler,
    Joiner,
)

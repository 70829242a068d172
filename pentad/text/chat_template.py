"""Render a conversation by a model's own jinja template.

Templates may use the features that transformers' utils/chat_template_utils.py allows, and render to the same text.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from types import CodeType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from pentad.errors import BadInput
from pentad.text.control import ControlStrings
from pentad.text.files import one_line
from pentad.text.sandbox import Sandbox

__all__ = ["ChatTemplate", "render_guarded"]

_MAX_SOURCE, _MAX_NODES = 1 << 18, 1 << 15  # the longest published templates have 30,000 characters, 5000 nodes
_PRIVATE_USE = range(0xE000, 0xF900)


class ChatTemplate:
    """A compiled jinja template.

    Attributes:
        source: the template.
        literals: the string constants in the template.
        takes_parts: true if it reads the text of content parts (``{"type": "text", "text": …}``).
    """

    def __init__(self, source: str) -> None:
        """Compile `source`. Raises `BadInput` for a syntax error, an unknown filter, or a source that is too long."""
        if len(source) > _MAX_SOURCE:
            raise BadInput(f"chat template: {len(source)} characters are too many; expected at most {_MAX_SOURCE}")
        sandbox = _environment({})
        try:
            tree = sandbox.parse(source)
            self.source = source
            found = list(tree.find_all(nodes.Node))
            if len(found) > _MAX_NODES:
                raise SecurityError(f"{len(found)} nodes are too many; expected at most {_MAX_NODES}")
            constants = (node.value for node in found if isinstance(node, nodes.Const))
            self.literals = {value for value in constants if isinstance(value, str)}
            names = {node.attr for node in found if isinstance(node, nodes.Getattr)}
            self.takes_parts = "text" in self.literals | names
            self._code: CodeType = sandbox.compile(tree)
        except (jinja2.TemplateError, SyntaxError, RecursionError, MemoryError, ValueError) as error:
            line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise BadInput(f"chat template{line}: {one_line(error)}") from None

    def render(self, variables: Mapping[str, Any]) -> str:
        """Render the template.

        Args:
            variables: name -> a value made of JSON's types.

        Returns:
            The text.

        Raises:
            BadInput: the template raised an error, whose message is kept, or exceeded its budget.
        """
        try:
            sandbox = _environment(variables)
            template = jinja2.Template.from_code(sandbox, self._code, sandbox.make_globals(None))
            return sandbox.concat(template.root_render_func(template.new_context(dict(variables))))
        except Exception as error:  # a template can raise anything
            raise BadInput(f"chat template: {one_line(error)}") from None


def render_guarded(
    template: ChatTemplate, control: ControlStrings, inputs: Mapping[str, Any], trusted: Mapping[str, Any]
) -> tuple[str, str]:
    """Render a template so that control strings in its inputs can be distinguished from the template's own.

    Args:
        template: the template.
        control: the control strings of the vocabulary.
        inputs: untrusted variables, including `messages`; a sentinel is inserted into each of their control strings.
        trusted: variables that are passed unchanged.

    Returns:
        The text, and the sentinel: a character that occurs in no input.

    Raises:
        BadInput: the inputs are malformed, or the template raises an error.
    """
    _check_messages(inputs["messages"])
    try:
        copied = {name: _plain(value, name) for name, value in inputs.items()}
    except RecursionError:
        raise BadInput("messages are nested too deeply") from None
    for number, message in enumerate(copied["messages"]):
        if isinstance(message.get("content"), list):
            texts = [_text_of(part, f"messages[{number}]") for part in message["content"]]
            if not template.takes_parts:
                message["content"] = "\n".join(texts)
    seen = set(template.source + json.dumps(copied, ensure_ascii=False))
    sentinel = next((chr(code) for code in _PRIVATE_USE if chr(code) not in seen), None)
    if sentinel is None:
        raise BadInput("messages hold every private-use character (U+E000 to U+F8FF); remove one of them")

    def guard(text: str) -> str:
        # The template compares its literals (roles, types) with the inputs, so these literals stay unchanged.
        return text if text in template.literals and text.isalnum() else control.guard(text, sentinel)

    guarded = {**trusted, **_map_strings(copied, guard)}
    messages = [{key: value for key, value in message.items() if value is not None} for message in guarded["messages"]]
    try:  # like transformers, without null fields: most templates expect that a message lacks them
        return template.render({**guarded, "messages": messages}), sentinel
    except BadInput:
        if messages == guarded["messages"]:
            raise
        return template.render(guarded), sentinel


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise BadInput("messages: expected a list of at least one {role, content}")
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, Mapping):
            raise BadInput(f"{where} is a {type(message).__name__}; expected a dict with role and content")
        if not isinstance(message.get("role"), str):
            raise BadInput(f"{where}: role is {message.get('role')!r}; expected a string such as 'user'")
        if not isinstance(message.get("content"), str | list) and not message.get("tool_calls"):
            content = type(message.get("content")).__name__
            raise BadInput(f"{where}: content is a {content}; expected a string or a list of parts")


def _text_of(part: Any, where: str) -> str:
    """The text of a content part; BadInput for pictures and others."""
    match part:
        case str():
            return part
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": str(kind)}:
            raise BadInput(f"{where}: content has a part of type {kind!r}; this model reads only text")
    raise BadInput(f'{where}: content has a malformed part; expected {{"type": "text", "text": …}}')


def _plain(value: Any, where: str) -> Any:
    """Copy `value` into JSON's types, because a template could call methods of other types."""
    match value:
        case None | bool():
            return value
        case str():
            return str.__str__(value)
        case int():
            return int(value)
        case float():
            return float(value)
        case Mapping():
            return {_plain(key, where): _plain(item, f"{where}.{key}") for key, item in value.items()}
        case list() | tuple():
            return [_plain(item, f"{where}[{n}]") for n, item in enumerate(value)]
    raise BadInput(f"{where} is a {type(value).__name__}; expected a string, a number, a list or a dict")


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Change every string in `value`, except for keys that a template can name."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {
            key if str(key).isidentifier() else _map_strings(key, change): _map_strings(item, change)
            for key, item in value.items()
        }
    return [_map_strings(item, change) for item in value] if isinstance(value, list) else value


def _environment(variables: Mapping[str, Any]) -> Sandbox:
    extensions = [_Generation, loopcontrols]
    sandbox = Sandbox(variables, trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    sandbox.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return sandbox


class _Generation(Extension):
    """The tags `{% generation %}…{% endgeneration %}` mark replies for training; here they only open a scope."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 100 or re.search(r"\d{3}", pattern):
        raise SecurityError("strftime_now: the format is too long")
    return datetime.now().strftime(pattern)

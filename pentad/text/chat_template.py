"""A conversation -> the text that a model's own jinja template makes of it.

Follows transformers' utils/chat_template_utils.py in what a template may use, and so in what it
renders to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pentad.errors import BadInput
from pentad.text import sandbox
from pentad.text.control import ControlStrings

__all__ = ["ChatTemplate", "render_guarded"]

_PRIVATE_USE = range(0xE000, 0xF900)


class ChatTemplate:
    """A compiled chat template."""

    def __init__(self, source: str) -> None:
        """Raises `BadInput` where `source` isn't a jinja template, or one that asks for what none
        may have.
        """
        self.source = source
        self._code, self.words = sandbox.compile_template(source)

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text. Raises `BadInput` with the template's own complaint, or where it does too much
        work.
        """
        return sandbox.render(self._code, variables)


def render_guarded(
    template: ChatTemplate,
    control: ControlStrings,
    inputs: Mapping[str, Any],
    trusted: Mapping[str, Any],
) -> tuple[str, str]:
    """Renders `inputs`, in which a sentinel breaks every control string, and `trusted`, which stays
    as it is.

    Returns the text and the sentinel: one character that occurs in none of the inputs.
    """
    check_messages(inputs["messages"])
    try:
        copied = {name: plain(value, name) for name, value in inputs.items()}
    except RecursionError:
        raise BadInput("messages: they are nested too deeply") from None
    copied["messages"] = [
        {key: value for key, value in message.items() if value is not None} for message in copied["messages"]
    ]
    seen = set(template.source)

    def see(text: str) -> str:
        seen.update(text)
        return text

    map_strings(copied, see)
    sentinel = next((chr(code) for code in _PRIVATE_USE if chr(code) not in seen), None)
    if sentinel is None:
        raise BadInput("messages: they use every private-use character there is: drop one of them")

    def guard(text: str) -> str:
        # The template's own words (roles, types) are compared with, so they stay as they are.
        return text if text in template.words and text.isalnum() else control.guard(text, sentinel)

    return template.render({**trusted, **map_strings(copied, guard)}), sentinel


def check_messages(messages: Any) -> None:
    """Raises `BadInput` where `messages` isn't a list of dicts with a role and a content."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise BadInput("messages: a list of {role, content} with at least one message was expected")
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, Mapping):
            raise BadInput(f"{where}: a dict with role and content was expected, not {type(message).__name__}")
        if not isinstance(message.get("role"), str):
            raise BadInput(f"{where}: 'role' must be a string such as 'user', not {message.get('role')!r}")
        if not isinstance(message.get("content"), str | list) and not message.get("tool_calls"):
            raise BadInput(f"{where}: 'content' must be a string or a list of parts")


def plain(value: Any, where: str) -> Any:
    """A copy made of JSON's types alone: a template could call methods of anything else."""
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
            return {plain(key, where): plain(item, f"{where}.{key}") for key, item in value.items()}
        case list() | tuple():
            return [plain(item, f"{where}[{n}]") for n, item in enumerate(value)]
    kind = type(value).__name__
    raise BadInput(f"{where}: strings, numbers, lists and dicts can be rendered, not {kind}")


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with every string in it changed; of the keys those that a template can't name."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {
            key if str(key).isidentifier() else map_strings(key, change): map_strings(item, change)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [map_strings(item, change) for item in value]
    return value

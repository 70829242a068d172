"""Functions that a model may call: how they get into its prompt, what its reply may be, and the calls in the reply.

All models write a call like Hermes and Qwen: ``<tool_call>\\n{"name": …, "arguments": {…}}\\n</tool_call>``. A chat
template that knows this form gets the functions and the calls as they are. With other templates they are described in
the system message.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pentad.errors import BadInput
from pentad.text.grammar import Constraint, embedded, quoted

OPEN, CLOSE = "<tool_call>\n", "\n</tool_call>"
_HEAD = re.compile(r'\{"name": "([\w-]+)", "arguments": ')
_SYSTEM = """You may call functions to answer the user. Their descriptions:
<tools>
{tools}
</tools>
To call one, reply with its name and arguments as JSON:
<tool_call>
{{"name": "<name>", "arguments": <arguments>}}
</tool_call>"""


class CallableTool(NamedTuple):
    """A function that may be called.

    Attributes:
        name: its name.
        parameters: the JSON schema of its arguments; None for no arguments.
        path: where the parameters are in the request.
    """

    name: str
    parameters: Mapping[str, Any] | None
    path: str


def calls_constraint(
    tools: Sequence[CallableTool], *, required: bool, parallel: bool, answer: Constraint | None = None
) -> Constraint:
    """The grammar of replies with calls.

    Args:
        tools: the functions that may be called.
        required: whether there must be a call; else there may be text, and calls after it.
        parallel: whether there may be several.
        answer: what a reply without calls must be.

    Raises:
        BadInput: the parameters of a function have a keyword that would not be enforced.
    """
    names = [f"call_{number}" for number, _ in enumerate(tools)]
    more = f"({quoted(chr(10) + OPEN)} call)*" if parallel else ""
    lines = [f"calls: call {more}", f"call: {' | '.join(names)}"]
    for name, tool in zip(names, tools, strict=True):
        head = quoted(f'{{"name": "{tool.name}", "arguments": ')
        lines.append(f"{name}: {head} {embedded(_parameters(tool), tool.path)} {quoted('}' + CLOSE)}")
    if required:
        return Constraint("\n".join([f"start: {quoted(OPEN)} calls", *lines]))
    if answer is not None:
        alternative = answer.grammar.removeprefix("start: ")
        return Constraint("\n".join([f"start: answer | {quoted(OPEN)} calls", f"answer: {alternative}", *lines]))
    text = ["start: TEXT | text_before calls", "TEXT: /(.|\\n)*/", f"text_before[lazy]: TEXT {quoted(OPEN)}"]
    return Constraint("\n".join([*text, *lines]))


def _parameters(tool: CallableTool) -> dict[str, Any]:
    if tool.parameters is None:
        return {"type": "object", "additionalProperties": False}
    if tool.parameters.get("type", "object") != "object":
        raise BadInput(f"{tool.path}.type is {str(tool.parameters['type'])[:40]!r}; expected 'object'")
    return {"type": "object", **tool.parameters}


def with_calls(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates expect them: the arguments of calls are objects.

    Raises:
        BadInput: they are not JSON.
    """
    result = []
    for number, message in enumerate(messages):
        calls = []
        for call in message.get("tool_calls", ()):
            try:
                arguments = json.loads(call["function"]["arguments"] or "{}")
            except (ValueError, RecursionError):
                raise BadInput(f"messages.{number}.tool_calls has arguments that are not JSON") from None
            calls.append({**call, "function": {**call["function"], "arguments": arguments}})
        result.append({**message, "tool_calls": calls} if calls else message)
    return result


def described(messages: Sequence[dict[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages for a template without calls: functions are in the system message, calls and results are texts."""
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    head = [_SYSTEM.format(tools=listed)] if tools else []
    if messages[0]["role"] == "system":
        head.insert(0, _text(messages[0]["content"]))
        messages = messages[1:]
    result: list[dict[str, Any]] = [{"role": "system", "content": "\n\n".join(head)}] if head else []
    for message in messages:
        if message["role"] == "tool":
            content = f"<tool_response>\n{_text(message['content'])}\n</tool_response>"
            if result and result[-1].get("responses"):
                result[-1]["content"] += "\n" + content
            else:
                result.append({"role": "user", "content": content, "responses": True})
        elif message.get("tool_calls"):
            calls = [OPEN + json.dumps(_plain_call(call), ensure_ascii=False) + CLOSE for call in message["tool_calls"]]
            text = "\n".join(filter(None, [_text(message.get("content")), *calls]))
            result.append({"role": "assistant", "content": text})
        else:
            result.append(message)
    return [{key: value for key, value in message.items() if key != "responses"} for message in result]


def _plain_call(call: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content or ())


@dataclass
class Call:
    """A call, or its growth.

    Attributes:
        index: its number in the reply.
        arguments: JSON, or the next part of it.
        name: of the function; with the first part.
        id: with the first part.
    """

    index: int
    arguments: str
    name: str | None = None
    id: str | None = None

    def delta(self) -> dict[str, Any]:
        """The object of a stream."""
        function = {"arguments": self.arguments}
        if self.name is None:
            return {"index": self.index, "function": function}
        return {"index": self.index, "id": self.id, "type": "function", "function": {"name": self.name, **function}}


class CallParser:
    """Finds the calls in a text as it grows. The text is one of `calls_constraint`."""

    def __init__(self) -> None:
        self.count = 0
        self._unread = ""
        self._depth = 0  # of braces in arguments; 0 outside of arguments
        self._inside = False
        self._begun = False  # after the first opening tag there are only calls
        self._in_string = self._escaped = False

    def add(self, text: str, *, last: bool = False) -> tuple[str, list[Call]]:
        """Read more text; `last` if no more follows. Returns the new text outside of calls, and the calls' growth."""
        self._unread += text
        content, calls = "", list[Call]()
        while True:
            if not self._begun:
                before, opened, after = self._unread.partition(OPEN)
                if opened:
                    content, self._unread, self._begun = content + before, after, True
                    continue
                held = 0 if last else next((n for n in range(len(OPEN), 0, -1) if before.endswith(OPEN[:n])), 0)
                content, self._unread = content + before[: len(before) - held], before[len(before) - held :]
                return content, calls
            if not self._inside:
                head = _HEAD.search(self._unread)
                if head is None:
                    return content, calls
                calls.append(Call(self.count, "", head[1], f"call_{uuid.uuid4().hex}"))
                self.count += 1
                self._inside, self._unread = True, self._unread[head.end() :]
            end = self._end_of_arguments()
            if end is None:
                piece, self._unread = self._unread, ""
            else:
                piece, self._unread, self._inside = self._unread[:end], self._unread[end:], False
            if calls and calls[-1].index == self.count - 1:
                calls[-1].arguments += piece
            elif piece:
                calls.append(Call(self.count - 1, piece))
            if end is None:
                return content, calls

    def _end_of_arguments(self) -> int | None:
        """The index after the brace that closes the arguments, if it has come."""
        for at, character in enumerate(self._unread):
            if self._in_string:
                ends = character == '"' and not self._escaped
                self._escaped = character == "\\" and not self._escaped
                self._in_string = not ends
            elif character == '"':
                self._in_string = True
            elif character == "{":
                self._depth += 1
            elif character == "}":
                self._depth -= 1
                if not self._depth:
                    return at + 1
        return None

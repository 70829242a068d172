"""What a request says about the form of its answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pentad.errors import BadInput
from pentad.serve.errors import APIError
from pentad.serve.openai import ChatBody, Function, GenerationBody, ResponseBody, ResponseFormat, ResponsesFormat
from pentad.serve.tools import CallableTool, calls_constraint
from pentad.text.grammar import Constraint


def constraint_of(body: GenerationBody) -> Constraint | None:
    """What the text must be, from `response_format` or `structured_outputs`.

    Raises:
        APIError: both are given, or they are malformed, or would not be enforced.
    """
    if body.structured_outputs is None:
        return None if body.response_format is None else _format(body.response_format)
    if body.response_format is not None and body.response_format.type != "text":
        raise _refusal("structured_outputs", "structured_outputs and response_format are given; expected one of them")
    given = body.structured_outputs.given()
    if len(given) != 1:
        message = (
            f"structured_outputs has {len(given)} fields; expected one of json, json_object, regex, choice, grammar"
        )
        raise _refusal("structured_outputs", message)
    [(name, value)] = given.items()
    param = f"structured_outputs.{name}"
    make: Mapping[str, Any] = {
        "json": lambda: Constraint.json_schema(value, param),
        "json_object": Constraint.json_object,
        "regex": lambda: Constraint.regex(value),
        "choice": lambda: Constraint.choice(value),
        "grammar": lambda: Constraint.lark(value),
    }
    try:
        made: Constraint = make[name]()
    except BadInput as error:
        raise _refusal(param, str(error)) from None
    return made


def _format(given: ResponseFormat) -> Constraint | None:
    if (given.json_schema is not None) != (given.type == "json_schema"):
        there = "missing" if given.json_schema is None else f"given, but the type is {given.type!r}"
        raise _refusal("response_format.json_schema", f"response_format.json_schema is {there}")
    schema = None if given.json_schema is None else given.json_schema.schema_
    return _json(given.type, schema, "response_format.json_schema.schema")


def responses_constraint(body: ResponseBody) -> Constraint | None:
    """What a response must be, from `text.format`, `tools` and `tool_choice`; see `chat_constraint`."""
    tools = {f"tools.{number}.parameters": tool for number, tool in enumerate(body.tools or [])}
    choice = body.tool_choice if isinstance(body.tool_choice, str | None) else body.tool_choice.name
    named = choice is not None and choice is not body.tool_choice
    return _with_calls(_responses_format(body.format), tools, choice, named, body.parallel_tool_calls is not False)


def _responses_format(given: ResponsesFormat) -> Constraint | None:
    if (given.schema_ is not None) != (given.type == "json_schema"):
        there = "missing" if given.schema_ is None else f"given, but the type is {given.type!r}"
        raise _refusal("text.format.schema", f"text.format.schema is {there}")
    return _json(given.type, given.schema_, "text.format.schema")


def _json(kind: str, schema: dict[str, Any] | None, param: str) -> Constraint | None:
    if kind == "text":
        return None
    if kind == "json_object":
        return Constraint.json_object()
    if schema is None:
        raise _refusal(param, f"{param} is missing")
    try:
        return Constraint.json_schema(schema, param)
    except BadInput as error:
        raise _refusal(param, str(error)) from None


def chat_constraint(body: ChatBody) -> Constraint | None:
    """What the reply must be, from the fields of `constraint_of`, `tools` and `tool_choice`.

    Raises:
        APIError: as in `constraint_of`; `tool_choice` names an unknown function, or the parameters of a function would
            not be enforced.
    """
    tools = {f"tools.{number}.function.parameters": tool.function for number, tool in enumerate(body.tools or [])}
    choice = body.tool_choice if isinstance(body.tool_choice, str | None) else body.tool_choice.function.name
    named = choice is not None and choice is not body.tool_choice
    return _with_calls(constraint_of(body), tools, choice, named, body.parallel_tool_calls is not False)


def _with_calls(
    answer: Constraint | None, tools: Mapping[str, Function], choice: str | None, named: bool, parallel: bool
) -> Constraint | None:
    """A constraint on the reply that also allows, or requires, calls.

    Args:
        answer: what a reply without calls must be.
        tools: path of the parameters in the request -> function.
        choice: "auto" (or None), "none" or "required"; if `named`, the name of the function to call.
        named: see `choice`.
        parallel: whether there may be several calls.
    """
    if not tools or (choice == "none" and not named):
        if named or choice == "required":
            raise _refusal("tool_choice", "tool_choice asks for a call, but there are no tools")
        return answer
    names = [tool.name for tool in tools.values()]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise _refusal("tools", f"tools has two functions {repeated!r}; expected different names")
    if named:
        tools, parallel = {path: tool for path, tool in tools.items() if tool.name == choice}, False
        if not tools:
            raise _refusal("tool_choice", f"tool_choice names {choice!r}; expected one of tools: {', '.join(names)}")
    callable_tools = [CallableTool(tool.name, tool.parameters, path) for path, tool in tools.items()]
    try:
        required = named or choice == "required"
        return calls_constraint(callable_tools, required=required, parallel=parallel, answer=answer)
    except BadInput as error:
        raise _refusal("tools", str(error)) from None


def _refusal(param: str, message: str) -> APIError:
    return APIError(400, message, param=param, code="invalid_value")

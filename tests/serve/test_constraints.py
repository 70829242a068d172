"""Constrained replies and calls of tools, through the official client and through plain HTTP."""

import json
import re
import threading
import time
from typing import Any, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from pentad.serve.tools import Call, CallParser
from tests.serve.conftest import Server, eventually

MESSAGES: Any = [{"role": "user", "content": "What is the weather?"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "unit": {"enum": ["C", "F"]},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER: Any = {
    "type": "function",
    "function": {"name": "get_weather", "description": "…", "parameters": SCHEMA, "strict": True},
}
CLOCK: Any = {"type": "function", "function": {"name": "clock"}}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA, "strict": True}}
CHAT: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 400}


class Forecast(BaseModel):
    city: str = Field(max_length=5)
    unit: Literal["C", "F"]


def test_every_reply_validates(server: Server) -> None:
    for seed, temperature in [(1, 0), (2, 1), (3, 5)]:
        reply = server.client.chat.completions.create(
            **CHAT, response_format=FORMAT, seed=seed, temperature=temperature, top_p=1, n=3
        )
        for choice in reply.choices:
            jsonschema.validate(json.loads(choice.message.content), SCHEMA)
            assert choice.finish_reason == "stop"


def test_a_stream_joins_to_the_constrained_reply(server: Server) -> None:
    options: Any = {**CHAT, "response_format": FORMAT, "seed": 7}
    whole = server.client.chat.completions.create(**options)
    chunks = list(server.client.chat.completions.create(**options, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content


def test_the_client_parses_replies_to_pydantic_models(server: Server) -> None:
    reply = server.client.chat.completions.parse(**CHAT, response_format=Forecast)
    assert isinstance(reply.choices[0].message.parsed, Forecast)
    with server.client.chat.completions.stream(**CHAT, response_format=Forecast) as stream:
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Forecast)
    response = server.client.responses.parse(
        model="tiny", input="Weather?", text_format=Forecast, max_output_tokens=400
    )
    assert isinstance(response.output_parsed, Forecast)


def test_a_json_object(server: Server) -> None:
    reply = server.client.chat.completions.create(
        **{**CHAT, "max_tokens": 30}, response_format={"type": "json_object"}, seed=1
    )
    assert reply.choices[0].message.content.startswith("{")
    response = server.client.responses.create(
        model="tiny", input="Weather?", text={"format": {"type": "json_object"}}, max_output_tokens=30
    )
    assert response.output_text.startswith("{")


def test_a_cut_reply_says_length(server: Server) -> None:
    reply = server.client.chat.completions.create(**{**CHAT, "max_tokens": 5}, response_format=FORMAT)
    assert reply.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("outputs", "pattern"),
    [
        ({"choice": ["yes", "no"]}, "yes|no"),
        ({"regex": "[a-c]{4}"}, "[a-c]{4}"),
        ({"grammar": 'start: "x" /[0-9]/'}, "x[0-9]"),
        ({"json": {"const": 5}}, "5"),
    ],
)
def test_structured_outputs(server: Server, outputs: Any, pattern: str) -> None:
    extra = {"structured_outputs": outputs}
    completion = server.client.completions.create(model="tiny", prompt="a", max_tokens=20, extra_body=extra)
    reply = server.client.chat.completions.create(**CHAT, extra_body=extra)
    assert re.fullmatch(pattern, completion.choices[0].text)
    assert re.fullmatch(pattern, reply.choices[0].message.content)


@pytest.mark.parametrize(
    ("fields", "param", "fact"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type", "xml"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
        ({"response_format": {"type": "text", "json_schema": {"name": "a"}}}, "response_format.json_schema", "text"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
            "missing",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}},
            "response_format.json_schema.schema",
            "response_format.json_schema.schema.not",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format.json_schema.name",
            "",
        ),
        ({"structured_outputs": {}}, "structured_outputs", "0 fields"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "2 fields"),
        ({"structured_outputs": {"guided": "a"}}, "structured_outputs.guided", "not supported"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs", ""),
        ({"guided_regex": "a"}, "guided_regex", "not supported"),
        ({"tools": [{"type": "function"}]}, "tools.0.function", "missing"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "a b"),
        ({"tools": [CLOCK, CLOCK]}, "tools", "clock"),
        (
            {"tools": [CLOCK, {"type": "function", "function": {"name": "f", "parameters": {"if": {}}}}]},
            "tools",
            "tools.1.function.parameters.if",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
            "tools",
            "array",
        ),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "clock"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "missing"),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}],
                    }
                ]
            },
            "messages",
            "not JSON",
        ),
    ],
)
def test_a_bad_field_is_refused_by_name(server: Server, fields: Any, param: str, fact: str) -> None:
    reply = server.request("/v1/chat/completions", {"model": "tiny", "messages": MESSAGES, **fields})
    assert reply.status == 400
    assert reply.error["param"] == param
    assert fact in reply.error["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"structured_outputs": {"regex": "(a"}},
        {"structured_outputs": {"grammar": "start: missing"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"format": "odd"}}}},
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_a_grammar_that_cannot_be_compiled_is_refused_before_a_stream_begins(
    server: Server, fields: Any, stream: bool
) -> None:
    reply = server.request("/v1/chat/completions", {"model": "tiny", "messages": MESSAGES, "stream": stream, **fields})
    assert reply.status == 400
    assert "grammar" in reply.error["message"]


def test_bombs_delay_neither_health_nor_others_tokens(server: Server) -> None:
    """Compiling takes place in a thread of the worker, and its cost is bounded."""
    properties = {f"c{i}": {"type": "integer"} for i in range(2000)}
    bombs: list[Any] = [
        {"structured_outputs": {"json": {"properties": properties}}},
        {"structured_outputs": {"regex": "((a{1,1000}){1,1000}){1,1000}"}},
        {"structured_outputs": {"grammar": "start: A\nA: /(.*a.{15})/ & /(.*b.{17})/ & ~/(.*c.{19})/"}},
        {"structured_outputs": {"json": {"type": "integer", "multipleOf": 19_997}}},
    ]
    statuses: list[int] = []

    def send(bomb: Any) -> None:
        body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 20, **bomb}
        statuses.append(server.request("/v1/chat/completions", body).status)

    threads = [threading.Thread(target=send, args=(bomb,)) for bomb in bombs * 2]
    chunks = server.client.chat.completions.create(**{**CHAT, "max_tokens": 3000}, stream=True, temperature=0)
    next(iter(chunks))
    for thread in threads:
        thread.start()
    received = 0
    for _ in chunks:
        received += 1
        if received % 50 == 0:
            begun = time.monotonic()
            assert server.request("/health").status == 200
            assert time.monotonic() - begun < 5
        if not any(thread.is_alive() for thread in threads):
            break
    chunks.close()
    assert received > 10
    for thread in threads:
        thread.join()
    assert set(statuses) <= {200, 400}
    eventually(lambda: server.open_sequences() == 0)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_required_call_has_valid_arguments(server: Server, choice: Any) -> None:
    options: Any = {**CHAT, "tools": [WEATHER], "tool_choice": choice, "parallel_tool_calls": False, "temperature": 2}
    for seed in range(3):
        reply = server.client.chat.completions.create(**options, seed=seed)
        [call] = reply.choices[0].message.tool_calls
        assert call.function.name == "get_weather"
        jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
        assert reply.choices[0].message.content is None
        assert reply.choices[0].finish_reason == "tool_calls"

        with server.client.chat.completions.stream(**options, seed=seed) as stream:
            final = stream.get_final_completion()
        [streamed] = final.choices[0].message.tool_calls
        assert (streamed.function.name, streamed.function.arguments) == ("get_weather", call.function.arguments)
        assert final.choices[0].finish_reason == "tool_calls"


def test_arguments_arrive_in_parts(server: Server) -> None:
    chunks = server.client.chat.completions.create(
        **CHAT, tools=[WEATHER, CLOCK], tool_choice="required", stream=True, seed=3, temperature=2, n=2
    )
    parts = [call for c in chunks for choice in c.choices for call in choice.delta.tool_calls or []]
    assert all(part.id and part.type == "function" for part in parts if part.function.name)
    assert len(parts) > 4


def test_the_client_parses_arguments(server: Server) -> None:
    reply = server.client.chat.completions.parse(
        **CHAT, tools=[openai.pydantic_function_tool(Forecast)], tool_choice="required", parallel_tool_calls=False
    )
    assert isinstance(reply.choices[0].message.tool_calls[0].function.parsed_arguments, Forecast)


def test_a_function_without_parameters(server: Server) -> None:
    reply = server.client.chat.completions.create(
        **CHAT, tools=[CLOCK], tool_choice="required", parallel_tool_calls=False
    )
    assert json.loads(reply.choices[0].message.tool_calls[0].function.arguments) == {}


def test_a_model_may_answer_with_text(server: Server) -> None:
    options: Any = {**CHAT, "max_tokens": 20, "temperature": 0}
    reply = server.client.chat.completions.create(**options, tools=[WEATHER])
    assert reply.choices[0].message.tool_calls is None
    assert reply.choices[0].message.content
    plain = server.client.chat.completions.create(**options)
    none = server.client.chat.completions.create(**options, tools=[WEATHER], tool_choice="none")
    assert none.choices[0].message.content == plain.choices[0].message.content
    assert none.usage.prompt_tokens == plain.usage.prompt_tokens < reply.usage.prompt_tokens


def test_a_model_may_answer_with_a_call_or_with_json(server: Server) -> None:
    for seed in range(6):
        reply = server.client.chat.completions.create(
            **CHAT, tools=[CLOCK], response_format=FORMAT, seed=seed, temperature=5, top_p=1
        )
        message = reply.choices[0].message
        if message.tool_calls:
            assert {call.function.name for call in message.tool_calls} == {"clock"}
        else:
            jsonschema.validate(json.loads(message.content), SCHEMA)


def test_a_conversation_goes_on_after_a_call(server: Server) -> None:
    first = server.client.chat.completions.create(
        **CHAT, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False
    )
    message = first.choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
    reply = server.client.chat.completions.create(
        model="tiny", messages=[*MESSAGES, message, result], tools=[WEATHER], max_tokens=5
    )
    assert reply.usage.prompt_tokens > first.usage.prompt_tokens


def parsed(text: str, size: int) -> tuple[str, list[Call], int]:
    """The content, the calls and the number of their parts, of a text that comes in pieces."""
    parser, content, calls, parts = CallParser(), "", list[Call](), 0
    for start in range(0, len(text), size):
        piece, grown = parser.add(text[start : start + size], last=start + size >= len(text))
        content += piece
        for call in grown:
            parts += 1
            if call.name is not None:
                assert call.index == len(calls)
                calls.append(Call(call.index, "", call.name, call.id))
            calls[call.index].arguments += call.arguments
    return content, calls, parts


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_calls_are_found_in_a_text_however_it_is_cut(size: int) -> None:
    one, two = '{"a": "}\\"{", "b": {"c": ["\\\\"]}}', "{ }"
    text = "I'll look <tool_call\n"
    for name, arguments in [("f-1", one), ("g", two)]:
        text += "\n" if name == "g" else ""
        text += f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
    content, calls, parts = parsed(text, size)
    assert content == "I'll look <tool_call\n"
    assert [(call.name, call.arguments) for call in calls] == [("f-1", one), ("g", two)]
    assert len({call.id for call in calls}) == 2
    assert (parts > 2) == (size < 1000)


def test_a_text_without_calls_is_whole() -> None:
    for text in ("a <tool_ca", "<tool_call>", "a\n{}", ""):
        assert parsed(text, 3)[:2] == (text, [])

"""/v1/responses and /v1/embeddings, through the official client."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
import torch
from transformers import AutoModel

from pentad.loading import load
from tests.serve.conftest import Server

GREEDY = {"model": "tiny", "temperature": 0, "max_output_tokens": 20}


@pytest.fixture(scope="module")
def alone(tiny: Path):
    """The same model in this process."""
    return load(tiny)


def test_a_response_is_the_chats_answer(server: Server, alone) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    expected = alone.chat(messages, temperature=0, max_tokens=20)
    reply = server.client.responses.create(**GREEDY, input="Hello", instructions="Be brief.")
    assert reply.output_text == expected.text
    assert reply.status == "incomplete"
    assert reply.incomplete_details.reason == "max_output_tokens"
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (expected.prompt_tokens, 20)
    parts = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
    ]
    assert server.client.responses.create(**GREEDY, input=parts).output_text == expected.text


def test_a_conversation_goes_on_with_the_output_of_a_response(server: Server, alone) -> None:
    first = server.client.responses.create(**GREEDY, input="Hello")
    question = {"role": "user", "content": "And?"}
    items = [{"role": "user", "content": "Hello"}, *(item.to_dict() for item in first.output), question]
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": first.output_text}, question]
    expected = alone.chat(messages, temperature=0, max_tokens=20).text
    assert server.client.responses.create(**GREEDY, input=items).output_text == expected


def test_a_stream_of_events(server: Server) -> None:
    whole = server.client.responses.create(**GREEDY, input="Hello")
    events = list(server.client.responses.create(**GREEDY, input="Hello", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert "".join(event.delta for event in events[4:-4]) == whole.output_text
    assert events[-1].response.output_text == whole.output_text
    assert events[-1].response.usage.output_tokens == 20


def test_what_needs_state_is_refused(server: Server) -> None:
    for option in ({"store": True}, {"previous_response_id": "resp_1"}, {"background": True}, {"truncation": "auto"}):
        with pytest.raises(openai.BadRequestError) as raised:
            server.client.responses.create(**GREEDY, input="Hello", **option)
        assert raised.value.param == next(iter(option))


SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "name": "get_weather", "description": "Forecast.", "parameters": SCHEMA, "strict": True}
CLOCK = {"type": "function", "name": "clock", "parameters": None, "strict": True}
HOT = {"model": "tiny", "temperature": 2, "max_output_tokens": 400}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}])
def test_a_required_call_has_valid_arguments(server: Server, choice: Any) -> None:
    options: Any = {**HOT, "tools": [WEATHER], "tool_choice": choice, "parallel_tool_calls": False, "input": "Hello"}
    for seed in range(3):
        reply = server.client.responses.create(**options, extra_body={"seed": seed})
        [call] = reply.output
        assert (call.type, call.name, call.status) == ("function_call", "get_weather", "completed")
        jsonschema.validate(json.loads(call.arguments), SCHEMA)
        events = list(server.client.responses.create(**options, stream=True, extra_body={"seed": seed}))
        kinds = [event.type.removeprefix("response.") for event in events]
        assert kinds[:3] == ["created", "in_progress", "output_item.added"]
        assert kinds[-3:] == ["function_call_arguments.done", "output_item.done", "completed"]
        assert "".join(event.delta for event in events[3:-3]) == call.arguments == events[-3].arguments
        assert events[-1].response.output[0].arguments == call.arguments


def test_text_and_several_calls_are_items_of_their_own(server: Server) -> None:
    kinds = set()
    for seed in range(8):
        options: Any = {**HOT, "tools": [CLOCK], "input": "Hello", "extra_body": {"seed": seed}, "top_p": 1}
        choice = "auto" if seed < 4 else "required"
        whole = server.client.responses.create(**options, tool_choice=choice)
        with server.client.responses.stream(**options, tool_choice=choice) as stream:
            final = stream.get_final_response()
        facts = [[(i.type, i.status, getattr(i, "arguments", None)) for i in reply.output] for reply in (whole, final)]
        assert facts[0] == facts[1]
        assert whole.output_text == final.output_text
        kinds |= {item.type for item in whole.output}
        if choice == "required":
            assert {item.type for item in whole.output} == {"function_call"}
            assert all(json.loads(item.arguments) == {} for item in whole.output if item.status == "completed")
    assert kinds == {"message", "function_call"}


def test_a_conversation_goes_on_after_a_call_as_in_chat_completions(server: Server) -> None:
    first = server.client.responses.create(
        **HOT, input="Hello", tools=[WEATHER], tool_choice="required", parallel_tool_calls=False
    )
    [call] = first.output
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    reply = server.client.responses.create(
        **GREEDY, input=[{"role": "user", "content": "Hello"}, call.to_dict(), result], tools=[WEATHER]
    )
    function = {"name": call.name, "arguments": call.arguments}
    messages: Any = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "tool_calls": [{"id": call.call_id, "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": call.call_id, "content": "sunny"},
    ]
    described = {key: value for key, value in WEATHER.items() if key != "type"}
    chat = server.client.chat.completions.create(
        model="tiny",
        messages=messages,
        tools=[{"type": "function", "function": described}],
        temperature=0,
        max_tokens=20,
    )
    assert reply.usage.input_tokens == chat.usage.prompt_tokens
    assert reply.output_text == (chat.choices[0].message.content or "")


@pytest.mark.parametrize(
    ("options", "param", "facts"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "function"),
        ({"tools": [CLOCK, CLOCK]}, "tools", "clock"),
        ({"tools": [{**CLOCK, "parameters": {"if": {}}}]}, "tools", "tools.0.parameters.if"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tools": [CLOCK], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice", "clock"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input.0", "reasoning"),
        ({"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "{"}]}, "input", "not JSON"),
    ],
)
def test_tools_that_are_refused(server: Server, options: dict, param: str, facts: str) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        server.client.responses.create(**{**GREEDY, "input": "Hello", **options})
    assert raised.value.param.startswith(param)
    assert facts in raised.value.message


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_are_hidden_states(server: Server, tiny: Path, pooling: str) -> None:
    texts = ["One", "A longer text"]
    reply = server.client.embeddings.create(model="tiny", input=texts, extra_body={"pooling": pooling})
    peer = AutoModel.from_pretrained(tiny).eval()
    for text, item in zip(texts, reply.data, strict=True):
        with torch.inference_mode():
            hidden_ND = peer(torch.tensor([list(text.encode())])).last_hidden_state[0]
        expected_D = hidden_ND[-1] if pooling == "last" else hidden_ND.mean(0)
        torch.testing.assert_close(torch.tensor(item.embedding), expected_D / expected_D.norm(), rtol=0, atol=1e-4)
    assert [item.index for item in reply.data] == [0, 1]
    assert reply.usage.prompt_tokens == sum(map(len, texts))


def test_embeddings_of_token_ids_and_as_numbers(server: Server) -> None:
    create = server.client.embeddings.create  # it asks for base64 unless a format is given
    packed, numbers = (create(model="tiny", input=list(b"One"), **kind) for kind in ({}, {"encoding_format": "float"}))
    assert numbers.data[0].embedding == pytest.approx(packed.data[0].embedding, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": [5, 264]}, "input"),
        ({"input": "x" * 9000}, "input"),
        ({"dimensions": 5}, "dimensions"),
    ],
)
def test_embeddings_that_are_refused(server: Server, options: dict, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        server.client.embeddings.create(**{"model": "tiny", "input": "hi", **options})
    assert raised.value.param == param

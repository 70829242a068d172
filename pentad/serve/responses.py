"""/v1/responses, without state: a response is not stored, and a conversation is sent whole."""

import asyncio
import itertools
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from pentad.serve.answers import Answers, Delta, encode, requests, respond, room
from pentad.serve.formats import responses_constraint
from pentad.serve.models import Model
from pentad.serve.openai import InputCallOutput, InputMessage, ResponseBody
from pentad.serve.tools import Call, CallParser

_Event = tuple[str, dict[str, Any]]
"""The kind of an event, and its fields."""


async def respond_statelessly(model: Model, body: ResponseBody, request: Request) -> Response:
    """Reply to a conversation."""
    loaded = model.loaded
    offered = [] if body.tool_choice == "none" else body.tools or []
    tools = [{"type": "function", "function": tool.model_dump(exclude_none=True, exclude={"type"})} for tool in offered]
    prompt = await encode(lambda: loaded.encode_chat(_messages(body), tools), "input")
    limit = room(loaded, prompt, body.max_output_tokens, param="input")
    constraint = await asyncio.to_thread(responses_constraint, body)
    asked = requests(body, [prompt], [limit], None, constraint=constraint, opens=True)
    answers = Answers(model, asked, [loaded.tokenizer.stream()], [])
    reply = _Reply(model.name, body, len(prompt), CallParser() if tools else None)
    return await respond(request, bool(body.stream), answers, reply, named_events=True)


def _messages(body: ResponseBody) -> list[dict[str, Any]]:
    """The conversation, with the instructions as its first message; calls belong to the assistant's message."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": body.instructions}] if body.instructions else []
    for item in [InputMessage(role="user", content=body.input)] if isinstance(body.input, str) else body.input:
        if isinstance(item, InputMessage):
            messages.append({"role": item.role, "content": item.text()})
        elif isinstance(item, InputCallOutput):
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": item.text()})
        else:
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            messages[-1].setdefault("tool_calls", []).append(call)
    return messages


class _Reply:
    """Builds the objects of a reply.

    Args:
        name: the model's.
        body: the request.
        prompt_tokens: the number of tokens of the prompt.
        parser: finds the calls of tools; None without tools.
    """

    def __init__(self, name: str, body: ResponseBody, prompt_tokens: int, parser: CallParser | None) -> None:
        self._prompt_tokens = prompt_tokens
        self._parser = parser
        self._output: list[dict[str, Any]] = []  # the items; only the last one grows
        choice = body.tool_choice or "auto"
        self._head = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "model": name,
            "error": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "text": {"format": body.format.model_dump(exclude_none=True, by_alias=True)},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [{**tool.model_dump(), "strict": True} for tool in body.tools or []],
            "top_p": body.top_p,
            "truncation": "disabled",
        }

    def whole(self, choices: list[Delta], answers: Answers) -> dict[str, Any]:
        for _ in (*self._grow(choices[0]), *self._close(choices[0].finish)):
            pass
        return self._response(choices[0].finish, answers)

    async def chunks(self, answers: Answers) -> AsyncIterator[dict[str, Any]]:
        """The events of a stream. The first is sent with the first text, so that an error before has its own status."""
        numbers, finish, begun = itertools.count(), None, False

        def event(kind: str, **fields: Any) -> dict[str, Any]:
            return {"type": f"response.{kind}", "sequence_number": next(numbers), **fields}

        async for delta in answers.deltas():
            if not begun:
                empty, begun = self._response(None, answers), True
                yield event("created", response=empty)
                yield event("in_progress", response=empty)
            for kind, fields in self._grow(delta):
                yield event(kind, **fields)
            finish = delta.finish
        for kind, fields in self._close(finish):
            yield event(kind, **fields)
        whole = self._response(finish, answers)
        yield event(whole["status"], response=whole)

    def _grow(self, delta: Delta) -> Iterator[_Event]:
        """Add new text and calls to the output; yields the events."""
        text, calls = delta.text, list[Call]()
        if self._parser is not None:
            text, calls = self._parser.add(text, last=delta.finish is not None)
        if text or (delta.finish is not None and not calls and not self._output):
            if not self._output:  # text comes before all calls
                yield self._begin({"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant"}, content=[])
                self._output[0]["content"] = [_part("")]
                yield "content_part.added", {**self._place(), "content_index": 0, "part": _part("")}
            self._output[0]["content"][0]["text"] += text
            yield "output_text.delta", {**self._place(), "content_index": 0, "delta": text, "logprobs": []}
        for call in calls:
            if call.name is not None:
                yield from self._close("stop")
                item = {"id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "call_id": call.id, "name": call.name}
                yield self._begin(item, arguments="")
            self._output[-1]["arguments"] += call.arguments
            yield "function_call_arguments.delta", {**self._place(), "delta": call.arguments}

    def _begin(self, item: dict[str, Any], **empty: Any) -> _Event:
        self._output.append({**item, "status": "in_progress", **empty})
        return "output_item.added", {"output_index": len(self._output) - 1, "item": dict(self._output[-1])}

    def _close(self, finish: str | None) -> Iterator[_Event]:
        """Complete the last item, if there is one; yields the events."""
        if not self._output:
            return
        item = self._output[-1]
        item["status"] = "incomplete" if finish == "length" else "completed"
        if item["type"] == "message":
            place, part = {**self._place(), "content_index": 0}, item["content"][0]
            yield "output_text.done", {**place, "text": part["text"], "logprobs": []}
            yield "content_part.done", {**place, "part": part}
        else:
            arguments = {"name": item["name"], "arguments": item["arguments"]}
            yield "function_call_arguments.done", {**self._place(), **arguments}
        yield "output_item.done", {"output_index": len(self._output) - 1, "item": item}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}

    def _response(self, finish: str | None, answers: Answers) -> dict[str, Any]:
        """The response so far; complete if there is a `finish`."""
        status = {None: "in_progress", "length": "incomplete"}.get(finish, "completed")
        return {
            **self._head,
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if finish == "length" else None,
            "output": self._output,
            "usage": None if finish is None else self._usage(answers),
        }

    def _usage(self, answers: Answers) -> dict[str, Any]:
        return {
            "input_tokens": self._prompt_tokens,
            "input_tokens_details": {"cached_tokens": answers.cached_tokens},
            "output_tokens": answers.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self._prompt_tokens + answers.completion_tokens,
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

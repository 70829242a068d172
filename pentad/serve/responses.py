"""/v1/responses, without state: a response is not stored, and a conversation is sent whole."""

import asyncio
import itertools
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from pentad.serve.answers import Answers, Delta, encode, requests, respond, room
from pentad.serve.formats import responses_constraint
from pentad.serve.models import Model
from pentad.serve.openai import ResponseBody, ResponsesFormat


async def respond_statelessly(model: Model, body: ResponseBody, request: Request) -> Response:
    """Reply to a conversation."""
    loaded = model.loaded
    prompt = await encode(lambda: loaded.encode_chat(_messages(body)), "input")
    limit = room(loaded, prompt, body.max_output_tokens, param="input")
    form = ResponsesFormat(type="text") if body.text is None or body.text.format is None else body.text.format
    constraint = await asyncio.to_thread(responses_constraint, form)
    asked = requests(body, [prompt], [limit], None, constraint=constraint, opens=True)
    answers = Answers(model, asked, [loaded.tokenizer.stream()], [])
    reply = _Reply(model.name, body, form, len(prompt))
    return await respond(request, bool(body.stream), answers, reply, named_events=True)


def _messages(body: ResponseBody) -> list[dict[str, Any]]:
    """The conversation, with the instructions as its first message."""
    given = [{"role": "user", "content": body.input}]
    if not isinstance(body.input, str):
        given = [{"role": message.role, "content": message.text()} for message in body.input]
    return [{"role": "system", "content": body.instructions}, *given] if body.instructions else given


class _Reply:
    """Builds the objects of a reply."""

    def __init__(self, name: str, body: ResponseBody, form: ResponsesFormat, prompt_tokens: int) -> None:
        self._prompt_tokens = prompt_tokens
        self._item_id = f"msg_{uuid.uuid4().hex}"
        self._head = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "model": name,
            "error": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": bool(body.parallel_tool_calls),
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "text": {"format": form.model_dump(exclude_none=True, by_alias=True)},
            "tool_choice": body.tool_choice or "auto",
            "tools": [],
            "top_p": body.top_p,
            "truncation": "disabled",
        }

    def whole(self, choices: list[Delta], answers: Answers) -> dict[str, Any]:
        return self._response(choices[0].text, choices[0].finish, answers)

    async def chunks(self, answers: Answers) -> AsyncIterator[dict[str, Any]]:
        """The events of a stream. The first is sent with the first text, so that an error before has its own status."""
        numbers = itertools.count()
        place = {"item_id": self._item_id, "output_index": 0, "content_index": 0}

        def event(kind: str, **fields: Any) -> dict[str, Any]:
            return {"type": f"response.{kind}", "sequence_number": next(numbers), **fields}

        text, finish = "", None
        async for delta in answers.deltas():
            if not text:
                begun = self._response("", None, answers)
                yield event("created", response=begun)
                yield event("in_progress", response=begun)
                yield event("output_item.added", output_index=0, item=self._item("in_progress", []))
                yield event("content_part.added", **place, part=_part(""))
            text, finish = text + delta.text, delta.finish
            yield event("output_text.delta", **place, delta=delta.text, logprobs=[])
        whole = self._response(text, finish, answers)
        yield event("output_text.done", **place, text=text, logprobs=[])
        yield event("content_part.done", **place, part=_part(text))
        yield event("output_item.done", output_index=0, item=whole["output"][0])
        yield event(whole["status"], response=whole)

    def _response(self, text: str, finish: str | None, answers: Answers) -> dict[str, Any]:
        """The response so far; complete if there is a `finish`."""
        status = {None: "in_progress", "length": "incomplete"}.get(finish, "completed")
        return {
            **self._head,
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if finish == "length" else None,
            "output": [] if finish is None else [self._item(status, [_part(text)])],
            "usage": None if finish is None else self._usage(answers),
        }

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._item_id, "type": "message", "role": "assistant", "status": status, "content": content}

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

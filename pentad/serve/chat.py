"""/v1/chat/completions."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from pentad.serve.answers import Answers, Delta, encode, requests, respond, room, usage, usage_so_far
from pentad.serve.calls import Event
from pentad.serve.errors import APIError
from pentad.serve.formats import chat_constraint
from pentad.serve.models import Model
from pentad.serve.openai import ChatBody, StreamOptions
from pentad.serve.tools import Call, CallParser
from pentad.text import Tokenizer


async def chat(model: Model, body: ChatBody, request: Request) -> Response:
    """Reply to a conversation."""
    loaded = model.loaded
    if body.top_logprobs is not None and not body.logprobs:
        message = f"top_logprobs is {body.top_logprobs}, but logprobs is not true"
        raise APIError(400, message, param="top_logprobs", code="invalid_value")
    messages = [one.model_dump(exclude_none=True) for one in body.messages]
    tools = [] if body.tool_choice == "none" else [tool.model_dump(exclude_none=True) for tool in body.tools or []]
    for number, one in enumerate(body.messages):
        if one.content is None and not one.tool_calls:
            param = f"messages.{number}.content"
            raise APIError(400, f"{param} is missing", param=param, code="missing_required_parameter")
    constraint = await asyncio.to_thread(chat_constraint, body)
    prompt = await encode(lambda: loaded.encode_chat(messages, tools), "messages")
    limit = room(loaded, prompt, body.max_completion_tokens or body.max_tokens, param="messages")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    asked = requests(body, [prompt], [limit], logprobs, n=body.n or 1, constraint=constraint, opens=True)
    answers = Answers(model, asked, [loaded.tokenizer.stream() for _ in asked], body.stops(), n=len(asked))
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model.name}
    parsers = [CallParser() for _ in asked] if tools else []
    reply = _Reply(loaded.tokenizer, head, len(prompt), parsers, logprobs is not None, body.usage_options)
    return await respond(request, bool(body.stream), answers, reply)


class _Reply:
    """Builds the objects of a reply.

    Args:
        tokenizer: the model's.
        head: the fields that all objects have.
        prompt_tokens: the number of tokens of the prompt.
        parsers: find the calls of tools, one per choice; empty without tools.
        logprobs: report log-probabilities.
        usage_options: how a stream reports the numbers of tokens; None if it doesn't.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        head: dict[str, Any],
        prompt_tokens: int,
        parsers: list[CallParser],
        logprobs: bool,
        usage_options: StreamOptions | None,
    ) -> None:
        self._tokenizer = tokenizer
        self._head = head
        self._prompt_tokens = prompt_tokens
        self._parsers = parsers
        self._logprobs = logprobs
        self._usage_options = usage_options

    def whole(self, choices: list[Delta], answers: Answers) -> dict[str, Any]:
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [
                {
                    "index": choice.choice,
                    "message": {"role": "assistant", "refusal": None, **message},
                    "logprobs": self._report(choice.tokens),
                    "finish_reason": finish,
                }
                for choice in choices
                for message, finish in [self._message(choice)]
            ],
            "usage": usage(self._prompt_tokens, answers),
        }

    async def chunks(self, answers: Answers) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a stream; the first chunk of each choice has the role."""
        head = {**self._head, "object": "chat.completion.chunk"}
        begun: set[int] = set()
        async for delta in answers.deltas():
            text, calls, finish = self._parsed(delta)
            message: dict[str, Any] = {} if delta.choice in begun else {"role": "assistant", "content": ""}
            begun.add(delta.choice)
            message |= {"content": text} if text else {}
            message |= {"tool_calls": [call.delta() for call in calls]} if calls else {}
            if not message and finish is None and not self._logprobs:
                continue
            choice = {
                "index": delta.choice,
                "delta": message,
                "logprobs": self._report(delta.tokens),
                "finish_reason": finish,
            }
            yield {**head, "choices": [choice], **usage_so_far(self._usage_options, self._prompt_tokens, answers)}
        if self._usage_options:
            yield {**head, "choices": [], "usage": usage(self._prompt_tokens, answers)}

    def _parsed(self, delta: Delta) -> tuple[str, list[Call], str | None]:
        """The text, the calls and the finish reason of one choice's growth."""
        if not self._parsers:
            return delta.text, [], delta.finish
        parser = self._parsers[delta.choice]
        text, calls = parser.add(delta.text, last=delta.finish is not None)
        return text, calls, "tool_calls" if delta.finish == "stop" and parser.count else delta.finish

    def _message(self, choice: Delta) -> tuple[dict[str, Any], str | None]:
        text, calls, finish = self._parsed(choice)
        if not calls:
            return {"content": text}, finish
        made = [{key: value for key, value in call.delta().items() if key != "index"} for call in calls]
        return {"content": text or None, "tool_calls": made}, finish

    def _report(self, tokens: list[Event]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        content = []
        for event in tokens:
            assert event.token is not None
            assert event.logprobs is not None
            logprob, top = event.logprobs
            content.append({**self._token(event.token, logprob), "top_logprobs": [self._token(*one) for one in top]})
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token)
        return {"token": raw.decode(errors="replace"), "logprob": logprob, "bytes": list(raw)}

"""/v1/chat/completions."""

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from pentad.serve.answers import Answers, Delta, encode, joined, requests, room, usage
from pentad.serve.models import Event, Model
from pentad.serve.openai import ChatBody
from pentad.serve.streaming import EventStream, unless_gone
from pentad.text import Tokenizer


async def chat(model: Model, body: ChatBody, request: Request) -> Response:
    """Reply to a conversation."""
    loaded = model.loaded
    tokenizer = loaded.tokenizer
    messages = [_message(message.model_dump(exclude_none=True)) for message in body.messages]
    prompt = await encode(lambda: tokenizer.chat(messages), "messages")
    limit = room(loaded, prompt, body.max_completion_tokens or body.max_tokens, param="messages")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    call = model.submit(requests(body, [prompt], [limit], logprobs))
    count = body.n or 1
    answers = Answers(call, [tokenizer.stream() for _ in range(count)], body.stops())
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model.name}
    reply = _Reply(tokenizer, head, logprobs is not None)
    streaming = False
    try:
        if body.stream:
            chunks = reply.chunks(answers, count, len(prompt), include_usage=body.include_usage)
            first = await unless_gone(request, anext(chunks))
            streaming = True
            return EventStream(first, chunks, answers.close)
        choices = await unless_gone(request, joined(answers, count))
        return JSONResponse(reply.whole(choices, usage(len(prompt), answers.completion_tokens)))
    finally:
        if not streaming:
            answers.close()


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """A message for the template; templates know "developer" by its older name."""
    return message | ({"role": "system"} if message["role"] == "developer" else {})


class _Reply:
    """Builds the objects of a reply."""

    def __init__(self, tokenizer: Tokenizer, head: dict[str, Any], logprobs: bool) -> None:
        self._tokenizer = tokenizer
        self._head = head
        self._logprobs = logprobs

    def whole(self, choices: list[Delta], count: dict[str, int]) -> dict[str, Any]:
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [
                {
                    "index": choice.choice,
                    "message": {"role": "assistant", "content": choice.text, "refusal": None},
                    "logprobs": self._report(choice.tokens),
                    "finish_reason": choice.finish,
                }
                for choice in choices
            ],
            "usage": count,
        }

    async def chunks(
        self, answers: Answers, count: int, prompt_tokens: int, *, include_usage: bool
    ) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a stream; the first chunk of each choice has the role."""
        unnamed = set(range(count))
        async for delta in answers.deltas():
            message = {"role": "assistant"} if delta.choice in unnamed else {}
            unnamed.discard(delta.choice)
            if delta.text or message:
                message["content"] = delta.text
            choice = {
                "index": delta.choice,
                "delta": message,
                "logprobs": self._report(delta.tokens),
                "finish_reason": delta.finish,
            }
            yield self._chunk([choice], {"usage": None} if include_usage else {})
        if include_usage:
            yield self._chunk([], {"usage": usage(prompt_tokens, answers.completion_tokens)})

    def _chunk(self, choices: list[dict[str, Any]], more: dict[str, Any]) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": choices, **more}

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

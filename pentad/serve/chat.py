"""/v1/chat/completions."""

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from pentad.serve.answers import Answers, Delta, encode, requests, respond, room, usage
from pentad.serve.calls import Event
from pentad.serve.errors import APIError
from pentad.serve.models import Model
from pentad.serve.openai import ChatBody
from pentad.text import Tokenizer


async def chat(model: Model, body: ChatBody, request: Request) -> Response:
    """Reply to a conversation."""
    loaded = model.loaded
    if body.top_logprobs is not None and not body.logprobs:
        message = f"top_logprobs is {body.top_logprobs}, but logprobs is not true"
        raise APIError(400, message, param="top_logprobs", code="invalid_value")
    messages = [message.model_dump(exclude_none=True) for message in body.messages]
    prompt = await encode(lambda: loaded.encode_chat(messages), "messages")
    limit = room(loaded, prompt, body.max_completion_tokens or body.max_tokens, param="messages")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    asked = requests(body, [prompt], [limit], logprobs, n=body.n or 1)
    answers = Answers(model, asked, [loaded.tokenizer.stream() for _ in asked], body.stops(), n=len(asked))
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model.name}
    reply = _Reply(loaded.tokenizer, head, len(prompt), logprobs is not None, body.include_usage)
    return await respond(request, bool(body.stream), answers, reply)


class _Reply:
    """Builds the objects of a reply."""

    def __init__(
        self, tokenizer: Tokenizer, head: dict[str, Any], prompt_tokens: int, logprobs: bool, include_usage: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._head = head
        self._prompt_tokens = prompt_tokens
        self._logprobs = logprobs
        self._include_usage = include_usage

    def whole(self, choices: list[Delta], answers: Answers) -> dict[str, Any]:
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
            "usage": usage(self._prompt_tokens, answers),
        }

    async def chunks(self, answers: Answers) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a stream; the first chunk of each choice has the role."""
        head = {**self._head, "object": "chat.completion.chunk"}
        begun: set[int] = set()
        async for delta in answers.deltas():
            message = {} if delta.choice in begun else {"role": "assistant", "content": ""}
            begun.add(delta.choice)
            choice = {
                "index": delta.choice,
                "delta": message | ({"content": delta.text} if delta.text else {}),
                "logprobs": self._report(delta.tokens),
                "finish_reason": delta.finish,
            }
            yield {**head, "choices": [choice], **({"usage": None} if self._include_usage else {})}
        if self._include_usage:
            yield {**head, "choices": [], "usage": usage(self._prompt_tokens, answers)}

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

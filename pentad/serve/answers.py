"""From a request's prompts to the texts of its choices, as they grow, and to the reply."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from pentad.errors import BadInput
from pentad.serve.calls import Event
from pentad.serve.errors import APIError
from pentad.serve.loaded import Loaded
from pentad.serve.models import Model
from pentad.serve.openai import SamplingBody, StreamOptions
from pentad.serve.streaming import EventStream, unless_gone
from pentad.text import Detokenizer
from pentad.text.grammar import Constraint
from pentad.text.transcript import Transcript

T = TypeVar("T")


async def encode(encoder: Callable[[], T], param: str) -> T:
    """Encode prompts in a thread, so that a long prompt or a slow template doesn't stop other requests.

    Raises:
        APIError: the prompt is malformed; the error names `param`.
    """
    try:
        return await asyncio.to_thread(encoder)
    except BadInput as error:
        raise APIError(400, str(error), param=param, code="invalid_value") from None


def room(loaded: Loaded, prompt: Sequence[int], max_tokens: int | None, *, param: str) -> int:
    """The number of tokens to generate at most: `max_tokens`, by default what the context has room for.

    Raises:
        APIError: the prompt is empty, or the tokens don't fit the context.
    """
    size, free = loaded.context_length, loaded.context_length - len(prompt)
    if not prompt:
        raise APIError(400, f"{param} is empty; expected at least one token", param=param, code="invalid_value")
    if free < (1 if max_tokens is None else max_tokens):
        asked = (
            f"and max_tokens {max_tokens} don't fit"
            if max_tokens
            else "leave no room"
            if max_tokens is None
            else "don't fit"
        )
        message = f"the prompt's {len(prompt)} tokens {asked} in the context of {size} tokens"
        raise APIError(400, message, param=param, code="context_length_exceeded")
    return free if max_tokens is None else max_tokens


def requests(
    body: SamplingBody,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    logprobs: int | None,
    *,
    n: int = 1,
    constraint: Constraint | None = None,
    opens: bool,
) -> list[dict[str, Any]]:
    """The messages to the worker: `n` sequences for each prompt; `opens` as in `Compiler.matcher`."""
    constrained = {} if constraint is None else {"constraint": constraint.grammar, "opens": opens}
    return [
        {
            "prompt": prompt,
            "max_tokens": limit,
            "sampling": body.sampling(),
            "seed": body.seed_of(choice),
            "ignore_eos": bool(body.ignore_eos),
            "logprobs": logprobs,
            **constrained,
        }
        for prompt, limit in zip(prompts, limits, strict=True)
        for choice in range(n)
    ]


class Delta(NamedTuple):
    """The growth of one choice.

    Attributes:
        choice: its number.
        text: new text.
        tokens: the new tokens that the text is made of.
        finish: "stop" or "length" once it has finished.
    """

    choice: int
    text: str
    tokens: list[Event]
    finish: str | None


class Answers:
    """The texts of a request's choices.

    Args:
        model: runs them.
        asked: see `requests`; empty if no token is wanted.
        detokenizers: one per choice.
        stop: strings that end a text.
        n: the number of choices of each prompt.

    Attributes:
        completion_tokens: the number of tokens generated so far.
        cached_tokens: the number of tokens of the prompts whose keys and values were in the cache.
    """

    def __init__(
        self,
        model: Model,
        asked: Sequence[dict[str, Any]],
        detokenizers: Sequence[Detokenizer],
        stop: Sequence[str],
        *,
        n: int = 1,
    ) -> None:
        self._n = n
        self.completion_tokens = 0
        self.cached_tokens = 0
        self._any = bool(asked)
        self._call = model.submit(asked)
        self._transcripts = [Transcript(detokenizer, stop) for detokenizer in detokenizers]

    def close(self) -> None:
        """Cancel what still runs."""
        self._call.close()

    async def deltas(self) -> AsyncIterator[Delta]:
        """The growth of the choices, in the order of their tokens.

        Raises:
            APIError: the worker refused a sequence, or died.
        """
        running = set(range(len(self._transcripts)))
        sent = [0] * len(running)
        held: list[list[Event]] = [[] for _ in running]  # tokens whose text may become a stop string or a character
        while running:
            event = await self._call.next() if self._any else Event(min(running), finish="length")
            choice, transcript, finish = event.choice, self._transcripts[event.choice], event.finish
            if choice not in running:  # it has been stopped in the meantime
                continue
            if choice % self._n == 0:  # the others share the first one's prompt
                self.cached_tokens += event.cached
            if event.token is not None:
                self.completion_tokens += 1
                held[choice].append(event)
                transcript.add(event.token)
            if finish is not None:
                transcript.finish()
            if transcript.stopped:
                finish = "stop"
                self._call.cancel(choice)
            new = transcript.text[sent[choice] :]
            if new or finish is not None:
                sent[choice] += len(new)
                yield Delta(choice, new, held[choice], finish)
                held[choice] = []
            if finish is not None:
                running.discard(choice)

    async def joined(self) -> list[Delta]:
        """All of each choice."""
        texts: list[list[Delta]] = [[] for _ in self._transcripts]
        async for delta in self.deltas():
            texts[delta.choice].append(delta)
        return [
            Delta(choice, "".join(d.text for d in deltas), [t for d in deltas for t in d.tokens], deltas[-1].finish)
            for choice, deltas in enumerate(texts)
        ]


class Reply(Protocol):
    """Builds the objects of a reply."""

    def whole(self, choices: list[Delta], answers: Answers) -> dict[str, Any]:
        """The only object."""

    def chunks(self, answers: Answers) -> AsyncIterator[dict[str, Any]]:
        """The objects of a stream."""


async def respond(
    request: Request, stream: bool, answers: Answers, reply: Reply, *, named_events: bool = False
) -> Response:
    """Reply with the answers, as a stream or as a whole; they end when the client has gone."""
    if not stream:
        try:
            choices = await unless_gone(request, answers.joined())
        finally:
            answers.close()
        return JSONResponse(reply.whole(choices, answers))
    chunks = reply.chunks(answers)
    try:
        first = await unless_gone(request, anext(chunks))
    except BaseException:
        answers.close()
        raise
    return EventStream(first, chunks, answers.close, named=named_events)


def usage(prompt_tokens: int, answers: Answers) -> dict[str, Any]:
    """OpenAI's count of tokens."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": answers.completion_tokens,
        "total_tokens": prompt_tokens + answers.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": answers.cached_tokens},
    }


def usage_so_far(options: StreamOptions | None, prompt_tokens: int, answers: Answers) -> dict[str, Any]:
    """The field `usage` of an event that isn't the last one of a stream."""
    if options is None:
        return {}
    return {"usage": usage(prompt_tokens, answers) if options.continuous_usage_stats else None}

"""From a request's prompts to the texts of its choices, as they grow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NamedTuple

from pentad.errors import BadInput
from pentad.serve.errors import APIError
from pentad.serve.models import Call, Event, Loaded
from pentad.serve.openai import GenerationBody
from pentad.text import Detokenizer
from pentad.text.transcript import Transcript


async def encode(encoder: Callable[[], list[int]], param: str) -> list[int]:
    """Encode a prompt in a thread, so that a long prompt or a slow template doesn't stop other requests.

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
    if free < 1 or (max_tokens is not None and max_tokens > free):
        asked = "leave no room" if max_tokens is None else f"and max_tokens {max_tokens} don't fit"
        message = f"the prompt's {len(prompt)} tokens {asked} in the context of {size} tokens"
        raise APIError(400, message, param=param, code="context_length_exceeded")
    return free if max_tokens is None else max_tokens


def requests(
    body: GenerationBody, prompts: Sequence[Sequence[int]], limits: Sequence[int], logprobs: int | None
) -> list[dict[str, Any]]:
    """The messages to the worker: `body.n` sequences for each prompt."""
    return [
        {
            "prompt": prompt,
            "max_tokens": limit,
            "sampling": body.sampling(),
            "seed": body.seed_of(choice),
            "logprobs": logprobs,
        }
        for prompt, limit in zip(prompts, limits, strict=True)
        for choice in range(body.n or 1)
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
    """The texts of a call's choices.

    Args:
        call: the sequences.
        detokenizers: one per sequence.
        stop: strings that end a text.

    Attributes:
        completion_tokens: the number of tokens generated so far.
    """

    def __init__(self, call: Call, detokenizers: Sequence[Detokenizer], stop: Sequence[str]) -> None:
        self.completion_tokens = 0
        self._call = call
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
            event = await self._call.next()
            index, transcript, finish = event.choice, self._transcripts[event.choice], event.finish
            if index not in running:  # it has been stopped in the meantime
                continue
            if event.token is not None:
                self.completion_tokens += 1
                held[index].append(event)
                transcript.add(event.token)
            if finish is not None:
                transcript.finish()
            if transcript.stopped:
                finish = "stop"
                self._call.cancel(index)
            new = transcript.text[sent[index] :]
            if new or finish is not None:
                sent[index] += len(new)
                yield Delta(index, new, held[index], finish)
                held[index] = []
            if finish is not None:
                running.discard(index)


async def joined(answers: Answers, count: int) -> list[Delta]:
    """All of each choice."""
    texts: list[list[Delta]] = [[] for _ in range(count)]
    async for delta in answers.deltas():
        texts[delta.choice].append(delta)
    return [
        Delta(index, "".join(d.text for d in deltas), [t for d in deltas for t in d.tokens], deltas[-1].finish)
        for index, deltas in enumerate(texts)
    ]


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """OpenAI's count of tokens."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}

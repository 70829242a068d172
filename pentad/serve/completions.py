"""/v1/completions."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from fastapi import Request
from fastapi.responses import Response

from pentad.serve.answers import Answers, Delta, encode, requests, respond, room, usage, usage_so_far
from pentad.serve.errors import APIError
from pentad.serve.formats import constraint_of
from pentad.serve.models import Model
from pentad.serve.openai import MAX_CHOICES, CompletionBody, StreamOptions
from pentad.serve.streaming import unless_gone
from pentad.text import Detokenizer, Tokenizer

DEFAULT_MAX_TOKENS = 16  # as OpenAI's
Logprob = tuple[float, list[tuple[int, float]]]


async def complete(model: Model, body: CompletionBody, request: Request) -> Response:
    """Continue texts."""
    loaded, count = model.loaded, body.n or 1
    prompts = await encode(lambda: loaded.encode_prompts(body.prompt), "prompt")
    if len(prompts) * count > MAX_CHOICES:
        message = f"{len(prompts)} prompts, n = {count} of each; expected at most {MAX_CHOICES} choices"
        raise APIError(400, message, param="n", code="invalid_value")
    wanted = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if not wanted and not body.echo:
        raise APIError(400, "max_tokens is 0; expected at least 1, or echo", param="max_tokens", code="invalid_value")
    for prompt in prompts:
        room(loaded, prompt, wanted, param="prompt")
    scores = await unless_gone(request, _score(model, prompts, body.logprobs)) if body.echo else []
    constraint = await asyncio.to_thread(constraint_of, body)
    limits = [wanted] * len(prompts)
    asked = requests(body, prompts, limits, body.logprobs, n=count, constraint=constraint, opens=False)
    tokenizer = loaded.tokenizer
    choices = [prompt for prompt in prompts for _ in range(count)]
    answers = Answers(
        model, asked if wanted else [], [tokenizer.stream(continues=True) for _ in choices], body.stops(), n=count
    )
    head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time())}
    echoes = [_Echo(prompt, score) for prompt, score in zip(prompts, scores, strict=False) for _ in range(count)]
    reports = [_Report(tokenizer) for _ in choices] if body.logprobs is not None else []
    reply = _Reply(
        tokenizer, {**head, "model": model.name}, echoes, reports, sum(map(len, prompts)), body.usage_options
    )
    return await respond(request, bool(body.stream), answers, reply)


async def _score(model: Model, prompts: Sequence[list[int]], logprobs: int | None) -> list[list[Logprob]]:
    """The log-probabilities of each prompt's tokens but the first, if they are wanted."""
    scores: list[list[Logprob]] = [[] for _ in prompts]
    scored = [i for i, prompt in enumerate(prompts) if len(prompt) > 1] if logprobs is not None else []
    call = model.submit([{"prompt": prompts[i], "score": True, "logprobs": logprobs} for i in scored])
    try:
        for _ in scored:
            event = await call.next()
            scores[scored[event.choice]] = event.scores or []
    finally:
        call.close()
    return scores


class _Echo(NamedTuple):
    prompt: list[int]
    scores: list[Logprob]


class _Report:
    """The log-probabilities of one choice's tokens, and where these begin in its text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._detokenizer: Detokenizer | None = None
        self._offset = 0

    def of(self, tokens: Sequence[int], logprobs: Sequence[Logprob | None], *, begins: bool = False) -> dict[str, Any]:
        """The report on more tokens; `begins` if the first of them opens the text."""
        report: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        self._detokenizer = self._detokenizer or self._tokenizer.stream(continues=not begins)
        for token, logprob in zip(tokens, logprobs, strict=True):
            name = self._name(token)
            report["tokens"].append(name)
            report["text_offset"].append(self._offset)
            self._offset += len(self._detokenizer.add(token))
            report["token_logprobs"].append(None if logprob is None else logprob[0])
            report["top_logprobs"].append(
                None if logprob is None else {**{self._name(one): value for one, value in logprob[1]}, name: logprob[0]}
            )
        return report

    def _name(self, token: int) -> str:
        """A token as text; as OpenAI's API writes it if it is a part of a character."""
        raw = self._tokenizer.token_bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class _Reply:
    """Builds the objects of a reply.

    Args:
        tokenizer: the model's.
        head: the fields that all objects have.
        echoes: what to put in front of each choice; empty without echo.
        reports: one per choice; empty without logprobs.
        prompt_tokens: the number of tokens of all prompts.
        usage_options: how a stream reports the numbers of tokens; None if it doesn't.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        head: dict[str, Any],
        echoes: list[_Echo],
        reports: list[_Report],
        prompt_tokens: int,
        usage_options: StreamOptions | None,
    ) -> None:
        self._tokenizer = tokenizer
        self._head = head
        self._echoes = echoes
        self._reports = reports
        self._prompt_tokens = prompt_tokens
        self._usage_options = usage_options

    def whole(self, choices: list[Delta], answers: Answers) -> dict[str, Any]:
        return {
            **self._head,
            "choices": [self._choice(self._echo(choice.choice), choice) for choice in choices],
            "usage": usage(self._prompt_tokens, answers),
        }

    async def chunks(self, answers: Answers) -> AsyncIterator[dict[str, Any]]:
        unechoed = set(range(len(self._echoes)))
        async for delta in answers.deltas():
            echo = self._echo(delta.choice) if delta.choice in unechoed else None
            unechoed.discard(delta.choice)
            yield {
                **self._head,
                "choices": [self._choice(echo, delta)],
                **usage_so_far(self._usage_options, self._prompt_tokens, answers),
            }
        if self._usage_options:
            yield {**self._head, "choices": [], "usage": usage(self._prompt_tokens, answers)}

    def _echo(self, choice: int) -> _Echo | None:
        return self._echoes[choice] if self._echoes else None

    def _choice(self, echo: _Echo | None, delta: Delta) -> dict[str, Any]:
        text = ("" if echo is None else self._tokenizer.decode(echo.prompt)) + delta.text
        tokens = [event.token for event in delta.tokens if event.token is not None]
        logprobs: list[Logprob | None] = [event.logprobs for event in delta.tokens]
        if echo is not None:
            tokens, logprobs = [*echo.prompt, *tokens], [None, *echo.scores, *logprobs]
        report = self._reports[delta.choice].of(tokens, logprobs, begins=echo is not None) if self._reports else None
        return {"text": text, "index": delta.choice, "logprobs": report, "finish_reason": delta.finish}

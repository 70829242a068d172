"""What `LanguageModel`'s verbs take and give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from pentad.generate.engine import TokenLogprobs


class Options(TypedDict, total=False):
    """How to generate; what is left out or None is as the checkpoint recommends, else `Sampling`'s defaults.

    ``max_tokens`` is by default what the context has room for; ``stop`` are strings that end the text; ``logprobs=k``
    reports each token's log-probability and the k likeliest ones. With ``seed`` the same prompt gives the same text;
    beside others too, but for rounding (in bfloat16 torch's products differ with the number of rows).
    """

    max_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    stop: str | Sequence[str] | None
    seed: int | None
    logprobs: int | None


@dataclass(frozen=True)
class Completion:
    """What was generated.

    Attributes:
        model: the name it was loaded by.
        text: without the stop string that ended it.
        token_ids: what was generated, without the end token.
        prompt_token_ids: what the model was given.
        finish_reason: "stop", "length" (`max_tokens` or the context was reached) or "interrupted".
        seconds: {"load", "prefill" (until the first token), "decode"}.
        logprobs: one entry a token, where they were asked for.
    """

    model: str
    text: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    seconds: dict[str, float]
    logprobs: list[TokenLogprobs] | None = None


@dataclass(frozen=True)
class Score:
    """How likely a text is: `log_likelihood` is natural, summed over all `tokens` but the first."""

    model: str
    tokens: int
    log_likelihood: float
    perplexity: float

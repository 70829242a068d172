"""The options and results of `LanguageModel`'s methods."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from pentad.generate.requests import TokenLogprobs
from pentad.text.grammar import Constraint


class Options(TypedDict, total=False):
    """Options of a generation. An absent option, or None, is as the checkpoint recommends, else `Sampling`'s default.

    Attributes:
        max_tokens: maximum number of new tokens; the rest of the context by default.
        temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty: see `Sampling`.
        stop: strings that end the text.
        seed: makes the text reproducible, also in a batch. (In bfloat16 the batch size may change torch's rounding.)
        logprobs: report the log-probability of each new token and of this many most likely tokens.
        constraint: what the text must be; a text that `max_tokens` cuts is only the beginning of it.
    """

    max_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    stop: str | Sequence[str] | None
    seed: int | None
    logprobs: int | None
    constraint: Constraint | None


@dataclass(frozen=True)
class Completion:
    """The result of a generation.

    Attributes:
        model: the name that the model was loaded by.
        text: the new text, without the stop string that ended it.
        token_ids: the new tokens, without the end token.
        prompt_token_ids: the model's input.
        finish_reason: "stop", "length" (reached `max_tokens` or the end of the context) or "interrupted".
        seconds: durations: "load", "prefill" (until the first token) and "decode".
        logprobs: one entry per new token, if requested.
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
    """The log-likelihood of a text, or of a continuation given a prompt.

    Attributes:
        model: the model's name.
        tokens: tokens of the text, or of the continuation.
        log_likelihood: natural; summed over all tokens but the text's first, or over the continuation.
        perplexity: exp of the mean negative log-likelihood of the summed tokens.
        greedy: whether each of these tokens is the model's most likely one.
    """

    model: str
    tokens: int
    log_likelihood: float
    perplexity: float
    greedy: bool

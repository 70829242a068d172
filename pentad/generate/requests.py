"""Requests to the engine, and the events that it reports."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pentad.errors import PentadError
from pentad.generate.constraint import Matcher
from pentad.generate.sampling import Sampling


@dataclass(frozen=True)
class TokenLogprobs:
    """The model's log-probabilities (natural, before temperature and filters) for one generated token.

    Attributes:
        token_id, logprob: the generated token.
        top: the most likely tokens with their log-probabilities, in descending order.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(eq=False)
class Request:
    """One sequence for the engine to run.

    Attributes:
        prompt: token ids, at least one; for an encoder-decoder the first tokens of the decoder.
        source: token ids for the encoder of an encoder-decoder.
        finish_reason: "stop", "length", "error" or "cancelled"; None until the request has finished.
        error: the reason for "error".
        cached_tokens: number of tokens of the prompt (and the source) that did not run, because their keys and values
            were in the cache.
    """

    prompt: Sequence[int]
    source: Sequence[int] | None = field(default=None, kw_only=True)
    finish_reason: str | None = field(default=None, kw_only=True)
    error: PentadError | None = field(default=None, kw_only=True)
    cached_tokens: int = field(default=0, kw_only=True)

    def pending(self, done: int) -> Sequence[int]:
        """The known tokens that still have to run after the first `done`."""
        return self.prompt[done:]

    @property
    def max_length(self) -> int:
        """The largest number of tokens that run."""
        return len(self.prompt)

    @property
    def reusable(self) -> int:
        """The number of known tokens whose logits are not needed, so that their keys and values may be another's."""
        return 0

    @cached_property
    def key(self) -> NDArray[np.int32]:
        """The source, if there is one, and the prompt; requests with equal beginnings of their keys can share pages."""
        source = () if self.source is None else (*self.source, -1)
        return np.array([*source, *self.prompt], dtype=np.int32)

    def restart(self) -> None:
        """Forget what depends on tokens that will run again."""


@dataclass(eq=False)
class Generation(Request):
    """A request for new tokens.

    Attributes:
        sampling: the sampling options.
        generator: random numbers for this request only, so other requests don't change its text.
        max_tokens: maximum number of new tokens.
        end_ids: tokens that end the text and are not part of it.
        logprobs: how many of the most likely tokens to report with each new token; None for no report.
        matcher: allows only the tokens of a grammar; the text ends when the grammar is complete.
        generated: the new tokens so far.
        token_logprobs: one report for each new token, if requested.
    """

    sampling: Sampling
    generator: torch.Generator
    max_tokens: int
    end_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    matcher: Matcher | None = None
    generated: list[int] = field(default_factory=list)
    token_logprobs: list[TokenLogprobs] = field(default_factory=list)

    def pending(self, done: int) -> Sequence[int]:
        return [*self.prompt[done:], *self.generated[max(0, done - len(self.prompt)) :]]

    @property
    def max_length(self) -> int:
        return len(self.prompt) + self.max_tokens - 1  # the last token does not run

    @property
    def reusable(self) -> int:
        return len(self.prompt) + len(self.generated) - 1


@dataclass(eq=False)
class Evaluation(Request):
    """A request for the logits of its prompt, or for the log-likelihood of a part of it.

    Attributes:
        first: index of the first token whose log-likelihood is summed; None to keep all logits instead.
        log_likelihood: the sum so far, natural.
        greedy: whether each token of the sum so far has the largest logit.
        logits: float32 [tokens, V] of each step so far, if logits are kept.
        logprobs: how many of the most likely tokens to report with each summed token; None for no report.
        token_logprobs: one report for each token of the sum so far, if requested.
    """

    first: int | None = None
    log_likelihood: float = 0.0
    greedy: bool = True
    logits: list[Tensor] = field(default_factory=list)
    logprobs: int | None = None
    token_logprobs: list[TokenLogprobs] = field(default_factory=list)

    def pending(self, done: int) -> Sequence[int]:
        return self.prompt[done : None if self.first is None else -1]  # the last token predicts nothing that is summed

    @property
    def reusable(self) -> int:
        return 0 if self.first is None else self.first - 1

    def restart(self) -> None:
        self.log_likelihood, self.greedy = 0.0, True
        self.logits.clear()
        self.token_logprobs.clear()


@dataclass(eq=False)
class Embedding(Evaluation):
    """A request for its prompt's hidden states after the final norm: their sum, or the last one.

    Attributes:
        last: whether it is the last one.
        hidden_D: float32 [D]; None until the first step.
    """

    last: bool = False
    hidden_D: Tensor | None = None

    def add(self, hidden_RD: Tensor) -> None:
        """Add the hidden states of a step."""
        new_D = hidden_RD[-1].clone() if self.last else hidden_RD.sum(0)
        self.hidden_D = new_D if self.last or self.hidden_D is None else self.hidden_D + new_D

    def restart(self) -> None:
        self.hidden_D = None


class Event(NamedTuple):
    """A new token, or the end of a request.

    Attributes:
        request: the request.
        token_id: its new token, if there is one.
        finish_reason: the request's, with its last event.
        logprobs: the report on the token, if requested.
    """

    request: Request
    token_id: int | None
    finish_reason: str | None
    logprobs: TokenLogprobs | None = None

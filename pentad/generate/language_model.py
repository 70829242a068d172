"""The runner of decoder-only language models: chat, complete, stream, score, logits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from pentad.errors import BadInput, PentadError
from pentad.generate.completion import Completion, Options, Score
from pentad.generate.engine import Engine, Evaluation
from pentad.generate.runner import Runner, Stream, as_ids
from pentad.generate.step import Step
from pentad.text import Tokenizer

Message = Mapping[str, Any]


class LanguageModel(Runner):
    """A language model that is ready to run; `pentad.load` makes one.

    Several threads may use it: calls are queued, and each gets the answer that it would get alone.

    Attributes:
        name: the name or path it was loaded by.
        network: the torch module.
        tokenizer: text <-> ids; if the checkpoint has none that can be read, only `logits` works.
        context_length: the longest sequence, prompt and generated tokens together.
        sampling: how tokens are chosen unless a call says otherwise.
    """

    def __init__(
        self,
        name: str,
        step: Step,
        tokenizer: Tokenizer | BadInput | None,
        *,
        context: int | None = None,
        generation: Mapping[str, Any] | None = None,
        load_seconds: float = 0.0,
    ) -> None:
        trained: int = step.network.config.max_position_embeddings
        if context is not None and not 1 <= context <= trained:
            raise BadInput(f"context is {context}; {name} takes 1 to {trained} tokens")
        super().__init__(
            name,
            Engine(step),
            tokenizer,
            context_length=context or trained,
            generation=generation,
            load_seconds=load_seconds,
        )

    def chat(self, messages: Sequence[Message] | str, **options: Unpack[Options]) -> Completion:
        """Reply to a conversation.

        A conversation that continues the last one prefills only its new tokens.

        Args:
            messages: ``[{"role": "user", "content": "…"}, …]``; a string is one user message.
            options: max_tokens, temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty,
                frequency_penalty, stop, seed, logprobs; see `Options`.

        Returns:
            The reply.

        Raises:
            BadInput: no chat template, messages that it refuses, options out of range, or no room in the context.
        """
        return self._run([self._begin(self.chat_ids(messages), self.tokenizer.stream(), options)])[0]

    def stream(self, prompt: str | Sequence[Message], *, special: bool = False, **options: Unpack[Options]) -> Stream:
        """`complete` (of a string) or `chat` (of messages), piece by piece; arguments and errors are theirs."""
        if isinstance(prompt, str):
            return self._begin(self.prompt_ids(prompt, special=special), self._detokenizer(), options)
        return self._begin(self.chat_ids(prompt), self.tokenizer.stream(), options)

    def chat_ids(self, messages: Sequence[Message] | str) -> list[int]:
        """The tokens that `chat` gives the model: the conversation in its template, up to where the reply begins."""
        return self.tokenizer.chat([{"role": "user", "content": messages}] if isinstance(messages, str) else messages)

    def score(self, text: str, *, stride: int | None = None) -> Score:
        """The log-likelihood of a text, no token added.

        Args:
            text: what to score.
            stride: for texts longer than the context: slide a window of `context_length` tokens by so many; each token
                is scored once, given the earlier tokens of its window.

        Returns:
            The sum over all tokens but the first, and the perplexity.

        Raises:
            BadInput: fewer than two tokens, a stride out of range, or longer than the context and no stride.
            PentadError: the model's logits are not numbers.
        """
        ids, size = self.tokenizer.encode(text), self.context_length
        self._check_ids(ids)
        if len(ids) < 2:
            raise BadInput(f"the text has {len(ids)} tokens; expected at least 2")
        if stride is not None and not 1 <= stride < size:
            raise BadInput(f"stride is {stride}; expected 1 to {size - 1} tokens")
        if len(ids) > size and stride is None:
            raise BadInput(f"the text has {len(ids)} tokens, the context {size}; --stride N slides a window over it")
        windows, scored = [], 1
        for start in range(0, len(ids), stride or size):
            window = ids[start : start + size]
            windows.append(Evaluation(window, first=scored - start))
            scored = start + len(window)
            if scored == len(ids):
                break
        self._evaluate(*windows)
        total = sum(window.log_likelihood for window in windows)
        loss = -total / (len(ids) - 1)
        if loss > 700:
            raise PentadError(f"the perplexity is e^{loss:.0f}, more than a number can hold: the weights are damaged")
        return Score(self.name, len(ids), total, math.exp(loss))

    def logits(self, ids: Sequence[int] | Tensor) -> Tensor:
        """The logits after each of T tokens.

        Args:
            ids: T token ids, a list or an integer tensor.

        Returns:
            float32 [T, vocab].

        Raises:
            BadInput: no ids, more than the context has room for, or ids outside the vocabulary.
        """
        request = Evaluation(as_ids(ids))
        self._check_length(request.prompt)
        self._evaluate(request)
        return torch.cat(request.logits)

    def is_full(self, completion: Completion) -> bool:
        """Whether a completion and its prompt fill the context."""
        return completion.prompt_tokens + completion.completion_tokens >= self.context_length

    def _check_room(self, ids: Sequence[int]) -> int:
        self._check_ids(ids)
        room = self.context_length - len(ids)
        if room < 1:
            raise BadInput(
                f"the prompt has {len(ids)} tokens and leaves no room in the context of {self.context_length}"
            )
        return room

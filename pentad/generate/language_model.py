"""The runner of decoder-only language models."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from pentad.errors import BadInput, PentadError
from pentad.generate.completion import Completion, Options, Score
from pentad.generate.engine import Evaluation
from pentad.generate.runner import Runner, Stream, as_ids

Message = Mapping[str, Any]


class LanguageModel(Runner):
    """A decoder-only language model that is ready to run; `pentad.load` makes one.

    Several threads may call it. Each call gets the answer that it would get alone.

    Attributes:
        name: the name or path that the model was loaded by.
        network: the torch module.
        tokenizer: converts text to token ids and back. Without a usable one only `logits` works.
        context_length: maximum sequence length, prompt and generated tokens together.
        sampling: default sampling options.
    """

    def chat(self, messages: Sequence[Message] | str, **options: Unpack[Options]) -> Completion:
        """Reply to a conversation. If it continues the last one, only its new tokens are prefilled.

        Args:
            messages: ``[{"role": "user", "content": "…"}, …]``; a string is one user message.
            options: max_tokens, temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty,
                frequency_penalty, stop, seed, logprobs; see `Options`.

        Returns:
            The reply.

        Raises:
            BadInput: the model has no chat template, the template refuses the messages, they leave no room in the
                context, or an option is out of range.
        """
        return self._run([self._begin(self.chat_ids(messages), self.tokenizer.stream(), options)])[0]

    def stream(self, prompt: str | Sequence[Message], *, special: bool = False, **options: Unpack[Options]) -> Stream:
        """Like `complete` (for a string) or `chat` (for messages), but return the text in pieces."""
        if isinstance(prompt, str):
            return self._begin(self.prompt_ids(prompt, special=special), self._detokenizer(), options)
        return self._begin(self.chat_ids(prompt), self.tokenizer.stream(), options)

    def chat_ids(self, messages: Sequence[Message] | str) -> list[int]:
        """The prompt of `chat`: the conversation in the chat template, up to the beginning of the reply."""
        messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        self._check_size(*(message.get("content") for message in messages if isinstance(message, Mapping)))
        return self.tokenizer.chat(messages)

    def score(self, text: str, *, stride: int | None = None) -> Score:
        """Compute the log-likelihood of a text, without BOS or other added tokens.

        Args:
            text: the text.
            stride: for texts longer than the context, slide a window of `context_length` tokens by this many tokens.
                Each token is scored once, given the earlier tokens of its window.

        Returns:
            The sum over all tokens but the first, and the perplexity.

        Raises:
            BadInput: the text has fewer than two tokens, or is longer than the context without a stride, or the stride
                is out of range.
            PentadError: the model's logits are not numbers.
        """
        if stride is None:
            self._check_size(text)
        ids, size = self.tokenizer.encode(text), self.context_length
        self._check_ids(ids)
        if len(ids) < 2:
            raise BadInput(f"the text has {len(ids)} tokens; expected at least 2")
        if stride is not None and not 1 <= stride < size:
            raise BadInput(f"stride is {stride}; expected 1 to {size - 1} tokens")
        if len(ids) > size and stride is None:
            raise BadInput(f"the text has {len(ids)} tokens, the context {size}; --stride N slides a window over it")
        log_likelihood, scored = 0.0, 1
        for start in range(0, len(ids), stride or size):
            window = Evaluation(ids[start : start + size], first=scored - start)
            self._evaluate(window)
            log_likelihood += window.log_likelihood
            scored = start + len(window.prompt)
            if scored == len(ids):
                break
        loss = -log_likelihood / (len(ids) - 1)
        if loss > 700:
            raise PentadError(f"the perplexity is e^{loss:.0f}, more than a number can hold: the weights are damaged")
        return Score(self.name, len(ids), log_likelihood, math.exp(loss))

    def logits(self, ids: Sequence[int] | Tensor) -> Tensor:
        """The logits after each of T tokens.

        Args:
            ids: T token ids, a list or an integer tensor.

        Returns:
            float32 [T, vocab].

        Raises:
            BadInput: ids are absent, longer than the context, or outside the vocabulary.
        """
        request = Evaluation(as_ids(ids))
        self._check_length(request.prompt)
        self._evaluate(request)
        return torch.cat(request.logits)

    def is_full(self, completion: Completion) -> bool:
        """True if a completion and its prompt have filled the context."""
        return completion.prompt_tokens + completion.completion_tokens >= self.context_length

    def _check_room(self, ids: Sequence[int]) -> int:
        self._check_ids(ids)
        if (room := self.context_length - len(ids)) < 1:
            raise BadInput(f"the prompt has {len(ids)} tokens and leaves no room in the context of {self._limit}")
        return room

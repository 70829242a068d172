"""The runner of decoder-only language models."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Unpack, cast, overload

import torch
from torch import Tensor

from pentad.errors import BadInput, PentadError
from pentad.generate.completion import Completion, Options, Score
from pentad.generate.requests import Evaluation
from pentad.generate.runner import Runner, as_ids
from pentad.generate.stream import Stream

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
                frequency_penalty, logit_bias, stop, seed, logprobs, constraint; see `Options`.

        Returns:
            The reply.

        Raises:
            BadInput: the model has no chat template, the template refuses the messages, they leave no room in the
                context, or an option is out of range.
        """
        return self._run([self._begin(self.chat_ids(messages), self.tokenizer.stream(), options)])[0]

    def stream(
        self, prompt: str | Sequence[Message] | Sequence[int], *, special: bool = False, **options: Unpack[Options]
    ) -> Stream:
        """Like `complete` (for a string or token ids) or `chat` (for messages), but return the text in pieces."""
        if isinstance(prompt, str):
            return self._begin(self.prompt_ids(prompt, special=special), self._detokenizer(), options)
        if prompt and isinstance(prompt[0], int):
            return self._begin(list(cast(Sequence[int], prompt)), self._detokenizer(), options)
        return self._begin(self.chat_ids(cast(Sequence[Message], prompt)), self.tokenizer.stream(), options)

    def chat_ids(self, messages: Sequence[Message] | str) -> list[int]:
        """The prompt of `chat`: the conversation in the chat template, up to the beginning of the reply."""
        messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        self._check_size(*(message.get("content") for message in messages if isinstance(message, Mapping)))
        return self.tokenizer.chat(messages)

    @overload
    def score(self, text: str, *, given: str | None = None, stride: int | None = None) -> Score: ...
    @overload
    def score(
        self,
        text: list[str] | tuple[str, ...],
        *,
        given: str | Sequence[str | None] | None = None,
        stride: int | None = None,
    ) -> list[Score]: ...
    def score(
        self,
        text: str | list[str] | tuple[str, ...],
        *,
        given: str | Sequence[str | None] | None = None,
        stride: int | None = None,
    ) -> Score | list[Score]:
        """Compute the log-likelihood of a text, without BOS or other added tokens, or of a continuation of a prompt.

        A prompt and its continuation are encoded as lm-evaluation-harness does: together, and the continuation has the
        tokens after those of the prompt alone; spaces at the prompt's end go to the continuation. Instead of an empty
        prompt stands BOS or, if there is none, the token that ends a text.

        Args:
            text: the text or continuation; or a list of them, which run as one batch.
            given: the prompt of the continuation, or a list of one for each text, where None stands for no prompt.
            stride: for texts longer than the context, slide a window of `context_length` tokens by this many tokens.
                Each token is scored once, given the earlier tokens of its window.

        Returns:
            The sum over all tokens but the first, or over the continuation, and the perplexity. A list gives a list.

        Raises:
            BadInput: there are too few tokens, or more than the context without a stride, or the stride is out of
                range; or there is another number of prompts than of texts.
            PentadError: the model's logits are not numbers.
        """
        texts = [text] if isinstance(text, str) else text
        prompts = [given] * len(texts) if given is None or isinstance(given, str) else given
        if len(prompts) != len(texts):
            raise BadInput(f"given has {len(prompts)} prompts, text {len(texts)} continuations; expected as many")
        if stride is not None and any(prompt is not None for prompt in prompts):
            raise BadInput("stride is for texts without a prompt; leave out stride or given")
        if stride is None:
            pairs = zip(texts, prompts, strict=True)
            requests = [self._text(one) if p is None else self._continuation(one, p) for one, p in pairs]
            self._evaluate(*requests)
            scores = [
                self._score(request, len(request.prompt) - (0 if prompt is None else request.first or 0))
                for request, prompt in zip(requests, prompts, strict=True)
            ]
        else:
            scores = [self._slide(one, stride) for one in texts]
        return scores[0] if isinstance(text, str) else scores

    def score_ids(self, sequences: Sequence[tuple[Sequence[int], int]]) -> list[Score]:
        """Compute the log-likelihoods of the ends of token sequences, which run as one batch.

        Args:
            sequences: token ids, and the index of the first one that is scored, from 1. The last token predicts nothing
                that is scored, so there may be one more than the context has.

        Raises:
            BadInput: there are too few or too many tokens, or they are outside the vocabulary.
        """
        requests = [Evaluation(as_ids(ids), first=first) for ids, first in sequences]
        for request in requests:
            self._check_ids(request.prompt)
            if not 1 <= (request.first or 0) < len(request.prompt):
                raise BadInput(f"of {len(request.prompt)} tokens those from {request.first} on can't be scored")
            self._check_length(request.prompt[:-1])
        self._evaluate(*requests)
        return [self._score(request, len(request.prompt) - (request.first or 0)) for request in requests]

    def _slide(self, text: str, stride: int) -> Score:
        """The score of a text in windows."""
        ids, size = self._scored_ids(text), self.context_length
        if not 1 <= stride < size:
            raise BadInput(f"stride is {stride}; expected 1 to {size - 1} tokens")
        whole, scored = Evaluation(ids, first=1), 1
        for start in range(0, len(ids), stride):
            window = Evaluation(ids[start : start + size], first=scored - start)
            self._evaluate(window)
            whole.log_likelihood += window.log_likelihood
            whole.greedy &= window.greedy
            scored = start + len(window.prompt)
            if scored == len(ids):
                break
        return self._score(whole, len(ids))

    def _scored_ids(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text)
        self._check_ids(ids)
        if len(ids) < 2:
            raise BadInput(f"the text has {len(ids)} tokens; expected at least 2")
        return ids

    def _text(self, text: str) -> Evaluation:
        """The request that scores a whole text."""
        self._check_size(text)
        ids = self._scored_ids(text)
        if len(ids) > self.context_length:
            size = self.context_length
            raise BadInput(f"the text has {len(ids)} tokens, the context {size}; --stride N slides a window over it")
        return Evaluation(ids, first=1)

    def _continuation(self, text: str, given: str) -> Evaluation:
        """The request that scores a continuation."""
        self._check_size(given, text)
        prompt = given.rstrip()
        ids, before = self.tokenizer.encode(given + text), len(self.tokenizer.encode(prompt)) if prompt else 0
        if not before:
            start = self.tokenizer.bos_id if self.tokenizer.bos_id is not None else self.tokenizer.eos_ids[0]
            ids, before = [start, *ids], 1
        self._check_ids(ids)
        if len(ids) <= before:
            raise BadInput("the continuation has no tokens")
        if len(ids) > self.context_length:
            raise BadInput(f"prompt and continuation have {len(ids)} tokens, the context {self.context_length}")
        return Evaluation(ids, first=before)

    def _score(self, request: Evaluation, tokens: int) -> Score:
        """The result of an evaluation."""
        loss = -request.log_likelihood / (len(request.prompt) - (request.first or 0))
        if loss > 700:
            raise PentadError(f"the perplexity is e^{loss:.0f}, more than a number can hold: the weights are damaged")
        return Score(self.name, tokens, request.log_likelihood, math.exp(loss), request.greedy)

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

"""The runner of encoder-decoders: complete, stream, logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from pentad.errors import BadInput
from pentad.generate.completion import Completion, Options
from pentad.generate.encoder_decoder_step import EncoderDecoderEngine, EncoderDecoderStep
from pentad.generate.engine import Evaluation
from pentad.generate.runner import Runner, Stream, as_ids
from pentad.nn.encoder_decoder import EncoderDecoder
from pentad.text import Detokenizer, Tokenizer


class EncoderDecoderModel(Runner):
    """A model that reads one text and writes another: `complete` gives that, not a continuation.

    T5's kind fills spans: ``complete("A <extra_id_0> walks.", special=True)`` gives them, each behind its sentinel.

    Attributes:
        context_length: the longest source, and the longest text written: the training length unless `context` asks for
            another, as positions are relative.
    """

    network: EncoderDecoder

    def __init__(
        self,
        name: str,
        step: EncoderDecoderStep,
        tokenizer: Tokenizer | BadInput | None,
        *,
        context: int | None = None,
        generation: Mapping[str, Any] | None = None,
        load_seconds: float = 0.0,
    ) -> None:
        if context is not None and context < 2:
            raise BadInput(f"context is {context}; {name} takes at least 2 tokens")
        super().__init__(
            name,
            EncoderDecoderEngine(step),
            tokenizer,
            context_length=context or step.network.config.max_position_embeddings,
            generation=generation,
            load_seconds=load_seconds,
        )

    def stream(self, prompt: str, *, special: bool = False, **options: Unpack[Options]) -> Stream:
        """`complete`, piece by piece; arguments and errors are the same."""
        return self._begin(self.prompt_ids(prompt, special=special), self._detokenizer(), options)

    def prompt_ids(self, text: str, *, special: bool = False) -> list[int]:
        """The tokens that the encoder reads: the text and the token that ends it, as in training."""
        ids = super().prompt_ids(text, special=special)
        end = self.tokenizer.eos_ids[:1]
        return ids if not ids or tuple(ids[-1:]) == end else [*ids, *end]

    def logits(self, ids: Sequence[int] | Tensor, decoder_ids: Sequence[int] | Tensor) -> Tensor:
        """The logits after each of the decoder's T tokens.

        Args:
            ids: the source's tokens, with the one that ends it.
            decoder_ids: the decoder's T tokens, with the one that it begins with (``network.start_id``).

        Returns:
            float32 [T, vocab].

        Raises:
            BadInput: no ids, more than the context has room for, or ids outside the vocabulary.
        """
        request = Evaluation(as_ids(decoder_ids), source=as_ids(ids))
        for tokens in (as_ids(ids), request.prompt):
            self._check_length(tokens)
        self._evaluate(request)
        return torch.cat(request.logits)

    def is_full(self, completion: Completion) -> bool:
        """Whether a completion fills the decoder's context."""
        return completion.completion_tokens >= self.context_length - 1

    def _check_room(self, ids: Sequence[int]) -> int:
        self._check_ids(ids)
        if len(ids) > self.context_length:
            raise BadInput(f"the prompt has {len(ids)} tokens, more than the context of {self.context_length}")
        return self.context_length - 1  # the decoder's own, which begins with a token

    def _inputs(self, ids: list[int]) -> tuple[list[int], list[int] | None]:
        return [self.network.start_id], ids

    def _detokenizer(self) -> Detokenizer:
        return self.tokenizer.stream(special=True)  # sentinels tell the spans of the new text apart

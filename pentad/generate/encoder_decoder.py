"""The runner of encoder-decoders: complete, stream, logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from pentad.errors import BadInput
from pentad.generate.completion import Completion, Options, Score
from pentad.generate.encoder_decoder_step import EncoderDecoderEngine, EncoderDecoderStep
from pentad.generate.language_model import LanguageModel, Message, Stream
from pentad.nn.batch import SequenceLayout, pack
from pentad.nn.encoder_decoder import EncoderDecoder
from pentad.text import Detokenizer, Tokenizer


class EncoderDecoderModel(LanguageModel):
    """A language model that reads a text and writes another: `complete` gives that, not a continuation.

    T5's kind fills spans: ``complete("A <extra_id_0> walks.", special=True)`` gives them, each behind its sentinel.

    Attributes:
        context_length: the longest source, and the longest text written; what it was trained with, unless `context`
            asks for another, as its positions are relative.
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
        super().__init__(name, step, tokenizer, generation=generation, load_seconds=load_seconds)
        if context is not None and context < 2:
            raise BadInput(f"context is {context}; {name} takes at least 2 tokens")
        self.context_length = context or self.context_length
        self._engine = EncoderDecoderEngine(step)

    def prompt_ids(self, text: str, *, special: bool = False) -> list[int]:
        """What the encoder is given: the text and, as when it was trained, the token that ends one."""
        ids = super().prompt_ids(text, special=special)
        end = self.tokenizer.eos_ids[:1]
        return ids if not ids or tuple(ids[-1:]) == end else [*ids, *end]

    def chat_ids(self, messages: Sequence[Message] | str) -> NoReturn:
        """Refuses.

        Raises:
            BadInput: always.
        """
        raise BadInput(f"{self.name} is an encoder-decoder, which doesn't chat: give complete a text instead")

    def score(self, text: str, *, stride: int | None = None) -> Score:
        """Refuses: a text is likely or not given another, whose logits `logits` gives.

        Raises:
            BadInput: always.
        """
        raise BadInput(
            f"{self.name} is an encoder-decoder, which scores no text by itself: see logits(ids, decoder_ids) in Python"
        )

    @torch.inference_mode()
    def logits(self, ids: Sequence[int] | Tensor, decoder_ids: Sequence[int] | Tensor | None = None) -> Tensor:
        """The logits after each of the decoder's T tokens: float32 [T, vocab].

        Args:
            ids: the source's tokens, with the one that ends it.
            decoder_ids: the decoder's, with the one that it begins with (``network.start_id``).

        Raises:
            BadInput: no ids, more than the context has room for, or ids outside the vocabulary.
        """
        if decoder_ids is None:
            raise BadInput(f"{self.name} is an encoder-decoder: logits takes ids and decoder_ids")
        read, written = (x.tolist() if isinstance(x, Tensor) else list(x) for x in (ids, decoder_ids))
        for tokens in (read, written):
            self._check_ids(tokens)
            if len(tokens) > self.context_length:
                raise BadInput(f"{len(tokens)} tokens don't fit the context of {self.context_length}")
        device = self.network.device
        hidden_MD, _ = self.network.encode(*pack(read, device=device))
        ids_T, batch = pack(written, device=device)
        hidden_TD = self.network(ids_T, replace(batch, context=SequenceLayout.of([len(read)])), hidden_MD)
        logits: Tensor = self.network.head(hidden_TD)
        return logits.float()

    def is_full(self, completion: Completion) -> bool:
        return completion.completion_tokens >= self.context_length - 1

    def _check_room(self, ids: Sequence[int]) -> int:
        self._check_ids(ids)
        if len(ids) > self.context_length:
            raise BadInput(f"the prompt has {len(ids)} tokens, more than the context of {self.context_length}")
        return self.context_length - 1  # the decoder's own, which begins with a token

    def _inputs(self, ids: list[int]) -> tuple[list[int], list[int] | None]:
        return [self.network.start_id], ids

    def _begin(self, ids: list[int], detokenizer: Detokenizer, options: Options) -> Stream:
        # What it writes opens a text of its own, in which sentinels tell the spans apart.
        return super()._begin(ids, self.tokenizer.stream(special=True), options)

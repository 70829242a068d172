"""The runner of encoder-decoders."""

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from pentad.errors import BadInput
from pentad.generate.completion import Completion, Options
from pentad.generate.requests import Evaluation
from pentad.generate.runner import Runner, as_ids
from pentad.generate.stream import Stream
from pentad.nn.encoder_decoder import EncoderDecoder
from pentad.text import Detokenizer
from pentad.weights.config import MAX_SIZE


class EncoderDecoderModel(Runner):
    """A model that reads a source and generates a new text; `complete` returns the new text, not a continuation.

    A model like T5 fills spans: ``complete("A <extra_id_0> walks.", special=True)`` returns them, each after its
    sentinel. The context limits the source and the new text separately.
    """

    network: EncoderDecoder

    def stream(self, prompt: str, *, special: bool = False, **options: Unpack[Options]) -> Stream:
        """Like `complete`, but return the text in pieces."""
        return self._begin(self.prompt_ids(prompt, special=special), self._detokenizer(), options)

    def prompt_ids(self, text: str, *, special: bool = False) -> list[int]:
        """The source for the encoder: the text's tokens and an end token, as in training."""
        tokenizer = self.tokenizer
        ids, end = tokenizer.encode(text, bos=tokenizer.adds_bos, special=special), tokenizer.eos_ids[:1]
        return ids if not ids or tuple(ids[-1:]) == end else [*ids, *end]

    def logits(self, ids: Sequence[int] | Tensor, decoder_ids: Sequence[int] | Tensor) -> Tensor:
        """The logits after each of the decoder's T tokens.

        Args:
            ids: the source's tokens, including its end token.
            decoder_ids: the decoder's T tokens, including its start token (``network.start_id``).

        Returns:
            float32 [T, vocab].

        Raises:
            BadInput: ids are absent, longer than the context, or outside the vocabulary.
        """
        request = Evaluation(as_ids(decoder_ids), source=as_ids(ids))
        for tokens in (as_ids(ids), request.prompt):
            self._check_length(tokens)
        self._evaluate(request)
        return torch.cat(request.logits)

    def is_full(self, completion: Completion) -> bool:
        """True if a completion has filled the decoder's context."""
        return completion.completion_tokens >= self.context_length - 1

    def _check_room(self, ids: Sequence[int]) -> int:
        self._check_ids(ids)
        if len(ids) > self.context_length:
            raise BadInput(f"the prompt has {len(ids)} tokens, more than the context of {self.context_length}")
        return self.context_length - 1  # the decoder begins with one token

    def _context_lengths(self) -> range:
        return range(2, MAX_SIZE)  # positions are relative

    def _inputs(self, ids: list[int]) -> tuple[list[int], list[int] | None]:
        return [self.network.start_id], ids

    def _detokenizer(self) -> Detokenizer:
        return self.tokenizer.stream(special=True)  # sentinels separate the spans

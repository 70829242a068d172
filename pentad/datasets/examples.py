"""Rows -> examples: the token ids of one or two sequences, and which of them are targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from pentad.datasets.rows import Row
from pentad.errors import BadInput
from pentad.text.targets import Encoded, encode_completion, encode_conversation, encode_document
from pentad.text.tokenizer import Tokenizer

DOCUMENTS, REPLIES, PAIRS, UNPAIRED = "documents", "replies", "pairs", "unpaired"
"""What an objective learns from: every token; the replies; chosen and rejected replies, where the chosen one's score is
the row's margin; or desirable replies (score 1) and others (score 0)."""


@dataclass(frozen=True)
class Encoder:
    """Encodes rows.

    Attributes:
        tokenizer: the model's.
        learns: `DOCUMENTS`, `REPLIES`, `PAIRS` or `UNPAIRED`.
        sequence_length: the most tokens of a sequence.
        truncate: cut longer sequences, which are otherwise refused.
    """

    tokenizer: Tokenizer
    learns: str
    sequence_length: int
    truncate: bool = False

    def examples(self, row: Row) -> Iterator[list[Encoded]]:
        """The examples of a row: usually one; a document longer than a sequence gives several.

        Raises:
            BadInput: the row doesn't fit the objective, is too long, has no target, or the template refuses it.
        """
        try:
            if self.learns == PAIRS:
                yield [self._cut(encoded) for encoded in self._pair(row)]
            elif self.learns == UNPAIRED:
                yield from ([self._cut(encoded)] for encoded in self._labelled(row))
            elif row.kind == "text" and self.learns == DOCUMENTS:
                yield from ([part] for part in self._parts(encode_document(self.tokenizer, row.fields["text"])))
            elif row.kind in ("messages", "completion"):
                encoded = self._replies(row)
                if self.learns == DOCUMENTS:
                    yield from ([part] for part in self._parts(Encoded(encoded.ids, [True] * len(encoded.ids), 1)))
                else:
                    yield [self._cut(encoded)]
            else:
                expected = "text" if self.learns == DOCUMENTS else "messages, or prompt and completion"
                raise BadInput(f"the row has {', '.join(row.fields)}; this objective expects {expected}")
        except BadInput as error:
            raise BadInput(f"{row.where}: {error}") from error

    def _replies(self, row: Row) -> Encoded:
        if row.kind == "messages":
            return self._reply([], row.fields["messages"], row.fields)
        return self._reply(row.fields["prompt"], row.fields["completion"], row.fields)

    def _pair(self, row: Row) -> list[Encoded]:
        if row.kind != "preference":
            raise BadInput(f"the row has {', '.join(row.fields)}; this objective expects prompt, chosen and rejected")
        chosen, rejected = row.fields["chosen"], row.fields["rejected"]
        if "prompt" in row.fields:
            prompt = row.fields["prompt"]
        else:  # both are whole conversations: the prompt is what they share
            shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))))
            prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if chosen == rejected or not chosen or not rejected:
            raise BadInput("chosen and rejected are equal, or one contains the other; there is nothing to learn")
        replies = [self._reply(prompt, reply, row.fields) for reply in (chosen, rejected)]
        return [replies[0]._replace(score=float(row.fields.get("margin", 0.0))), replies[1]]

    def _labelled(self, row: Row) -> list[Encoded]:
        if row.kind == "preference":
            chosen, rejected = self._pair(row)
            return [chosen._replace(score=1.0), rejected]
        if row.kind != "unpaired":
            raise BadInput(
                f"the row has {', '.join(row.fields)}; this objective expects prompt, completion and label (true or"
                " false), or prompt, chosen and rejected"
            )
        return [self._replies(row)._replace(score=float(row.fields["label"]))]

    def _reply(self, prompt: Any, reply: Any, fields: Mapping[str, Any]) -> Encoded:
        if isinstance(prompt, str):
            return encode_completion(self.tokenizer, prompt, reply)
        return encode_conversation(self.tokenizer, [*prompt, *reply], tools=fields.get("tools"), first=len(prompt))

    def _cut(self, encoded: Encoded) -> Encoded:
        length = self.sequence_length
        if len(encoded.ids) > length and not self.truncate:
            raise BadInput(
                f"{len(encoded.ids)} tokens are more than sequence_length, {length}; raise it, or cut with --truncate"
            )
        ids, targets = encoded.ids[:length], encoded.targets[:length]
        if not any(targets[1:]):
            cut = " within sequence_length" if any(encoded.targets[1:]) else ""
            raise BadInput(f"no token of a reply is a target{cut}, so there is nothing to learn")
        return Encoded(ids, targets, encoded.ends if len(encoded.ids) <= length else 0, encoded.score)

    def _parts(self, encoded: Encoded) -> Iterator[Encoded]:
        """The parts of a document, of equal length as far as possible; no token is lost."""
        count = -(-len(encoded.ids) // self.sequence_length)
        size = -(-len(encoded.ids) // count)
        if len(encoded.ids) < 2:
            raise BadInput("the text has fewer than 2 tokens, so there is nothing to learn")
        for start in range(0, len(encoded.ids), size):
            part: Sequence[int] = encoded.ids[start : start + size]
            if len(part) > 1:
                yield Encoded(list(part), [True] * len(part), encoded.ends if start + size >= len(encoded.ids) else 0)

"""One interface to the libraries that encode text: `tokenizers` and `sentencepiece`."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from pentad.errors import BadInput
from pentad.text.byte_level import BYTE_OF, CHARACTER_OF
from pentad.text.control import ControlStrings, is_control
from pentad.text.files import one_line
from pentad.text.sentencepiece_proto import BYTE_PIECE, SPACE, without_prefix

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer

__all__ = ["Backend", "SentencePieceBackend", "TokenizersBackend"]

_MAX_GROWTH = 100
_LONG_TEXT = 10_000  # characters, which take some milliseconds
_NESTED_REPETITION = re.compile(r"\((?:[^()\\]|\\.)*[^\\][+*](?:[^()\\]|\\.)*\)[+*{]")


class Backend(Protocol):
    """A vocabulary and its encoder.

    Attributes:
        vocab_size: the number of ids.
        control: the control strings.
    """

    vocab_size: int
    control: ControlStrings

    def encode(self, text: str, *, special: bool) -> list[int]:
        """The ids of `text`; control strings become their ids only if `special`."""

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """The ids of one text, given as runs of plain text and the ids of control strings."""

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token in the middle of a text."""

    def first_bytes(self, token: int) -> bytes:
        """The bytes of a token that opens a text."""


class TokenizersBackend:
    """A pipeline of the `tokenizers` library, as a tokenizer.json describes it.

    Attributes:
        pipeline: the library's object; read only.
        byte_level: True if each character of a token stands for one byte. Otherwise tokens are text, and a token such
            as `<0x0A>` stands for a byte.
    """

    def __init__(self, pipeline: Tokenizer, vocab_size: int | None = None) -> None:
        """Take over a pipeline.

        Args:
            pipeline: the library's object; its settings are changed.
            vocab_size: the largest id plus one. If it is None, it is computed, which takes a while.

        Raises:
            BadInput: the decoder of the pipeline is of an unsupported type, or encoding might never end.
        """
        _check_cost(pipeline)
        pipeline.no_truncation()
        pipeline.no_padding()
        self.pipeline = pipeline
        # `encode_special_tokens` is set on the pipeline, not passed to a call.
        self._lock = threading.Lock()
        added = pipeline.get_added_tokens_decoder()
        self._added = {i: token.content for i, token in added.items()}
        control = {i: t for i, t in added.items() if t.special or is_control(t.content)}
        pipeline.add_special_tokens([token for token in control.values() if not token.special])
        self.vocab_size = vocab_size or max(pipeline.get_vocab().values(), default=-1) + 1
        self.control = ControlStrings(
            {token.content: i for i, token in control.items()},
            {token.content: (token.lstrip, token.rstrip) for token in control.values()},
        )
        self._unknown = _unknown_of(pipeline)
        self._control_ids = frozenset(control) - {self._unknown}
        steps = _steps(pipeline.decoder, "decoders")
        types = {step["type"] for step in steps}
        self._word_end: str = getattr(pipeline.model, "end_of_word_suffix", None) or ""  # CLIP
        self.byte_level = "ByteLevel" in types
        self._separates = not types  # without a decoder, the library puts spaces between tokens
        if types and not types & {"ByteLevel", "ByteFallback", "Metaspace"}:
            named = ", ".join(sorted(types))
            raise BadInput(f"tokenizer.json: its decoder is {named}; expected ByteLevel, ByteFallback or Metaspace")
        self._strips_first = any(
            (step["type"] == "Strip" and step.get("start", 0) > 0)
            or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
            for step in steps
        )
        self._prefixes_first_only = any(
            step["type"] == "Metaspace" and step.get("prepend_scheme") == "first"
            for step in _steps(pipeline.pre_tokenizer, "pretokenizers")
        )

    def encode(self, text: str, *, special: bool) -> list[int]:
        """See `Backend`."""
        with self._lock:
            self.pipeline.encode_special_tokens = not special
            if len(text) < _LONG_TEXT:
                ids: list[int] = self.pipeline.encode(text, add_special_tokens=False).ids
            else:  # releases the GIL, but may start threads, about which tokenizers complains in a forked child
                ids = self.pipeline.encode_batch_fast([text], add_special_tokens=False)[0].ids
        if special or self._control_ids.isdisjoint(ids):
            return ids
        # A control token may also be a word of the model (with ignore_merges, or by its merges).
        spelled = (self._spelled(i) if i in self._control_ids else [i] for i in ids)
        return [i for run in spelled for i in run]

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """See `Backend`."""
        ids: list[int] = []
        for number, part in enumerate(parts):
            if isinstance(part, int):
                ids.append(part)
            elif number and self._prefixes_first_only:
                opening = self.encode("\n", special=False)  # the prefix goes to this newline instead of the part
                ids += self.encode("\n" + part, special=False)[len(opening) :]
            else:
                ids += self.encode(part, special=False)
        return ids

    def token_bytes(self, token: int) -> bytes:
        """See `Backend`."""
        if self._separates and (piece := self.pipeline.id_to_token(token)) is not None:
            return b" " + piece.encode()
        if token in self._added:
            return self._added[token].encode()
        piece = self.pipeline.id_to_token(token)
        if piece is None:
            return b""
        if not self.byte_level:
            return _piece_bytes(piece)
        if self._word_end and piece.endswith(self._word_end):
            piece = piece.removesuffix(self._word_end) + CHARACTER_OF[ord(" ")]
        try:
            return bytes(map(BYTE_OF.__getitem__, piece))
        except KeyError:
            return piece.encode()

    def first_bytes(self, token: int) -> bytes:
        """See `Backend`."""
        data = self.token_bytes(token)
        if self._separates:
            return data[1:]
        return data[1:] if self._strips_first and token not in self._added and data[:1] == b" " else data

    def _spelled(self, token: int) -> list[int]:
        if self._unknown is not None:  # the vocabulary has no tokens for bytes
            characters = (self.pipeline.token_to_id(character) for character in self._added[token])
            return [self._unknown if i is None else i for i in characters]
        piece_of = CHARACTER_OF.__getitem__ if self.byte_level else "<0x{:02X}>".format
        ids = (self.pipeline.token_to_id(piece_of(byte)) for byte in self._added[token].encode())
        return [i for i in ids if i is not None and i not in self._control_ids]


class SentencePieceBackend:
    """A SentencePiece model, with the library's ids.

    Attributes:
        model: the serialized ModelProto.
        special_tokens: role (`bos_token`, `eos_token`, `unk_token`, `pad_token`) -> the model's piece.
    """

    def __init__(self, model: bytes, *, prefix_after_control: bool = True) -> None:
        """Open a model.

        Args:
            model: a serialized ModelProto.
            prefix_after_control: put a space in front of text that follows a control token, as llama.cpp, the
                converted tokenizer.json and the models' training code do; `"legacy": false` in a file turns it off.

        Raises:
            BadInput: sentencepiece refuses the model.
        """
        self.model = model
        self._prefix_after_control = prefix_after_control
        self._processor = _sentencepiece(model)
        self.vocab_size: int = self._processor.vocab_size()
        processor = self._processor
        try:
            self._pieces: list[str] = processor.id_to_piece(list(range(self.vocab_size)))
        except UnicodeDecodeError as error:
            raise BadInput(f"the SentencePiece vocabulary is invalid: {error.object[:20]!r} is not UTF-8") from None
        control = (i for i in range(self.vocab_size) if processor.is_control(i) or processor.is_unknown(i))
        self.control = ControlStrings({self._pieces[i]: i for i in control})
        roles = {"bos": processor.bos_id(), "eos": processor.eos_id()}
        roles |= {"unk": processor.unk_id(), "pad": processor.pad_id()}
        self.special_tokens = {f"{role}_token": self._pieces[i] for role, i in roles.items() if i >= 0}

    @cached_property
    def _bare(self) -> SentencePieceProcessor:
        """The model without the leading space."""
        return _sentencepiece(without_prefix(self.model))

    @cached_property
    def prefixes(self) -> bool:
        """True if the model puts a space in front of a text."""
        return bool(self._processor.encode("a") != self._bare.encode("a"))

    def encode(self, text: str, *, special: bool) -> list[int]:
        """See `Backend`."""
        return self.encode_parts(self.control.split(text) if special else [text])

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """See `Backend`."""
        ids: list[int] = []
        for number, part in enumerate(parts):
            if isinstance(part, int):
                ids.append(part)
            else:
                prefixed = self._prefix_after_control or number == 0
                ids += (self._processor if prefixed else self._bare).encode(part)
        return ids

    def token_bytes(self, token: int) -> bytes:
        """See `Backend`."""
        return _piece_bytes(self._pieces[token])

    def first_bytes(self, token: int) -> bytes:
        """See `Backend`."""
        piece = self._pieces[token]
        return _piece_bytes(piece.removeprefix(SPACE) if self.prefixes else piece)


def _sentencepiece(model: bytes) -> SentencePieceProcessor:
    from sentencepiece import SentencePieceProcessor

    if not model:
        raise BadInput("the SentencePiece vocabulary is empty")
    try:
        return SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise BadInput(f"the SentencePiece vocabulary is invalid: {one_line(error)}") from None


def _piece_bytes(piece: str) -> bytes:
    byte = BYTE_PIECE.fullmatch(piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace(SPACE, " ").encode()


def _unknown_of(pipeline: Tokenizer) -> int | None:
    """The id for unknown characters in a Unigram vocabulary without byte tokens.

    tokenizer.json marks this token as a control token, but any text may be encoded to it.
    """
    from tokenizers import models

    if not isinstance(pipeline.model, models.Unigram):
        return None
    ids = [token.id for token in pipeline.model.tokenize("\U0010ffff")]
    return ids[0] if len(ids) == 1 else None


def _check_cost(pipeline: Tokenizer) -> None:
    """Raise BadInput if a normalizer lets texts grow without bounds, or a regex may backtrack without end."""
    normalizers = _steps(pipeline.normalizer, "normalizers")
    growth = 1.0
    for step in (step for step in normalizers if step["type"] == "Replace"):
        growth *= max(1.0, len(step["content"]) / max(1, len(step["pattern"].get("String", ""))))
    if growth > _MAX_GROWTH:
        raise BadInput(f"its normalizer makes texts {growth:.3g} times longer; expected at most {_MAX_GROWTH}")
    for step in (*normalizers, *_steps(pipeline.pre_tokenizer, "pretokenizers")):
        pattern = step.get("pattern")
        if isinstance(pattern, dict) and _NESTED_REPETITION.search(pattern.get("Regex", "")):
            raise BadInput(f"its regex {pattern['Regex'][:100]!r} repeats a repetition, and may take forever")


def _steps(part: Any, key: str) -> list[dict[str, Any]]:
    """The steps of a decoder, normalizer or pre-tokenizer in tokenizer.json's form, which is also its pickled state."""
    if part is None:
        return []
    return _flat(json.loads(part.__getstate__()), key)


def _flat(state: dict[str, Any], key: str) -> list[dict[str, Any]]:
    return [step for part in state[key] for step in _flat(part, key)] if state["type"] == "Sequence" else [state]

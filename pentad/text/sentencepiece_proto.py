"""SentencePiece's ModelProto on the wire: the few fields that make up a BPE vocabulary.

Format: https://protobuf.dev/programming-guides/encoding; fields: sentencepiece_model.proto.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import NamedTuple

__all__ = [
    "BYTE_PIECE",
    "SPACE",
    "Kind",
    "Piece",
    "append_pieces",
    "is_bpe",
    "read_pieces",
    "without_prefix",
    "write_model",
]

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space
BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")  # and a byte of a character that is no piece

# Of ModelProto, of its SentencePiece, its TrainerSpec and its NormalizerSpec
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE, _BYTE_FALLBACK = 3, 35
_NAME, _ADD_DUMMY_PREFIX, _REMOVE_EXTRA_SPACES, _ESCAPE_SPACES = 1, 3, 4, 5
_UNIGRAM, _BPE = 1, 2


class Kind(IntEnum):
    """What a piece is. GGUF's `tokenizer.ggml.token_type` has the same numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Piece(NamedTuple):
    """One token; `text` has `SPACE` for spaces, and `<0x0A>` for a byte. Higher scores merge first."""

    text: str
    score: float
    kind: int


def write_model(pieces: Iterable[Piece], *, prefix: bool) -> bytes:
    """A serialized ModelProto: BPE by score, no normalization. `prefix`: texts begin with a space."""
    pieces = list(pieces)
    model = b"".join(_field(_PIECES, _piece(piece)) for piece in pieces)
    byte_fallback = any(piece.kind == Kind.BYTE for piece in pieces)
    trainer = _field(_MODEL_TYPE, _BPE) + _field(_BYTE_FALLBACK, int(byte_fallback))
    normalizer = (
        _field(_NAME, b"identity")
        + _field(_ADD_DUMMY_PREFIX, int(prefix))
        + _field(_REMOVE_EXTRA_SPACES, 0)
        + _field(_ESCAPE_SPACES, 1)
    )
    return model + _field(_TRAINER, trainer) + _field(_NORMALIZER, normalizer)


def append_pieces(model: bytes, pieces: Iterable[Piece]) -> bytes:
    """`model` with `pieces` following its own: concatenated messages merge."""
    return model + b"".join(_field(_PIECES, _piece(piece)) for piece in pieces)


def without_prefix(model: bytes) -> bytes:
    """`model`, but it puts no space in front of a text: of a scalar given twice, the last one counts."""
    return model + _field(_NORMALIZER, _field(_ADD_DUMMY_PREFIX, 0))


def read_pieces(model: bytes) -> list[Piece]:
    """The pieces of a serialized ModelProto that sentencepiece has accepted, in order of their ids."""
    return [_read_piece(value) for number, value in _fields(model) if number == _PIECES and isinstance(value, bytes)]


def is_bpe(model: bytes) -> bool:
    """Whether the model merges by score; the other kinds of sentencepiece don't."""
    kind: int | bytes = _UNIGRAM
    for number, value in _fields(model):
        if number == _TRAINER and isinstance(value, bytes):
            kind = dict(_fields(value)).get(_MODEL_TYPE, kind)
    return kind == _BPE


def _piece(piece: Piece) -> bytes:
    score = bytes([_SCORE << 3 | 5]) + struct.pack("<f", piece.score)
    return _field(_PIECE, piece.text.encode()) + score + _field(_TYPE, piece.kind)


def _read_piece(data: bytes) -> Piece:
    text, score, kind = b"", 0.0, int(Kind.NORMAL)
    for number, value in _fields(data):
        if number == _TYPE and isinstance(value, int):
            kind = value
        elif number == _PIECE and isinstance(value, bytes):
            text = value
        elif number == _SCORE and isinstance(value, bytes):
            (score,) = struct.unpack("<f", value)
    return Piece(text.decode(), score, kind)


def _field(number: int, value: bytes | int) -> bytes:
    """A protobuf field: bytes are length-delimited, an int is a varint."""
    if isinstance(value, int):
        return bytes([*_varint(number << 3), *_varint(value)])
    return bytes([*_varint(number << 3 | 2), *_varint(len(value))]) + value


def _varint(value: int) -> Iterator[int]:
    while value > 0x7F:
        yield value & 0x7F | 0x80
        value >>= 7
    yield value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field: an int for a varint, bytes for every other kind."""
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        size = {1: 8, 5: 4}.get(tag & 7)
        if tag & 7 == 0:
            number, at = _read_varint(data, at)
            yield tag >> 3, number
            continue
        if size is None:
            size, at = _read_varint(data, at)
        yield tag >> 3, data[at : at + size]
        at += size


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at

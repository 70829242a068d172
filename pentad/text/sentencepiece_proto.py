"""Read and write SentencePiece's ModelProto: the few fields that make up a BPE vocabulary.

Format: https://protobuf.dev/programming-guides/encoding; fields: sentencepiece_model.proto.
"""

import re
import struct
from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import NamedTuple

from pentad.errors import BadInput
from pentad.text.control import is_control

__all__ = [
    *("BYTE_PIECE", "SPACE", "Piece", "PieceType"),
    *("added_type", "append_pieces", "read_pieces", "without_prefix", "write_model"),
]

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # stands for a space in a piece
BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")  # stands for one byte of a character that has no piece

# Field numbers of ModelProto, SentencePiece, TrainerSpec, NormalizerSpec; values of TrainerSpec.model_type
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE, _BYTE_FALLBACK = 3, 35
_NAME, _ADD_DUMMY_PREFIX, _REMOVE_EXTRA_SPACES, _ESCAPE_SPACES = 1, 3, 4, 5
_UNIGRAM, _BPE = 1, 2


class PieceType(IntEnum):
    """The type of a piece. GGUF's `tokenizer.ggml.token_type` has the same numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Piece(NamedTuple):
    """A token. `text` has `SPACE` for spaces, and `<0x0A>` for a byte; pieces of higher `score` merge first."""

    text: str
    score: float
    type: int


def added_type(token: str, special: bool = False) -> PieceType:
    """The type of an added token, `special` if its file says so."""
    return PieceType.CONTROL if special or is_control(token) else PieceType.USER_DEFINED


def write_model(pieces: Iterable[Piece], *, prefix: bool) -> bytes:
    """Serialize a BPE by score without normalization; `prefix` makes it put a space in front of a text."""
    pieces = list(pieces)
    model = b"".join(_field(_PIECES, _piece(piece)) for piece in pieces)
    byte_fallback = any(piece.type == PieceType.BYTE for piece in pieces)
    trainer = _field(_MODEL_TYPE, _BPE) + _field(_BYTE_FALLBACK, int(byte_fallback))
    normalizer = (
        _field(_NAME, b"identity")
        + _field(_ADD_DUMMY_PREFIX, int(prefix))
        + _field(_REMOVE_EXTRA_SPACES, 0)
        + _field(_ESCAPE_SPACES, 1)
    )
    return model + _field(_TRAINER, trainer) + _field(_NORMALIZER, normalizer)


def append_pieces(model: bytes, pieces: Iterable[Piece]) -> bytes:
    """Append `pieces` to a serialized model; concatenated protobuf messages merge."""
    return model + b"".join(_field(_PIECES, _piece(piece)) for piece in pieces)


def without_prefix(model: bytes) -> bytes:
    """Make a serialized model put no space in front of a text; the last value of a scalar field counts."""
    return model + _field(_NORMALIZER, _field(_ADD_DUMMY_PREFIX, 0))


def read_pieces(model: bytes) -> list[Piece]:
    """The pieces by id of a serialized BPE that sentencepiece has accepted. Raises `BadInput` for other models."""
    if not _is_bpe(model):
        raise BadInput("its SentencePiece vocabulary is not a BPE; expected BPE")
    return [_read_piece(value) for number, value in _fields(model) if number == _PIECES and isinstance(value, bytes)]


def _is_bpe(model: bytes) -> bool:
    model_type: int | bytes = _UNIGRAM
    for number, value in _fields(model):
        if number == _TRAINER and isinstance(value, bytes):
            model_type = dict(_fields(value)).get(_MODEL_TYPE, model_type)
    return model_type == _BPE


def _piece(piece: Piece) -> bytes:
    score = bytes([_SCORE << 3 | 5]) + struct.pack("<f", piece.score)
    return _field(_PIECE, piece.text.encode()) + score + _field(_TYPE, piece.type)


def _read_piece(data: bytes) -> Piece:
    text, score, piece_type = b"", 0.0, int(PieceType.NORMAL)
    for number, value in _fields(data):
        if number == _TYPE and isinstance(value, int):
            piece_type = value
        elif number == _PIECE and isinstance(value, bytes):
            text = value
        elif number == _SCORE and isinstance(value, bytes):
            (score,) = struct.unpack("<f", value)
    return Piece(text.decode(), score, piece_type)


def _field(number: int, value: bytes | int) -> bytes:
    """Serialize a field: bytes are length-delimited, an int is a varint."""
    if isinstance(value, int):
        return bytes([*_varint(number << 3), *_varint(value)])
    return bytes([*_varint(number << 3 | 2), *_varint(len(value))]) + value


def _varint(value: int) -> Iterator[int]:
    while value > 0x7F:
        yield value & 0x7F | 0x80
        value >>= 7
    yield value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the number and value of each field: an int for a varint, bytes for every other wire type."""
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

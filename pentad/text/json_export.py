"""Write a tokenizer as tokenizer.json and tokenizer_config.json, as transformers reads them."""

from __future__ import annotations

import json
from typing import Any

from pentad.errors import BadInput
from pentad.text import byte_level
from pentad.text.backends import SentencePieceBackend, TokenizersBackend
from pentad.text.folder_vocab import ROLES
from pentad.text.sentencepiece_proto import SPACE, Piece, PieceType, is_bpe, read_pieces
from pentad.text.tokenizer import Tokenizer

__all__ = ["tokenizer_config", "tokenizer_json"]


def tokenizer_json(tokenizer: Tokenizer) -> bytes:
    """Write a tokenizer.json that gives the ids of `tokenizer`.

    A SentencePiece vocabulary becomes the pipeline of Llama's published tokenizer.json. It differs in one way: text
    that follows a user-defined token also gets a space in front.

    Raises:
        BadInput: a SentencePiece vocabulary is not a BPE.
    """
    backend = tokenizer.backend
    if isinstance(backend, SentencePieceBackend):
        state = _sentencepiece_pipeline(backend)
    else:
        assert isinstance(backend, TokenizersBackend)
        state = json.loads(backend.pipeline.to_str())
    bos = next((token for token, i in tokenizer.control.items() if i == tokenizer.bos_id), None)
    state["post_processor"] = _begins_with(bos, tokenizer.bos_id) if tokenizer.adds_bos and bos else None
    return json.dumps(state, ensure_ascii=False).encode()


def tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer_config.json that belongs to `tokenizer_json`."""
    templates: Any = [{"name": name, "template": source} for name, source in tokenizer.templates.items()]
    if tokenizer.templates.keys() == {"default"}:
        templates = tokenizer.chat_template
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": tokenizer.adds_bos,
        **{role: tokenizer.special_tokens[role] for role in ROLES if role in tokenizer.special_tokens},
        **({"chat_template": templates} if templates else {}),
    }


def _sentencepiece_pipeline(backend: SentencePieceBackend) -> dict[str, Any]:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    if not is_bpe(backend.model):
        raise BadInput("its SentencePiece vocabulary is not a BPE; expected BPE")
    pieces = read_pieces(backend.model)
    unknown = next((piece.text for piece in pieces if piece.type == PieceType.UNKNOWN), None)
    model = models.BPE(
        vocab={piece.text: i for i, piece in enumerate(pieces)},
        merges=byte_level.merges([piece.text for piece in _by_priority(pieces)]),
        byte_fallback=any(piece.type == PieceType.BYTE for piece in pieces),
        unk_token=unknown,
        fuse_unk=True,
    )
    pipeline = Tokenizer(model)
    replaced = normalizers.Replace(" ", SPACE)
    shown = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if backend.prefixes:
        pipeline.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replaced])
        pipeline.decoder = decoders.Sequence([*shown, decoders.Strip(" ", 1, 0)])
    else:
        pipeline.normalizer = replaced
        pipeline.decoder = decoders.Sequence(shown)
    added = (PieceType.UNKNOWN, PieceType.CONTROL, PieceType.USER_DEFINED)
    for piece in (piece for piece in pieces if piece.type in added):
        control = piece.type != PieceType.USER_DEFINED
        token = AddedToken(piece.text.replace(SPACE, " "), special=control, normalized=False)
        (pipeline.add_special_tokens if control else pipeline.add_tokens)([token])
    state: dict[str, Any] = json.loads(pipeline.to_str())
    return state


def _by_priority(pieces: list[Piece]) -> list[Piece]:
    """The normal pieces in the order of their merges.

    Of equal scores (runs of spaces) the longer piece comes first. So a run grows from its left end, as if the leftmost
    pair were merged.
    """
    words = [piece for piece in pieces if piece.type == PieceType.NORMAL]
    return sorted(words, key=lambda piece: (-piece.score, -len(piece.text)))


def _begins_with(token: str, token_id: int | None) -> dict[str, Any]:
    """The post-processor that puts one token in front of a text."""
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    single = [first, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }

"""Write a tokenizer as the `tokenizer.…` keys of a GGUF file, as llama.cpp reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pentad.errors import BadInput
from pentad.text import byte_level
from pentad.text.backends import SentencePieceBackend, TokenizersBackend
from pentad.text.byte_level import SPLITS, WHOLE_WORDS
from pentad.text.control import END_OF_TURN
from pentad.text.sentencepiece_proto import BYTE_PIECE, SPACE, PieceType, added_type, is_bpe, read_pieces
from pentad.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Pipeline

__all__ = ["PROBE", "metadata", "pad"]

# A text that different tokenizers split differently. It is composed (NFC), because some tokenizers compose.
PROBE = (
    "Hello,  world! it's WE'LL don't\n\n\n  \t x\r\n \n   def f(x):\n        return {'a': 12345.678, \"b\": x**2 != y}"
    "  #/// café naïve Ünïcödé ÀÉÎ Ελληνικά Кириллица 日本語の文章。 한국어 مرحبا नमस्ते ไทย 😀👍🏽 ½ ² ٣٤٥ "
    "camelCaseAndSNAKE_CASE <<<>>> $100+200=300 ~~~|||^^^ [x] <|x|> a\u3000b\u00a0c ..."
)

_ADDED_SCORE = -1000.0  # llama.cpp's converter gives it to added tokens


def metadata(tokenizer: Tokenizer) -> dict[str, Any]:
    """Write the keys of a tokenizer.

    Features that llama.cpp lacks are lost: composing text (NFC) before it is encoded, and leaving out the space before
    text that follows a control token (`"legacy": false`) or begins with a space (`Metaspace` in a tokenizer.json).

    Returns:
        Key -> a string, int, bool, or a list of strings, of ints (int32) or of floats (float32).

    Raises:
        BadInput: GGUF has no form for the vocabulary.
    """
    backend = tokenizer.backend
    if isinstance(backend, SentencePieceBackend):
        vocabulary = _sentencepiece(backend)
    else:
        assert isinstance(backend, TokenizersBackend)
        state = json.loads(backend.pipeline.to_str())
        if state["model"]["type"] != "BPE":
            raise BadInput(f"its model is {state['model']['type']}; expected BPE")
        vocabulary = _byte_level(backend, state) if backend.byte_level else _byte_fallback(backend, state)
    keys = {f"tokenizer.ggml.{key}": value for key, value in (vocabulary | _special(tokenizer)).items()}
    for name, source in tokenizer.templates.items():
        keys["tokenizer.chat_template" + ("" if name == "default" else f".{name}")] = source
    return keys


def pad(keys: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Add unused tokens to `keys`: llama.cpp requires one token for each row of the embedding."""
    extra = range(len(keys["tokenizer.ggml.tokens"]), vocab_size)
    fillers: dict[str, list[Any]] = {
        "tokenizer.ggml.tokens": [f"[PAD{i}]" for i in extra],
        "tokenizer.ggml.scores": [_ADDED_SCORE for _ in extra],
        "tokenizer.ggml.token_type": [int(PieceType.UNUSED) for _ in extra],
    }
    return {key: [*value, *fillers[key]] if key in fillers else value for key, value in keys.items()}


def _special(tokenizer: Tokenizer) -> dict[str, Any]:
    control, roles = tokenizer.control, tokenizer.special_tokens
    known = {control.get(string) for string in END_OF_TURN}  # readers end a reply there without a key
    ids = {
        "bos": tokenizer.bos_id,
        "eos": next(iter(tokenizer.eos_ids), None),
        "eot": next((i for i in tokenizer.eos_ids[1:] if i not in known), None),
        "unknown": control.get(roles.get("unk_token", "")),
        "padding": control.get(roles.get("pad_token", "")),
    }
    named = {f"{name}_token_id": i for name, i in ids.items() if i is not None}
    return {**named, "add_bos_token": tokenizer.adds_bos}


def _sentencepiece(backend: SentencePieceBackend) -> dict[str, Any]:
    if not is_bpe(backend.model):
        raise BadInput("its SentencePiece vocabulary is not a BPE; expected BPE")
    pieces = read_pieces(backend.model)
    return {
        "model": "llama",
        "pre": "default",
        "tokens": [_plain(piece.text, piece.type) for piece in pieces],
        "scores": [piece.score for piece in pieces],
        "token_type": [piece.type for piece in pieces],
        "add_space_prefix": backend.prefixes,
    }


def _byte_fallback(backend: TokenizersBackend, state: Mapping[str, Any]) -> dict[str, Any]:
    """A SentencePiece vocabulary from a tokenizer.json; pieces that are merged earlier have higher scores."""
    tokens, types = _tokens(backend, state)
    scores = [_ADDED_SCORE if type_ != PieceType.NORMAL else 0.0 for type_ in types]
    vocabulary = state["model"]["vocab"]
    for rank, (left, right) in reversed(list(enumerate(state["model"]["merges"]))):
        scores[vocabulary[left + right]] = -float(rank)
    for i, token in enumerate(tokens):
        if types[i] == PieceType.NORMAL and BYTE_PIECE.fullmatch(token):
            types[i], scores[i] = PieceType.BYTE, 0.0
        elif token == state["model"]["unk_token"]:
            types[i] = PieceType.UNKNOWN
    opening = backend.encode("a", special=False)
    return {
        "model": "llama",
        "pre": "default",
        "tokens": [_plain(token, type_) for token, type_ in zip(tokens, types, strict=True)],
        "scores": scores,
        "token_type": [int(type_) for type_ in types],
        "add_space_prefix": backend.token_bytes(opening[0])[:1] == b" ",
    }


def _byte_level(backend: TokenizersBackend, state: Mapping[str, Any]) -> dict[str, Any]:
    tokens, types = _tokens(backend, state)
    return {
        "model": "gpt2",
        "pre": _pre(backend, state),
        "tokens": tokens,
        "token_type": [int(type_) for type_ in types],
        "merges": [f"{left} {right}" for left, right in state["model"]["merges"]],
    }


def _tokens(backend: TokenizersBackend, state: Mapping[str, Any]) -> tuple[list[str], list[PieceType]]:
    """The tokens by id, and their types; missing ids become unused tokens."""
    tokens = [f"[PAD{i}]" for i in range(backend.vocab_size)]
    types = [PieceType.UNUSED] * backend.vocab_size
    for token, i in state["model"]["vocab"].items():
        tokens[i], types[i] = token, PieceType.NORMAL
    for added in state["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = added_type(added["content"], added["special"])
    return tokens, types


def _plain(token: str, type_: int) -> str:
    # llama.cpp searches the text itself for user-defined tokens.
    return token.replace(SPACE, " ") if type_ == PieceType.USER_DEFINED else token


def _pre(backend: TokenizersBackend, state: Mapping[str, Any]) -> str:
    """The `tokenizer.ggml.pre` that splits the probe, and treats whole words, as the pipeline does."""
    if (state["normalizer"] or {"type": "NFC"})["type"] != "NFC":
        raise BadInput(f"its normalizer is {state['normalizer']['type']}; llama.cpp supports no normalizer")
    if not state["model"]["merges"] and not state["model"]["ignore_merges"]:
        return "default"  # without merges the split makes no difference
    words = _split(backend.pipeline)
    equal = [
        name
        for name, splits in SPLITS.items()
        if words == _split(byte_level.build({}, [], splits, whole_words=False, control=()))
    ]
    if not equal:
        splitter = json.dumps(state["pre_tokenizer"], ensure_ascii=False)
        raise BadInput(f"llama.cpp has no name for its pre_tokenizer {splitter[:300]}")
    whole = bool(state["model"]["ignore_merges"])
    exact = [name for name in equal if (name in WHOLE_WORDS) == whole]
    if not exact and _some_word_is_not_merged(state):
        raise BadInput(f"its ignore_merges is {whole}; llama.cpp's {equal[0]!r} expects {not whole}")
    return [*exact, *equal][0]


def _split(pipeline: Pipeline) -> list[str]:
    words = pipeline.pre_tokenizer.pre_tokenize_str(PROBE) if pipeline.pre_tokenizer else []
    return [word for word, _ in words]


def _some_word_is_not_merged(state: Mapping[str, Any]) -> bool:
    """True if `ignore_merges` makes a difference."""
    from tokenizers import models

    vocabulary, pairs = state["model"]["vocab"], [tuple(pair) for pair in state["model"]["merges"]]
    added = {token["content"] for token in state["added_tokens"]}
    model = models.BPE(vocab=vocabulary, merges=pairs)
    return any(len(model.tokenize(word)) != 1 for word in vocabulary if word not in added)

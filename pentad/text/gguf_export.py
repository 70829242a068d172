"""A `Tokenizer` -> the `tokenizer.…` keys of a GGUF file, as llama.cpp reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pentad.errors import BadInput
from pentad.text import byte_level
from pentad.text.backends import SentencePieceBackend, TokenizersBackend
from pentad.text.byte_level import SPLITS, WHOLE_WORDS
from pentad.text.control import END_OF_TURN, is_control
from pentad.text.sentencepiece_proto import BYTE_PIECE, SPACE, Kind, is_bpe, read_pieces
from pentad.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Pipeline

__all__ = ["PROBE", "metadata", "pad"]

PROBE = (
    "Hello,  world! it's WE'LL don't\n\n\n  \t x\r\n \n   def f(x):\n        return {'a': 12345.678, \"b\": x**2 != y}"
    "  #/// café naïve Ünïcödé ÀÉÎ Ελληνικά Кириллица 日本語の文章。 한국어 مرحبا नमस्ते ไทย 😀👍🏽 ½ ² ٣٤٥ "
    "camelCaseAndSNAKE_CASE <<<>>> $100+200=300 ~~~|||^^^ [x] <|x|> a\u3000b\u00a0c ..."
)
"""Tells tokenizers apart: a text that their splits treat differently. Composed characters alone, as some compose."""

_ADDED_SCORE = -1000.0  # what llama.cpp's converter gives to tokens that no text is made of


def metadata(tokenizer: Tokenizer) -> dict[str, Any]:
    """Key -> a string, int, bool, or list of strings, of ints (int32) or of floats (float32).

    What llama.cpp doesn't do is lost: to compose text (NFC) before it is encoded; to put no space in
    front of text after a control token (`"legacy": false`), or of text that begins with one
    (`Metaspace` in a tokenizer.json).
    Raises `BadInput` for a vocabulary that llama.cpp has no form for.
    """
    backend = tokenizer.backend
    if isinstance(backend, SentencePieceBackend):
        vocabulary = _sentencepiece(backend)
    else:
        assert isinstance(backend, TokenizersBackend)
        state = json.loads(backend.pipeline.to_str())
        if state["model"]["type"] != "BPE":
            raise BadInput(f"its model is {state['model']['type']}: pentad writes BPE vocabularies to GGUF")
        vocabulary = _byte_level(backend, state) if backend.byte_level else _byte_fallback(backend, state)
    keys = {f"tokenizer.ggml.{key}": value for key, value in (vocabulary | _special(tokenizer)).items()}
    for name, source in tokenizer.templates.items():
        keys["tokenizer.chat_template" + ("" if name == "default" else f".{name}")] = source
    return keys


def pad(keys: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """`keys` with unused tokens put after the vocabulary: llama.cpp wants as many as the embedding has rows."""
    extra = range(len(keys["tokenizer.ggml.tokens"]), vocab_size)
    fillers: dict[str, list[Any]] = {
        "tokenizer.ggml.tokens": [f"[PAD{i}]" for i in extra],
        "tokenizer.ggml.scores": [_ADDED_SCORE for _ in extra],
        "tokenizer.ggml.token_type": [int(Kind.UNUSED) for _ in extra],
    }
    return {key: [*value, *fillers[key]] if key in fillers else value for key, value in keys.items()}


def _special(tokenizer: Tokenizer) -> dict[str, Any]:
    control, roles = tokenizer.control, tokenizer.special_tokens
    known = {control.get(string) for string in END_OF_TURN}  # readers take these for ends, whatever the file says
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
        raise BadInput("its SentencePiece vocabulary isn't a BPE: pentad writes BPE vocabularies to GGUF")
    pieces = read_pieces(backend.model)
    return {
        "model": "llama",
        "pre": "default",
        "tokens": [_shown(piece.text, piece.kind) for piece in pieces],
        "scores": [piece.score for piece in pieces],
        "token_type": [piece.kind for piece in pieces],
        "add_space_prefix": backend.prefixes,
    }


def _byte_fallback(backend: TokenizersBackend, state: Mapping[str, Any]) -> dict[str, Any]:
    """A SentencePiece vocabulary in a tokenizer.json: the earlier a piece is merged, the higher its score."""
    tokens, kinds = _tokens(backend, state)
    scores = [_ADDED_SCORE if kind != Kind.NORMAL else 0.0 for kind in kinds]
    vocabulary = state["model"]["vocab"]
    for rank, (left, right) in reversed(list(enumerate(state["model"]["merges"]))):
        scores[vocabulary[left + right]] = -float(rank)
    for i, token in enumerate(tokens):
        if kinds[i] == Kind.NORMAL and BYTE_PIECE.fullmatch(token):
            kinds[i], scores[i] = Kind.BYTE, 0.0
        elif token == state["model"]["unk_token"]:
            kinds[i] = Kind.UNKNOWN
    opening = backend.encode("a", special=False)
    return {
        "model": "llama",
        "pre": "default",
        "tokens": [_shown(token, kind) for token, kind in zip(tokens, kinds, strict=True)],
        "scores": scores,
        "token_type": [int(kind) for kind in kinds],
        "add_space_prefix": backend.token_bytes(opening[0])[:1] == b" ",
    }


def _byte_level(backend: TokenizersBackend, state: Mapping[str, Any]) -> dict[str, Any]:
    tokens, kinds = _tokens(backend, state)
    return {
        "model": "gpt2",
        "pre": _pre(backend, state),
        "tokens": tokens,
        "token_type": [int(kind) for kind in kinds],
        "merges": [f"{left} {right}" for left, right in state["model"]["merges"]],
    }


def _tokens(backend: TokenizersBackend, state: Mapping[str, Any]) -> tuple[list[str], list[Kind]]:
    """The tokens by id, and their kinds; ids that nothing has become unused tokens."""
    tokens = [f"[PAD{i}]" for i in range(backend.vocab_size)]
    kinds = [Kind.UNUSED] * backend.vocab_size
    for token, i in state["model"]["vocab"].items():
        tokens[i], kinds[i] = token, Kind.NORMAL
    for added in state["added_tokens"]:
        control = added["special"] or is_control(added["content"])
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = Kind.CONTROL if control else Kind.USER_DEFINED
    return tokens, kinds


def _shown(token: str, kind: int) -> str:
    """llama.cpp looks for user-defined tokens in the text as it is."""
    return token.replace(SPACE, " ") if kind == Kind.USER_DEFINED else token


def _pre(backend: TokenizersBackend, state: Mapping[str, Any]) -> str:
    """The `tokenizer.ggml.pre` that splits the probe as the pipeline does, and that treats whole words alike."""
    if (state["normalizer"] or {"type": "NFC"})["type"] != "NFC":
        raise BadInput(f"its normalizer is {state['normalizer']['type']}: llama.cpp has none")
    if not state["model"]["merges"] and not state["model"]["ignore_merges"]:
        return "default"  # however words are split, characters stay alone
    words = _split(backend.pipeline)
    alike = [
        name
        for name, splits in SPLITS.items()
        if words == _split(byte_level.build({}, [], splits, whole_words=False, control=()))
    ]
    if not alike:
        splitter = json.dumps(state["pre_tokenizer"], ensure_ascii=False)
        raise BadInput(f"llama.cpp has no name for how it splits texts into words: {splitter[:300]}")
    whole = bool(state["model"]["ignore_merges"])
    exact = [name for name in alike if (name in WHOLE_WORDS) == whole]
    if not exact and _some_word_is_not_merged(state):
        raise BadInput(f"words that no merges make are {'taken' if whole else 'left'}: llama.cpp's {alike[0]} doesn't")
    return [*exact, *alike][0]


def _split(pipeline: Pipeline) -> list[str]:
    words = pipeline.pre_tokenizer.pre_tokenize_str(PROBE) if pipeline.pre_tokenizer else []
    return [word for word, _ in words]


def _some_word_is_not_merged(state: Mapping[str, Any]) -> bool:
    """Whether taking whole words makes a difference."""
    from tokenizers import models

    vocabulary, pairs = state["model"]["vocab"], [tuple(pair) for pair in state["model"]["merges"]]
    added = {token["content"] for token in state["added_tokens"]}
    model = models.BPE(vocab=vocabulary, merges=pairs)
    return any(len(model.tokenize(word)) != 1 for word in vocabulary if word not in added)

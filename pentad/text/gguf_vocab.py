"""Read and write the tokenizer in a GGUF file's metadata, as llama.cpp does.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pentad.errors import BadInput
from pentad.text import byte_level
from pentad.text.backends import Backend, SentencePieceBackend, TokenizersBackend
from pentad.text.byte_level import SPLITS, WHOLE_WORDS
from pentad.text.control import END_OF_TURN
from pentad.text.files import refusing
from pentad.text.sentencepiece_proto import BYTE_PIECE, SPACE, Piece, PieceType, added_type, read_pieces, write_model
from pentad.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Pipeline

__all__ = ["NONE", "PROBE", "load", "metadata", "pad"]

NONE = "none"  # `tokenizer.ggml.model` of a file without a vocabulary; llama.cpp requires the key

# A text that different tokenizers split differently. It is in NFC, because some tokenizers normalize to NFC.
PROBE = (
    "Hello,  world! it's WE'LL don't\n\n\n  \t x\r\n \n   def f(x):\n        return {'a': 12345.678, \"b\": x**2 != y}"
    "  #/// café naïve Ünïcödé ÀÉÎ Ελληνικά Кириллица 日本語の文章。 한국어 مرحبا नमस्ते ไทย 😀👍🏽 ½ ² ٣٤٥ "
    "camelCaseAndSNAKE_CASE <<<>>> $100+200=300 ~~~|||^^^ [x] <|x|> a\u3000b\u00a0c ..."
)

_ADDED_SCORE = -1000.0  # llama.cpp's converter gives it to added tokens

# GGUF's name of a role -> its name in chat templates
_ROLES = {"bos": "bos", "eos": "eos", "eot": "eot", "eom": "eom", "unknown": "unk", "padding": "pad"}


def load(metadata: Mapping[str, Any]) -> Tokenizer | None:
    """Load a tokenizer.

    Args:
        metadata: the keys of a GGUF file.

    Returns:
        The tokenizer, or None if the file has no vocabulary.

    Raises:
        BadInput: the vocabulary is of a type that pentad can't read, or contradicts itself.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model in (None, NONE, "no_vocab"):
        return None
    with refusing("GGUF vocabulary", prefix=True):
        return _load(str(model), metadata)


def _load(model: str, metadata: Mapping[str, Any]) -> Tokenizer:
    tokens = _list(metadata, "tokens", str)
    if not tokens:
        raise BadInput("tokenizer.ggml.tokens is missing or empty")
    types = _types(metadata, tokens)
    backend: Backend
    if model == "gpt2":
        pre = metadata.get("tokenizer.ggml.pre") or "default"
        backend, adds_bos = _byte_level_bpe(tokens, types, _list(metadata, "merges", str), pre), pre in WHOLE_WORDS
    elif model == "llama":
        scores = _list(metadata, "scores", float)
        prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
        backend, adds_bos = SentencePieceBackend(_sentencepiece_model(tokens, types, scores, prefix)), True
    else:
        raise BadInput(f"tokenizer.ggml.model is {model!r}; expected 'gpt2' or 'llama'")
    ids = {name: _token_id(metadata, f"tokenizer.ggml.{name}_token_id", len(tokens)) for name in _ROLES}
    return Tokenizer(
        backend,
        bos_id=ids["bos"],
        eos_ids=[i for i in (ids["eos"], ids["eot"], ids["eom"]) if i is not None],
        adds_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", adds_bos)),
        closing=[ids["eos"]] if ids["eos"] is not None and metadata.get("tokenizer.ggml.add_eos_token") else [],
        special_tokens={f"{_ROLES[name]}_token": tokens[i] for name, i in ids.items() if i is not None},
        templates=_templates(metadata),
    )


def _list(metadata: Mapping[str, Any], name: str, item_type: type) -> Sequence[Any]:
    values = metadata.get(f"tokenizer.ggml.{name}") or []
    if not isinstance(values, Sequence) or not set(map(type, values)) <= {item_type}:
        raise BadInput(f"tokenizer.ggml.{name} is not a list of {item_type.__name__}")
    return values


def _types(metadata: Mapping[str, Any], tokens: Sequence[str]) -> list[int]:
    types = _list(metadata, "token_type", int) or [PieceType.NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise BadInput(f"{len(tokens)} tokens have {len(types)} token types; expected one for each")
    user_defined = PieceType.USER_DEFINED
    return [added_type(tokens[i]) if type_ == user_defined else type_ for i, type_ in enumerate(types)]


def _token_id(metadata: Mapping[str, Any], key: str, size: int) -> int | None:
    token = metadata.get(key)
    if token is not None and (not isinstance(token, int) or not 0 <= token < size):
        raise BadInput(f"{key} is {token!r}; expected an id below {size}")
    return token


def _templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    key = "tokenizer.chat_template"
    named = {name.removeprefix(key + "."): source for name, source in metadata.items() if name.startswith(key + ".")}
    templates = named | ({"default": metadata[key]} if key in metadata else {})
    if not all(isinstance(source, str) for source in templates.values()):
        raise BadInput(f"{key} is not a string")
    return templates


def _byte_level_bpe(tokens: Sequence[str], types: Sequence[int], merges: Sequence[str], pre: str) -> TokenizersBackend:
    if pre not in SPLITS:
        raise BadInput(f"tokenizer.ggml.pre is {pre!r}; expected one of {', '.join(sorted(SPLITS))}")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise BadInput(f"{len(tokens) - len(vocabulary)} tokens are listed twice")
    pairs = []
    for merge in merges:
        left, space, right = merge[1:].partition(" ")  # the first character may be a space itself
        if not space:
            raise BadInput(f"the merge {merge!r} is not two tokens with a space between them")
        pairs.append((merge[0] + left, right))
    pipeline = byte_level.build(
        vocabulary,
        pairs,
        SPLITS[pre],
        whole_words=pre in WHOLE_WORDS,
        control=[
            t for t, type_ in zip(tokens, types, strict=True) if t and type_ in (PieceType.CONTROL, PieceType.UNKNOWN)
        ],
        user_defined=[t for t, type_ in zip(tokens, types, strict=True) if t and type_ == PieceType.USER_DEFINED],
    )
    return TokenizersBackend(pipeline, len(tokens))


def _sentencepiece_model(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float], prefix: bool) -> bytes:
    if len(scores) != len(tokens):
        raise BadInput(f"{len(tokens)} tokens have {len(scores)} scores; expected one for each")
    unknown = types.index(PieceType.UNKNOWN) if PieceType.UNKNOWN in types else -1
    pieces = []
    for i, (token, score, type_) in enumerate(zip(tokens, scores, types, strict=True)):
        if type_ == PieceType.UNKNOWN and i != unknown:
            type_ = PieceType.CONTROL  # a placeholder: sentencepiece accepts only one unknown token
        elif type_ == PieceType.USER_DEFINED:
            token = token.replace(" ", SPACE)
        pieces.append(Piece(token, score, type_))
    return write_model(pieces, prefix=prefix)


def metadata(tokenizer: Tokenizer) -> dict[str, Any]:
    """Write the keys of a tokenizer.

    Two features that llama.cpp lacks are lost. Text isn't normalized to NFC. A space is always put before text that
    follows a control token (despite `"legacy": false`) or begins with a space (despite `Metaspace`).

    Returns:
        Key -> a string, int, bool, or a list of strings, of ints (int32) or of floats (float32).

    Raises:
        BadInput: GGUF can't represent the vocabulary.
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
    known = {control.get(string) for string in END_OF_TURN}  # readers end a reply at these even without a key
    ids = {
        "bos": tokenizer.bos_id,
        "eos": next(iter(tokenizer.eos_ids), None),
        "eot": next((i for i in tokenizer.eos_ids[1:] if i not in known), None),
        "unknown": control.get(roles.get("unk_token", "")),
        "padding": control.get(roles.get("pad_token", "")),
    }
    named = {f"{name}_token_id": i for name, i in ids.items() if i is not None}
    return {**named, "add_bos_token": tokenizer.adds_bos, "add_eos_token": bool(tokenizer.closing)}


def _sentencepiece(backend: SentencePieceBackend) -> dict[str, Any]:
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
    """A SentencePiece vocabulary from a tokenizer.json; the earlier a merge, the higher its score."""
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
    """The value of `tokenizer.ggml.pre` with the pipeline's split of PROBE and, if possible, its `ignore_merges`."""
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

"""Load the tokenizer in a GGUF file's metadata.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pentad.errors import BadInput
from pentad.text import byte_level
from pentad.text.backends import Backend, SentencePieceBackend, TokenizersBackend
from pentad.text.byte_level import SPLITS, WHOLE_WORDS
from pentad.text.files import refusing
from pentad.text.sentencepiece_proto import SPACE, Piece, PieceType, added_type, write_model
from pentad.text.tokenizer import Tokenizer

__all__ = ["NONE", "load"]

NONE = "none"  # `tokenizer.ggml.model` of a file without a vocabulary; llama.cpp requires the key

# The names of GGUF -> those of chat templates
_ROLES = {"bos": "bos", "eos": "eos", "eot": "eot", "eom": "eom", "unknown": "unk", "padding": "pad"}


def load(metadata: Mapping[str, Any]) -> Tokenizer | None:
    """Load the tokenizer.

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
        control=[t for t, type_ in zip(tokens, types, strict=True) if t and type_ in _CONTROL],
        user_defined=[t for t, type_ in zip(tokens, types, strict=True) if t and type_ == PieceType.USER_DEFINED],
    )
    return TokenizersBackend(pipeline, len(tokens))


_CONTROL = (PieceType.CONTROL, PieceType.UNKNOWN)


def _sentencepiece_model(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float], prefix: bool) -> bytes:
    if len(scores) != len(tokens):
        raise BadInput(f"{len(tokens)} tokens have {len(scores)} scores; expected one for each")
    unknown = types.index(PieceType.UNKNOWN) if PieceType.UNKNOWN in types else -1
    pieces = []
    for i, (token, score, type_) in enumerate(zip(tokens, scores, types, strict=True)):
        if type_ == PieceType.UNKNOWN and i != unknown:
            type_ = PieceType.CONTROL  # a placeholder: sentencepiece takes one unknown token only
        elif type_ == PieceType.USER_DEFINED:
            token = token.replace(" ", SPACE)
        pieces.append(Piece(token, score, type_))
    return write_model(pieces, prefix=prefix)

"""The vocabulary in a GGUF file's metadata -> `Tokenizer`.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pentad.errors import BadInput
from pentad.text import byte_level
from pentad.text.backends import Backend, SentencePieceBackend, TokenizersBackend
from pentad.text.byte_level import SPLITS, WHOLE_WORDS
from pentad.text.control import is_control
from pentad.text.sentencepiece_proto import SPACE, Kind, Piece, write_model
from pentad.text.tokenizer import Tokenizer

__all__ = ["NONE", "load"]

NONE = "none"
"""What `tokenizer.ggml.model` is in a file that has no vocabulary; llama.cpp reads none where it is missing."""


def load(metadata: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer in a GGUF file's metadata; None where the file has no vocabulary.

    Raises `BadInput` for a kind of vocabulary that pentad doesn't read, and for one that
    contradicts itself.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model in (None, NONE, "no_vocab"):
        return None
    tokens = _list(metadata, "tokens", str)
    if not tokens:
        raise BadInput("GGUF vocabulary: tokenizer.ggml.tokens is missing or empty")
    types = _types(metadata, tokens)
    backend: Backend
    if model == "gpt2":
        pre = metadata.get("tokenizer.ggml.pre") or "default"
        backend = _byte_level_bpe(tokens, types, _list(metadata, "merges", str), pre)
        begins = pre in WHOLE_WORDS
    elif model == "llama":
        scores = _list(metadata, "scores", float)
        prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
        backend, begins = SentencePieceBackend(_sentencepiece_model(tokens, types, scores, prefix)), True
    else:
        raise BadInput(f"GGUF vocabulary: tokenizer.ggml.model is {model!r}: pentad reads 'gpt2' and 'llama'")
    ids = {name: _token_id(metadata, f"tokenizer.ggml.{name}_token_id", len(tokens)) for name in _ROLES}
    ends = (ids["eos"], ids["eot"], ids["eom"])
    return Tokenizer(
        backend,
        bos_id=ids["bos"],
        eos_ids=[i for i in ends if i is not None],
        adds_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", begins)),
        special_tokens={f"{_ROLES[name]}_token": tokens[i] for name, i in ids.items() if i is not None},
        templates=_templates(metadata),
    )


# The names of GGUF -> those of chat templates
_ROLES = {
    "bos": "bos",
    "eos": "eos",
    "eot": "eot",
    "eom": "eom",
    "unknown": "unk",
    "padding": "pad",
}


def _list(metadata: Mapping[str, Any], name: str, kind: type) -> Sequence[Any]:
    values = metadata.get(f"tokenizer.ggml.{name}") or []
    if not isinstance(values, Sequence) or not set(map(type, values)) <= {kind}:
        raise BadInput(f"GGUF vocabulary: tokenizer.ggml.{name} is not a list of {kind.__name__}")
    return values


def _types(metadata: Mapping[str, Any], tokens: Sequence[str]) -> list[int]:
    types = _list(metadata, "token_type", int)
    if not types:
        return [Kind.NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise BadInput(f"GGUF vocabulary: {len(tokens)} tokens but {len(types)} token types")
    user_defined = Kind.USER_DEFINED
    return [
        Kind.CONTROL if kind == user_defined and is_control(token) else kind
        for kind, token in zip(types, tokens, strict=True)
    ]


def _token_id(metadata: Mapping[str, Any], key: str, size: int) -> int | None:
    token = metadata.get(key)
    if token is None:
        return None
    if not isinstance(token, int) or not 0 <= token < size:
        raise BadInput(f"GGUF vocabulary: {key} is {token!r}, outside of the {size} tokens")
    return token


def _templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    key = "tokenizer.chat_template"
    named = {name.removeprefix(key + "."): source for name, source in metadata.items() if name.startswith(key + ".")}
    templates = named | ({"default": metadata[key]} if key in metadata else {})
    if not all(isinstance(source, str) for source in templates.values()):
        raise BadInput(f"GGUF vocabulary: {key} is not a string")
    return templates


def _byte_level_bpe(tokens: Sequence[str], types: Sequence[int], merges: Sequence[str], pre: str) -> TokenizersBackend:
    if pre not in SPLITS:
        known = ", ".join(sorted(SPLITS))
        raise BadInput(f"GGUF vocabulary: tokenizer.ggml.pre is {pre!r}: pentad knows {known}")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise BadInput(f"GGUF vocabulary: {len(tokens) - len(vocabulary)} tokens come twice")
    pairs = []
    for merge in merges:
        left, space, right = merge[1:].partition(" ")  # the first character may be a space itself
        if not space:
            raise BadInput(f"GGUF vocabulary: the merge {merge!r} is not two tokens with a space between them")
        pairs.append((merge[0] + left, right))
    word = Kind.NORMAL
    added = [(token, kind) for token, kind in zip(tokens, types, strict=True) if kind != word and token]
    try:
        pipeline = byte_level.build(
            vocabulary,
            pairs,
            SPLITS[pre],
            whole_words=pre in WHOLE_WORDS,
            control=[token for token, kind in added if kind in (Kind.CONTROL, Kind.UNKNOWN)],
            user_defined=[token for token, kind in added if kind == Kind.USER_DEFINED],
        )
    except Exception as error:  # the library raises no narrower class
        raise BadInput(f"GGUF vocabulary: {error}") from None
    return TokenizersBackend(pipeline, len(tokens))


def _sentencepiece_model(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float], prefix: bool) -> bytes:
    if len(scores) != len(tokens):
        raise BadInput(f"GGUF vocabulary: {len(tokens)} tokens but {len(scores)} scores")
    unknown = types.index(Kind.UNKNOWN) if Kind.UNKNOWN in types else -1
    pieces = []
    for i, (token, score, kind) in enumerate(zip(tokens, scores, types, strict=True)):
        if kind == Kind.UNKNOWN and i != unknown:
            kind = Kind.CONTROL  # one unknown token is all that sentencepiece takes; the others are placeholders
        elif kind == Kind.USER_DEFINED:
            token = token.replace(" ", SPACE)
        pieces.append(Piece(token, score, kind))
    return write_model(pieces, prefix=prefix)

"""The vocabulary in a GGUF file's metadata -> `Tokenizer`.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; what each `tokenizer.ggml.pre`
stands for: llama.cpp, src/llama-vocab.cpp.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pentad.errors import BadInput
from pentad.text.backends import Backend, SentencePieceBackend, TokenizersBackend
from pentad.text.control import is_control
from pentad.text.tokenizer import Tokenizer

__all__ = ["added_pieces", "load"]

# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

_GPT2 = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",)
_STARCODER = (r"\p{N}", *_GPT2)
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_QWEN2 = (_LLAMA3[0].replace(r"\p{N}{1,3}", r"\p{N}"),)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", *_GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")

# tokenizer.ggml.pre -> the splits, made one after the other
_SPLITS: dict[str, tuple[str, ...]] = {
    "default": _DEFAULT,
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "minerva-7b"), _STARCODER),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), _LLAMA3),
    **dict.fromkeys(("smaug-bpe", "dbrx"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan"), _QWEN2),
    "tekken": _TEKKEN,
}
# These take a word that is in the vocabulary as it is, before any merge, and begin with BOS where
# the file is silent.
_WHOLE_WORDS = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken"})


def load(metadata: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer in a GGUF file's metadata; None where the file has no vocabulary.

    Raises `BadInput` for a kind of vocabulary that pentad doesn't read, and for one that
    contradicts itself.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model is None:
        return None
    tokens = _list(metadata, "tokens", str)
    if not tokens:
        raise BadInput("GGUF vocabulary: tokenizer.ggml.tokens is missing or empty")
    types = _types(metadata, tokens)
    backend: Backend
    if model == "gpt2":
        pre = metadata.get("tokenizer.ggml.pre") or "default"
        backend = _byte_level_bpe(tokens, types, _list(metadata, "merges", str), pre)
        begins = pre in _WHOLE_WORDS
    elif model == "llama":
        scores = _list(metadata, "scores", float)
        prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
        backend, begins = SentencePieceBackend(_model_proto(tokens, types, scores, prefix)), True
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
    if not isinstance(values, Sequence) or not all(isinstance(value, kind) for value in values):
        raise BadInput(f"GGUF vocabulary: tokenizer.ggml.{name} is not a list of {kind.__name__}")
    return values


def _types(metadata: Mapping[str, Any], tokens: Sequence[str]) -> list[int]:
    types = _list(metadata, "token_type", int)
    if not types:
        return [_NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise BadInput(f"GGUF vocabulary: {len(tokens)} tokens but {len(types)} token types")
    return [
        _CONTROL if kind == _USER_DEFINED and is_control(token) else kind
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
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    if pre not in _SPLITS:
        known = ", ".join(sorted(_SPLITS))
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
    try:
        model = models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=pre in _WHOLE_WORDS)
    except Exception as error:  # the library raises no narrower class
        raise BadInput(f"GGUF vocabulary: {error}") from None
    pipeline = Tokenizer(model)
    pipeline.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS[pre]]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    pipeline.decoder = decoders.ByteLevel()
    added = [
        (kind, AddedToken(token, special=kind != _USER_DEFINED, normalized=False))
        for token, kind in zip(tokens, types, strict=True)
        if kind in (_CONTROL, _UNKNOWN, _USER_DEFINED) and token
    ]
    pipeline.add_special_tokens([token for kind, token in added if kind != _USER_DEFINED])
    pipeline.add_tokens([token for kind, token in added if kind == _USER_DEFINED])
    return TokenizersBackend(pipeline)


def _model_proto(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float], prefix: bool) -> bytes:
    """A serialized sentencepiece ModelProto (sentencepiece_model.proto): BPE, by score."""
    if len(scores) != len(tokens):
        raise BadInput(f"GGUF vocabulary: {len(tokens)} tokens but {len(scores)} scores")
    unknown = types.index(_UNKNOWN) if _UNKNOWN in types else -1
    model = bytearray()
    for i, (token, score, kind) in enumerate(zip(tokens, scores, types, strict=True)):
        # One unknown token is all that sentencepiece takes; the others are placeholders.
        kind = _CONTROL if kind == _UNKNOWN and i != unknown else kind
        piece = _field(1, token.encode()) + b"\x15" + struct.pack("<f", score) + _field(3, kind)
        model += _field(1, piece)
    bpe, byte_fallback = _field(3, 2), _field(35, int(_BYTE in types))
    model += _field(2, bpe + byte_fallback)  # trainer_spec
    normalizer = (
        _field(1, b"identity") + _field(3, int(prefix)) + _field(4, 0) + _field(5, 1)
    )  # name, add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces
    return bytes(model + _field(3, normalizer))


def added_pieces(tokens: Sequence[tuple[str, bool]]) -> bytes:
    """What to append to a serialized ModelProto so that `tokens`, (string, is control), follow its
    own.
    """
    return b"".join(
        _field(1, _field(1, token.encode()) + _field(3, _CONTROL if control else _USER_DEFINED))
        for token, control in tokens
    )


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

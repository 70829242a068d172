"""A checkpoint's tokenizer -> the files and keys that other formats have for it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from pentad import text
from pentad.errors import BadInput
from pentad.text import folder_vocab, gguf_export, gguf_vocab, json_export
from pentad.text.backends import Backend, SentencePieceBackend, TokenizersBackend
from pentad.text.files import read_bytes
from pentad.text.tokenizer import Source, Tokenizer, refusing

__all__ = ["consolidated_files", "gguf_metadata", "hf_files", "spaced_alike"]

_CONFIG = "tokenizer_config.json"
_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "tekken.json",
    "qwen.tiktoken",
    "vocab.json",
    "merges.txt",
    _CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)


def hf_files(checkpoint: Source) -> dict[str, bytes]:
    """Name -> content of the tokenizer's files in a folder that transformers reads; none where the
    checkpoint has no tokenizer.

    The checkpoint's own files are copied. Where they are of a kind that transformers doesn't read
    (GGUF, tekken.json, qwen.tiktoken, a SentencePiece model by itself), tokenizer.json is made, and
    tokenizer_config.json made or completed. Which ids end a reply, beyond the one of `eos_token`, is
    for generation_config.json to say (`Tokenizer.eos_ids`).
    Raises `BadInput` as `text.load`, and where what is made would not give the same ids.
    """
    files = _copied(checkpoint)
    if files.keys() & {"tokenizer.json", "spiece.model"} or ("tokenizer.model" in files and _CONFIG in files):
        return files
    tokenizer = text.load(checkpoint)
    if tokenizer is None:
        return files
    with _writing(checkpoint, "as tokenizer.json"):
        content = json_export.tokenizer_json(tokenizer)
        _check_same(tokenizer, _pipeline(content))
        files["tokenizer.json"] = content
        if isinstance(tokenizer.backend, SentencePieceBackend):
            files["tokenizer.model"] = tokenizer.backend.model
        config = json.loads(files.get(_CONFIG, b"{}"))
        config.pop("auto_map", None)  # names code that isn't copied
        config |= json_export.tokenizer_config(tokenizer)
        files[_CONFIG] = json.dumps(config, ensure_ascii=False, indent=2).encode() + b"\n"
    return files


def consolidated_files(checkpoint: Source) -> dict[str, bytes]:
    """Name -> content of the tokenizer's files beside a params.json: the checkpoint's own
    (tokenizer.model, tekken.json, or whatever it has), of a GGUF file those of `hf_files`.
    """
    return hf_files(checkpoint) if checkpoint.format == "gguf" else _copied(checkpoint)


def gguf_metadata(checkpoint: Source, vocab_size: int | None = None) -> dict[str, Any]:
    """The `tokenizer.…` keys of a GGUF file, each a string, int, bool or a list of strings, of ints (int32) or of
    floats (float32); where the checkpoint has no tokenizer, the one that says so.

    A GGUF file's own keys are taken as they are. `vocab_size`: how many rows the embedding has; tokens past the
    vocabulary become `[PAD32001]`, of type unused.
    Raises `BadInput` as `text.load`, and for a tokenizer that llama.cpp has no form for.
    """
    tokenizer = text.load(checkpoint, vocab_size)
    if tokenizer is None:
        return {"tokenizer.ggml.model": gguf_vocab.NONE}
    if checkpoint.format == "gguf":
        keys = {key: value for key, value in checkpoint.config.items() if key.startswith("tokenizer.")}
    else:
        with _writing(checkpoint, "to GGUF"):
            keys = gguf_export.metadata(tokenizer)
            _check_same(tokenizer, gguf_vocab.load(keys))
    return keys if vocab_size is None else gguf_export.pad(keys, vocab_size)


def spaced_alike(checkpoint: Source, keys: Mapping[str, Any]) -> bool:
    """Whether text after a control token has the same ids by `gguf_metadata`'s keys: of SentencePiece vocabularies,
    some put no space in front of it, and llama.cpp always does.
    """
    if keys.get("tokenizer.ggml.model") != "llama":
        return True
    tokenizers = text.load(checkpoint), gguf_vocab.load(keys)
    one, other = (t and t.encode(f"{next(iter(t.control), '')}a", special=True) for t in tokenizers)
    return one == other


def _copied(checkpoint: Source) -> dict[str, bytes]:
    if checkpoint.format == "gguf":
        return {}
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    found = [file for pattern in _FILES for file in sorted(folder.glob(pattern)) if file.is_file()]
    vocabulary = folder_vocab.find(folder)  # which may be called tokenizer.model.v3
    files = [vocabulary, *found] if vocabulary else found
    return {file.relative_to(folder).as_posix(): read_bytes(file) for file in files}


@contextlib.contextmanager
def _writing(checkpoint: Source, how: str) -> Iterator[None]:
    """Says of an error what it is that can't be written."""
    what = f"{checkpoint.path}: its tokenizer can't be written {how}"
    with refusing(what):
        try:
            yield
        except BadInput as error:
            raise BadInput(f"{what}: {error}") from None


def _pipeline(content: bytes) -> Backend:
    from tokenizers import Tokenizer as Pipeline

    return TokenizersBackend(Pipeline.from_str(content.decode()))


def _check_same(tokenizer: Tokenizer, made: Tokenizer | Backend | None) -> None:
    """Raises `BadInput` where what was made of a tokenizer would give other ids."""
    probe = gguf_export.PROBE
    if made is None or made.encode(probe, special=False) != tokenizer.encode(probe):
        raise BadInput("what is made of it gives other ids: it normalizes or splits texts in a way of its own")

"""Write a checkpoint's tokenizer in the formats of other programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pentad import text
from pentad.errors import BadInput
from pentad.text import folder_vocab, gguf_export, gguf_vocab, json_export
from pentad.text.backends import Backend, SentencePieceBackend, TokenizersBackend
from pentad.text.files import read_bytes, refusing
from pentad.text.tokenizer import Source, Tokenizer

__all__ = ["consolidated_files", "gguf_metadata", "hf_files", "keeps_spacing"]

_CONFIG = "tokenizer_config.json"
_FILES = (
    *("tokenizer.json", "tokenizer.model", "spiece.model", "tekken.json", "qwen.tiktoken", "vocab.json", "merges.txt"),
    *(_CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    "additional_chat_templates/*.jinja",
)


def hf_files(checkpoint: Source) -> dict[str, bytes]:
    """Write the tokenizer's files for a folder that transformers reads.

    The checkpoint's own files are copied. If transformers can't read them (GGUF, tekken.json, qwen.tiktoken, a
    SentencePiece model by itself), a tokenizer.json is added, and tokenizer_config.json is written or completed. More
    ids that end a reply than that of `eos_token` belong in generation_config.json (`Tokenizer.eos_ids`).

    Returns:
        Name -> content; empty if the checkpoint has no tokenizer.

    Raises:
        BadInput: as `text.load`, and if the tokenizer.json would give other ids.
    """
    files = _copied(checkpoint)
    if files.keys() & {"tokenizer.json", "spiece.model"} or ("tokenizer.model" in files and _CONFIG in files):
        return files
    tokenizer = text.load(checkpoint)
    if tokenizer is None:
        return files
    with refusing(f"{checkpoint.path}: its tokenizer can't be written as tokenizer.json", prefix=True):
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
    """Name -> content of the tokenizer's files beside a params.json: copies, or for a GGUF file those of `hf_files`."""
    return hf_files(checkpoint) if checkpoint.format == "gguf" else _copied(checkpoint)


def gguf_metadata(checkpoint: Source, vocab_size: int | None = None) -> dict[str, Any]:
    """Write the `tokenizer.…` keys of a GGUF file; those of a GGUF checkpoint are copied.

    Args:
        checkpoint: a checkpoint, with or without a tokenizer.
        vocab_size: the number of rows of the embedding; tokens past the vocabulary become `[PAD32001]`, of type unused.

    Returns:
        Key -> a string, int, bool or a list of strings, of ints (int32) or of floats (float32).

    Raises:
        BadInput: as `text.load`, and if GGUF has no form for the tokenizer.
    """
    tokenizer = text.load(checkpoint, vocab_size)
    if tokenizer is None:
        return {"tokenizer.ggml.model": gguf_vocab.NONE}
    if checkpoint.format == "gguf":
        keys = {key: value for key, value in checkpoint.config.items() if key.startswith("tokenizer.")}
    else:
        with refusing(f"{checkpoint.path}: its tokenizer can't be written to GGUF", prefix=True):
            keys = gguf_export.metadata(tokenizer)
            _check_same(tokenizer, gguf_vocab.load(keys))
    return keys if vocab_size is None else gguf_export.pad(keys, vocab_size)


def keeps_spacing(checkpoint: Source, keys: Mapping[str, Any]) -> bool:
    """Compare the ids of text after a control token with those by `gguf_metadata`'s keys.

    llama.cpp always puts a space in front of such text; some SentencePiece vocabularies don't.

    Returns:
        True if the ids are equal.
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
    vocabulary = folder_vocab.find(folder)  # its name may be tokenizer.model.v3
    files = [vocabulary, *found] if vocabulary else found
    return {file.relative_to(folder).as_posix(): read_bytes(file) for file in files}


def _pipeline(content: bytes) -> Backend:
    from tokenizers import Tokenizer as Pipeline

    return TokenizersBackend(Pipeline.from_str(content.decode()))


def _check_same(tokenizer: Tokenizer, made: Tokenizer | Backend | None) -> None:
    probe = gguf_export.PROBE
    if made is None or made.encode(probe, special=False) != tokenizer.encode(probe):
        raise BadInput("the copy would give other ids, because the original normalizes or splits text differently")

"""Write a checkpoint's tokenizer in the formats of other programs."""

import json
from collections.abc import Mapping
from typing import Any

from pentad import text
from pentad.errors import BadInput
from pentad.text import byte_level, folder_vocab, gguf_vocab
from pentad.text.backends import Backend, SentencePieceBackend, TokenizersBackend
from pentad.text.files import read_bytes, refusing
from pentad.text.folder_settings import ROLES, TOKENIZER_CONFIG, folder_of
from pentad.text.sentencepiece_proto import SPACE, Piece, PieceType, read_pieces
from pentad.text.tokenizer import Source, Tokenizer

__all__ = ["consolidated_files", "gguf_metadata", "hf_files", "keeps_spacing"]

_FILES = (
    *("tokenizer.json", "tokenizer.model", "spiece.model", "tekken.json", "qwen.tiktoken", "vocab.json", "merges.txt"),
    *(TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    "additional_chat_templates/*.jinja",
)


def hf_files(checkpoint: Source) -> dict[str, bytes]:
    """Write the tokenizer's files for a folder that transformers reads.

    The checkpoint's own files are copied. If transformers can't read them (GGUF, tekken.json, qwen.tiktoken, a
    SentencePiece model by itself), a tokenizer.json is added, and tokenizer_config.json is written or completed. The
    caller writes `Tokenizer.eos_ids` to generation_config.json, because `eos_token` is only one of these ids.

    Returns:
        Name -> content; empty if the checkpoint has no tokenizer.

    Raises:
        BadInput: as `text.load`, or the new tokenizer.json would give other ids.
    """
    files = _copied(checkpoint)
    if files.keys() & {"tokenizer.json", "spiece.model"} or ("tokenizer.model" in files and TOKENIZER_CONFIG in files):
        return files
    tokenizer = text.load(checkpoint)
    if tokenizer is None:
        return files
    from tokenizers import Tokenizer as Pipeline

    with refusing(f"{checkpoint.path}: its tokenizer can't be written as tokenizer.json", prefix=True):
        content = _tokenizer_json(tokenizer)
        _check_same(tokenizer, TokenizersBackend(Pipeline.from_str(content.decode())))
        files["tokenizer.json"] = content
        if isinstance(tokenizer.backend, SentencePieceBackend):
            files["tokenizer.model"] = tokenizer.backend.model
        config = json.loads(files.get(TOKENIZER_CONFIG, b"{}"))
        config.pop("auto_map", None)  # names code that isn't copied
        config |= _tokenizer_config(tokenizer)
        files[TOKENIZER_CONFIG] = json.dumps(config, ensure_ascii=False, indent=2).encode() + b"\n"
    return files


def consolidated_files(checkpoint: Source) -> dict[str, bytes]:
    """Name -> content of the tokenizer's files for the consolidated layout: copies, or for GGUF those of `hf_files`."""
    return hf_files(checkpoint) if checkpoint.format == "gguf" else _copied(checkpoint)


def gguf_metadata(checkpoint: Source, vocab_size: int | None = None) -> dict[str, Any]:
    """Write the `tokenizer.…` keys of a GGUF file; those of a GGUF checkpoint are copied.

    Args:
        checkpoint: a checkpoint, with or without a tokenizer.
        vocab_size: the number of rows of the embedding; tokens past the vocabulary become `[PAD32001]`, of type unused.

    Returns:
        Key -> a string, int, bool or a list of strings, of ints (int32) or of floats (float32).

    Raises:
        BadInput: as `text.load`, or GGUF can't represent the tokenizer.
    """
    tokenizer = text.load(checkpoint, vocab_size)
    if tokenizer is None:
        return {"tokenizer.ggml.model": gguf_vocab.NONE}
    if checkpoint.format == "gguf":
        keys = {key: value for key, value in checkpoint.config.items() if key.startswith("tokenizer.")}
    else:
        with refusing(f"{checkpoint.path}: its tokenizer can't be written to GGUF", prefix=True):
            keys = gguf_vocab.metadata(tokenizer)
            _check_same(tokenizer, gguf_vocab.load(keys))
    return keys if vocab_size is None else gguf_vocab.pad(keys, vocab_size)


def keeps_spacing(checkpoint: Source, keys: Mapping[str, Any]) -> bool:
    """Check that a GGUF tokenizer with `keys` encodes text after a control token as the checkpoint's tokenizer does.

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
    folder = folder_of(checkpoint)
    found = [file for pattern in _FILES for file in sorted(folder.glob(pattern)) if file.is_file()]
    vocabulary = folder_vocab.find(folder)  # its name may be tokenizer.model.v3
    files = [vocabulary, *found] if vocabulary else found
    return {file.relative_to(folder).as_posix(): read_bytes(file) for file in files}


def _check_same(tokenizer: Tokenizer, made: Tokenizer | Backend | None) -> None:
    probe = gguf_vocab.PROBE
    if made is None or made.encode(probe, special=False) != tokenizer.encode(probe):
        raise BadInput("the copy would give other ids, because the original normalizes or splits text differently")


def _tokenizer_json(tokenizer: Tokenizer) -> bytes:
    """Write a tokenizer.json that gives the ids of `tokenizer`.

    A SentencePiece vocabulary becomes the pipeline of Llama's published tokenizer.json. It differs in one way: text
    that follows a user-defined token also gets a space in front.

    Raises:
        BadInput: a SentencePiece vocabulary is not a BPE.
    """
    from tokenizers.processors import TemplateProcessing

    backend = tokenizer.backend
    if isinstance(backend, SentencePieceBackend):
        state = _sentencepiece_pipeline(backend)
    else:
        assert isinstance(backend, TokenizersBackend)
        state = json.loads(backend.pipeline.to_str())
    opening = [i for i in [tokenizer.bos_id] if i is not None and tokenizer.adds_bos]
    strings = {i: token for token, i in tokenizer.control.items()}
    state["post_processor"] = None
    if (opening or tokenizer.closing) and strings.keys() >= {*opening, *tokenizer.closing}:
        before, after = ([strings[i] for i in ids] for ids in (opening, tokenizer.closing))
        template = TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", "$B:1", *after],
            special_tokens=[(strings[i], i) for i in {*opening, *tokenizer.closing}],
        )
        state["post_processor"] = json.loads(template.__getstate__())
    return json.dumps(state, ensure_ascii=False).encode()


def _tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer_config.json that belongs to `_tokenizer_json`."""
    templates: Any = [{"name": name, "template": source} for name, source in tokenizer.templates.items()]
    if tokenizer.templates.keys() == {"default"}:
        templates = tokenizer.chat_template
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": tokenizer.adds_bos,
        "add_eos_token": bool(tokenizer.closing),
        **{role: tokenizer.special_tokens[role] for role in ROLES if role in tokenizer.special_tokens},
        **({"chat_template": templates} if templates else {}),
    }


def _sentencepiece_pipeline(backend: SentencePieceBackend) -> dict[str, Any]:
    from tokenizers import AddedToken, decoders, models, normalizers
    from tokenizers import Tokenizer as Pipeline

    pieces = read_pieces(backend.model)
    unknown = next((piece.text for piece in pieces if piece.type == PieceType.UNKNOWN), None)
    model = models.BPE(
        vocab={piece.text: i for i, piece in enumerate(pieces)},
        merges=byte_level.merges([piece.text for piece in _by_priority(pieces)]),
        byte_fallback=any(piece.type == PieceType.BYTE for piece in pieces),
        unk_token=unknown,
        fuse_unk=True,
    )
    pipeline = Pipeline(model)
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

    If scores are equal (runs of spaces), the longer piece comes first. So a run grows from its left end, as in
    sentencepiece, which merges the leftmost pair.
    """
    words = [piece for piece in pieces if piece.type == PieceType.NORMAL]
    return sorted(words, key=lambda piece: (-piece.score, -len(piece.text)))

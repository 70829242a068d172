"""Load the tokenizer in a folder.

The vocabulary is the first of tokenizer.json, tekken.json, tokenizer.model, spiece.model, qwen.tiktoken and those
of CLIP (see `clip_bpe`) that the folder has. `folder_settings` reads what other files say about tokens; chat templates
come from tokenizer_config.json, chat_template.jinja and additional_chat_templates/. All of these are optional.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pentad.errors import BadInput
from pentad.text import clip_bpe, mistral_chat, tekken, tiktoken
from pentad.text.backends import Backend, SentencePieceBackend, TokenizersBackend
from pentad.text.files import read_bytes, read_text, refusing
from pentad.text.folder_settings import TOKENIZER_CONFIG, FolderSettings, folder_of, read, read_generation
from pentad.text.sentencepiece_proto import SPACE, Piece, added_type, append_pieces
from pentad.text.tokenizer import Source, Tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Pipeline

__all__ = ["find", "load"]

_T5 = "spiece.model"
_SENTINELS = 100  # T5's tokens for masked spans
_VERSIONED = re.compile(r".*\.model\.(v\d+)(?:m\d+)?")  # Mistral's names of SentencePiece models: tokenizer.model.v3
_TEKKEN_ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


class _Vocabulary(NamedTuple):
    """The content of a vocabulary file; other files of the folder may override it."""

    backend: Backend
    special_tokens: Mapping[str, str]  # role -> string
    template: str | None = None
    opening: Sequence[int] | None = None  # ids that a tokenizer.json puts in front of a plain prompt
    closing: Sequence[int] = ()  # and after it


def find(folder: Path) -> Path | None:
    """Find the file in `folder` that holds its vocabulary; returns None if there is none."""
    versions = {match[1]: file for file in folder.glob("*.model.v*") if (match := _VERSIONED.fullmatch(file.name))}
    newest = [versions[version] for version in sorted(versions, key=lambda version: -int(version[1:]))]
    names = ("tokenizer.json", "tekken.json", "tokenizer.model", _T5, "qwen.tiktoken", clip_bpe.OPENAI)
    named = [folder / name for name in names]
    found = next((file for file in [*named[:2], *newest, *named[2:]] if file.is_file()), None)
    return folder / clip_bpe.VOCABULARY if found is None and clip_bpe.has_vocabulary(folder) else found


def load(checkpoint: Source) -> Tokenizer | None:
    """Load the tokenizer of a checkpoint.

    Args:
        checkpoint: its path is the folder, or a file in the folder.

    Returns:
        The tokenizer, or None if the folder has no vocabulary.

    Raises:
        BadInput: a file is broken; the message names the file.
    """
    folder = folder_of(checkpoint)
    file = find(folder)
    if file is None:
        return None
    settings, (generation, generation_file) = read(folder), read_generation(checkpoint)
    vocabulary = _read(file, settings, generation, checkpoint)
    backend, special_tokens = vocabulary.backend, {**vocabulary.special_tokens, **settings.special_tokens}
    bos = backend.control.ids.get(special_tokens.get("bos_token", ""), generation.get("bos_token_id"))
    eos = backend.control.ids.get(special_tokens.get("eos_token", ""))
    adds_bos, closing = settings.config.get("add_bos_token"), vocabulary.closing
    if vocabulary.opening is not None:  # tokenizer.json, CLIP
        bos, adds_bos = next(iter(vocabulary.opening), bos), bool(vocabulary.opening)
    elif file.name == _T5:  # its code has no settings for this
        adds_bos, closing = False, [] if eos is None else [eos]
    elif settings.config.get("add_eos_token") and eos is not None:
        closing = [eos]
    return Tokenizer(
        backend,
        bos_id=bos,
        eos_ids=[*([] if eos is None else [eos]), *_as_ids(generation.get("eos_token_id"), generation_file)],
        adds_bos=file.name != "qwen.tiktoken" if adds_bos is None else bool(adds_bos),
        closing=closing,
        special_tokens=special_tokens,
        templates=_templates(folder, settings.config, vocabulary.template),
    )


def _read(file: Path, settings: FolderSettings, generation: Mapping[str, Any], checkpoint: Source) -> _Vocabulary:
    """Read the vocabulary in `file`.

    Without a tokenizer_config.json, the chat template follows the publisher's code: Mistral's by the version of the
    tokenizer, Qwen's by `chat_format`; all Llama 3 models get the instruct models' template.
    """
    bare = not file.with_name(TOKENIZER_CONFIG).is_file()
    if file.name == "tokenizer.json":
        return _from_pipeline(_pipeline(file), settings, {})
    if file.name in (clip_bpe.OPENAI, clip_bpe.VOCABULARY):
        read = clip_bpe.load_openai if file.name == clip_bpe.OPENAI else clip_bpe.load_vocabulary
        return _from_pipeline(read(file), settings, clip_bpe.ROLES)
    if file.name == "tekken.json":
        backend, version = tekken.load(file)
        roles = {role: string for role, string in _TEKKEN_ROLES.items() if string in backend.control.ids}
        return _Vocabulary(backend, roles, mistral_chat.template(version) if bare else None)
    if file.name == "qwen.tiktoken":
        chat = tiktoken.CHATML if generation.get("chat_format") == "chatml" else None
        return _Vocabulary(tiktoken.load_qwen(file), tiktoken.QWEN_ROLES, chat)
    content = read_bytes(file)
    if tiktoken.is_tiktoken(content):
        words = tiktoken.load_llama3(file, tool_use=bool(checkpoint.config.get("use_scaled_rope")))
        return _Vocabulary(words, tiktoken.LLAMA3_ROLES, tiktoken.LLAMA3_CHAT if bare else None)
    model = _sentencepiece(file, content, settings)
    version_of_model = _version(file, model, checkpoint) if bare else None
    template = mistral_chat.template(version_of_model) if version_of_model else None
    return _Vocabulary(model, model.special_tokens, template)


def _pipeline(file: Path) -> "Pipeline":
    from tokenizers import Tokenizer as Pipeline

    with refusing(f"{file}: not a tokenizer.json"):
        return Pipeline.from_file(str(file))


def _from_pipeline(pipeline: "Pipeline", settings: FolderSettings, roles: Mapping[str, str]) -> _Vocabulary:
    pipeline.add_tokens(settings.added_to(pipeline.get_added_tokens_decoder()))
    backend = TokenizersBackend(pipeline)
    bare, full = (pipeline.encode("a", add_special_tokens=special).ids for special in (False, True))
    start = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    return _Vocabulary(backend, roles, opening=full[:start], closing=full[start + len(bare) :])


def _sentencepiece(file: Path, model: bytes, settings: FolderSettings) -> SentencePieceBackend:
    with refusing(f"{file}: neither a SentencePiece model nor tiktoken's lines", prefix=True):
        size = SentencePieceBackend(model).vocab_size
    extra = {i: _added_piece(token.content, token.special) for i, token in settings.by_id.items() if i >= size}
    if file.name == _T5 and not extra:
        extra = dict(enumerate(_sentinels(file, settings.config), size))
    if sorted(extra) != list(range(size, size + len(extra))):
        raise BadInput(f"{file}: added tokens have the ids {str(sorted(extra))[:60]}; expected {size}, {size + 1}, …")
    legacy = settings.config.get("legacy")
    return SentencePieceBackend(
        append_pieces(model, (extra[i] for i in sorted(extra))), prefix_after_control=legacy is not False
    )


def _sentinels(file: Path, config: Mapping[str, Any]) -> list[Piece]:
    """The tokens that T5's code adds to its vocabulary, the last one first."""
    count = config.get("extra_ids", _SENTINELS)
    if not isinstance(count, int) or not 0 <= count <= 1000:
        raise BadInput(f"{file.with_name(TOKENIZER_CONFIG)}: extra_ids is {str(count)[:40]}; expected 0 to 1000")
    return [_added_piece(f"<extra_id_{i}>", True) for i in reversed(range(count))]


def _added_piece(token: str, special: bool) -> Piece:
    return Piece(token.replace(" ", SPACE), 0.0, added_type(token, special))


def _version(file: Path, model: SentencePieceBackend, checkpoint: Source) -> str | None:
    """The version of a Mistral SentencePiece model, by file name or control tokens; None for other models.

    Version 1 has the same control tokens as Llama 2, but only Mistral's params.json has `hidden_dim`.
    """
    named = _VERSIONED.fullmatch(file.name)
    if named:
        return named[1]
    if "[INST]" in model.control.ids:
        return "v7" if "[SYSTEM_PROMPT]" in model.control.ids else "v3"
    return "v1" if checkpoint.format == "consolidated" and "hidden_dim" in checkpoint.config else None


def _as_ids(value: Any, file: Path) -> list[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) for i in ids):
        raise BadInput(f"{file}: eos_token_id is {value!r}; expected ids")
    return ids


def _named(entry: Any, folder: Path) -> tuple[str, str]:
    match entry:
        case {"name": str(name), "template": str(source)}:
            return name, source
    raise BadInput(f"{folder / TOKENIZER_CONFIG}: an entry of chat_template is not {{name, template}}")


def _templates(folder: Path, config: Mapping[str, Any], default: str | None) -> dict[str, str]:
    """Name -> jinja source. Template files win over tokenizer_config.json, which wins over `default`."""
    templates = {} if default is None else {"default": default}
    match config.get("chat_template"):
        case str(source):
            templates["default"] = source
        case list(named):
            templates |= dict(_named(entry, folder) for entry in named)
    if (folder / "chat_template.jinja").is_file():
        templates["default"] = read_text(folder / "chat_template.jinja")
    for file in sorted(folder.glob("additional_chat_templates/*.jinja")):
        templates[file.stem] = read_text(file)
    return templates

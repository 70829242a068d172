"""Load the tokenizer in a folder.

The vocabulary is the first of tokenizer.json, tekken.json, tokenizer.model, spiece.model and qwen.tiktoken that the
folder has. Settings come from tokenizer_config.json, special_tokens_map.json, added_tokens.json,
generation_config.json, chat_template.jinja and additional_chat_templates/, all of them optional.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pentad.errors import BadInput
from pentad.text import mistral_chat, tekken, tiktoken
from pentad.text.backends import Backend, SentencePieceBackend, TokenizersBackend
from pentad.text.files import read_bytes, read_json, read_text, refusing
from pentad.text.sentencepiece_proto import SPACE, Piece, added_type, append_pieces
from pentad.text.tokenizer import Source, Tokenizer

__all__ = ["ROLES", "find", "load"]

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_CONFIG = "tokenizer_config.json"
_T5 = "spiece.model"
_SENTINELS = 100  # T5's tokens for masked spans
_VERSIONED = re.compile(r".*\.model\.(v\d+)(?:m\d+)?")  # Mistral's names of SentencePiece models: tokenizer.model.v3
_TEKKEN_ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


class _Vocabulary(NamedTuple):
    """The content of a vocabulary file; other files of the folder may override it."""

    backend: Backend
    adds_bos: bool
    special_tokens: Mapping[str, str]  # role -> string
    template: str | None = None


def find(folder: Path) -> Path | None:
    """Find the file in `folder` that holds its vocabulary; returns None if there is none."""
    versions = {match[1]: file for file in folder.glob("*.model.v*") if (match := _VERSIONED.fullmatch(file.name))}
    newest = [versions[version] for version in sorted(versions, key=lambda version: -int(version[1:]))]
    names = ("tokenizer.json", "tekken.json", "tokenizer.model", _T5, "qwen.tiktoken")
    named = [folder / name for name in names]
    return next((file for file in [*named[:2], *newest, *named[2:]] if file.is_file()), None)


def load(checkpoint: Source) -> Tokenizer | None:
    """Load the tokenizer of a checkpoint.

    Args:
        checkpoint: its path is the folder, or a file in the folder.

    Returns:
        The tokenizer, or None if the folder has no vocabulary.

    Raises:
        BadInput: a file is broken; the message names the file.
    """
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    file = find(folder)
    if file is None:
        return None
    config = {**_optional(folder / "special_tokens_map.json"), **_optional(folder / _CONFIG)}
    settings = folder / "generation_config.json"
    generation = _optional(settings)
    if not settings.is_file() and checkpoint.format == "hf":  # as in transformers
        settings, generation = folder / "config.json", dict(checkpoint.config)
    vocabulary = _read(file, config, generation, checkpoint)
    backend = vocabulary.backend
    special_tokens = {**vocabulary.special_tokens, **_special_tokens(config)}
    control = backend.control.ids
    eos = control.get(special_tokens.get("eos_token", ""))
    add_bos = config.get("add_bos_token")
    return Tokenizer(
        backend,
        bos_id=control.get(special_tokens.get("bos_token", ""), generation.get("bos_token_id")),
        eos_ids=[*([] if eos is None else [eos]), *_as_ids(generation.get("eos_token_id"), settings)],
        adds_bos=vocabulary.adds_bos if add_bos is None else bool(add_bos),
        special_tokens=special_tokens,
        templates=_templates(folder, config, vocabulary.template),
    )


def _read(file: Path, config: Mapping[str, Any], generation: Mapping[str, Any], checkpoint: Source) -> _Vocabulary:
    """Read the vocabulary in `file`.

    Without a tokenizer_config.json, the chat template follows the publisher's code: Mistral's by the version of the
    tokenizer, Qwen's by `chat_format`; all Llama 3 models get the instruct models' template.
    """
    bare = not file.with_name(_CONFIG).is_file()
    if file.name == "tokenizer.json":
        return _pipeline(file, config)
    if file.name == "tekken.json":
        backend, version = tekken.load(file)
        roles = {role: string for role, string in _TEKKEN_ROLES.items() if string in backend.control.ids}
        return _Vocabulary(backend, True, roles, mistral_chat.template(version) if bare else None)
    if file.name == "qwen.tiktoken":
        chat = tiktoken.CHATML if generation.get("chat_format") == "chatml" else None
        return _Vocabulary(tiktoken.load_qwen(file), False, tiktoken.QWEN_ROLES, chat)
    content = read_bytes(file)
    if tiktoken.is_tiktoken(content):
        words = tiktoken.load_llama3(file, tool_use=bool(checkpoint.config.get("use_scaled_rope")))
        return _Vocabulary(words, True, tiktoken.LLAMA3_ROLES, tiktoken.LLAMA3_CHAT if bare else None)
    model = _sentencepiece(file, content, config)
    version_of_model = _version(file, model, checkpoint) if bare else None
    template = mistral_chat.template(version_of_model) if version_of_model else None
    return _Vocabulary(model, True, model.special_tokens, template)


def _optional(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _pipeline(file: Path, config: Mapping[str, Any]) -> _Vocabulary:
    from tokenizers import Tokenizer as Pipeline

    with refusing(f"{file}: not a tokenizer.json"):
        pipeline = Pipeline.from_file(str(file))
    with refusing(f"{file.with_name(_CONFIG)}: not a map of ids and added tokens, or a list of special tokens"):
        _add_tokens(pipeline, config)
    adds_bos = pipeline.encode("a").ids[:1] != pipeline.encode("a", add_special_tokens=False).ids[:1]
    return _Vocabulary(TokenizersBackend(pipeline), adds_bos, {})


def _add_tokens(pipeline: Any, config: Mapping[str, Any]) -> None:
    """Add the tokens that only tokenizer_config.json names, with the ids that transformers gives them."""
    from tokenizers import AddedToken

    decoder = config.get("added_tokens_decoder") or {}
    for _, token in sorted((int(i), token) for i, token in decoder.items()):
        flags = {name: token[name] for name in ("lstrip", "rstrip", "normalized", "single_word") if name in token}
        (pipeline.add_special_tokens if token.get("special") else pipeline.add_tokens)(
            [AddedToken(token["content"], special=bool(token.get("special")), **flags)]
        )
    lists = [config.get(name) or [] for name in ("additional_special_tokens", "extra_special_tokens")]
    named = [token for tokens in lists for token in (tokens.values() if isinstance(tokens, dict) else tokens)]
    special = [*_special_tokens(config).values(), *map(_content, named)]
    present = {token.content for token in pipeline.get_added_tokens_decoder().values()}
    pipeline.add_special_tokens([AddedToken(content) for content in special if content not in present])


def _sentencepiece(file: Path, model: bytes, config: Mapping[str, Any]) -> SentencePieceBackend:
    with refusing(f"{file}: neither a SentencePiece model nor tiktoken's lines", prefix=True):
        size = SentencePieceBackend(model).vocab_size
    extra = {i: piece for i, piece in _added(file, config).items() if i >= size}
    if file.name == _T5 and not extra:
        extra = dict(enumerate(_sentinels(file, config), size))
    if sorted(extra) != list(range(size, size + len(extra))):
        raise BadInput(f"{file}: added tokens have the ids {str(sorted(extra))[:60]}; expected {size}, {size + 1}, …")
    return SentencePieceBackend(
        append_pieces(model, (extra[i] for i in sorted(extra))), prefix_after_control=config.get("legacy") is not False
    )


def _added(file: Path, config: Mapping[str, Any]) -> dict[int, Piece]:
    """Id -> token added to a SentencePiece model by tokenizer_config.json, or in older folders by added_tokens.json."""
    where = file.with_name("added_tokens.json")
    special = set(_special_tokens(config).values())
    try:
        special |= {_content(token) for token in config.get("additional_special_tokens") or ()}
        added = {int(i): _added_piece(token, token in special) for token, i in _optional(where).items()}
        where = file.with_name(_CONFIG)
        for i, token in (config.get("added_tokens_decoder") or {}).items():
            added[int(i)] = _added_piece(token["content"], bool(token.get("special")))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise BadInput(f"{where}: expected a map of ids and added tokens") from None
    return added


def _sentinels(file: Path, config: Mapping[str, Any]) -> list[Piece]:
    """The tokens that T5's code adds to its vocabulary, the last one first."""
    count = config.get("extra_ids", _SENTINELS)
    if not isinstance(count, int) or not 0 <= count <= 1000:
        raise BadInput(f"{file.with_name(_CONFIG)}: extra_ids is {str(count)[:40]}; expected 0 to 1000")
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


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Role -> string."""
    contents = {role: _content(config.get(role)) for role in ROLES}
    return {role: token for role, token in contents.items() if isinstance(token, str)}


def _content(token: Any) -> Any:
    """The string of a token: the token itself, or the `content` of an object."""
    return token.get("content") if isinstance(token, dict) else token


def _as_ids(value: Any, file: Path) -> list[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) for i in ids):
        raise BadInput(f"{file}: eos_token_id is {value!r}; expected ids")
    return ids


def _named(entry: Any, folder: Path) -> tuple[str, str]:
    match entry:
        case {"name": str(name), "template": str(source)}:
            return name, source
    raise BadInput(f"{folder / _CONFIG}: an entry of chat_template is not {{name, template}}")


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

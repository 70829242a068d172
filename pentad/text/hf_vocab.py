"""The tokenizer files of a Hugging Face folder -> `Tokenizer`.

Read are tokenizer.json, else tokenizer.model; with tokenizer_config.json, special_tokens_map.json,
generation_config.json, chat_template.jinja and additional_chat_templates/, whichever are there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pentad.errors import BadInput
from pentad.text.backends import Backend, SentencePieceBackend, TokenizersBackend
from pentad.text.control import is_control
from pentad.text.gguf_vocab import added_pieces
from pentad.text.tokenizer import Tokenizer

__all__ = ["load"]

_ROLES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


def load(path: Path) -> Tokenizer | None:
    """The tokenizer in the folder `path`, or beside the file `path`; None where there is none.

    Raises `BadInput` naming the file that is broken.
    """
    folder = path if path.is_dir() else path.parent
    config = _json(folder / "tokenizer_config.json")
    backend: Backend
    if (folder / "tokenizer.json").is_file():
        backend, begins = _pipeline(folder / "tokenizer.json")
    elif (folder / "tokenizer.model").is_file():
        backend, begins = _sentencepiece(folder / "tokenizer.model", config), True
    else:
        return None
    special_tokens = _special_tokens({**_json(folder / "special_tokens_map.json"), **config})
    control = backend.control.ids
    eos = control.get(special_tokens.get("eos_token", ""))
    generation = _json(folder / "generation_config.json")
    bos = control.get(special_tokens.get("bos_token", ""), generation.get("bos_token_id"))
    add_bos = config.get("add_bos_token")
    return Tokenizer(
        backend,
        bos_id=bos,
        eos_ids=[*([] if eos is None else [eos]), *_as_ids(generation.get("eos_token_id"), folder)],
        adds_bos=begins if add_bos is None else bool(add_bos),
        special_tokens=special_tokens,
        templates=_templates(folder, config),
    )


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise BadInput(f"{file}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise BadInput(f"{file}: a JSON object was expected, not {type(content).__name__}")
    return content


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{file}: not valid UTF-8 (byte {error.start}): save it as UTF-8") from None


def _pipeline(file: Path) -> tuple[TokenizersBackend, bool]:
    """The pipeline, and whether its own post-processor begins a text with a control token."""
    from tokenizers import Tokenizer as Pipeline

    try:
        pipeline = Pipeline.from_file(str(file))
    except Exception as error:  # the library raises no narrower class
        raise BadInput(f"{file}: not a tokenizer.json: {error}") from None
    with_specials, without = (
        pipeline.encode("a").ids,
        pipeline.encode("a", add_special_tokens=False).ids,
    )
    return TokenizersBackend(pipeline), with_specials[:1] != without[:1]


def _sentencepiece(file: Path, config: Mapping[str, Any]) -> SentencePieceBackend:
    try:
        added = {
            int(i): (token["content"], bool(token.get("special")) or is_control(token["content"]))
            for i, token in (config.get("added_tokens_decoder") or {}).items()
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        where = file.with_name("tokenizer_config.json")
        raise BadInput(f"{where}: added_tokens_decoder doesn't map ids to tokens") from None
    legacy = config.get("legacy")
    model = file.read_bytes()
    size = SentencePieceBackend(model).vocab_size
    extra = {i: token for i, token in added.items() if i >= size}
    if sorted(extra) != list(range(size, size + len(extra))):
        raise BadInput(f"{file}: holds {size} tokens, which the added ones don't follow on")
    return SentencePieceBackend(
        model + added_pieces([extra[i] for i in sorted(extra)]),
        prefix_after_control=legacy is not False,
    )


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Role -> string. A token is its string, or an object that has the string as `content`."""
    found = {role: config.get(role) for role in _ROLES}
    contents = {role: token.get("content") if isinstance(token, dict) else token for role, token in found.items()}
    return {role: token for role, token in contents.items() if isinstance(token, str)}


def _as_ids(value: Any, folder: Path) -> list[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) for i in ids):
        raise BadInput(f"{folder / 'generation_config.json'}: eos_token_id is {value!r}: ids were expected")
    return ids


def _named(entry: Any, folder: Path) -> tuple[str, str]:
    match entry:
        case {"name": str(name), "template": str(source)}:
            return name, source
    where = folder / "tokenizer_config.json"
    raise BadInput(f"{where}: an entry of chat_template isn't {{name, template}}")


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Name -> source: one string is the default; a list has {name, template}; files of their own
    win.
    """
    templates: dict[str, str] = {}
    match config.get("chat_template"):
        case str(source):
            templates["default"] = source
        case list(named):
            templates |= dict(_named(entry, folder) for entry in named)
    if (folder / "chat_template.jinja").is_file():
        templates["default"] = _text(folder / "chat_template.jinja")
    for file in sorted(folder.glob("additional_chat_templates/*.jinja")):
        templates[file.stem] = _text(file)
    return templates

"""Read the settings of tokens, ends of text and sampling from a Hugging Face folder, with transformers 5's precedence.

Which tokens exist
    1. The vocabulary, with tokenizer.json's ``added_tokens``.
    2. tokenizer_config.json's ``added_tokens_decoder`` by id; without this key, added_tokens.json by id.
    3. Tokens with a role (``eos_token``, …), then those of other keys that end in ``_token``, then
       ``extra_special_tokens`` or the older ``additional_special_tokens``.

    In a tokenizer.json, a token of 2 or 3 that is new gets the next free id, whatever id its file gives.
Which token has a role
    special_tokens_map.json before tokenizer_config.json; but beside an ``added_tokens_decoder`` it is not read.
Which tokens surround a plain prompt
    tokenizer.json's ``post_processor``. tokenizer_config.json's ``add_bos_token`` and ``add_eos_token`` count only for
    vocabularies without a tokenizer.json; if they are absent, BOS is added, as by Meta's code, transformers 4 and
    llama.cpp (transformers 5 does so for Code Llama only). T5's spiece.model: EOS at the end, no BOS. (vLLM uses
    transformers. llama.cpp's converter reads the post-processor too, but lets ``add_bos_token`` and ``add_eos_token``
    override it.)
What ends a text, and how to sample
    generation_config.json; without this file config.json. The tokenizer's ``eos_token`` also ends a text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pentad.text.files import read_json, refusing
from pentad.text.tokenizer import Source

if TYPE_CHECKING:
    from tokenizers import AddedToken

__all__ = ["ROLES", "TOKENIZER_CONFIG", "FolderSettings", "folder_of", "read", "read_generation"]

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TOKENIZER_CONFIG = "tokenizer_config.json"
_DECODER = "added_tokens_decoder"
_FLAGS = ("special", "lstrip", "rstrip", "normalized", "single_word")


@dataclass(frozen=True)
class FolderSettings:
    """The settings of a folder's tokenizer.

    Attributes:
        config: tokenizer_config.json; empty if there is none.
        by_id: the added tokens to which a file gives an id.
        named: role, or another key -> token.
        extra: special tokens without a key.
    """

    config: Mapping[str, Any]
    by_id: Mapping[int, AddedToken]
    named: Mapping[str, AddedToken]
    extra: Sequence[AddedToken]

    @property
    def special_tokens(self) -> dict[str, str]:
        """Role -> string."""
        return {role: token.content for role, token in self.named.items() if role in ROLES}

    def added_to(self, pipeline: Mapping[int, AddedToken]) -> list[AddedToken]:
        """The tokens to add to a tokenizer.json, in this order.

        Args:
            pipeline: its own added tokens by id.
        """
        by_id = self.by_id if _DECODER in self.config else {**self.by_id, **pipeline}
        tokens = {token.content: token for _, token in sorted(by_id.items())}
        present = {token.content: token for token in pipeline.values()}
        for token in self.named.values():
            tokens.setdefault(token.content, present.get(token.content, token)).special = True
        for token in self.extra:
            tokens.setdefault(token.content, present.get(token.content, token))
        return list(tokens.values())


def folder_of(checkpoint: Source) -> Path:
    """The folder with a checkpoint's files."""
    return checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent


def read_generation(checkpoint: Source) -> tuple[dict[str, Any], Path]:
    """The recommended settings of generation, and the file that has them (or would have them)."""
    file = folder_of(checkpoint) / "generation_config.json"
    if checkpoint.format == "hf" and not file.is_file():
        return dict(checkpoint.config), file.with_name("config.json")
    return _optional(file), file


def read(folder: Path) -> FolderSettings:
    """Read the settings of a folder's tokenizer.

    Raises:
        BadInput: a file is broken; the message names the file.
    """
    file = folder / TOKENIZER_CONFIG
    config, given = _optional(file), {}
    if _DECODER not in config:
        file = folder / "special_tokens_map.json"
        given = _optional(file)
    with refusing(f"{file}: not a map of ids and added tokens, or a list of special tokens"):
        named, extra = _named(config, given), _extra(config, given)
        if _DECODER in config:
            by_id = {int(i): _token(token, special=False) for i, token in (config[_DECODER] or {}).items()}
            return FolderSettings(config, by_id, named, extra)
    file = folder / "added_tokens.json"
    added = _optional(file)
    with refusing(f"{file}: not a map of ids and added tokens"):
        special = {token.content for token in (*named.values(), *extra)}
        by_id = {int(i): _token(token, special=token in special) for token, i in added.items()}
    return FolderSettings(config, by_id, named, extra)


def _named(config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, AddedToken]:
    """The tokens with a key, roles first; `given` is special_tokens_map.json."""
    merged = {**config, **given}
    own = {key: token for key, token in config.items() if _is_other(key) and isinstance(token, str)}
    others = {key: token for key, token in merged.items() if _is_other(key) and (key in given or key not in own)}
    listed = merged.get("extra_special_tokens")
    tokens = {**{role: merged.get(role) for role in ROLES}, **others, **own}
    tokens |= listed if isinstance(listed, dict) else {}
    return {key: _token(token) for key, token in tokens.items() if isinstance(token, str | dict)}


def _is_other(key: str) -> bool:
    return key.endswith("_token") and key not in ROLES


def _extra(config: Mapping[str, Any], given: Mapping[str, Any]) -> list[AddedToken]:
    """The special tokens without a key; `given` is special_tokens_map.json."""
    new, old = "extra_special_tokens", "additional_special_tokens"
    tokens = config.get(new) or config.get(old)
    if isinstance(config.get(new), dict) or not config.keys() & {new, old}:
        tokens = given.get(old, config.get(old))
    listed = [] if isinstance(given.get(new), dict) else given.get(new)
    return [_token(token) for token in [*(tokens or ()), *(listed or ())]]


def _token(token: str | Mapping[str, Any], *, special: bool = True) -> AddedToken:
    """A token that is written as a string, or as an object; without a flag in it, it is `special` or not."""
    from tokenizers import AddedToken

    if isinstance(token, str):
        return AddedToken(token, special=special)
    flags = {flag: token[flag] for flag in _FLAGS if flag in token}
    return AddedToken(token["content"], **{"special": special, **flags})


def _optional(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}

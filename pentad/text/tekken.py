"""Mistral's tekken.json: a byte-level BPE by rank, with control tokens in front of its words.

Read as mistral-common does (tokens/tokenizers/tekken.py there).
"""

from __future__ import annotations

import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pentad.errors import BadInput
from pentad.text import byte_level
from pentad.text.backends import TokenizersBackend
from pentad.text.files import read_json

__all__ = ["load"]

# What files have that list none: those up to version 7. The rest of the 1000 are called <SPECIAL_20>, …
_CONTROL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
_MOST_CONTROL = 100_000  # published files have 1000


def load(file: Path) -> tuple[TokenizersBackend, str]:
    """The vocabulary, and its version ("v3"), which says how a conversation is written.

    Ids: first the control tokens, then the words by rank; words past `default_vocab_size` are
    dropped. Raises `BadInput` naming the file for whatever it lacks or contradicts itself in.
    """
    content = read_json(file)
    try:
        return _read(content)
    except BadInput as error:
        raise BadInput(f"{file}: {error}") from None
    except Exception as error:  # the tokenizers library raises no narrower class
        raise BadInput(f"{file}: not a tekken.json: {' '.join(str(error).split())[:200]}") from None


def _read(content: Mapping[str, Any]) -> tuple[TokenizersBackend, str]:
    config = content.get("config")
    match config:
        case {
            "pattern": str(pattern),
            "default_vocab_size": int(size),
            "default_num_special_tokens": int(reserved),
            "version": str(version),
        }:
            pass
        case _:
            needed = "pattern, default_vocab_size, default_num_special_tokens and version"
            raise BadInput(f"not a tekken.json: its config lacks one of {needed}")
    entries = content.get("vocab")
    if not isinstance(entries, list) or not 0 < reserved < min(size, _MOST_CONTROL) or size > reserved + len(entries):
        held = len(entries) if isinstance(entries, list) else "no"
        raise BadInput(f"{held} words and {reserved} control tokens don't make up its {size} ids")
    words = [byte_level.characters(_word(entry, rank)) for rank, entry in enumerate(entries[: size - reserved])]
    byte_level.check_bytes(words)
    control = _control(content.get("special_tokens"), reserved)
    vocabulary = {token: i for i, token in enumerate([*control, *words])}
    if len(vocabulary) != size:
        raise BadInput(f"{size - len(vocabulary)} of its tokens come twice")
    pipeline = byte_level.build(vocabulary, byte_level.merges(words), [pattern], whole_words=True, control=control)
    return TokenizersBackend(pipeline), version


def _word(entry: Any, rank: int) -> bytes:
    match entry:
        case {"rank": int(given), "token_bytes": str(encoded)} if given == rank:
            try:
                return binascii.a2b_base64(encoded, strict_mode=True)
            except ValueError as error:
                raise BadInput(f"vocab[{rank}]: token_bytes is not base64: {error}") from None
    raise BadInput(f"vocab[{rank}] is not a word of rank {rank} with token_bytes")


def _control(listed: Any, reserved: int) -> list[str]:
    if listed is None:
        tokens = list(_CONTROL[:reserved])
    elif not isinstance(listed, list) or len(listed) > reserved:
        raise BadInput(f"special_tokens is not a list of at most {reserved}")
    else:
        tokens = [_control_string(entry, rank) for rank, entry in enumerate(listed)]
    return [*tokens, *(f"<SPECIAL_{i}>" for i in range(len(tokens), reserved))]


def _control_string(entry: Any, rank: int) -> str:
    match entry:
        case {"rank": int(given), "token_str": str(string)} if given == rank and string:
            return string
    raise BadInput(f"special_tokens[{rank}] is not a token of rank {rank} with a token_str")

"""Read Mistral's tekken.json: a byte-level BPE, words by rank; control tokens have the first ids.

Defined by mistral-common, tokens/tokenizers/tekken.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pentad.errors import BadInput
from pentad.text import byte_level
from pentad.text.backends import TokenizersBackend
from pentad.text.files import read_json, refusing

__all__ = ["load"]

# The control tokens of files that don't list them (up to version 7). The other reserved ids are <SPECIAL_20>, …
_CONTROL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
_MAX_CONTROL = 100_000  # published files have 1000


def load(file: Path) -> tuple[TokenizersBackend, str]:
    """Load a tekken.json.

    The control tokens have the first ids, then the words by rank; words past `default_vocab_size` are dropped.

    Returns:
        The vocabulary, and its version ("v3"), which determines the chat template.

    Raises:
        BadInput: the file is broken; the message names the file and the field.
    """
    content = read_json(file)
    with refusing(f"{file}: not a tekken.json", prefix=True):
        return _read(content)


def _read(content: Mapping[str, Any]) -> tuple[TokenizersBackend, str]:
    match content.get("config"):
        case {
            "pattern": str(pattern),
            "default_vocab_size": int(size),
            "default_num_special_tokens": int(reserved),
            "version": str(version),
        }:
            pass
        case _:
            needed = "pattern, default_vocab_size, default_num_special_tokens and version"
            raise BadInput(f"its config is incomplete; expected {needed}")
    entries = content.get("vocab")
    if not isinstance(entries, list) or not 0 < reserved < min(size, _MAX_CONTROL) or size > reserved + len(entries):
        count = len(entries) if isinstance(entries, list) else "no"
        raise BadInput(f"{count} words and {reserved} control tokens don't add up to its {size} ids")
    words = [_word(entry, rank) for rank, entry in enumerate(entries[: size - reserved])]
    control = _control(content.get("special_tokens"), reserved)
    return TokenizersBackend(byte_level.build_ranked([*control, *words], words, pattern, control=control)), version


def _word(entry: Any, rank: int) -> str:
    match entry:
        case {"rank": int(given), "token_bytes": str(encoded)} if given == rank:
            return byte_level.decode_base64(encoded, f"vocab[{rank}]: token_bytes")
    raise BadInput(f"vocab[{rank}]: expected an object with rank {rank} and token_bytes")


def _control(listed: Any, reserved: int) -> list[str]:
    if listed is None:
        tokens = list(_CONTROL[:reserved])
    elif not isinstance(listed, list) or len(listed) > reserved:
        raise BadInput(f"special_tokens: expected a list of at most {reserved}")
    else:
        tokens = [_control_string(entry, rank) for rank, entry in enumerate(listed)]
    return [*tokens, *(f"<SPECIAL_{i}>" for i in range(len(tokens), reserved))]


def _control_string(entry: Any, rank: int) -> str:
    match entry:
        case {"rank": int(given), "token_str": str(string)} if given == rank and string:
            return string
    raise BadInput(f"special_tokens[{rank}]: expected an object with rank {rank} and a token_str")

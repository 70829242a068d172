"""Qwen's qwen.tiktoken: a byte-level BPE as lines of base64 and rank, control tokens after its words.

Read as the published tokenizer does (tokenization_qwen.py, qwen_generation_utils.py of
Qwen/Qwen-14B-Chat, and tokenization_note.md of QwenLM/Qwen).
"""

from __future__ import annotations

import binascii
from pathlib import Path

from pentad.errors import BadInput
from pentad.text import byte_level
from pentad.text.backends import TokenizersBackend
from pentad.text.files import read_bytes

__all__ = ["CHATML", "END", "load"]

END = "<|endoftext|>"
_CONTROL = (END, "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))

CHATML = """\
{%- set system = 'You are a helpful assistant.' -%}
{%- if messages[0].role != 'system' -%}
    {{- '<|im_start|>system\\n' + system + '<|im_end|>' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if not loop.first or message.role != 'system' -%}{{- '\\n' -}}{%- endif -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '\\n<|im_start|>assistant\\n' -}}{%- endif -%}
"""
"""What `make_context` of qwen_generation_utils.py writes, with the system message that `chat` gives it."""


def load(file: Path) -> TokenizersBackend:
    """The vocabulary: words by rank, then the 208 control tokens (from 151643 on in the published
    file). Texts are composed (NFC) before they are encoded.

    Raises `BadInput` naming the file, and the line where there is one.
    """
    words: list[str] = []
    for number, line in enumerate(read_bytes(file).splitlines()):
        where = f"{file}: line {number + 1}"
        encoded, _, rank = line.partition(b" ")
        if rank != b"%d" % number:
            raise BadInput(f"{where}: {line[:40]!r} is not a word in base64, a space and its rank, {number}")
        try:
            words.append(byte_level.characters(binascii.a2b_base64(encoded, strict_mode=True)))
        except ValueError as error:
            raise BadInput(f"{where}: {encoded[:40]!r} is not base64: {error}") from None
    vocabulary = {token: i for i, token in enumerate([*words, *_CONTROL])}
    try:
        byte_level.check_bytes(words)
        if len(vocabulary) != len(words) + len(_CONTROL):
            raise BadInput(f"{len(words) + len(_CONTROL) - len(vocabulary)} of its words come twice")
        pairs = byte_level.merges(words)
    except BadInput as error:
        raise BadInput(f"{file}: {error}") from None
    splits = byte_level.SPLITS["qwen2"]
    return TokenizersBackend(byte_level.build(vocabulary, pairs, splits, whole_words=True, control=_CONTROL, nfc=True))

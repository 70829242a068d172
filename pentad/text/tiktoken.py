"""Read tiktoken's files: a byte-level BPE as lines of base64 and rank; control tokens follow its words.

Qwen's qwen.tiktoken is defined by tokenization_qwen.py and qwen_generation_utils.py of Qwen/Qwen-14B-Chat, and
tokenization_note.md of QwenLM/Qwen; Llama 3's tokenizer.model by llama/tokenizer.py of meta-llama/llama3, and
models/llama3 of meta-llama/llama-models.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from pentad.errors import BadInput
from pentad.text import byte_level
from pentad.text.backends import TokenizersBackend
from pentad.text.files import read_bytes, refusing

__all__ = ["CHATML", "LLAMA3_CHAT", "LLAMA3_ROLES", "QWEN_ROLES", "is_tiktoken", "load_llama3", "load_qwen"]

QWEN_ROLES = {"eos_token": "<|endoftext|>"}
_QWEN_CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))

LLAMA3_ROLES = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
_LLAMA3_CONTROL = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
_LLAMA31_CONTROL = {**_LLAMA3_CONTROL, 4: "finetune_right_pad_id", 8: "eom_id", 10: "python_tag"}
_LLAMA3_RESERVED = 256  # names above, by number, and <|reserved_special_token_0|>, …

_FIRST_LINE = re.compile(rb"[!-~]+ \d+\r?(?:\n|$)")

# Renders as `make_context` of qwen_generation_utils.py does, with the default system message of that file's `chat`.
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

# Renders as `ChatFormat.encode_dialog_prompt` of llama/tokenizer.py does.
LLAMA3_CHAT = """\
{%- if tools -%}{{- raise_exception('this template does not support tools') -}}{%- endif -%}
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content.strip() + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""


def is_tiktoken(content: bytes) -> bool:
    """True if a tokenizer.model begins with a line of text; SentencePiece's begins with a protobuf tag, 0x0a."""
    return _FIRST_LINE.match(content) is not None


def load_qwen(file: Path) -> TokenizersBackend:
    """Load the words of a qwen.tiktoken, then the 208 control tokens (from id 151643 on in the published file).

    Texts are normalized to NFC before they are encoded.

    Raises:
        BadInput: the file is broken; the message names the file and the line.
    """
    return _load(file, _QWEN_CONTROL, "qwen2", nfc=True)


def load_llama3(file: Path, *, tool_use: bool) -> TokenizersBackend:
    """Load the words of a tokenizer.model of Llama 3, then the 256 control tokens (from id 128000 on).

    Args:
        file: the tokenizer.model.
        tool_use: three of the reserved control tokens have a name, as from Llama 3.1 on.

    Raises:
        BadInput: the file is broken; the message names the file and the line.
    """
    names = _LLAMA31_CONTROL if tool_use else _LLAMA3_CONTROL
    unnamed = [i for i in range(_LLAMA3_RESERVED) if i not in names]
    names = names | {i: f"reserved_special_token_{n}" for n, i in enumerate(unnamed)}
    return _load(file, [f"<|{names[i]}|>" for i in range(_LLAMA3_RESERVED)], "llama-bpe")


def _load(file: Path, control: Sequence[str], split: str, *, nfc: bool = False) -> TokenizersBackend:
    words = []
    content = read_bytes(file)
    with refusing(str(file), prefix=True):
        for number, line in enumerate(content.splitlines()):
            encoded, _, rank = line.partition(b" ")
            if rank != b"%d" % number:
                raise BadInput(f"line {number + 1} is {line[:40]!r}; expected a word in base64, a space and {number}")
            words.append(byte_level.decode_base64(encoded, f"line {number + 1}"))
        (pattern,) = byte_level.SPLITS[split]
        return TokenizersBackend(byte_level.build_ranked([*words, *control], words, pattern, control=control, nfc=nfc))

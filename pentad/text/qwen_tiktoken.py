"""Read Qwen's qwen.tiktoken: a byte-level BPE as lines of base64 and rank; control tokens follow its words.

Defined by the published tokenizer: tokenization_qwen.py and qwen_generation_utils.py of Qwen/Qwen-14B-Chat, and
tokenization_note.md of QwenLM/Qwen.
"""

from pathlib import Path

from pentad.errors import BadInput
from pentad.text import byte_level
from pentad.text.backends import TokenizersBackend
from pentad.text.files import read_bytes, refusing

__all__ = ["CHATML", "END", "load"]

END = "<|endoftext|>"
_CONTROL = (END, "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))

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


def load(file: Path) -> TokenizersBackend:
    """Load the words, then the 208 control tokens (from id 151643 on in the published file).

    Texts are normalized to NFC before they are encoded.

    Raises:
        BadInput: the file is broken; the message names the file and the line.
    """
    words = []
    content = read_bytes(file)
    with refusing(str(file), prefix=True):
        for number, line in enumerate(content.splitlines()):
            encoded, _, rank = line.partition(b" ")
            if rank != b"%d" % number:
                raise BadInput(f"line {number + 1} is {line[:40]!r}; expected a word in base64, a space and {number}")
            words.append(byte_level.decode_base64(encoded, f"line {number + 1}"))
        tokens, pattern = [*words, *_CONTROL], byte_level.SPLITS["qwen2"][0]
        return TokenizersBackend(byte_level.build_ranked(tokens, words, pattern, control=_CONTROL, nfc=True))

"""Byte-level BPE (Radford et al. 2019): bytes as characters, the splits into words, merges.

llama.cpp (src/llama-vocab.cpp) defines how each value of `tokenizer.ggml.pre` splits a text.
"""

from __future__ import annotations

import binascii
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pentad.errors import BadInput

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    *("BYTE_OF", "CHARACTER_OF", "SPLITS", "WHOLE_WORDS"),
    *("build", "build_ranked", "characters", "decode_base64", "merges"),
]

_MAX_WORD = 1024  # bytes; the longest published word has 128, and finding its merges takes quadratic time

_GPT2 = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",)
_STARCODER = (r"\p{N}", *_GPT2)
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_QWEN2 = (_LLAMA3[0].replace(r"\p{N}{1,3}", r"\p{N}"),)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", *_GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")

# tokenizer.ggml.pre -> regular expressions, applied in order. Of names with equal splits, exports use the first.
SPLITS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "minerva-7b"), _STARCODER),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), _LLAMA3),
    **dict.fromkeys(("smaug-bpe", "dbrx"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan"), _QWEN2),
    "tekken": _TEKKEN,
    "default": _DEFAULT,
}
# With these names, a word of the vocabulary is encoded without merges, and BOS is added unless the file disables it.
WHOLE_WORDS = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken"})

# GPT-2's table: printable bytes are their own characters, the other bytes become U+0100, U+0101, …
_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_UNPRINTABLE = [byte for byte in range(256) if byte not in _PRINTABLE]
CHARACTER_OF = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(256 + n) for n, byte in enumerate(_UNPRINTABLE)}
BYTE_OF = {character: byte for byte, character in CHARACTER_OF.items()}


def characters(data: bytes) -> str:
    """`data` in the pipeline's form: one character for each byte."""
    return data.decode("latin-1").translate(CHARACTER_OF)


def decode_base64(encoded: str | bytes, where: str) -> str:
    """The word that `encoded` stands for, in the form of `characters`. Raises `BadInput`, naming `where`."""
    try:
        return characters(binascii.a2b_base64(encoded, strict_mode=True))
    except ValueError as error:
        raise BadInput(f"{where} is {encoded[:40]!r}, which is not base64: {error}") from None


def merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """List the merges of a BPE that always merges the pair whose word comes first in `words`, leftmost first.

    tiktoken orders words by rank, sentencepiece by score. Every split of a word into two words is listed. The extra
    merges do no harm: inside a longer text a word is merged in the same order as alone. So the same two parts always
    form the word, and the parts of its other splits never become neighbors.

    Raises:
        BadInput: a word is longer than any published one.
    """
    vocabulary = set(words)
    longest = max(words, key=len, default="")
    if len(longest) > _MAX_WORD:
        raise BadInput(f"a token has {len(longest)} bytes; expected at most {_MAX_WORD}: {longest[:20]}…")
    return [
        (word[:end], word[end:])
        for word in words
        for end in range(1, len(word))
        if word[:end] in vocabulary and word[end:] in vocabulary
    ]


def build(
    vocabulary: Mapping[str, int],
    pairs: Sequence[tuple[str, str]],
    splits: Sequence[str],
    *,
    whole_words: bool,
    control: Sequence[str],
    user_defined: Sequence[str] = (),
    nfc: bool = False,
) -> Tokenizer:
    """Build the pipeline of a byte-level BPE.

    Args:
        vocabulary: string -> id; words in the form of `characters`, added tokens as they are.
        pairs: the merges, in order.
        splits: regular expressions; each splits the pieces that the previous one produced.
        whole_words: encode a word of the vocabulary without merges.
        control: the control tokens.
        user_defined: the other added tokens.
        nfc: compose characters (NFC) before encoding.

    Raises:
        Exception: the `tokenizers` library refuses the vocabulary; it raises no narrower class.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pipeline = Tokenizer(models.BPE(vocab=dict(vocabulary), merges=list(pairs), ignore_merges=whole_words))
    if nfc:
        pipeline.normalizer = normalizers.NFC()
    pipeline.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splits]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    pipeline.decoder = decoders.ByteLevel()
    pipeline.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    pipeline.add_tokens([AddedToken(token, normalized=False) for token in user_defined])
    return pipeline


def build_ranked(
    tokens: Sequence[str], words: Sequence[str], pattern: str, *, control: Sequence[str], nfc: bool = False
) -> Tokenizer:
    """Build the pipeline of a BPE whose words are listed by rank, as in tiktoken.

    Args:
        tokens: all tokens by id.
        words: the words by rank, in the form of `characters`.
        pattern: the regular expression that splits a text into words.
        control: the control tokens.
        nfc: compose characters (NFC) before encoding.

    Raises:
        BadInput: a byte is missing from the words, a token is listed twice, or a word is longer than any published one.
    """
    missing = sorted(BYTE_OF[character] for character in BYTE_OF.keys() - set(words))
    if missing:
        raise BadInput(f"the vocabulary lacks {len(missing)} of the 256 bytes, such as 0x{missing[0]:02x}")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise BadInput(f"{len(tokens) - len(vocabulary)} of its tokens are listed twice")
    return build(vocabulary, merges(words), [pattern], whole_words=True, control=control, nfc=nfc)

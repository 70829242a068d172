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
_CASED = (  # the letters of DeepSeek LLM's tokenizer.json
    "A-Za-z"
    "\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556"
    "\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    "\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_CASED}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    r"\p{N}+",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_LLM[4], r"\p{N}")
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_SEED_CODER = (_QWEN2[0].replace(r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}\r\n]+"),)
_VIKING = ("\u0020?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+", r"\p{N}")
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", *_GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")

# tokenizer.ggml.pre -> regular expressions, applied in order. Of names with equal splits, exports use the first.
SPLITS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4", "a.x-4.0", "mellum"), _GPT2),
    **dict.fromkeys(("trillion", "granite-docling"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "minerva-7b"), _STARCODER),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0"), _LLAMA3),
    **dict.fromkeys(("smaug-bpe", "dbrx"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "kormo", "f2llmv2"), _QWEN2),
    "tekken": _TEKKEN,
    "deepseek-llm": _DEEPSEEK_LLM,
    "deepseek-coder": _DEEPSEEK_CODER,
    "deepseek-v3": _DEEPSEEK_V3,
    "seed-coder": _SEED_CODER,
    "viking": _VIKING,
    "default": _DEFAULT,
}
# With these names, a word of the vocabulary is encoded without merges, and BOS is added unless the file disables it.
WHOLE_WORDS = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0", "tekken"})

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

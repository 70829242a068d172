"""Byte-level BPE (Radford et al. 2019): bytes as characters, how texts are split into words, merges.

What each name of `tokenizer.ggml.pre` stands for: llama.cpp, src/llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from pentad.errors import BadInput

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["BYTE_OF", "CHARACTER_OF", "SPLITS", "WHOLE_WORDS", "build", "characters", "check_bytes", "merges"]

_LONGEST = 1024  # bytes; the longest word published has 128, and finding its merges is quadratic

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

# tokenizer.ggml.pre -> the splits, made one after the other. Of names that mean the same, the first is written.
SPLITS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "minerva-7b"), _STARCODER),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), _LLAMA3),
    **dict.fromkeys(("smaug-bpe", "dbrx"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan"), _QWEN2),
    "tekken": _TEKKEN,
    "default": _DEFAULT,
}
# These take a word that is in the vocabulary as it is, before any merge, and begin with BOS where
# the file is silent.
WHOLE_WORDS = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken"})


def _byte_characters() -> dict[int, str]:
    """GPT-2's table: each byte as a printable character, its own where it has one, else from U+0100
    on.
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


CHARACTER_OF = _byte_characters()
BYTE_OF = {character: byte for byte, character in CHARACTER_OF.items()}


def characters(data: bytes) -> str:
    """`data` as the pipeline spells it: one character a byte."""
    return data.decode("latin-1").translate(CHARACTER_OF)


def check_bytes(words: Iterable[str]) -> None:
    """Raises `BadInput` where one of the 256 bytes is no word, so that some text would have no ids."""
    missing = sorted(BYTE_OF[character] for character in BYTE_OF.keys() - set(words))
    if missing:
        raise BadInput(f"the vocabulary lacks {len(missing)} of the 256 bytes, 0x{missing[0]:02x} for one")


def merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """The merges of a BPE that joins, of all neighbors that make up a word, those whose word comes
    first in `words`, and of equals the leftmost: as tiktoken does by rank, sentencepiece by score.

    Every way to split a word in two words is listed; none is wrong. Inside the span that a word
    takes, merges come in the order in which they come for the word alone, so the two parts that it
    is made of at last are always the same, and the other ways never lie side by side.

    Raises `BadInput` for a word that is longer than any real one.
    """
    vocabulary = set(words)
    longest = max(words, key=len, default="")
    if len(longest) > _LONGEST:
        raise BadInput(f"a token has {len(longest)} bytes; {_LONGEST} are possible: {longest[:20]}…")
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
    """The pipeline of a byte-level BPE.

    `vocabulary`: string -> id, of words by their characters and of added tokens as they are;
    `pairs`: the merges, first ones first; `splits`: regular expressions, each applied to what the
    one before has left in one piece; `whole_words`: a word that is in the vocabulary is never
    merged from parts; `control`, `user_defined`: the added tokens; `nfc`: composes characters first.
    Raises whatever the `tokenizers` library raises, which is no narrower than Exception.
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

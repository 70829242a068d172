"""Read CLIP's vocabulary files: a byte-level BPE of lower-cased text, whose words end in ``</w>``.

OpenAI's bpe_simple_vocab_16e6.txt.gz is defined by clip/simple_tokenizer.py, vocab.json and merges.txt by transformers'
CLIPTokenizer. As in transformers, HTML entities and damaged Unicode in a text are left as they are.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from pentad.errors import BadInput
from pentad.text.byte_level import CHARACTER_OF
from pentad.text.files import read_json, read_text, refusing

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["MERGES", "OPENAI", "ROLES", "VOCABULARY", "has_vocabulary", "learn", "load_openai", "load_vocabulary"]

OPENAI, VOCABULARY, MERGES = "bpe_simple_vocab_16e6.txt.gz", "vocab.json", "merges.txt"
_START, _END = "<|startoftext|>", "<|endoftext|>"
ROLES = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}
END_OF_WORD = "</w>"

_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_OPENAI_MERGES = 49408 - 2 * 256 - 2  # the file has five times as many
_MAX_LEARNED = 4096  # merges; each takes a pass over all words
_MAX_TEXT = 20_000_000  # bytes; OpenAI's file has 3 million


def has_vocabulary(folder: Path) -> bool:
    """True if `folder` has a vocab.json and a merges.txt of CLIP's kind; those of GPT-2's kind have other tokens."""
    files = folder / VOCABULARY, folder / MERGES
    return all(file.is_file() for file in files) and {_START, _END} <= read_json(files[0]).keys()


def load_vocabulary(file: Path) -> Tokenizer:
    """The pipeline of a vocab.json, with the merges.txt beside it.

    Raises:
        BadInput: a file is broken; the message names it.
    """
    merges = file.with_name(MERGES)
    return _build(read_json(file), _pairs(merges, read_text(merges)))


def load_openai(file: Path) -> Tokenizer:
    """The pipeline of a bpe_simple_vocab_16e6.txt.gz: the bytes, the bytes that end words, merges, control tokens.

    Raises:
        BadInput: the file is broken; the message names it.
    """
    try:
        with gzip.open(file) as stream:
            content = stream.read(_MAX_TEXT + 1).decode()
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise BadInput(f"{file} is not a gzip archive of text: {error}") from None
    if len(content) > _MAX_TEXT:
        raise BadInput(f"{file} holds more than {_MAX_TEXT} bytes; expected OpenAI's 3 million")
    pairs = _pairs(file, content)[:_OPENAI_MERGES]
    return _build(_numbered(pairs), pairs)


def learn(texts: Iterable[str], size: int) -> dict[str, bytes]:
    """Learn a vocabulary: the most frequent pair is merged first. Equal texts give equal files.

    Args:
        texts: any texts.
        size: the most ids; there are fewer where the texts have no more pairs, or after `_MAX_LEARNED` merges.

    Returns:
        Name -> content of the files of a folder.
    """
    pipeline = _build(_numbered([]), [])
    counts = Counter[tuple[str, ...]]()
    for text in texts:
        for word, _ in pipeline.pre_tokenizer.pre_tokenize_str(pipeline.normalizer.normalize_str(text)):
            counts[*word[:-1], word[-1] + END_OF_WORD] += 1
    merges = list[tuple[str, str]]()
    while len(merges) < min(size - len(_numbered([])), _MAX_LEARNED):
        pairs = Counter[tuple[str, str]]()
        for parts, count in counts.items():
            for pair in pairwise(parts):
                pairs[pair] += count
        if not pairs:
            break
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        counts = Counter({_merged(parts, merges[-1]): count for parts, count in counts.items()})
    settings = {"tokenizer_class": "CLIPTokenizer", **ROLES}
    return {
        VOCABULARY: json.dumps(_numbered(merges), ensure_ascii=False).encode(),
        MERGES: "\n".join(["#version: 0.2", *map(" ".join, merges), ""]).encode(),
        "tokenizer_config.json": json.dumps(settings, indent=2).encode(),
    }


def _merged(parts: Sequence[str], pair: tuple[str, str]) -> tuple[str, ...]:
    """A word's parts with a pair merged wherever it is."""
    merged = list[str]()
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return tuple(merged)


def _numbered(pairs: Sequence[tuple[str, str]]) -> dict[str, int]:
    """The ids of a vocabulary in OpenAI's order: bytes, bytes that end words, merges, control tokens."""
    characters = [*CHARACTER_OF.values()]
    words = [*characters, *(character + END_OF_WORD for character in characters), *map("".join, pairs), _START, _END]
    return {word: i for i, word in enumerate(dict.fromkeys(words))}


def _pairs(file: Path, text: str) -> list[tuple[str, str]]:
    """The merges of a file whose first line may be a comment.

    Raises:
        BadInput: a line isn't two words.
    """
    lines = text.split("\n")
    pairs = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or (number == 1 and "#version" in line):
            continue
        first, _, second = line.rstrip("\r").partition(" ")
        if not first or not second or " " in second:
            raise BadInput(f"{file}: line {number} is {line[:40]!r}; expected two words")
        pairs.append((first, second))
    return pairs


def _build(vocabulary: Mapping[str, int], pairs: Sequence[tuple[str, str]]) -> Tokenizer:
    """The pipeline of transformers' CLIPTokenizer."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    with refusing("the vocabulary and its merges don't fit each other"):
        model = models.BPE(
            vocab=dict(vocabulary), merges=list(pairs), end_of_word_suffix=END_OF_WORD, unk_token=_END, fuse_unk=False
        )
    pipeline = Tokenizer(model)
    pipeline.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    pipeline.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_SPLIT), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    pipeline.decoder = decoders.ByteLevel()
    pipeline.post_processor = processors.RobertaProcessing(
        (_END, vocabulary[_END]), (_START, vocabulary[_START]), trim_offsets=False, add_prefix_space=False
    )
    pipeline.add_special_tokens([_START, _END])
    return pipeline

"""A tiny CLIP in a folder as transformers writes it, with a tokenizer trained on a few sentences."""

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPImageProcessorPil, CLIPProcessor, CLIPTokenizer

from pentad.text.byte_level import CHARACTER_OF
from tests.helpers.vocabularies import SHORT
from tests.models.test_clip import saved

START, END = "<|startoftext|>", "<|endoftext|>"
SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@cache  # equal pairs are counted in no certain order
def vocabulary(size: int = 700) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary with the order of OpenAI's, and its merges."""
    pipeline = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    pipeline.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    pipeline.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    pipeline.train_from_iterator([*SHORT, "a photo of a red cat, a dog and a horse"] * 2, trainer)
    merges = [tuple(merge) for merge in json.loads(pipeline.to_str())["model"]["merges"]]
    characters = [*CHARACTER_OF.values()]
    words = [*characters, *(character + "</w>" for character in characters), *map("".join, merges), START, END]
    return {word: i for i, word in enumerate(words)}, merges


def write_vocabulary(folder: Path, form: str) -> CLIPTokenizer:
    """Write a vocabulary as "tokenizer.json", "vocab.json" or "openai"; the peer with the same vocabulary."""
    ids, merges = vocabulary()
    peer = CLIPTokenizer(vocab=ids, merges=merges, model_max_length=77)
    folder.mkdir(exist_ok=True)
    lines = "\n".join(["#version: 0.2", *map(" ".join, merges), ""])
    if form == "tokenizer.json":
        peer.save_pretrained(folder)
    elif form == "vocab.json":
        (folder / "vocab.json").write_text(json.dumps(ids))
        (folder / "merges.txt").write_text(lines)
    else:
        (folder / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress(lines.encode()))
    return peer


def write_clip(folder: Path, *, width: int = 24) -> tuple[Any, CLIPProcessor]:
    """A CLIP with embeddings of a width, and its processor; the peers."""
    ids, merges = vocabulary()
    special = {"vocab_size": len(ids), "bos_token_id": ids[START], "eos_token_id": ids[END]}
    peer = saved(folder, special, width=width)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = CLIPProcessor(images, CLIPTokenizer(vocab=ids, merges=merges, model_max_length=77))
    processor.save_pretrained(folder)
    return peer, processor

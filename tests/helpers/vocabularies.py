"""Small vocabularies of every type, and checkpoints that contain them."""

import base64
import io
import json
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import sentencepiece
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Pipeline

TESTS = Path(__file__).parent.parent
TEXTS = [(text, times) for text, times in json.loads((TESTS / "text/corpus.json").read_text("utf-8"))]
CORPUS = [text * times for text, times in TEXTS]
SHORT = [text * min(times, 50) for text, times in TEXTS]
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PUBLISHED = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
}


def words_by_rank(pattern: str, size: int = 700) -> list[bytes]:
    """Train a byte-level BPE; returns its words by rank: the 256 bytes, then the merged words."""
    pipeline = Pipeline(models.BPE())
    pipeline.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    pipeline.train_from_iterator(SHORT, trainer)
    pipeline.decoder = decoders.ByteLevel()
    vocabulary = pipeline.get_vocab()
    learned = [to_bytes(word) for word in sorted(vocabulary, key=vocabulary.__getitem__) if len(word) > 1]
    return [*(bytes([byte]) for byte in range(256)), *learned]


def to_bytes(word: str) -> bytes:
    """Map GPT-2's characters back to bytes: from U+0100 on they stand for the unprintable bytes, in order."""
    unprintable = [*range(0x21), *range(0x7F, 0xA1), 0xAD]
    return bytes(unprintable[ord(c) - 256] if ord(c) > 255 else ord(c) for c in word)


def tekken(**change: Any) -> dict[str, Any]:
    """Make a tekken.json with 600 ids: 30 control tokens and 570 of its 700 words. `change` replaces fields."""
    words = words_by_rank(TEKKEN)
    content = {
        "config": {
            "pattern": TEKKEN,
            "num_vocab_tokens": len(words),
            "default_vocab_size": 600,
            "default_num_special_tokens": 30,
            "version": "v3",
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(word).decode(), "token_str": None}
            for rank, word in enumerate(words)
        ],
    }
    for key, value in change.items():
        (content if key in ("config", "vocab", "special_tokens") else content["config"])[key] = value
    return content


def tiktoken_file(words: list[bytes]) -> bytes:
    """A qwen.tiktoken, or a tokenizer.model of Llama 3: lines of base64 and rank."""
    return b"".join(base64.b64encode(word) + b" %d\n" % rank for rank, word in enumerate(words))


def sentencepiece_model(**options: Any) -> bytes:
    """Train a small SentencePiece BPE with byte fallback, like Llama's."""
    lines = [line for text in SHORT for line in text.splitlines() if line.isprintable()]
    model = io.BytesIO()
    options = {"model_type": "bpe", "vocab_size": 700, "normalization_rule_name": "identity", **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 4),
        model_writer=model,
        byte_fallback=True,
        character_coverage=0.99,
        remove_extra_whitespaces=False,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def published(version: str) -> bytes:
    """One of Mistral's SentencePiece models, from mistral-common."""
    return (resources.files("mistral_common") / "data" / PUBLISHED[version]).read_bytes()


def source(
    folder: Path, files: dict[str, Any], *, format: str = "hf", config: dict[str, Any] | None = None
) -> SimpleNamespace:
    """Write `files` (name -> bytes, text or JSON) to `folder`; returns a stand-in for its checkpoint."""
    for name, content in files.items():
        if isinstance(content, str):
            content = content.encode()
        elif not isinstance(content, bytes):
            content = json.dumps(content).encode()
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return SimpleNamespace(path=folder, format=format, config=config or {})

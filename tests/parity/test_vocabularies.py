"""A GGUF vocabulary gives llama.cpp's ids, for each value of tokenizer.ggml.pre that pentad reads.

The vocabulary is trained on the test's texts. llama.cpp may split characters that its table of Unicode categories lacks
differently; the texts have none. Where llama.cpp's splits are known not to be the published ones, texts are left out.
"""

import unicodedata
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter

from pentad.text import byte_level, gguf_vocab
from tests.helpers.vocabularies import SHORT, TEKKEN, words_by_rank
from tests.parity.golden import apart

pytest.importorskip("llama_cpp", reason="make parity installs it")

TEXTS = [text for text in SHORT if text] + [gguf_vocab.PROBE, "It's WE'LL 1234 12345.6", "\r\n\n  x \t\n"]


def is_split_as_published(pre: str, text: str) -> bool:
    """Whether llama.cpp splits the text as the model's published tokenizer.json does."""
    if pre == "tekken":  # its form of the expression has no marks (category M)
        return not any(unicodedata.category(c).startswith("M") for c in text)
    if pre in ("deepseek-llm", "deepseek-coder"):  # it sees U+000B for other spaces, some of which are in a class
        return not any(c.isspace() and ord(c) > 127 for c in text)
    return True


def metadata(pre: str) -> dict[str, Any]:
    words = [byte_level.characters(word) for word in words_by_rank(TEKKEN)]
    tokens = [*words, "<s>", "</s>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * len(words) + [3, 3],
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in byte_level.merges(words)],
        "tokenizer.ggml.bos_token_id": len(words),
        "tokenizer.ggml.eos_token_id": len(words) + 1,
    }


def write(path: Path, keys: dict[str, Any]) -> None:
    """Write a GGUF with a vocabulary and the sizes that llama.cpp requires of a Llama."""
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in keys.items():
        add = {str: writer.add_string, int: writer.add_uint32, list: writer.add_array}[type(value)]
        add(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def ids(path: Path, texts: list[str]) -> list[list[int]]:
    import llama_cpp

    model = llama_cpp.Llama(model_path=str(path), vocab_only=True, verbose=False)
    return [model.tokenize(text.encode(), add_bos=False, special=False) for text in texts]


@pytest.mark.parametrize("pre", byte_level.SPLITS)
def test_ids_equal_llama_cpps(tmp_path: Path, pre: str) -> None:
    keys = metadata(pre)
    write(tmp_path / "m.gguf", keys)
    tokenizer = gguf_vocab.load(keys)
    assert tokenizer is not None
    texts = [text for text in TEXTS if is_split_as_published(pre, text)]
    assert len(texts) > len(TEXTS) / 2
    assert [tokenizer.encode(text) for text in texts] == apart(partial(ids, texts=texts), tmp_path / "m.gguf")

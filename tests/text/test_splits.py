"""How values of tokenizer.ggml.pre split a text; tests/parity/test_vocabularies.py compares ids with llama.cpp's."""

import pytest

from pentad.text import byte_level

TEXT = "It's a (bad)  test_1234 \r\n\nx=1;\n"
GPT2_WORDS = ["It", "'s", " a", " (", "bad", ")", " ", " test", "_"]
WORDS = {
    "gpt-2": [*GPT2_WORDS, "1234", " \r\n", "\n", "x", "=", "1", ";", "\n"],
    "smollm": [*GPT2_WORDS, "1", "2", "3", "4", " \r\n", "\n", "x", "=", "1", ";", "\n"],
    "llama-bpe": [*GPT2_WORDS, "123", "4", " \r\n\n", "x", "=", "1", ";\n"],
    "qwen2": [*GPT2_WORDS, "1", "2", "3", "4", " \r\n\n", "x", "=", "1", ";\n"],
    "deepseek-llm": [
        *("It", "'", "s", " a", " (", "bad", ")", " ", " test", "_", "1234", " ", "\r", "\n", "\n"),
        *("x", "=", "1", ";", "\n"),
    ],
    "deepseek-coder": [
        *("It", "'", "s", " a", " (", "bad", ")", " ", " test", "_", "1", "2", "3", "4", " ", "\r", "\n", "\n"),
        *("x", "=", "1", ";", "\n"),
    ],
    "deepseek-v3": [*GPT2_WORDS, "123", "4", " \r\n\n", "x", "=", "1", ";\n"],
    "seed-coder": [*GPT2_WORDS, "1", "2", "3", "4", " \r\n\n", "x", "=", "1", ";", "\n"],
    "viking": ["It's", " a", " (", "bad", ") ", " test_", "1", "2", "3", "4", " \r\n\n", "x=", "1", ";", "\n"],
}
HAN = {
    "deepseek-llm": ["日本語かな", " ", "中文한국", " éǅ", "ა"],
    "deepseek-coder": ["日本語かな", " ", "中文한국", " éǅ", "ა"],
    "deepseek-v3": ["日本語かな", " ", "中文", "한국", " éǅა"],
}


def split(pre: str, text: str) -> list[str]:
    pipeline = byte_level.build({}, [], byte_level.SPLITS[pre], whole_words=False, control=())
    words = pipeline.pre_tokenizer.pre_tokenize_str(text)
    return [bytes(byte_level.BYTE_OF[character] for character in word).decode() for word, _ in words]


@pytest.mark.parametrize("pre", WORDS)
def test_words(pre: str) -> None:
    assert split(pre, TEXT) == WORDS[pre]


@pytest.mark.parametrize("pre", HAN)
def test_words_of_other_scripts(pre: str) -> None:
    assert split(pre, "日本語かな 中文한국 éǅა") == HAN[pre]

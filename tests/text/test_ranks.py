"""Byte-level BPE by rank: qwen.tiktoken and random vocabularies against a reference loop."""

import base64
import itertools
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from pentad.errors import BadInput
from pentad.text import Tokenizer, byte_level, load
from tests.helpers.vocabularies import QWEN, SHORT, source, tiktoken_file, words_by_rank

WORDS = words_by_rank(QWEN)
RANKS = {word: rank for rank, word in enumerate(WORDS)}


def merged(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Encode a word by tiktoken's rule: a known word is one token; otherwise merge the leftmost pair of lowest rank."""
    if word in ranks:
        return [ranks[word]]
    parts = [bytes([byte]) for byte in word]
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def by_loop(text: str) -> list[int]:
    words = regex.findall(QWEN, unicodedata.normalize("NFC", text))
    return [i for word in words for i in merged(word.encode(), RANKS)]


def qwen(folder: Path, **generation: Any) -> Tokenizer:
    files = {
        "qwen.tiktoken": tiktoken_file(WORDS),
        "generation_config.json": {"eos_token_id": len(WORDS), **generation},
    }
    tokenizer = load(source(folder, files))
    assert tokenizer is not None
    return tokenizer


@given(data=st.data())
def test_merges_recovered_from_ranks(data: st.DataObject) -> None:
    # The words overlap and have arbitrary ranks; some of them can't be made by merges.
    found = data.draw(st.lists(st.text("ab", min_size=2, max_size=6), unique=True, max_size=12))
    words = [*map(chr, range(33, 127)), *found]  # the byte-level alphabet maps these characters to themselves
    vocabulary = {word: rank for rank, word in enumerate(words)}
    pipeline = byte_level.build(vocabulary, byte_level.merges(words), [r"\s+"], whole_words=True, control=())
    ranks = {word.encode(): rank for word, rank in vocabulary.items()}
    text = data.draw(st.sampled_from([*found, "a"]) | st.text("ab", min_size=1, max_size=40))
    assert pipeline.encode(text).ids == merged(text.encode(), ranks)


def test_ids_equal_the_reference_loop(tmp_path: Path) -> None:
    tokenizer = qwen(tmp_path)
    for text in SHORT:
        assert tokenizer.encode(text) == by_loop(text)
        assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


@given(text=st.text())
def test_ids_of_any_text_equal_the_reference_loop(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    if not _loaded:
        _loaded.append(qwen(tmp_path_factory.mktemp("qwen")))
    assert _loaded[0].encode(text) == by_loop(text)


_loaded: list[Tokenizer] = []


def test_control_tokens_follow_the_words(tmp_path: Path) -> None:
    tokenizer = qwen(tmp_path)
    size = len(WORDS)  # 151643 in the published file
    assert tokenizer.vocab_size == size + 208
    assert list(tokenizer.control)[:4] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_0|>"]
    assert [tokenizer.control[token] - size for token in list(tokenizer.control)[:4]] == [0, 1, 2, 3]
    assert tokenizer.control["<|extra_204|>"] == size + 207
    assert (tokenizer.bos_id, tokenizer.adds_bos, tokenizer.eos_ids) == (None, False, (size, size + 2))
    assert tokenizer.encode("a<|im_end|>", special=True)[-1] == size + 2
    assert tokenizer.decode(tokenizer.encode("a<|im_end|>")) == "a<|im_end|>"


@pytest.mark.parametrize("system", [None, "Be brief.", ""])
def test_chat_equals_make_context(tmp_path: Path, system: str | None) -> None:
    tokenizer = qwen(tmp_path, chat_format="chatml")
    start, end = tokenizer.control["<|im_start|>"], tokenizer.control["<|im_end|>"]
    turns = [("user", " hi  <|im_end|>"), ("assistant", "ok\n"), ("user", "né 12")]
    context = [start, *by_loop("system\n"), *by_loop("You are a helpful assistant." if system is None else system), end]
    for role, content in turns:
        context += [*by_loop("\n"), start, *by_loop(role), *by_loop("\n"), *by_loop(content), end]
    context += [*by_loop("\n"), start, *by_loop("assistant\n")]
    messages = [{"role": role, "content": content} for role, content in turns]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    assert tokenizer.chat(messages) == context


@pytest.mark.parametrize("chat_format", ["raw", None])
def test_a_base_model_has_no_template(tmp_path: Path, chat_format: str | None) -> None:
    assert qwen(tmp_path, chat_format=chat_format).chat_template is None


def line(word: bytes, rank: int) -> bytes:
    return base64.b64encode(word) + b" %d\n" % rank


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ".*256 of the 256 bytes.* 0x00"),
        (tiktoken_file(WORDS[:100]), ".*156 of the 256 bytes.* 0x64"),
        (b"AA= 0\n", "line 1 is b'AA=', .*base64"),
        (b"!!!! 0\n", "line 1 is b'!!!!', .*base64"),
        (b"AAAA\n", "line 1 is b'AAAA'; .* 0$"),
        (b"AAAA 1\n", "line 1 is b'AAAA .* 0$"),
        (b"AAAA zero\n", "line 1 is b'AAAA .* 0$"),
        (tiktoken_file(WORDS) + line(b"xyz", len(WORDS) + 1), f"line {len(WORDS) + 1} "),
        (tiktoken_file(WORDS) + line(WORDS[300], len(WORDS)), "1 .*twice"),
        (tiktoken_file(WORDS) + line(b"<|im_end|>", len(WORDS)), "1 .*twice"),
        (tiktoken_file(WORDS) + line(b"x" * 10**6, len(WORDS)), ".*1000000 bytes"),
        (b"\x93NUMPY\x01\x00v\x00" * 99, "line 1"),
    ],
)
def test_an_invalid_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(BadInput, match=f"qwen.tiktoken: {message}") as error:
        load(source(tmp_path, {"qwen.tiktoken": content}))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300 + len(str(tmp_path))

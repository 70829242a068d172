"""Llama 3's tokenizer.model gives the ids of the tiktoken package, and the dialogs of Meta's code."""

import base64
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from pentad.errors import BadInput
from pentad.text import Tokenizer, load
from pentad.text.export import gguf_metadata, hf_files
from tests.helpers.vocabularies import SHORT, published, source, tiktoken_file, words_by_rank

SPLIT = (  # of meta-llama/llama3: llama/tokenizer.py
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RESERVED = "<|reserved_special_token_{}|>".format
NAMES = [
    *("<|begin_of_text|>", "<|end_of_text|>", *map(RESERVED, range(4))),
    *("<|start_header_id|>", "<|end_header_id|>", RESERVED(4), "<|eot_id|>", *map(RESERVED, range(5, 251))),
]
NAMES_OF_3_1 = [
    *("<|begin_of_text|>", "<|end_of_text|>", RESERVED(0), RESERVED(1), "<|finetune_right_pad_id|>", RESERVED(2)),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
    *map(RESERVED, range(3, 248)),
]
WORDS = words_by_rank(SPLIT)
SIZE = len(WORDS)  # 128000 in the published file
PEER = tiktoken.Encoding(
    "llama3",
    pat_str=SPLIT,
    mergeable_ranks={word: rank for rank, word in enumerate(WORDS)},
    special_tokens={name: SIZE + i for i, name in enumerate(NAMES)},
)
META = {"dim": 64, "multiple_of": 32, "vocab_size": SIZE + 256}


def llama3(folder: Path, content: bytes | None = None, **params: Any) -> Tokenizer:
    files = {"tokenizer.model": tiktoken_file(WORDS) if content is None else content}
    tokenizer = load(source(folder, files, format="consolidated", config=META | params), SIZE + 256)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return llama3(tmp_path_factory.mktemp("llama3"))


def test_ids_equal_tiktoken(tokenizer: Tokenizer) -> None:
    for text in SHORT:
        ids = tokenizer.encode(text)
        assert ids == PEER.encode_ordinary(text)
        assert tokenizer.decode(ids) == text
    text = "<|begin_of_text|>a <|eot_id|>b<|reserved_special_token_250|>"
    assert tokenizer.encode(text, special=True) == PEER.encode(text, allowed_special="all")
    assert tokenizer.encode(text) == PEER.encode_ordinary(text)


@given(text=st.text())
def test_ids_of_any_text_equal_tiktoken(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.encode(text) == PEER.encode_ordinary(text)


@pytest.mark.parametrize(("params", "names"), [({}, NAMES), ({"use_scaled_rope": True}, NAMES_OF_3_1)])
def test_control_tokens_follow_the_words(tmp_path: Path, params: dict[str, Any], names: list[str]) -> None:
    tokenizer = llama3(tmp_path, **params)
    assert tokenizer.control == {name: SIZE + i for i, name in enumerate(names)}
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.adds_bos) == (SIZE + 256, SIZE, True)
    ends = [SIZE + 1, SIZE + 9] + ([SIZE + 8] if params else [])
    assert sorted(tokenizer.eos_ids) == sorted(ends)


def test_chat_equals_metas_dialog_prompt(tokenizer: Tokenizer) -> None:
    dialog = [("system", "Be brief. <|eot_id|>"), ("user", " hi\n"), ("assistant", ""), ("user", "\x1c né 1234 \n\n")]

    def header(role: str) -> list[int]:
        start, end = (PEER.encode_single_token(f"<|{name}_header_id|>") for name in ("start", "end"))
        return [start, *PEER.encode_ordinary(role), end, *PEER.encode_ordinary("\n\n")]

    expected = [SIZE]
    for role, content in dialog:
        expected += [*header(role), *PEER.encode_ordinary(content.strip()), SIZE + 9]
    assert tokenizer.chat([{"role": role, "content": content} for role, content in dialog]) == [
        *expected,
        *header("assistant"),
    ]
    with pytest.raises(BadInput, match="tools"):
        tokenizer.chat([{"role": "user", "content": "a"}], tools=[{"name": "x"}])


def test_sentencepiece_models_of_the_same_name_are_still_read(tmp_path: Path) -> None:
    files = {"tokenizer.model": published("v1")}
    tokenizer = load(source(tmp_path, files, format="consolidated", config={"hidden_dim": 8}))
    assert tokenizer is not None
    assert "<|begin_of_text|>" not in tokenizer.control


def test_the_tokenizer_converts(tmp_path: Path) -> None:
    checkpoint = source(tmp_path, {"tokenizer.model": tiktoken_file(WORDS)}, format="consolidated", config=META)
    assert gguf_metadata(checkpoint)["tokenizer.ggml.pre"] == "llama-bpe"
    made = load(source(tmp_path / "hf", hf_files(checkpoint)))
    assert made is not None
    original = llama3(tmp_path / "meta")
    assert (made.control, made.bos_id, made.adds_bos) == (original.control, original.bos_id, True)
    assert all(made.encode(text) == original.encode(text) for text in SHORT)


def line(word: bytes, rank: int) -> bytes:
    return base64.b64encode(word) + b" %d\n" % rank


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tiktoken_file(WORDS[:100]), ".*156 of the 256 bytes.* 0x64"),
        (b"AA= 0\n", "line 1 is b'AA=', .*base64"),
        (b"AAAA 1\n", "line 1 is b'AAAA .* 0$"),
        (b"AAAA 0\nAAAB\n", "line 2 is b'AAAB'; .* 1$"),
        (tiktoken_file(WORDS) + line(b"xyz", SIZE + 1), f"line {SIZE + 1} "),
        (tiktoken_file(WORDS) + line(WORDS[300], SIZE), "1 .*twice"),
        (tiktoken_file(WORDS) + line(b"x" * 10**6, SIZE), ".*1000000 bytes"),
        (b"AAAA\n", "neither a SentencePiece model nor tiktoken's lines"),
        (b"", "neither a SentencePiece model nor tiktoken's lines"),
    ],
)
def test_an_invalid_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(BadInput, match=rf"tokenizer\.model: {message}") as error:
        llama3(tmp_path, content)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400 + len(str(tmp_path))


def test_words_without_embedding_rows_are_refused(tmp_path: Path) -> None:
    files = {"tokenizer.model": tiktoken_file(WORDS)}
    with pytest.raises(BadInput, match=f"{SIZE + 256} ids, but its embedding {SIZE - 1} rows"):
        load(source(tmp_path, files, format="consolidated", config=META), SIZE - 1)

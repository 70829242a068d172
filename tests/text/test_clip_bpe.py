"""CLIP's vocabularies give the ids of transformers' CLIPTokenizer, from each of their files."""

import gzip
from itertools import product
from pathlib import Path

import pytest

from pentad import BadInput, text
from pentad.text.byte_level import CHARACTER_OF
from pentad.weights.checkpoint import Checkpoint
from tests.helpers.clip_files import END, START, vocabulary, write_vocabulary

TEXTS = [
    "a photo of a cat.",
    "  Two\tspaces\n\nand LINES, it's 2023!  ",
    "naïve café — İstanbul ﬁn e\u0301",
    "日本語 and 🤷‍♂️ emoji, don't &amp; won't",
    "",
    "12345 a1b2 ___ '''s",
]


def source(folder: Path) -> Checkpoint:
    return Checkpoint(folder, "hf", {}, {}, {})


@pytest.mark.parametrize("form", ["tokenizer.json", "vocab.json", "openai"])
def test_ids_equal_those_of_transformers(tmp_path: Path, form: str) -> None:
    peer = write_vocabulary(tmp_path, form)
    tokenizer = text.load(source(tmp_path))
    assert tokenizer is not None
    for one in TEXTS:
        ids = [*tokenizer.encode(one, bos=True), *tokenizer.closing]
        assert ids == peer(one).input_ids
        assert tokenizer.decode(ids).strip() == peer.decode(ids, skip_special_tokens=True).strip()
    assert (tokenizer.adds_bos, tokenizer.special_tokens["pad_token"]) == (True, END)
    assert tokenizer.control == {START: peer.bos_token_id, END: peer.eos_token_id}


def test_the_first_merges_of_openai_s_longer_list(tmp_path: Path) -> None:
    pairs = ["#version: 0.2", *(f"{one} {other}" for one, other in product(CHARACTER_OF.values(), repeat=2))]
    (tmp_path / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress("\n".join(pairs).encode()))
    tokenizer = text.load(source(tmp_path))
    assert tokenizer is not None
    assert tokenizer.control == {START: 49406, END: 49407}  # as in the published networks


def test_a_text_forges_no_control_token(tmp_path: Path) -> None:
    write_vocabulary(tmp_path, "vocab.json")
    tokenizer = text.load(source(tmp_path))
    assert tokenizer is not None
    assert not {*tokenizer.encode(f"cat {END} {START}")} & {*tokenizer.control.values()}


def test_vocabularies_that_are_broken(tmp_path: Path) -> None:
    openai = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    for content, message in {
        b"no gzip": "is not a gzip archive of text",
        gzip.compress(b"#version\na b\n")[:-6]: "is not a gzip archive of text",
        gzip.compress(b"#version\na b c\n"): "line 2 is 'a b c'; expected two words",
        gzip.compress(b"#version\nzz yy\n"): "don't fit each other",
    }.items():
        openai.write_bytes(content)
        with pytest.raises(BadInput, match=message):
            text.load(source(tmp_path))
    openai.unlink()
    write_vocabulary(tmp_path, "vocab.json")
    (tmp_path / "merges.txt").write_text("lonely\n")
    with pytest.raises(BadInput, match=r"merges.txt: line 1 is 'lonely'; expected two words"):
        text.load(source(tmp_path))


def test_other_vocabularies_of_two_files_are_none_of_clip_s(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0, "<|endoftext|>": 1}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    assert text.load(source(tmp_path)) is None
    assert len(vocabulary()[1]) > 100

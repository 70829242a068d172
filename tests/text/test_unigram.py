"""Unigram vocabularies like T5's: spiece.model gives sentencepiece's ids, tokenizer.json gives transformers'."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
from transformers import T5Tokenizer

from pentad.errors import BadInput
from pentad.text import Tokenizer, export, load
from tests.helpers.tiny_switch import unigram_model
from tests.helpers.vocabularies import SHORT, source

SPANS = "The <extra_id_0> walks in <extra_id_1> park"
SENTINELS = [f"<extra_id_{i}>" for i in reversed(range(100))]


@pytest.fixture
def spiece(tmp_path: Path) -> SimpleNamespace:
    return source(tmp_path, {"spiece.model": unigram_model()})


@pytest.fixture
def tokenizer(spiece: SimpleNamespace) -> Tokenizer:
    loaded = load(spiece)
    assert loaded is not None
    return loaded


@pytest.fixture(scope="module")
def peer() -> T5Tokenizer:
    """A tokenizer without normalization, built from pieces: reading the model file would need protobuf."""
    model = sentencepiece.SentencePieceProcessor(model_proto=unigram_model("identity"))
    pieces = [(model.id_to_piece(i), model.get_score(i)) for i in range(model.vocab_size())]
    return T5Tokenizer(vocab=[*pieces, *((sentinel, 0.0) for sentinel in SENTINELS)])


@pytest.fixture
def pipeline(peer: T5Tokenizer, tmp_path: Path) -> Tokenizer:
    peer.save_pretrained(tmp_path)
    loaded = load(source(tmp_path, {}))
    assert loaded is not None
    return loaded


def test_ids_and_text_equal_sentencepiece(tokenizer: Tokenizer) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=unigram_model())
    for text in SHORT:
        ids = processor.encode(text)
        assert tokenizer.encode(text) == ids
        if 2 not in ids:  # sentencepiece decodes its unknown token differently
            assert tokenizer.decode(ids) == processor.decode(ids)


def test_sentinels_follow_the_vocabulary_in_reverse_order(tokenizer: Tokenizer) -> None:
    size = sentencepiece.SentencePieceProcessor(model_proto=unigram_model()).vocab_size()
    assert [tokenizer.control[sentinel] for sentinel in SENTINELS] == list(range(size, size + 100))
    assert tokenizer.vocab_size == size + 100
    assert (tokenizer.eos_ids, tokenizer.bos_id, tokenizer.adds_bos) == ((1,), None, False)


def test_sentinels_are_text_unless_special(tokenizer: Tokenizer, pipeline: Tokenizer) -> None:
    for each in (tokenizer, pipeline):
        first, second = each.control["<extra_id_0>"], each.control["<extra_id_1>"]
        words = [each.encode(text) for text in ("The", "walks in", "park")]
        assert each.encode(SPANS, special=True) == [*words[0], first, *words[1], second, *words[2]]
        plain = each.encode(SPANS)
        assert not {first, second} & set(plain)
        assert each.decode(plain) == SPANS
        spans = [first, *each.encode("dog"), second, *each.encode("the big")]
        assert each.decode(spans, special=True) == "<extra_id_0> dog<extra_id_1> the big"
        assert each.decode(spans) == "dog the big"


def test_tokenizer_json_ids_equal_transformers(pipeline: Tokenizer, peer: T5Tokenizer) -> None:
    for text in (SPANS, "Hello  world ", "A<extra_id_0>b</s>", *SHORT):
        assert pipeline.encode(text, special=True) == peer(text, add_special_tokens=False).input_ids


def test_unknown_characters_give_the_unknown_token(tokenizer: Tokenizer, pipeline: Tokenizer) -> None:
    for each in (tokenizer, pipeline):
        assert each.encode("a \u2603") == [*each.encode("a"), *each.encode("\u2603")]
        assert each.encode("\u2603")[-1] == each.control["<unk>"]


def test_tokenizer_config_has_the_number_of_sentinels(tmp_path: Path) -> None:
    files = {"spiece.model": unigram_model(), "tokenizer_config.json": {"extra_ids": 2, "eos_token": "</s>"}}
    loaded = load(source(tmp_path, files))
    assert loaded is not None
    assert [name for name in loaded.control if "extra" in name] == ["<extra_id_1>", "<extra_id_0>"]


def test_tokenizer_config_may_list_the_sentinels(tmp_path: Path) -> None:
    size = sentencepiece.SentencePieceProcessor(model_proto=unigram_model()).vocab_size()
    added = {str(size + i): {"content": name, "special": True} for i, name in enumerate(SENTINELS[-3:])}
    files = {"spiece.model": unigram_model(), "tokenizer_config.json": {"added_tokens_decoder": added}}
    loaded = load(source(tmp_path, files))
    assert loaded is not None
    assert loaded.vocab_size == size + 3
    assert loaded.control["<extra_id_0>"] == size + 2


def test_tokenizer_files_are_copied(spiece: SimpleNamespace) -> None:
    (spiece.path / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 100}))
    files = export.hf_files(spiece)
    assert files.keys() == {"spiece.model", "tokenizer_config.json"}
    assert files["spiece.model"] == unigram_model()


@pytest.mark.parametrize("count", [-1, 10**9, "many"])
def test_invalid_numbers_of_sentinels_are_refused(tmp_path: Path, count: object) -> None:
    files = {"spiece.model": unigram_model(), "tokenizer_config.json": {"extra_ids": count}}
    with pytest.raises(BadInput, match=r"tokenizer_config\.json: extra_ids is .*; expected 0 to 1000"):
        load(source(tmp_path, files))


def test_an_invalid_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"spiece\.model: .*SentencePiece"):
        load(source(tmp_path, {"spiece.model": b"\x0e\x00broken"}))

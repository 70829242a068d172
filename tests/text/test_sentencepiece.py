"""SentencePiece vocabularies: from GGUF metadata and tokenizer.model, against sentencepiece."""

import io
import json
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from pentad.errors import BadInput
from pentad.text import Tokenizer, load

TESTS = Path(__file__).parent.parent
CORPUS = [text * times for text, times in json.loads((TESTS / "text/corpus.json").read_text("utf-8"))]


def train() -> sentencepiece.SentencePieceProcessor:
    lines = [line for text in CORPUS for line in text[:2000].splitlines() if line.isprintable()]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 4),
        model_writer=model,
        vocab_size=700,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.99,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=["[INST]", "<|im_end|>"],
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def published() -> sentencepiece.SentencePieceProcessor:
    pytest.importorskip("mistral_common")
    file = resources.files("mistral_common") / "data" / "tokenizer.model.v1"
    return sentencepiece.SentencePieceProcessor(model_proto=file.read_bytes())


@pytest.fixture(scope="module", params=[train, published])
def peer(request: pytest.FixtureRequest) -> sentencepiece.SentencePieceProcessor:
    return request.param()


def gguf(peer: sentencepiece.SentencePieceProcessor, **more: Any) -> SimpleNamespace:
    def kind(i: int) -> int:
        marks = (peer.is_unknown(i), peer.is_control(i), False, peer.is_unused(i), peer.is_byte(i))
        return marks.index(True) + 2 if any(marks) else 1

    ids = range(peer.vocab_size())
    metadata = {
        "model": "llama",
        "tokens": [peer.id_to_piece(i) for i in ids],
        "scores": [peer.get_score(i) for i in ids],
        "token_type": [kind(i) for i in ids],
        "bos_token_id": peer.bos_id(),
        "eos_token_id": peer.eos_id(),
        **more,
    }
    config = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    return SimpleNamespace(path=None, format="gguf", config=config)


@pytest.fixture(scope="module")
def tokenizer(peer: sentencepiece.SentencePieceProcessor) -> Tokenizer:
    loaded = load(gguf(peer))
    assert loaded is not None
    return loaded


def test_ids_and_text_equal_sentencepiece(tokenizer: Tokenizer, peer: sentencepiece.SentencePieceProcessor) -> None:
    for text in CORPUS:
        ids = peer.encode(text)
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == peer.decode(ids)


def test_tokenizer_model_beside_a_folder(tmp_path: Path, peer: sentencepiece.SentencePieceProcessor) -> None:
    (tmp_path / "tokenizer.model").write_bytes(peer.serialized_model_proto())
    size = peer.vocab_size()
    added = {str(size): {"content": "<|new|>"}, str(size + 1): {"content": "<b>"}}
    config = {"bos_token": "<s>", "eos_token": "</s>", "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load(SimpleNamespace(path=tmp_path, format="hf", config={}))
    assert tokenizer is not None
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.adds_bos) == (size + 2, 1, True)
    assert all(tokenizer.encode(text) == peer.encode(text) for text in CORPUS if "<b>" not in text)
    assert tokenizer.encode("<|new|>", special=True) == [size]
    assert size not in tokenizer.encode("<|new|>")
    assert tokenizer.encode("<b>")[-1] == size + 1


def test_control_strings_stay_text_unless_asked(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<s>a</s>")
    assert not {1, 2} & set(ids)
    assert tokenizer.decode(ids) == "<s>a</s>"
    a = tokenizer.encode("a")
    assert tokenizer.encode("<s>a</s>", special=True) == [1, *a, 2]


def test_text_after_a_control_token_gets_a_space_unless_the_files_say_no(
    tmp_path: Path, peer: sentencepiece.SentencePieceProcessor
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(peer.serialized_model_proto())
    spaced, bare = peer.encode("hello"), peer.encode("\nhello")[2:]
    for legacy, expected in (True, spaced), (False, bare):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy}))
        tokenizer = load(SimpleNamespace(path=tmp_path, format="hf", config={}))
        assert tokenizer is not None
        assert tokenizer.encode("<s>hello", special=True) == [1, *expected]
        assert tokenizer.encode("hello") == spaced


def test_no_space_prefix_where_the_file_wants_none(
    peer: sentencepiece.SentencePieceProcessor,
) -> None:
    tokenizer = load(gguf(peer, add_space_prefix=False))
    assert tokenizer is not None
    assert tokenizer.encode("hello") == peer.encode("\nhello")[2:]
    assert tokenizer.decode(tokenizer.encode(" hello")) == " hello"


def test_a_continuation_keeps_its_leading_space(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello")
    assert tokenizer.decode(ids) == "hello"
    assert tokenizer.decode(ids, continues=True) == " hello"


@given(data=st.data())
def test_pieces_joined_are_the_decoded_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    stream = tokenizer.stream()
    assert "".join([*map(stream.add, ids), stream.finish()]) == tokenizer.decode(ids)


@given(text=st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"])))
def test_decoding_undoes_encoding(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_added_tokens_must_follow_on(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train().serialized_model_proto())
    source = SimpleNamespace(path=tmp_path, format="hf", config={})
    for added, message in (({"9999": {"content": "x"}}, "follow on"), (["x"], "map ids")):
        config = json.dumps({"added_tokens_decoder": added})
        (tmp_path / "tokenizer_config.json").write_text(config)
        with pytest.raises(BadInput, match=message):
            load(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": [0.0]}, "but 1 scores"),
        ({"token_type": None}, "SentencePiece vocabulary is broken"),
    ],
)
def test_broken_gguf_vocabulary(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message) as error:
        load(gguf(train(), **change))
    assert "\n" not in str(error.value)

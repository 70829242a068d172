"""SentencePiece vocabularies from GGUF metadata and tokenizer.model give sentencepiece's ids."""

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
from pentad.text.sentencepiece_proto import Piece, PieceType, write_model
from tests.helpers.vocabularies import CORPUS


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
    def token_type(i: int) -> int:
        marks = (peer.is_unknown(i), peer.is_control(i), False, peer.is_unused(i), peer.is_byte(i))
        return marks.index(True) + 2 if any(marks) else 1

    ids = range(peer.vocab_size())
    metadata = {
        "model": "llama",
        "tokens": [peer.id_to_piece(i) for i in ids],
        "scores": [peer.get_score(i) for i in ids],
        "token_type": [token_type(i) for i in ids],
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


def test_tokenizer_model_with_added_tokens(tmp_path: Path, peer: sentencepiece.SentencePieceProcessor) -> None:
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


def test_control_strings_are_text_unless_special(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<s>a</s>")
    assert not {1, 2} & set(ids)
    assert tokenizer.decode(ids) == "<s>a</s>"
    a = tokenizer.encode("a")
    assert tokenizer.encode("<s>a</s>", special=True) == [1, *a, 2]


def test_text_after_a_control_token_gets_a_space_unless_legacy_is_false(
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


def test_add_space_prefix_false_adds_no_space(peer: sentencepiece.SentencePieceProcessor) -> None:
    tokenizer = load(gguf(peer, add_space_prefix=False))
    assert tokenizer is not None
    assert tokenizer.encode("hello") == peer.encode("\nhello")[2:]
    assert tokenizer.decode(tokenizer.encode(" hello")) == " hello"


def test_a_continuation_keeps_its_leading_space(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello")
    assert tokenizer.decode(ids) == "hello"
    assert tokenizer.decode(ids, continues=True) == " hello"


@given(data=st.data())
def test_streamed_pieces_join_to_the_decoded_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    stream = tokenizer.stream()
    assert "".join([*map(stream.add, ids), stream.finish()]) == tokenizer.decode(ids)


@given(text=st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"])))
def test_decoding_reverses_encoding(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_gap_in_the_ids_of_added_tokens_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train().serialized_model_proto())
    source = SimpleNamespace(path=tmp_path, format="hf", config={})
    for added, message in (({"9999": {"content": "x"}}, "9999.* expected 700"), (["x"], "map of ids")):
        config = json.dumps({"added_tokens_decoder": added})
        (tmp_path / "tokenizer_config.json").write_text(config)
        with pytest.raises(BadInput, match=message):
            load(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"scores": [0.0]}, "700 tokens .* 1 scores"), ({"token_type": None}, "SentencePiece .*unk")],
)
def test_an_invalid_gguf_vocabulary_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message) as error:
        load(gguf(train(), **change))
    assert "\n" not in str(error.value)


def test_a_piece_that_resembles_a_byte(tmp_path: Path) -> None:
    pieces = [Piece("<unk>", 0, PieceType.UNKNOWN), Piece("<0xZZ>", -1, PieceType.NORMAL)]
    (tmp_path / "tokenizer.model").write_bytes(write_model(pieces, prefix=False))
    tokenizer = load(SimpleNamespace(path=tmp_path, format="hf", config={}))
    assert tokenizer is not None
    assert tokenizer.decode([1]) == "<0xZZ>"


CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
ORCA = {"[PAD]": 32000, "<|im_start|>": 32001, "<|im_end|>": 32002}


@pytest.mark.parametrize("older", [False, True], ids=["added_tokens_decoder", "added_tokens.json alone"])
def test_chatml_on_llamas_vocabulary(tmp_path: Path, older: bool) -> None:
    # Like Orca 2: 32003 tokens, three of them after the SentencePiece model's. Files of 2023 also list tokens of the
    # model in added_tokens.json.
    peer = published()
    config: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "[PAD]", "chat_template": CHATML}
    if older:
        (tmp_path / "added_tokens.json").write_text(json.dumps({"<unk>": 0, "<s>": 1, "</s>": 2, **ORCA}))
    else:
        config["added_tokens_decoder"] = {str(i): {"content": token, "special": True} for token, i in ORCA.items()}
    (tmp_path / "tokenizer.model").write_bytes(peer.serialized_model_proto())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load(SimpleNamespace(path=tmp_path, format="hf", config={}), vocab_size=32003)
    assert tokenizer is not None
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (32003, 1, (2, 32002))
    assert {token: tokenizer.control[token] for token in ORCA} == ORCA
    start, end, newline = 32001, 32002, peer.encode("\n")
    assert tokenizer.chat([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "a<|im_end|>"}]) == [
        *(start, *peer.encode("system\nBe kind."), end, *newline),
        *(start, *peer.encode("user\na<|im_end|>"), end, *newline),
        *(start, *peer.encode("assistant\n")),
    ]
    assert tokenizer.decode([start, *peer.encode("ok"), end]) == "ok"


def test_added_tokens_that_are_not_special(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train().serialized_model_proto())
    (tmp_path / "added_tokens.json").write_text('{"<a>": 700, "<b>": 701, "<|c|>": 702}')
    (tmp_path / "special_tokens_map.json").write_text('{"additional_special_tokens": [{"content": "<a>"}]}')
    tokenizer = load(SimpleNamespace(path=tmp_path, format="hf", config={}))
    assert tokenizer is not None
    assert tokenizer.control.keys() >= {"<a>", "<|c|>"}
    assert "<b>" not in tokenizer.control
    assert 701 in tokenizer.encode("x<b>")
    (tmp_path / "added_tokens.json").write_text('{"<a>": "x"}')
    with pytest.raises(BadInput, match=r"added_tokens\.json: .*map of ids"):
        load(SimpleNamespace(path=tmp_path, format="hf", config={}))

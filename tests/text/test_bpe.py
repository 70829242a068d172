"""Byte-level BPE gives llama.cpp's ids for SmolLM2, and the tokenizers library's ids for a tokenizer.json."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Pipeline

from pentad.errors import BadInput
from pentad.text import Tokenizer, load
from tests.helpers.vocabularies import CORPUS

TESTS = Path(__file__).parent.parent
CONTROL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def train_pipeline() -> Pipeline:
    """Train a small byte-level BPE with the splits of Llama 3."""
    pipeline = Pipeline(models.BPE())
    split = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    pipeline.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    pipeline.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=CONTROL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pipeline.train_from_iterator([text[:2000] for text in CORPUS], trainer)
    pipeline.add_tokens([AddedToken("<think>", normalized=False)])
    return pipeline


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return train_pipeline()


def write_folder(folder: Path, pipeline: Pipeline, **config: Any) -> SimpleNamespace:
    pipeline.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return SimpleNamespace(path=folder, format="hf", config={})


def gguf(pipeline: Pipeline, **more: Any) -> SimpleNamespace:
    """Make a stand-in for a GGUF checkpoint with the vocabulary in its metadata."""
    state = json.loads(pipeline.to_str())
    vocabulary = pipeline.get_vocab()
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    types = [3 if token in CONTROL else 4 if token == "<think>" else 1 for token in tokens]
    metadata = {
        "model": "gpt2",
        "pre": "llama-bpe",
        "tokens": tokens,
        "token_type": types,
        "merges": [" ".join(merge) for merge in state["model"]["merges"]],
        "bos_token_id": 0,
        "eos_token_id": 1,
        **more,
    }
    config = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    return SimpleNamespace(path=None, format="gguf", config=config)


@pytest.fixture(scope="module", params=["hf", "gguf"])
def tokenizer(
    request: pytest.FixtureRequest, pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    if request.param == "gguf":
        loaded = load(gguf(pipeline))
    else:
        loaded = load(write_folder(tmp_path_factory.mktemp("hf"), pipeline))
    assert loaded is not None
    return loaded


def golden() -> list[dict[str, Any]]:
    file = TESTS / "golden/smollm2_tokens.json"
    cases: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["cases"]
    return cases


def test_smollm2_ids_equal_llama_cpp(smollm2: Path) -> None:
    import pentad.weights

    tokenizer = load(pentad.weights.open(smollm2))
    assert tokenizer is not None
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.adds_bos) == (49152, 1, False)
    assert tokenizer.eos_ids[0] == 2
    assert len(golden()) == len(CORPUS)
    for case in golden():
        text = case["text"] * case["times"]
        ids = tokenizer.encode(text)
        if "ids" in case:
            assert ids == case["ids"], text
        else:
            digest = hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()
            assert (len(ids), digest) == (case["count"], case["sha256"]), case["text"]
        assert tokenizer.decode(ids) == text


def test_ids_equal_the_tokenizers_library(tokenizer: Tokenizer, pipeline: Pipeline) -> None:
    for text in CORPUS:
        pipeline.encode_special_tokens = True
        as_text = pipeline.encode(text, add_special_tokens=False).ids
        pipeline.encode_special_tokens = False
        assert tokenizer.encode(text) == as_text
        with_control = pipeline.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, special=True) == with_control
        assert tokenizer.decode(with_control) == pipeline.decode(with_control)
        assert tokenizer.decode(as_text) == text


def test_long_texts_have_the_same_ids(tokenizer: Tokenizer) -> None:
    """They are encoded by another function of the library."""
    line = "A line, and <|im_end|> another.\n"
    for special in (False, True):
        assert tokenizer.encode(line * 1000, special=special) == tokenizer.encode(line, special=special) * 1000


def test_control_strings_are_text_unless_special(tokenizer: Tokenizer) -> None:
    text = "<s>a<|im_end|>"
    assert not set(tokenizer.encode(text)) & set(tokenizer.control.values())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    start, *_, end = tokenizer.encode(text, special=True)
    assert (start, end) == (tokenizer.control["<s>"], tokenizer.control["<|im_end|>"])
    assert tokenizer.decode([start, end]) == ""
    assert tokenizer.decode([start, end], special=True) == "<s><|im_end|>"


def test_user_defined_tokens_are_text(tokenizer: Tokenizer, pipeline: Pipeline) -> None:
    assert tokenizer.encode("<think>") == [pipeline.token_to_id("<think>")]
    assert tokenizer.decode(tokenizer.encode("<think>")) == "<think>"


def test_bos_and_eos_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("a", bos=True) == [0, *tokenizer.encode("a")]
    assert tokenizer.eos_ids == (1, 3)  # </s>, then <|im_end|>, which ends a turn


@given(text=st.text())
def test_decoding_reverses_encoding(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


@given(text=st.text(st.sampled_from("<|im_start|>ed/ "), max_size=60))
def test_text_never_gives_a_control_token(tokenizer: Tokenizer, text: str) -> None:
    assert not set(tokenizer.encode(text)) & set(tokenizer.control.values())


@given(ids=st.lists(st.integers(0, 700)))
def test_streamed_pieces_join_to_the_decoded_text(tokenizer: Tokenizer, ids: list[int]) -> None:
    stream = tokenizer.stream()
    pieces = [*map(stream.add, ids), stream.finish()]
    assert "".join(pieces) == tokenizer.decode(ids)
    kept = [i for i in ids if i not in tokenizer.control.values()]
    data = b"".join(map(tokenizer.token_bytes, kept))
    assert tokenizer.decode(ids) == data.decode("utf-8", "replace")


def test_no_piece_contains_half_a_character(tokenizer: Tokenizer) -> None:
    text = "👩‍👩‍👧‍👦 é 日本語 ﷽"
    stream = tokenizer.stream()
    pieces = [*map(stream.add, tokenizer.encode(text)), stream.finish()]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == text


def test_a_word_of_the_model_never_becomes_a_control_token(pipeline: Pipeline) -> None:
    # Llama 3's BPE encodes a word of the vocabulary without merges. Here such a word is a control token.
    source = gguf(pipeline)
    types = source.config["tokenizer.ggml.token_type"]
    tokens = source.config["tokenizer.ggml.tokens"]
    word = next(i for i, token in enumerate(tokens) if len(token) > 3 and token.isalpha())
    types[word] = 3
    tokenizer = load(source)
    assert tokenizer is not None
    ids = tokenizer.encode(tokens[word])
    assert word not in ids
    assert tokenizer.decode(ids) == tokens[word]
    assert tokenizer.encode(tokens[word], special=True) == [word]


def test_the_post_processor_determines_adds_bos(pipeline: Pipeline, tmp_path: Path) -> None:
    source = write_folder(tmp_path, pipeline)
    plain = load(source)
    assert plain is not None
    assert not plain.adds_bos
    with_bos = train_pipeline()
    with_bos.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert load(write_folder(tmp_path, with_bos)).adds_bos  # type: ignore[union-attr]
    source = write_folder(tmp_path, with_bos, add_bos_token=False)  # not read, as in transformers
    assert load(source).adds_bos  # type: ignore[union-attr]


def test_generation_config_adds_end_tokens(pipeline: Pipeline, tmp_path: Path) -> None:
    source = write_folder(tmp_path, pipeline)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 1]}')
    assert load(source).eos_ids == (1, 9, 3)  # type: ignore[union-attr]


def test_config_names_end_tokens_if_there_is_no_generation_config(pipeline: Pipeline, tmp_path: Path) -> None:
    write_folder(tmp_path, pipeline)
    source = SimpleNamespace(path=tmp_path, format="hf", config={"eos_token_id": 9})
    assert load(source).eos_ids == (1, 9, 3)  # type: ignore[union-attr]
    (tmp_path / "generation_config.json").write_text("{}")
    assert load(source).eos_ids == (1, 3)  # type: ignore[union-attr]


def test_without_tokenizer_files_there_is_no_tokenizer(tmp_path: Path) -> None:
    assert load(SimpleNamespace(path=tmp_path, format="hf", config={})) is None
    assert load(SimpleNamespace(path=None, format="gguf", config={})) is None


def test_ids_past_the_vocabulary_have_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""
    with pytest.raises(BadInput, match="-1; expected 0"):
        tokenizer.token_bytes(-1)


def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(BadInput, match=r"character 2 .*surrogate"):
        tokenizer.encode("ab\udcff")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "t5"}, "'t5'; expected 'gpt2' or 'llama'"),
        ({"pre": "klingon"}, "'klingon'.*smollm"),
        ({"tokens": []}, "tokens is missing"),
        ({"tokens": [1, 2]}, "tokens .* list of str"),
        ({"merges": "a b"}, "merge 'a'"),
        ({"tokens": ["a", "a"], "token_type": [1, 1], "merges": []}, "1 .*twice"),
        ({"token_type": [1]}, "601 tokens .* 1 token types"),
        ({"merges": ["ab"]}, "merge 'ab'"),
        ({"merges": ["a nosuchtoken"]}, "nosuchtoken"),
        ({"bos_token_id": 10**9}, "bos_token_id is 1000000000"),
    ],
)
def test_an_invalid_gguf_vocabulary_is_refused(pipeline: Pipeline, change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message) as error:
        load(gguf(pipeline, **change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", b"[]", "list; expected a JSON object"),
        ("tokenizer_config.json", b'{"chat_template": ["x"]}', "{name, template}"),
        ("generation_config.json", b'{"eos_token_id": "x"}', "'x'; expected ids"),
        ("chat_template.jinja", b"a\xff", "byte 1 .*UTF-8"),
    ],
)
def test_an_invalid_file_is_named(pipeline: Pipeline, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    source = write_folder(tmp_path, pipeline)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=f"{name}.*{message}"):
        load(source)


def test_an_unsupported_decoder_is_refused(pipeline: Pipeline, tmp_path: Path) -> None:
    other = Pipeline(pipeline.model)
    other.decoder = decoders.WordPiece()
    with pytest.raises(BadInput, match="WordPiece; expected ByteLevel"):
        load(write_folder(tmp_path, other))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_file_that_is_not_json_is_named(pipeline: Pipeline, tmp_path: Path, name: str) -> None:
    source = write_folder(tmp_path, pipeline)
    (tmp_path / name).write_text("{")
    with pytest.raises(BadInput, match=name):
        load(source)

"""transformers and pentad read exported tokenizers, and get the original ids."""

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Pipeline
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pentad.errors import BadInput
from pentad.text import Tokenizer, byte_level, load
from pentad.text.export import consolidated_files, gguf_metadata, hf_files
from pentad.text.gguf_vocab import PROBE
from pentad.text.sentencepiece_proto import Piece, PieceType, write_model
from tests.helpers.vocabularies import (
    CORPUS,
    QWEN,
    SHORT,
    TEKKEN,
    published,
    sentencepiece_model,
    source,
    tekken,
    tiktoken_file,
    words_by_rank,
)

CHAT = [
    {"role": "user", "content": "Hi  there\n"},
    {"role": "assistant", "content": "ok"},
    {"role": "user", "content": "1+1 é?"},
]
CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA_CONFIG = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "chat_template": "{{ bos_token }}" + CHATML,
    "added_tokens_decoder": {
        "700": {"content": "<|im_start|>", "special": True},
        "701": {"content": "<|im_end|>", "special": True},
        "702": {"content": "<tool>", "special": False},
    },
}


def bare(folder: Path, model: bytes | None = None) -> SimpleNamespace:
    files = {"tokenizer.model": model or sentencepiece_model()}
    return source(folder, files, format="consolidated", config={"hidden_dim": 8})


def tekken_folder(folder: Path) -> SimpleNamespace:
    return source(folder, {"tekken.json": tekken()}, format="consolidated")


def qwen_folder(folder: Path) -> SimpleNamespace:
    files = {
        "qwen.tiktoken": tiktoken_file(words_by_rank(QWEN)),
        "generation_config.json": {"chat_format": "chatml"},
        "tokenizer_config.json": {"tokenizer_class": "QWenTokenizer", "auto_map": {"AutoTokenizer": ["x.Y", None]}},
    }
    return source(folder, files)


def llama_gguf(folder: Path) -> SimpleNamespace:
    """Make a GGUF checkpoint with a SentencePiece vocabulary and added tokens."""
    files = {"tokenizer.model": sentencepiece_model(), "tokenizer_config.json": LLAMA_CONFIG}
    return SimpleNamespace(path=folder / "x.gguf", format="gguf", config=gguf_metadata(source(folder, files)))


def byte_level_gguf(folder: Path) -> SimpleNamespace:
    metadata = gguf_metadata(byte_level_folder(folder))
    return SimpleNamespace(path=folder / "x.gguf", format="gguf", config=metadata)


def byte_level_folder(
    folder: Path, pre: str = "llama-bpe", change: Callable[[Pipeline], object] | None = None, **config: Any
) -> SimpleNamespace:
    """Write a folder with a tokenizer.json that has the splits of `pre`."""
    words = [byte_level.characters(word) for word in words_by_rank(TEKKEN)]
    control = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    pipeline = byte_level.build(
        {token: i for i, token in enumerate([*control, *words])},
        byte_level.merges(words),
        byte_level.SPLITS[pre],
        whole_words=pre in byte_level.WHOLE_WORDS,
        control=control,
        user_defined=["<tool>"],
    )
    pipeline.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    if change is not None:
        change(pipeline)
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHATML, **config}
    return source(folder, {"tokenizer.json": pipeline.to_str(), "tokenizer_config.json": config})


def byte_fallback_folder(folder: Path) -> SimpleNamespace:
    """Write a folder with a SentencePiece vocabulary as tokenizer.json, like Llama's."""
    made = hf_files(llama_gguf(folder / "gguf"))
    return source(folder, {name: made[name] for name in ("tokenizer.json", "tokenizer_config.json")})


SOURCES = [bare, tekken_folder, qwen_folder, llama_gguf, byte_level_gguf, byte_level_folder, byte_fallback_folder]


@pytest.fixture(params=SOURCES, ids=lambda make: make.__name__)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> SimpleNamespace:
    return request.param(tmp_path / "source")


def write(folder: Path, files: dict[str, bytes]) -> SimpleNamespace:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return SimpleNamespace(path=folder, format="hf", config={})


def loaded(checkpoint: SimpleNamespace) -> Tokenizer:
    tokenizer = load(checkpoint)
    assert tokenizer is not None
    return tokenizer


def assert_same(one: Tokenizer, other: Tokenizer, texts: list[str]) -> None:
    for text in texts:
        for special in (False, True):
            assert other.encode(text, special=special) == one.encode(text, special=special), text
        assert other.decode(one.encode(text)) == one.decode(one.encode(text))
    assert (other.bos_id, other.adds_bos, other.eos_ids) == (one.bos_id, one.adds_bos, one.eos_ids)
    assert other.control == one.control
    assert other.templates == one.templates
    assert other.chat(CHAT) == one.chat(CHAT)


def test_hf_files_give_the_original_ids(made: SimpleNamespace, tmp_path: Path) -> None:
    ours = loaded(made)
    folder = write(tmp_path / "hf", hf_files(made))
    assert_same(ours, loaded(folder), SHORT)
    (folder.path / "config.json").write_text('{"model_type": "llama"}')  # model_type must not select another class
    for tokenizer_class in (AutoTokenizer, PreTrainedTokenizerFast):
        theirs = tokenizer_class.from_pretrained(folder.path)
        for text in SHORT:
            ids = ours.encode(text, special=True)
            assert theirs.encode(text, add_special_tokens=False) == ids
            assert theirs.decode(ids) == ours.decode(ids, special=True)
        assert theirs.encode("a") == ours.encode("a", bos=ours.adds_bos)
        assert theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False) == ours.chat(CHAT)
        assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_ids[0])


def test_long_texts(tmp_path: Path) -> None:
    made = bare(tmp_path / "source", published("v1"))
    files = hf_files(made)
    del files["tokenizer.model"]
    ours, pipeline = loaded(made), loaded(write(tmp_path / "hf", files))
    assert all(pipeline.encode(text) == ours.encode(text) for text in CORPUS)


def test_gguf_metadata_gives_the_original_ids(made: SimpleNamespace, tmp_path: Path) -> None:
    ours = loaded(made)
    size = ours.vocab_size + 3
    metadata = gguf_metadata(made, vocab_size=size)
    read = loaded(SimpleNamespace(path=tmp_path, format="gguf", config=metadata))
    # llama.cpp doesn't normalize to NFC
    texts = [text for text in SHORT if unicodedata.is_normalized("NFC", text)]
    assert_same(ours, read, texts)
    assert read.vocab_size == len(metadata["tokenizer.ggml.token_type"]) == size
    assert metadata["tokenizer.ggml.tokens"][-3:] == [f"[PAD{i}]" for i in range(size - 3, size)]
    assert metadata["tokenizer.ggml.token_type"][-3:] == [5, 5, 5]
    assert metadata.keys() >= {"tokenizer.chat_template", "tokenizer.ggml.pre", "tokenizer.ggml.add_bos_token"}
    per_token = {"tokenizer.ggml.tokens": str, "tokenizer.ggml.token_type": int, "tokenizer.ggml.scores": float}
    for key in metadata.keys() & per_token.keys():
        assert {type(value) for value in metadata[key]} == {per_token[key]}
        assert len(metadata[key]) == size


def test_consolidated_files_give_the_original_ids(made: SimpleNamespace, tmp_path: Path) -> None:
    files = consolidated_files(made)
    folder = write(tmp_path / "out", files)
    (tmp_path / "out/generation_config.json").write_text('{"chat_format": "chatml"}')  # conversion copies this file
    folder.format, folder.config = "consolidated", {"hidden_dim": 8}
    assert_same(loaded(made), loaded(folder), SHORT)


def test_existing_tokenizer_files_are_copied(tmp_path: Path) -> None:
    files: dict[str, Any] = {
        "tokenizer.model": sentencepiece_model(),
        "tokenizer_config.json": LLAMA_CONFIG,
        "special_tokens_map.json": {"bos_token": "<s>"},
        "added_tokens.json": {"<|im_start|>": 700},
        "chat_template.jinja": CHATML,
        "additional_chat_templates/tool_use.jinja": "T",
    }
    folder = source(tmp_path, {**files, "config.json": {}, "model.safetensors": b"", "tokenization_x.py": "boom"})
    assert hf_files(folder) == consolidated_files(folder)
    assert hf_files(folder) == {name: (tmp_path / name).read_bytes() for name in files}


def test_a_consolidated_folder_gets_no_new_files(tmp_path: Path) -> None:
    folder = source(tmp_path, {"tokenizer.model.v3": published("v3")}, format="consolidated")
    assert consolidated_files(folder) == {"tokenizer.model.v3": published("v3")}
    assert hf_files(folder).keys() == {
        "tokenizer.model.v3",
        "tokenizer.model",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_the_config_refers_to_no_remote_code(tmp_path: Path) -> None:
    files = hf_files(qwen_folder(tmp_path))
    assert files.keys() == {"qwen.tiktoken", "tokenizer.json", "tokenizer_config.json"}
    config = json.loads(files["tokenizer_config.json"])
    assert "auto_map" not in config
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_without_a_tokenizer_no_files_are_written(tmp_path: Path) -> None:
    for name in ("hf", "consolidated", "gguf"):
        checkpoint = SimpleNamespace(path=tmp_path, format=name, config={})
        assert (hf_files(checkpoint), consolidated_files(checkpoint)) == ({}, {})
        assert gguf_metadata(checkpoint, 10) == {"tokenizer.ggml.model": "none"}  # llama.cpp requires this key


def test_tokenizer_keys_of_a_gguf_are_copied(tmp_path: Path) -> None:
    made = byte_level_gguf(tmp_path)
    own = {**made.config, "tokenizer.ggml.pre": "llama3", "tokenizer.chat_templates": ["tool_use"]}
    made.config = {"general.architecture": "llama", **own}
    assert gguf_metadata(made) == own


@pytest.mark.parametrize("sizes", [(2, 3), (2, 3, 5), (2, 4, 3), (2, 3, 4, 6, 16)])
def test_runs_of_equal_score_merge_from_the_left(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    pieces = [Piece("<unk>", 0, PieceType.UNKNOWN), Piece("a", -1, PieceType.NORMAL), Piece("▁a", -2, PieceType.NORMAL)]
    pieces += [Piece(f"<0x{byte:02X}>", 0, PieceType.BYTE) for byte in range(256)]
    pieces += [Piece("▁" * size, -1e9, PieceType.NORMAL) for size in (1, *sizes)]
    made = bare(tmp_path / "bare", write_model(pieces, prefix=False))
    ours, pipeline = loaded(made), Pipeline.from_str(hf_files(made)["tokenizer.json"].decode())
    for count in range(1, 40):
        for text in (" " * count, " " * count + "a" + " " * (count // 2)):
            assert pipeline.encode(text).ids == ours.encode(text)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2", "tekken", "default"])
def test_pre_is_recognized_by_its_splits(tmp_path: Path, pre: str) -> None:
    folder = byte_level_folder(tmp_path, pre)
    assert gguf_metadata(folder)["tokenizer.ggml.pre"] == pre


def test_pre_is_recognized_in_equivalent_pipelines(tmp_path: Path) -> None:
    def gpt2(pipeline: Pipeline) -> None:
        pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)

    def smollm(pipeline: Pipeline) -> None:
        digits = pre_tokenizers.Digits(individual_digits=True)
        pipeline.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])

    def composed(pipeline: Pipeline) -> None:
        pipeline.normalizer = normalizers.NFC()

    assert gguf_metadata(byte_level_folder(tmp_path, "qwen2", gpt2))["tokenizer.ggml.pre"] == "gpt-2"
    assert gguf_metadata(byte_level_folder(tmp_path, "qwen2", smollm))["tokenizer.ggml.pre"] == "smollm"
    assert gguf_metadata(byte_level_folder(tmp_path, "qwen2", composed))["tokenizer.ggml.pre"] == "qwen2"


def test_the_probe_is_in_nfc() -> None:
    assert unicodedata.is_normalized("NFC", PROBE)


def spaced(pipeline: Pipeline) -> None:
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def lowered(pipeline: Pipeline) -> None:
    pipeline.normalizer = normalizers.Lowercase()


def unsplit(pipeline: Pipeline) -> None:
    pipeline.pre_tokenizer = None


def parts_first(pipeline: Pipeline) -> None:
    """Drop the merges of some words, and encode words of the vocabulary without merges."""
    state = json.loads(pipeline.to_str())
    vocabulary, merges = state["model"]["vocab"], [tuple(pair) for pair in state["model"]["merges"][:-5]]
    pipeline.model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True)


@pytest.mark.parametrize(
    ("pre", "change", "message"),
    [
        ("gpt-2", spaced, "pre_tokenizer .*add_prefix_space"),
        ("gpt-2", unsplit, "pre_tokenizer null"),
        ("gpt-2", lowered, "normalizer is Lowercase"),
        ("qwen2", parts_first, "ignore_merges is True.*'qwen2'"),
    ],
)
def test_pipelines_that_gguf_cannot_express_are_refused(
    tmp_path: Path, pre: str, change: Callable[[Pipeline], object], message: str
) -> None:
    folder = byte_level_folder(tmp_path, pre, change)
    with pytest.raises(BadInput, match=f"GGUF: .*{message}") as error:
        gguf_metadata(folder)
    assert "\n" not in str(error.value)


def test_unsupported_vocabularies_are_refused(tmp_path: Path) -> None:
    unigram = source(tmp_path / "a", {"tokenizer.model": sentencepiece_model(model_type="unigram", vocab_size=450)})
    words = Pipeline(models.WordLevel({"a": 0}, unk_token="a"))
    words.decoder = decoders.ByteLevel()
    word_level = source(tmp_path / "b", {"tokenizer.json": words.to_str()})
    composing = source(tmp_path / "c", {"tokenizer.model": sentencepiece_model(normalization_rule_name="nmt_nfkc")})
    for write_it, folder, message in (
        (hf_files, unigram, "tokenizer.json: .*expected BPE"),
        (gguf_metadata, unigram, "GGUF: .*expected BPE"),
        (gguf_metadata, word_level, "GGUF: .*WordLevel; expected BPE"),
        (hf_files, composing, "tokenizer.json: .*other ids"),
        (gguf_metadata, composing, "GGUF: .*other ids"),
    ):
        with pytest.raises(BadInput, match=message) as error:
            write_it(folder)
        assert "\n" not in str(error.value)


def test_unused_ids_become_padding_tokens(tmp_path: Path) -> None:
    def gap(pipeline: Pipeline) -> None:
        state = json.loads(pipeline.to_str())
        vocabulary = {token: i + 60 * (i > 650) for token, i in state["model"]["vocab"].items()}
        merges = [tuple(pair) for pair in state["model"]["merges"]]
        pipeline.model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True)

    folder = byte_level_folder(tmp_path, "llama-bpe", gap)
    tokenizer = loaded(folder)
    metadata = gguf_metadata(folder)
    assert metadata["tokenizer.ggml.tokens"][651:704] == [f"[PAD{i}]" for i in range(651, 704)]
    assert len(metadata["tokenizer.ggml.tokens"]) == tokenizer.vocab_size
    read = loaded(SimpleNamespace(path=tmp_path, format="gguf", config=metadata))
    assert all(read.encode(text) == tokenizer.encode(text) for text in SHORT)
    assert any(i > 710 for text in SHORT for i in tokenizer.encode(text))


def test_generation_config_adds_eot(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 3, 9]}')
    metadata = gguf_metadata(folder)
    assert (metadata["tokenizer.ggml.eos_token_id"], metadata["tokenizer.ggml.eot_token_id"]) == (1, 9)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path)
    size = loaded(folder).vocab_size
    assert load(folder, vocab_size=size) is not None
    assert load(folder, vocab_size=size + 100) is not None
    for check in (load, gguf_metadata):
        with pytest.raises(BadInput, match=f"{size} ids.* {size - 1} rows") as error:
            check(folder, vocab_size=size - 1)
        assert "\n" not in str(error.value)


def test_user_defined_tokens_with_spaces(tmp_path: Path) -> None:
    config = {**LLAMA_CONFIG, "added_tokens_decoder": {"700": {"content": "a b  c", "special": False}}}
    folder = source(tmp_path, {"tokenizer.model": sentencepiece_model(), "tokenizer_config.json": config})
    metadata = gguf_metadata(folder)
    assert metadata["tokenizer.ggml.tokens"][700] == "a b  c"
    read = loaded(SimpleNamespace(path=tmp_path, format="gguf", config=metadata))
    for tokenizer in (loaded(folder), read):
        assert 700 in tokenizer.encode("xa b  cx")
        assert tokenizer.decode(tokenizer.encode("xa b  cx")) == "xa b  cx"


def test_added_token_keeps_its_type(tmp_path: Path) -> None:
    def added(pipeline: Pipeline) -> None:
        pipeline.add_tokens([AddedToken("<note>", normalized=False)])

    metadata = gguf_metadata(byte_level_folder(tmp_path, "qwen2", added))
    types = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True))
    assert (types["<note>"], types["<tool>"], types["<s>"], types["a"]) == (4, 4, 3, 1)

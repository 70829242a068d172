"""Tokens, ends of text and sampling named by several files of a folder, against transformers on generated folders."""

import itertools
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Pipeline
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import pentad
from pentad.errors import BadInput
from pentad.generate.sampling import Sampling
from pentad.text import load
from tests.helpers.tiny import edit_json, talking_checkpoint
from tests.helpers.vocabularies import sentencepiece_model

TEXT = "one<a>two <b> <c>hello</s> <d>"
ROLES = ("bos_token", "eos_token", "pad_token")


def made() -> Pipeline:
    pipeline = Pipeline(models.BPE())
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pipeline.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pipeline.train_from_iterator(["hello one two"] * 9, trainer)
    pipeline.add_tokens([AddedToken("<d>")])
    return pipeline


PIPELINE = made()
TEMPLATES = {
    "none": None,
    "bos": processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]),
    "eos": processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)]),
    "both": processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]),
    "other": processors.TemplateProcessing(single="<d> $A", special_tokens=[("<d>", PIPELINE.token_to_id("<d>"))]),
}


def objects(*contents: str) -> list[Any]:
    return [{"__type": "AddedToken", "content": content, "lstrip": True} for content in contents]


token = st.sampled_from(["<s>", "</s>", "<a>", "<b>", "<c>", "<d>", "hello", *objects("<a>", "</s>")])
content = st.sampled_from(["<s>", "</s>", "<a>", "<b>", "<c>", {"content": "<c>", "rstrip": True}])
contents = st.lists(st.sampled_from(["<a>", "<b>", "<c>"]), unique=True, max_size=2)
flags = st.fixed_dictionaries({"special": st.booleans()}, optional={"lstrip": st.booleans()})
decoder = st.dictionaries(st.sampled_from(["<a>", "<b>", "<c>", "<d>"]), flags, max_size=3).map(
    lambda tokens: {str(600 - i): {"content": key, **value} for i, (key, value) in enumerate(tokens.items())}
)
tokenizer_config = st.fixed_dictionaries(
    {},
    optional={
        **{role: st.none() | token for role in ROLES},
        "image_token": token,
        "audio_token": token,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": contents,
        "extra_special_tokens": contents | st.just({"audio": "<b>", "video": "<a>"}),
        "add_bos_token": st.booleans(),
        "add_eos_token": st.booleans(),
    },
)
special_tokens_map = st.fixed_dictionaries(
    {}, optional={**dict.fromkeys(ROLES, content), "image_token": content, "additional_special_tokens": contents}
)
added_tokens = st.dictionaries(st.sampled_from(["<a>", "<b>", "<c>"]), st.integers(500, 510), max_size=3).filter(
    lambda tokens: len(set(tokens.values())) == len(tokens)
)


@settings(max_examples=250)
@given(
    tokenizer_config=st.none() | tokenizer_config,
    special_tokens_map=st.none() | special_tokens_map,
    added_tokens=st.none() | added_tokens,
    template=st.sampled_from(sorted(TEMPLATES)),
)
def test_tokens_and_roles_equal_transformers(template: str, **files: dict[str, Any] | None) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        pipeline = Pipeline.from_str(PIPELINE.to_str())
        if TEMPLATES[template] is not None:
            pipeline.post_processor = TEMPLATES[template]
        pipeline.save(str(folder / "tokenizer.json"))
        for stem, written in files.items():
            if written is not None:
                (folder / f"{stem}.json").write_text(json.dumps(written))
        ours = load(SimpleNamespace(path=folder, format="hf", config={}))
        theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    assert ours is not None
    assert {role: ours.special_tokens.get(role) for role in ROLES} == {role: getattr(theirs, role) for role in ROLES}
    assert ours.eos_ids[:1] == ((theirs.eos_token_id,) if theirs.eos_token else (1,))  # "</s>" always ends a reply
    assert ours.vocab_size == len(theirs)
    assert ours.encode(TEXT, special=True) == theirs.encode(TEXT, add_special_tokens=False)
    assert [*ours.encode(TEXT, bos=ours.adds_bos, special=True), *ours.closing] == theirs.encode(TEXT)


def source(folder: Path, decoder: object = "ByteLevel", **config: Any) -> SimpleNamespace:
    state = json.loads(PIPELINE.to_str())
    (folder / "tokenizer.json").write_text(json.dumps(state if decoder else {**state, "decoder": None}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return SimpleNamespace(path=folder, format="hf", config={})


def test_without_a_decoder_tokens_are_joined_as_in_transformers(tmp_path: Path) -> None:
    ours = load(source(tmp_path, decoder=None, eos_token="</s>"))
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ids = theirs.encode("hello one xyz")
    assert ours is not None
    assert ours.encode("hello one xyz") == ids
    assert ours.decode(ids) == theirs.decode(ids)


def test_a_control_token_may_lie_beyond_the_embedding(tmp_path: Path) -> None:
    checkpoint, rows = source(tmp_path, pad_token="<pad>"), PIPELINE.get_vocab_size()
    assert load(checkpoint, vocab_size=rows).control["<pad>"] == rows  # type: ignore[union-attr]
    with pytest.raises(BadInput, match=f"embedding {rows - 1} rows"):
        load(checkpoint, vocab_size=rows - 1)


GENERATION = [
    None,
    {},
    {"eos_token_id": 5},
    {"eos_token_id": [6, 5], "do_sample": True, "temperature": 0.5},
    {"bos_token_id": 3, "do_sample": True, "top_k": 7, "top_p": 0.8, "min_p": 0.1},
    {"do_sample": False, "repetition_penalty": 1.5},
]
CONFIG = [
    {},
    {"eos_token_id": 7},
    {"eos_token_id": [8, 9], "do_sample": True, "top_k": 4, "temperature": 0.25},
    {"bos_token_id": 2, "do_sample": False, "repetition_penalty": 1.25},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talking_checkpoint(tmp_path_factory.mktemp("tiny"), num_hidden_layers=1).folder


@pytest.mark.parametrize(("generation", "config"), list(itertools.product(GENERATION, CONFIG)), ids=str)
def test_ends_and_sampling_equal_transformers(
    tmp_path: Path, folder: Path, generation: dict[str, Any] | None, config: dict[str, Any]
) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    unset = {key: None for settings in CONFIG for key in settings}
    plain = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(plain))
    edit_json(tmp_path / "config.json", **{**unset, **config})
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    ours = pentad.load(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config
    ends = theirs.eos_token_id if isinstance(theirs.eos_token_id, list) else [theirs.eos_token_id]
    assert ours.tokenizer.eos_ids == (256, *(i for i in ends if i is not None))
    assert ours.tokenizer.bos_id == theirs.bos_token_id
    named = {name: getattr(theirs, name, None) for name in ("temperature", "top_k", "top_p", "min_p")}
    expected = Sampling()
    if theirs.do_sample:
        expected = Sampling(temperature=1.0, top_p=1.0).replace(**named)
    elif theirs.do_sample is False:
        expected = Sampling(temperature=0)
    assert ours.sampling == expected.replace(repetition_penalty=theirs.repetition_penalty)


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("tokenizer_config", {"added_tokens_decoder": {"x": {"content": "<a>"}}}),
        ("tokenizer_config", {"added_tokens_decoder": ["<a>"]}),
        ("special_tokens_map", {"eos_token": {"lstrip": True}}),
        ("special_tokens_map", {"additional_special_tokens": [1]}),
        ("added_tokens", {"<a>": "x"}),
        ("generation_config", {"eos_token_id": "5"}),
    ],
    ids=str,
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, written: dict[str, Any]) -> None:
    PIPELINE.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / f"{name}.json").write_text(json.dumps(written))
    with pytest.raises(BadInput, match=rf"{name}\.json: "):
        load(SimpleNamespace(path=tmp_path, format="hf", config={}))


FLAGS = [None, True, False]


@pytest.mark.parametrize("name", ["LlamaTokenizer", "CodeLlamaTokenizer", "T5Tokenizer"])
@pytest.mark.parametrize(("adds_bos", "adds_eos"), list(itertools.product(FLAGS, FLAGS)))
def test_what_surrounds_a_prompt_without_a_tokenizer_json(
    tmp_path: Path, name: str, adds_bos: bool | None, adds_eos: bool | None
) -> None:
    """transformers 4, Meta's code and llama.cpp add BOS unless told otherwise; transformers 5 only for Code Llama."""
    t5 = name == "T5Tokenizer"
    config = {"tokenizer_class": name, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config |= {} if adds_bos is None else {"add_bos_token": adds_bos}
    config |= {} if adds_eos is None else {"add_eos_token": adds_eos}
    vocabulary = sentencepiece_model(model_type="unigram", vocab_size=450) if t5 else sentencepiece_model()
    (tmp_path / ("spiece.model" if t5 else "tokenizer.model")).write_bytes(vocabulary)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load(SimpleNamespace(path=tmp_path, format="hf", config={}))
    theirs = getattr(transformers, name).from_pretrained(tmp_path).encode("hello one")
    if name == "LlamaTokenizer" and adds_bos is None:
        theirs = [1, *theirs]
    assert ours is not None
    assert [*ours.encode("hello one", bos=ours.adds_bos), *ours.closing] == theirs

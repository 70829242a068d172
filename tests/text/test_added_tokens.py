"""Tokens that only tokenizer_config.json names get transformers' ids."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer as Pipeline
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from pentad.errors import BadInput
from pentad.text import Tokenizer, load

TEXT = "one<a>two <b> <c>hello<z>"


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    made = Pipeline(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["hello one two"] * 9, trainer)
    return made


def both(folder: Path, pipeline: Pipeline, config: dict[str, Any]) -> tuple[Tokenizer, Any]:
    pipeline.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load(SimpleNamespace(path=folder, format="hf", config={}))
    assert ours is not None
    return ours, AutoTokenizer.from_pretrained(folder)


def decoder(**contents: bool) -> dict[str, Any]:
    """`added_tokens_decoder` in the opposite order of its ids; content -> special."""
    entries = {str(600 + i): {"content": f"<{name}>", "special": s} for i, (name, s) in enumerate(contents.items())}
    return dict(reversed(entries.items()))


@pytest.mark.parametrize(
    "config",
    [
        {"added_tokens_decoder": decoder(a=False, b=True)},
        {"additional_special_tokens": ["<b>", "<a>"]},
        {"extra_special_tokens": {"image": "<b>", "audio": "<a>"}},
        {"extra_special_tokens": ["<b>", "<a>"]},
        {"eos_token": "<c>"},
        {"eos_token": "hello"},
        {
            "eos_token": {"__type": "AddedToken", "content": "<c>"},
            "bos_token": "<b>",
            "additional_special_tokens": ["<a>"],
        },
        {"pad_token": "<a>", "unk_token": "<b>", "added_tokens_decoder": decoder(z=True)},
    ],
    ids=str,
)
def test_ids_equal_transformers(tmp_path: Path, pipeline: Pipeline, config: dict[str, Any]) -> None:
    ours, theirs = both(tmp_path, pipeline, config)
    assert ours.encode(TEXT, special=True) == theirs.encode(TEXT, add_special_tokens=False)
    assert ours.vocab_size == len(theirs)
    if theirs.eos_token_id is not None:
        assert ours.eos_ids[0] == theirs.eos_token_id


def test_without_a_decoder_tokens_are_joined_as_in_transformers(tmp_path: Path, pipeline: Pipeline) -> None:
    state = json.loads(pipeline.to_str())
    ours, theirs = both(tmp_path, Pipeline.from_str(json.dumps({**state, "decoder": None})), {"eos_token": "</s>"})
    ids = theirs.encode("hello one xyz")
    assert ours.encode("hello one xyz") == ids
    assert ours.decode(ids) == theirs.decode(ids)


def test_a_control_token_may_lie_beyond_the_embedding(tmp_path: Path, pipeline: Pipeline) -> None:
    both(tmp_path, pipeline, {"pad_token": "<pad>"})
    source = SimpleNamespace(path=tmp_path, format="hf", config={})
    rows = pipeline.get_vocab_size()
    assert load(source, vocab_size=rows).control["<pad>"] == rows  # type: ignore[union-attr]
    with pytest.raises(BadInput, match=f"embedding {rows - 1} rows"):
        load(source, vocab_size=rows - 1)

"""Pipelines of a tokenizer.json that might never end are refused when they are read."""

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from pentad.errors import BadInput
from pentad.text.backends import TokenizersBackend
from pentad.text.byte_level import SPLITS


def pipeline() -> Tokenizer:
    made = Tokenizer(models.BPE(vocab={"h": 0, "a": 1}, merges=[]))
    made.decoder = decoders.ByteLevel()
    return made


def test_a_normalizer_that_lets_texts_grow_is_refused() -> None:
    hostile = pipeline()
    hostile.normalizer = normalizers.Sequence([normalizers.Replace("h", "hh")] * 40)
    with pytest.raises(BadInput, match=r"normalizer.* 1\.1e\+12 times"):
        TokenizersBackend(hostile)
    hostile.normalizer = normalizers.Sequence([hostile.normalizer, normalizers.NFC()])
    with pytest.raises(BadInput, match="normalizer"):
        TokenizersBackend(hostile)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a*)*b", r"(?:\\s*\\w+)+x", "([a-z]+){2,}"])
def test_a_regex_that_repeats_a_repetition_is_refused(pattern: str) -> None:
    hostile = pipeline()
    hostile.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    with pytest.raises(BadInput, match="repeats a repetition"):
        TokenizersBackend(hostile)


def test_published_pipelines_are_accepted() -> None:
    plain = pipeline()
    plain.normalizer = normalizers.Sequence(
        [normalizers.Prepend("_"), normalizers.Replace(" ", "_"), normalizers.NFC()]
    )
    for splits in SPLITS.values():
        plain.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(s), "isolated") for s in splits])
        assert TokenizersBackend(plain).vocab_size == 2

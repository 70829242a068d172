"""Log-likelihoods of texts, and of continuations of prompts, on a tiny model whose tokens are bytes."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import pentad
import pentad.generate.engine
import pentad.generate.scheduler
from pentad.errors import BadInput
from pentad.generate import LanguageModel
from tests.helpers.tiny import pages_of_requests, talking_checkpoint

TEXT = "The quick brown fox jumps over the lazy dog."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talking_checkpoint(tmp_path_factory.mktemp("talking")).folder


@pytest.fixture
def model(folder: Path) -> LanguageModel:
    return pentad.load(folder)


def log_likelihood(model: LanguageModel, ids: list[int]) -> list[float]:
    rows = model.logits(ids).double().log_softmax(-1)[:-1]
    return rows.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


@pytest.mark.parametrize("chunk", [256, 7, 1])
def test_score(model: LanguageModel, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pentad.generate.scheduler, "MAX_EVALUATED_TOKENS", chunk)
    score, ids = model.score(TEXT), list(TEXT.encode())
    expected = sum(log_likelihood(model, ids))
    assert score.tokens == len(TEXT)
    assert score.log_likelihood == pytest.approx(expected, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(-expected / (len(TEXT) - 1)), rel=1e-4)
    assert pages_of_requests(model) == 0


def test_continuations_are_scored_given_their_prompts(model: LanguageModel) -> None:
    pairs = [("The quick ", "brown fox"), ("The quick", " brown fox"), ("a", "é"), (TEXT, TEXT)]
    scores = model.score([text for _, text in pairs], given=[given for given, _ in pairs])
    for score, (given, text) in zip(scores, pairs, strict=True):
        ids = list((given + text).encode())
        before = len(given.rstrip().encode())
        logits = model.logits(ids)
        expected = sum(log_likelihood(model, ids)[before - 1 :])
        assert score.log_likelihood == pytest.approx(expected, rel=1e-5)
        assert score.tokens == len(ids) - before
        assert score.greedy == (logits[before - 1 : -1].argmax(-1).tolist() == ids[before:])
        assert model.score(text, given=given) == score
    assert scores[0].log_likelihood == scores[1].log_likelihood
    best = {chr(code): int(model.logits([code])[-1].argmax()) for code in range(33, 127)}
    prompt, token = next((prompt, token) for prompt, token in best.items() if 33 <= token < 127)
    assert model.score(chr(token), given=prompt).greedy
    assert model.score("b", given="").tokens == 1
    assert pages_of_requests(model) == 0


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda m: m.score(["a"], given=["b", "c"]), "2 prompts"),
        (lambda m: m.score("", given="b"), "no tokens"),
        (lambda m: m.score("a" * 5000, given="b"), "context"),
        (lambda m: m.score("a", given="b", stride=2), "stride"),
    ],
)
def test_continuations_that_can_not_be_scored(model: LanguageModel, use: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        use(model)


def test_a_list_is_scored_as_each_of_it(model: LanguageModel) -> None:
    texts, prompts = [TEXT, "fox", TEXT[:9]], [None, "The quick brown ", None]
    expected = [model.score(text, given=given) for text, given in zip(texts, prompts, strict=True)]
    assert model.score(texts, given=prompts) == expected
    assert model.score(texts) == [model.score(text) for text in texts]
    assert model.score(texts, stride=4)[0] == model.score(TEXT, stride=4)
    assert model.score([]) == []


def test_token_sequences_are_scored_from_an_index(model: LanguageModel) -> None:
    ids = [*TEXT.encode()]
    whole, end = model.score_ids([(ids, 1), (ids, 40)])
    assert whole.log_likelihood == pytest.approx(model.score(TEXT).log_likelihood, rel=1e-6)
    assert (whole.tokens, end.tokens) == (len(ids) - 1, len(ids) - 40)
    assert end.log_likelihood == pytest.approx(sum(log_likelihood(model, ids)[39:]), rel=1e-5)
    size = model.context_length
    assert model.score_ids([([97] * (size + 1), size)])[0].tokens == 1
    for wrong in ((ids, 0), (ids, len(ids)), ([], 1), ([97] * (size + 2), 1), ([9999, 1], 1)):
        with pytest.raises(BadInput):
            model.score_ids([wrong])


def test_scores_that_need_more_than_the_memory_are_refused(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pentad.generate.runner.available_memory", lambda device: 1000)
    with pytest.raises(BadInput, match=r"0\.0 GB"):
        model.score(TEXT)


@pytest.mark.parametrize("stride", [1, 5, 11])
def test_a_sliding_window_scores_each_token_once(folder: Path, stride: int) -> None:
    """A token's context is the tokens before it in its window: at least size - stride, except in the first window."""
    model, ids, size = pentad.load(folder, context=12), list(TEXT.encode()), 12
    expected, done = 0.0, 1
    for start in range(0, len(ids), stride):
        window = ids[start : start + size]
        expected += sum(log_likelihood(model, window)[done - start - 1 :])
        done = start + len(window)
        if done == len(ids):
            break
    score = model.score(TEXT, stride=stride)
    assert score.log_likelihood == pytest.approx(expected, rel=1e-5)
    assert score.tokens == len(ids)

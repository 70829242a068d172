"""Filters and penalties against transformers' processors, and draws against probabilities."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pentad.errors import BadInput
from pentad.generate.sampling import Choice, Sampling, argmax, candidates, penalize, sample

V = 50
OFF = Sampling(temperature=1.0, top_p=1.0)
FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": V},
    {"top_k": 10 * V},
    {"top_p": 0.9},
    {"top_p": 0.3},
    {"top_p": 1e-6},
    {"top_p": 0.999999},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"temperature": 0.7, "top_k": 12, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 1.6, "top_k": 30, "top_p": 0.95},
    {"temperature": 0.8, "top_p": 0.95, "min_p": 0.02},
]


def random_logits(seed: int, size: int = V) -> Tensor:
    return 3 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def candidates_of(logits_V: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Probabilities and ids of the tokens that remain after one row's filters."""
    [(rows, weights, ids)] = candidates(logits_V[None], [sampling])
    assert rows == [0]
    kept = weights[0] > 0
    return weights[0][kept].double() / weights.double().sum(), ids[0][kept]


def sample_one(
    logits_V: Tensor, sampling: Sampling, generator: torch.Generator, prompt: Any = (), generated: Any = ()
) -> int:
    [token], _ = sample(logits_V[None], [Choice(sampling, generator, prompt, generated)])
    return token


def penalize_one(logits_V: Tensor, sampling: Sampling, prompt: Any, generated: Any) -> Tensor:
    return penalize(logits_V[None], [Choice(sampling, torch.Generator(), prompt, generated)])[0]


def peer_probabilities(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that transformers samples from, with its warpers in its order."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return warpers(torch.zeros(1, 1, dtype=torch.int64), logits_V[None])[0].softmax(-1)


@pytest.mark.parametrize("size", [V, 3000])
@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_filters_equal_transformers(options: dict[str, Any], size: int) -> None:
    sampling = OFF.replace(**options)
    for seed in range(4):
        logits_V = random_logits(seed, size)
        probabilities_C, ids_C = candidates_of(logits_V, sampling)
        ours = torch.zeros(size).double()
        ours[ids_C] = probabilities_C
        theirs = peer_probabilities(logits_V, sampling).double()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
        assert len(set(ids_C.tolist())) == len(ids_C)
        assert not (ours[theirs > 1e-9] == 0).any()
        assert not ours[theirs == 0].any()
        assert float(probabilities_C.sum()) == pytest.approx(1)


@pytest.mark.parametrize("flat", [False, True])
def test_the_nucleus_of_a_flat_distribution_is_wide(flat: bool) -> None:
    """It has more tokens than the partial sort examines, so all tokens are sorted."""
    logits_V = torch.zeros(5000) if flat else random_logits(0, 5000) / 30
    probabilities_C, ids_C = candidates_of(logits_V, OFF.replace(top_p=0.9))
    theirs = peer_probabilities(logits_V, OFF.replace(top_p=0.9))
    assert abs(len(ids_C) - int((theirs > 0).sum())) <= 1
    assert len(ids_C) == pytest.approx(4500, abs=150)
    assert float(probabilities_C.sum()) == pytest.approx(1)


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    for seed in range(4):
        logits_V = random_logits(seed)
        prompt, generated = [3, 4, 4, 9], [9, 20, 21, 21, 21]
        ours = penalize_one(logits_V, OFF.replace(repetition_penalty=penalty), prompt, generated)
        ids = torch.tensor([prompt + generated])
        theirs = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits_V[None].clone())[0]
        torch.testing.assert_close(ours, theirs)
        assert torch.equal(logits_V, random_logits(seed)), "penalize changes the caller's logits"


def test_presence_and_frequency_penalties_apply_to_generated_tokens() -> None:
    logits_V = random_logits(0)
    sampling = OFF.replace(presence_penalty=0.5, frequency_penalty=0.25)
    ours = penalize_one(logits_V, sampling, [1, 2, 3], [5, 5, 5, 7])
    expected = logits_V.clone()
    expected[5] -= 0.5 + 3 * 0.25
    expected[7] -= 0.5 + 0.25
    torch.testing.assert_close(ours, expected)
    assert torch.equal(penalize_one(logits_V, sampling, [1, 2, 3], []), logits_V)


@pytest.mark.parametrize("bias", [{3: 5.0, 7: -2.5}, {"3": 5, "7": -2.5}], ids=["numbers", "strings, as in JSON"])
def test_a_bias_is_added_before_the_penalties(bias: Any) -> None:
    logits_V = random_logits(0)
    ours = penalize_one(logits_V, OFF.replace(logit_bias=bias, repetition_penalty=2.0), [3], [])
    expected = logits_V.clone()
    expected[7] -= 2.5
    expected[3] = (expected[3] + 5) / 2
    torch.testing.assert_close(ours, expected)


def test_a_bias_of_100_chooses_the_token_and_one_of_minus_100_bans_it() -> None:
    greedy, generator = Sampling(temperature=0), torch.Generator()
    for seed in range(5):
        logits_V = random_logits(seed)
        likeliest = int(logits_V.argmax())
        assert sample_one(logits_V, greedy.replace(logit_bias={11: 100}), generator) == 11
        assert sample_one(logits_V, OFF.replace(logit_bias={11: 100}), generator) == 11
        assert sample_one(logits_V, greedy.replace(logit_bias={likeliest: -100}), generator) != likeliest


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        ({-1: 1}, "key '-1'"),
        ({"x": 1}, "key 'x'"),
        ({1.5: 1}, "key '1.5'"),
        ({1: 101}, "token 1 is 101"),
        ({1: math.nan}, "token 1 is nan"),
        ({1: "2"}, "token 1 is 2"),
        ([1], r"\[1\]; expected a mapping"),
    ],
)
def test_a_bad_bias_is_refused(bias: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        OFF.replace(logit_bias=bias)


def test_a_penalty_changes_the_greedy_token() -> None:
    logits_V = torch.tensor([1.0, 3.0, 2.9])
    greedy, generator = Sampling(temperature=0), torch.Generator()
    assert sample_one(logits_V, greedy, generator, [0], [1]) == 1
    assert sample_one(logits_V, greedy.replace(repetition_penalty=1.2), generator, [0], [1]) == 2
    assert sample_one(logits_V, greedy.replace(repetition_penalty=1.2), generator, [1], []) == 2
    assert sample_one(logits_V, greedy.replace(presence_penalty=0.2), generator, [0], [1]) == 2
    assert sample_one(logits_V, greedy.replace(presence_penalty=0.2), generator, [1], []) == 1
    assert sample_one(logits_V, greedy.replace(frequency_penalty=0.04), generator, [], [1] * 2) == 1
    assert sample_one(logits_V, greedy.replace(frequency_penalty=0.04), generator, [], [1] * 3) == 2


def test_greedy_is_argmax_and_draws_no_random_number() -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    for seed in range(5):
        logits_V = random_logits(seed)
        assert sample_one(logits_V, Sampling(temperature=0), generator) == int(logits_V.argmax())
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    for seed in range(5):
        logits_V = random_logits(seed)
        token = sample_one(logits_V, OFF.replace(temperature=temperature), torch.Generator())
        assert token == int(logits_V.argmax())


@pytest.mark.parametrize("size", [V, 2000])
@pytest.mark.parametrize("options", [{}, {"min_p": 0.05}, {"temperature": 0.7, "top_k": 9, "min_p": 0.01}], ids=str)
def test_tokens_are_drawn_with_their_probabilities(options: dict[str, Any], size: int) -> None:
    """A chi-square test at p = 0.001; tokens expected fewer than five times form one class."""
    logits_V, sampling, draws = random_logits(1, size), OFF.replace(**options), 4000
    generator = torch.Generator().manual_seed(7)
    drawn = torch.tensor([sample_one(logits_V, sampling, generator) for _ in range(draws)])
    counts = drawn.bincount(minlength=size).double()
    expected = peer_probabilities(logits_V, sampling).double() * draws
    assert not counts[expected == 0].any()
    common = expected >= 5
    observed = torch.cat((counts[common], counts[~common].sum()[None]))
    wanted = torch.cat((expected[common], expected[~common].sum()[None]))
    statistic = float(((observed - wanted).square() / wanted.clamp_min(1e-9)).sum())
    degrees = int(common.sum())
    assert statistic < degrees + 3.1 * math.sqrt(2 * degrees) + 6


def test_the_same_seed_draws_the_same() -> None:
    def draw(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [sample_one(random_logits(i), OFF, generator) for i in range(30)]

    assert draw(3) == draw(3) != draw(4)


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, Sampling()),
        ({"do_sample": False, "temperature": 0.6}, Sampling(temperature=0)),
        ({"do_sample": True}, OFF),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, OFF.replace(temperature=0.6, top_p=0.9)),
        ({"temperature": 0.6}, OFF.replace(temperature=0.6)),
        ({"top_k": 20}, OFF.replace(top_k=20)),
        ({"repetition_penalty": 1.1}, Sampling(repetition_penalty=1.1)),
        ({"eos_token_id": 2, "temperature": None}, Sampling()),
    ],
    ids=str,
)
def test_recommended_sampling(generation: dict[str, Any], expected: Sampling) -> None:
    assert Sampling.recommended(generation) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", -0.5),
        ("repetition_penalty", 0),
        ("presence_penalty", math.inf),
        ("frequency_penalty", 101),
    ],
)
def test_values_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(BadInput, match=f"{name} is {value}"):
        OFF.replace(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", "hot"), ("top_k", 2.5), ("top_p", [0.9]), ("top_k", "many")]
)
def test_a_recommendation_that_is_not_a_number_is_refused(name: str, value: object) -> None:
    """generation_config.json is untrusted."""
    with pytest.raises(BadInput, match=name):
        Sampling.recommended({"do_sample": True, name: value})


def test_argmax_returns_nan() -> None:
    tokens, logits = argmax(torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, math.nan]]))
    assert tokens == [1, 2]
    assert logits[0] == 3.0
    assert math.isnan(logits[1])


def test_a_rows_token_does_not_depend_on_the_batch() -> None:
    """Other rows have other options and logits; some logits are tied."""
    options = [{}, {"top_k": 9}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 9, "top_p": 0.5}, {"temperature": 0}]
    options += [{"top_p": 0.9, "presence_penalty": 1.0}, {"temperature": 0, "repetition_penalty": 1.5}]
    samplings = [OFF.replace(**options[i % len(options)]) for i in range(40)]
    logits_MV = torch.stack([random_logits(i, 3000).bfloat16().float() / (1 + 9 * (i % 3)) for i in range(40)])

    def choice(row: int) -> Choice:
        return Choice(samplings[row], torch.Generator().manual_seed(row), [1, 2], [3, 3, row])

    batched, _ = sample(logits_MV, [choice(row) for row in range(40)])
    assert batched == [sample(logits_MV[row : row + 1], [choice(row)])[0][0] for row in range(40)]
    some = [3, 11, 30]
    assert [batched[row] for row in some] == sample(logits_MV[some], [choice(row) for row in some])[0]


def test_a_greedy_recommendation_keeps_its_repetition_penalty() -> None:
    sampling = Sampling.recommended({"do_sample": False, "repetition_penalty": 1.5})
    assert (sampling.temperature, sampling.repetition_penalty) == (0, 1.5)


@pytest.mark.parametrize(
    ("written", "read"),
    [({"top_k": -1}, {"top_k": 0}), ({"top_k": 50.0}, {"top_k": 50}), ({"temperature": "0.7"}, {"temperature": 0.7})],
)
def test_numbers_that_mean_the_same(written: dict[str, Any], read: dict[str, Any]) -> None:
    assert Sampling.recommended({"do_sample": True, **written}) == Sampling.recommended({"do_sample": True, **read})


@pytest.mark.parametrize("written", [{"top_k": 1.5}, {"top_k": -2}, {"temperature": "hot"}, {"top_p": True}])
def test_other_values_are_refused_with_file_and_key(written: dict[str, Any]) -> None:
    [key] = written
    with pytest.raises(BadInput, match=rf"generation_config\.json: {key} is"):
        Sampling.recommended(written)

"""Each router against its paper's formulas, token by token."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from pentad.nn.batch import SequenceLayout
from pentad.nn.moe.dispatch import within_capacity
from pentad.nn.moe.routers import Route, Routing, expert_choice, gshard_top_2, mixtral_top_k, noisy_top_k, softmax_top_k


def random_logits(tokens: int = 40, experts: int = 8, seed: int = 0) -> Tensor:
    return 2 * torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def largest(row: list[float], k: int) -> list[int]:
    return sorted(range(len(row)), key=lambda e: -row[e])[:k]


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(x) for x in row]
    return [power / sum(powers) for power in powers]


def assert_decides(routing: Routing, expected: list[dict[int, float]]) -> None:
    """Check each token's experts and weights, first choice first, and that none is dropped."""
    assert routing.all_kept
    assert routing.kept.all()
    for row, (experts, weights) in enumerate(zip(routing.experts.tolist(), routing.weights.tolist(), strict=True)):
        assert experts == list(expected[row])
        assert weights == pytest.approx(list(expected[row].values()), abs=1e-6)
    assert routing.weights.dtype == torch.float32
    assert routing.experts.dtype == torch.int64


@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_mixtral(k: int) -> None:
    """The k largest values of the softmax over all experts, divided by their sum, as in transformers."""
    logits = random_logits()
    expected = []
    for row in logits.tolist():
        chosen, gates = largest(row, k), softmax(row)
        total = sum(gates[e] for e in chosen)
        expected.append({e: gates[e] / total for e in chosen})
    assert_decides(mixtral_top_k(logits, k), expected)


@pytest.mark.parametrize("k", [1, 2])
def test_switch_and_openmoe_do_not_renormalize(k: int) -> None:
    logits = random_logits()
    expected = []
    for row in logits.tolist():
        gates = softmax(row)
        expected.append({e: gates[e] for e in largest(row, k)})
    routing = softmax_top_k(logits, k)
    assert_decides(routing, expected)
    assert float(routing.weights.sum(-1).max()) < 1


@pytest.mark.parametrize("k", [1, 2, 4])
def test_noisy_top_k_without_noise(k: int) -> None:
    clean = random_logits()
    expected = []
    for row in clean.tolist():
        chosen = largest(row, k)
        expected.append(dict(zip(chosen, softmax([row[e] for e in chosen]), strict=True)))
    routing = noisy_top_k(torch.cat((clean, random_logits(seed=1)), -1), k)
    assert_decides(routing, expected)
    assert torch.equal(routing.logits, clean)


def test_the_standard_deviation_of_the_noise_is_learned() -> None:
    """It is softplus of the scores' second half; the noise is added to the first half."""
    raw = torch.tensor([-3.0, 0.0, 2.0, 5.0])
    scores = torch.cat((random_logits(1, 4).expand(20_000, 4), raw.expand(20_000, 4)), -1)
    routing = noisy_top_k(scores, 2, None, seeded())
    assert torch.equal(routing.logits, noisy_top_k(scores, 2, None, seeded()).logits)
    expected = torch.tensor([math.log1p(math.exp(x)) for x in raw.tolist()])
    torch.testing.assert_close(routing.logits.std(0), expected, rtol=0.03, atol=0)
    torch.testing.assert_close(routing.logits.mean(0), scores[0, :4], rtol=0, atol=0.12)
    assert routing.clean is not None
    assert routing.noise_std is not None
    torch.testing.assert_close(routing.noise_std[0], expected)


@pytest.mark.parametrize("capacity", [1, 3, 100])
@pytest.mark.parametrize("training", [False, True])
def test_gshard_is_algorithm_1(capacity: int, training: bool) -> None:
    """Follows the paper's algorithm line by line, for one group."""
    logits, size, experts = random_logits(30, 4), 30, 4
    rnd = torch.rand(size, generator=seeded(7)).tolist() if training else [0.0] * size
    counts, combine = [0] * experts, [[0.0] * experts for _ in range(size)]
    tops = []
    for s, row in enumerate(logits.tolist()):
        gates = softmax(row)
        e1, e2 = largest(row, 2)
        g1, g2 = gates[e1] / (gates[e1] + gates[e2]), gates[e2] / (gates[e1] + gates[e2])
        tops.append((e2, g2))
        if counts[e1] < capacity:
            combine[s][e1] = g1
        counts[e1] += 1
    for s, (e2, g2) in enumerate(tops):
        if counts[e2] < capacity and 2 * g2 > rnd[s]:
            combine[s][e2] = g2
        counts[e2] += 1
    routing = gshard_top_2(logits, 2, None, seeded(7) if training else None)
    assert routing.all_kept is not training
    limited = within_capacity(routing, experts, SequenceLayout((0, size)), lambda tokens: capacity)
    got = torch.zeros(size, experts).scatter(1, limited.experts, limited.weights * limited.kept)
    torch.testing.assert_close(got, torch.tensor(combine))
    assert bool(routing.kept.all()) is not training


def test_gshard_refuses_k_other_than_2() -> None:
    with pytest.raises(ValueError, match="k is 3"):
        gshard_top_2(random_logits(), 3)


@pytest.mark.parametrize(("starts", "k"), [((0, 40), 2), ((0, 16, 17, 40), 2), ((0, 40), 1), ((0, 0, 40), 8)])
def test_expert_choice(starts: tuple[int, ...], k: int) -> None:
    """In each group of n tokens an expert takes its best n k / E tokens."""
    logits = random_logits()
    routing = expert_choice(logits, k, SequenceLayout(starts))
    gates = logits.softmax(-1)
    assert not routing.all_kept
    for start, stop in pairwise(starts):
        count = stop - start
        for e in range(8):
            best = sorted(range(start, stop), key=lambda s: -float(gates[s, e]))
            expected = set(best[: min(count, max(1, count * k // 8))])
            assert {s for s in range(start, stop) if routing.kept[s, e]} == expected
    assert torch.equal(routing.experts, torch.arange(8).expand(40, 8))
    torch.testing.assert_close(routing.weights, gates)


def test_expert_choice_without_groups_treats_the_batch_as_one() -> None:
    logits = random_logits()
    assert torch.equal(expert_choice(logits, 2).kept, expert_choice(logits, 2, SequenceLayout((0, 40))).kept)
    counts = expert_choice(logits, 1).kept.sum(1)
    assert counts.sum() == 40
    assert counts.min() == 0  # a token may have no expert


@pytest.mark.parametrize("route", [noisy_top_k, gshard_top_2, softmax_top_k, mixtral_top_k])
def test_a_tokens_routing_does_not_depend_on_the_batch(route: Route) -> None:
    """Bit by bit."""
    logits = random_logits()
    whole = route(logits, 2)
    for row in (0, 17, 39):
        one = route(logits[row : row + 1], 2)
        assert torch.equal(one.experts[0], whole.experts[row])
        assert torch.equal(one.weights[0], whole.weights[row])

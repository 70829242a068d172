"""Losses at their papers' known values, against sampling, and against transformers."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from pentad.nn.batch import SequenceLayout
from pentad.nn.moe.losses import (
    gshard_balance_loss,
    importance_loss,
    load,
    load_loss,
    mixtral_balance_loss,
    router_z_loss,
    switch_balance_loss,
)
from pentad.nn.moe.routers import Routing, gshard_top_2, mixtral_top_k, noisy_top_k, softmax_top_k

EXPERTS = 8


def balanced(k: int, tokens: int = 64) -> Tensor:
    """Logits with which all experts are chosen equally often and equally probable."""
    chosen = torch.zeros(EXPERTS, EXPERTS)
    for e in range(EXPERTS):
        for i in range(k):
            chosen[e, (e + i) % EXPERTS] = 5
    return chosen.repeat(tokens // EXPERTS, 1)


def collapsed(k: int, tokens: int = 64) -> Tensor:
    """Logits with which all tokens choose the same k experts with probability 1."""
    logits = torch.full((tokens, EXPERTS), -1e4)
    logits[:, :k] = torch.arange(k, 0, -1) / 1e3  # all tokens have the same first choice
    return logits


def random_logits(tokens: int = 40, experts: int = EXPERTS, seed: int = 0) -> Tensor:
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_mixtral_is_k_if_balanced_and_e_if_collapsed(k: int) -> None:
    even = mixtral_balance_loss([mixtral_top_k(balanced(k), k)] * 2)
    assert float(even) == pytest.approx(k, abs=1e-4)
    assert float(mixtral_balance_loss([mixtral_top_k(collapsed(k), k)] * 2)) == pytest.approx(EXPERTS, abs=1e-4)


def test_mixtral_equals_transformers() -> None:
    layers = [random_logits(seed=seed) for seed in range(3)]
    ours = mixtral_balance_loss([mixtral_top_k(logits, 2) for logits in layers])
    theirs = load_balancing_loss_func(tuple(layers), EXPERTS, 2)
    torch.testing.assert_close(ours, theirs)
    assert float(ours) != pytest.approx(2, abs=1e-3)


def test_layers_are_pooled_not_averaged() -> None:
    """Two layers that are collapsed onto different experts are balanced when pooled."""
    one = collapsed(4)
    routings = [mixtral_top_k(one, 4), mixtral_top_k(one.flip(1), 4)]
    assert float(mixtral_balance_loss(routings)) == pytest.approx(4, abs=1e-4)
    assert float(mixtral_balance_loss(routings[:1])) == pytest.approx(EXPERTS, abs=1e-4)


def test_switch_is_alpha_if_balanced() -> None:
    alpha = 0.01
    assert alpha * float(switch_balance_loss(softmax_top_k(balanced(1), 1))) == pytest.approx(alpha, abs=1e-6)
    assert float(switch_balance_loss(softmax_top_k(collapsed(1), 1))) == pytest.approx(EXPERTS, abs=1e-4)


def test_switch_matches_its_equations() -> None:
    logits = random_logits()
    probabilities = logits.softmax(-1)
    fractions = [float((probabilities.argmax(-1) == e).sum()) / 40 for e in range(EXPERTS)]
    means = [float(probabilities[:, e].mean()) for e in range(EXPERTS)]
    expected = EXPERTS * sum(f * p for f, p in zip(fractions, means, strict=True))
    assert float(switch_balance_loss(softmax_top_k(logits, 1))) == pytest.approx(expected, rel=1e-5)
    dropped = softmax_top_k(logits, 1)._replace(kept=torch.zeros(40, 1, dtype=torch.bool), all_kept=False)
    assert float(switch_balance_loss(dropped)) == pytest.approx(expected, rel=1e-5)


def test_gshard_balanced_and_collapsed() -> None:
    groups = SequenceLayout((0, 32, 64))
    assert float(gshard_balance_loss(gshard_top_2(balanced(2)), groups)) == pytest.approx(1 / EXPERTS**2, abs=1e-6)
    assert float(gshard_balance_loss(gshard_top_2(collapsed(1)), groups)) == pytest.approx(1 / EXPERTS, abs=1e-6)


def test_gshard_matches_algorithm_1_for_each_group() -> None:
    logits, starts = random_logits(), (0, 9, 40)
    losses = []
    for start, stop in pairwise(starts):
        gates = logits[start:stop].softmax(-1)
        counts = [int((gates.argmax(-1) == e).sum()) for e in range(EXPERTS)]
        size = stop - start
        losses.append(sum(counts[e] / size * float(gates[:, e].mean()) for e in range(EXPERTS)) / EXPERTS)
    ours = gshard_balance_loss(gshard_top_2(logits), SequenceLayout(starts))
    assert float(ours) == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_importance_is_the_squared_coefficient_of_variation() -> None:
    logits = torch.cat((random_logits(), torch.zeros(40, EXPERTS)), -1)
    routing = noisy_top_k(logits, 2)
    importance = torch.zeros(EXPERTS, dtype=torch.float64)
    for experts, weights in zip(routing.experts.tolist(), routing.weights.tolist(), strict=True):
        for e, weight in zip(experts, weights, strict=True):
            importance[e] += weight
    expected = importance.var(correction=0) / importance.mean() ** 2
    assert float(importance_loss(routing)) == pytest.approx(float(expected), rel=1e-4)
    even = torch.cat((balanced(2), torch.zeros(64, EXPERTS)), -1)
    assert float(importance_loss(noisy_top_k(even, 2))) == pytest.approx(0, abs=1e-6)
    one = torch.cat((collapsed(1), torch.zeros(64, EXPERTS)), -1)
    assert float(importance_loss(noisy_top_k(one, 1))) == pytest.approx(EXPERTS - 1, rel=1e-4)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_load_is_the_probability_of_being_chosen_with_resampled_noise(k: int) -> None:
    """Estimates it by resampling one expert's noise 20,000 times, with the other experts' noise fixed."""
    scores = torch.cat((random_logits(3), random_logits(3, seed=1)), -1)
    routing = noisy_top_k(scores, k, None, torch.Generator().manual_seed(2))
    assert routing.clean is not None
    assert routing.noise_std is not None
    draws, generator = 20_000, torch.Generator().manual_seed(3)
    expected = torch.zeros(EXPERTS)
    for n in range(3):
        for e in range(EXPERTS):
            noisy = routing.logits[n].repeat(draws, 1)
            noisy[:, e] = routing.clean[n, e] + torch.randn(draws, generator=generator) * routing.noise_std[n, e]
            expected[e] += (noisy.topk(k).indices == e).any(-1).float().mean()
    torch.testing.assert_close(load(routing), expected, rtol=0, atol=0.02)


def test_load_is_even_at_initialization() -> None:
    """Both projections are zero, so each expert expects an even share of 4,000 tokens."""
    routing = noisy_top_k(torch.zeros(4000, 2 * EXPERTS), 2, None, torch.Generator().manual_seed(0))
    share = 4000 * 2 / EXPERTS
    torch.testing.assert_close(load(routing), torch.full((EXPERTS,), share), rtol=0.1, atol=0)
    assert float(load_loss(routing)) < 0.01


def test_load_needs_noise_and_k_below_the_number_of_experts() -> None:
    with pytest.raises(ValueError, match="noisy_top_k"):
        load(mixtral_top_k(random_logits(), 2))
    with pytest.raises(ValueError, match="all 4 experts"):
        load(noisy_top_k(random_logits(4, 8), 4))


def test_z_loss() -> None:
    def loss(logits: Tensor) -> float:
        return float(router_z_loss(mixtral_top_k(logits, 2)))

    assert loss(torch.zeros(5, EXPERTS)) == pytest.approx(math.log(EXPERTS) ** 2)
    assert loss(torch.full((5, EXPERTS), -math.log(EXPERTS))) == pytest.approx(0, abs=1e-10)
    rows = random_logits(3).double()
    expected = sum(math.log(sum(math.exp(x) for x in row)) ** 2 for row in rows.tolist()) / 3
    assert loss(rows.float()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "loss",
    [
        lambda routing: mixtral_balance_loss([routing]),
        switch_balance_loss,
        lambda routing: gshard_balance_loss(routing, SequenceLayout((0, 40))),
        importance_loss,
        load_loss,
        router_z_loss,
    ],
    ids=["mixtral", "switch", "gshard", "importance", "load", "z"],
)
def test_a_step_along_the_negative_gradient_decreases_the_loss(loss: Callable[[Routing], Tensor]) -> None:
    """Both evaluations draw the same noise."""
    logits = torch.cat((random_logits(), random_logits(seed=1)), -1).requires_grad_()

    def value() -> Tensor:
        return loss(noisy_top_k(logits, 2, None, torch.Generator().manual_seed(0)))

    before = value()
    (gradient,) = torch.autograd.grad(before, logits)
    with torch.no_grad():
        logits -= 0.01 * gradient / gradient.norm()
    assert float(value().detach()) < float(before.detach())

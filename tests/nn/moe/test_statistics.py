"""Expert usage against counting, and its known values for even and for collapsed routing."""

import math

import pytest
import torch

from pentad.nn.batch import SequenceLayout
from pentad.nn.moe.dispatch import Capacity, within_capacity
from pentad.nn.moe.routers import Routing, expert_choice, mixtral_top_k, softmax_top_k
from pentad.nn.moe.statistics import usage, usage_by_token

TOKENS, EXPERTS = 40, 4


def routed(k: int = 2, factor: float | None = None) -> Routing:
    routing = mixtral_top_k(torch.randn(TOKENS, EXPERTS) + torch.tensor([2.0, 0, 0, 0]), k)
    return (
        routing
        if factor is None
        else within_capacity(routing, EXPERTS, SequenceLayout((0, 15, 40)), Capacity(factor, EXPERTS))
    )


@pytest.mark.parametrize("factor", [None, 1.0])
def test_usage_matches_counting(factor: float | None) -> None:
    routing = routed(factor=factor)
    seen = usage(routing)
    chosen, kept, entropy_sum = [0] * EXPERTS, [0] * EXPERTS, 0.0
    for token in range(TOKENS):
        for choice in range(2):
            expert = int(routing.experts[token, choice])
            chosen[expert] += 1
            kept[expert] += bool(routing.kept[token, choice])
        entropy_sum -= sum(p * math.log(p) for p in routing.logits[token].double().softmax(-1).tolist())
    assert (seen.tokens, seen.chosen.tolist(), seen.kept.tolist()) == (TOKENS, chosen, kept)
    assert seen.load.tolist() == pytest.approx([count / sum(kept) for count in kept])
    assert seen.evenness == pytest.approx(-sum(p * math.log(p, EXPERTS) for p in seen.load.tolist()))
    assert seen.router_entropy == pytest.approx(entropy_sum / TOKENS)
    assert seen.drop_rate == pytest.approx(1 - sum(kept) / sum(chosen))
    assert (seen.drop_rate > 0) is (factor is not None)


def test_usages_of_parts_add_up() -> None:
    routing = routed(factor=1.0)
    pieces = [Routing(*(x[part] for x in routing[:4])) for part in (slice(0, 15), slice(15, 40))]
    whole, summed = usage(routing), usage(pieces[0]) + usage(pieces[1])
    assert (summed.tokens, summed.chosen.tolist()) == (whole.tokens, whole.chosen.tolist())
    assert (summed.evenness, summed.drop_rate) == (whole.evenness, whole.drop_rate)
    assert summed.router_entropy == pytest.approx(whole.router_entropy)


def test_even_and_collapsed_routing() -> None:
    even = usage(mixtral_top_k(torch.eye(EXPERTS).repeat(3, 1), 1))
    assert even.evenness == pytest.approx(1)
    assert even.load.tolist() == [0.25] * 4
    one = usage(softmax_top_k(torch.tensor([[100.0, 0, 0, 0]]).repeat(6, 1), 1))
    assert (one.evenness, one.load.tolist()) == (0, [1, 0, 0, 0])
    assert one.router_entropy == pytest.approx(0)
    assert usage(mixtral_top_k(torch.zeros(6, EXPERTS), 2)).router_entropy == pytest.approx(math.log(EXPERTS))


def test_one_expert_no_tokens_and_all_dropped() -> None:
    assert usage(softmax_top_k(torch.zeros(3, 1), 1)).evenness == 1
    nothing = usage(mixtral_top_k(torch.zeros(0, EXPERTS), 2))
    assert (nothing.evenness, nothing.router_entropy, nothing.drop_rate) == (0, 0, 0)
    routing = routed()
    dropped = usage(routing._replace(kept=torch.zeros_like(routing.kept), all_kept=False))
    assert (dropped.drop_rate, float(dropped.load.sum())) == (1, 0)


@pytest.mark.parametrize("factor", [None, 1.0])
def test_usage_by_token_matches_counting(factor: float | None) -> None:
    routing, ids = routed(factor=factor), torch.randint(5, (TOKENS,))
    wanted = torch.tensor([3, 0, 17])  # 17 doesn't occur
    counts = usage_by_token(routing, ids, wanted)
    for row, token in enumerate(wanted.tolist()):
        for expert in range(EXPERTS):
            times = sum(
                bool(((routing.experts[n] == expert) & routing.kept[n]).any()) for n in range(TOKENS) if ids[n] == token
            )
            assert counts[row, expert] == times


def test_usage_of_expert_choice_counts_the_kept_pairs() -> None:
    seen = usage(expert_choice(torch.randn(TOKENS, EXPERTS), 2))
    assert seen.kept.tolist() == [TOKENS * 2 // EXPERTS] * EXPERTS
    assert seen.drop_rate == pytest.approx(0.5)

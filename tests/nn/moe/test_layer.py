"""The mixture layer: randomness, capacity, gradients and invalid arguments."""

import copy

import pytest
import torch

from pentad.errors import BadInput
from pentad.nn.batch import Batch
from pentad.nn.moe.dispatch import Capacity, within_capacity
from pentad.nn.moe.experts import MLPExperts
from pentad.nn.moe.layer import MixtureOfExperts, Router
from pentad.nn.moe.routers import Route, expert_choice, gshard_top_2, mixtral_top_k, noisy_top_k, softmax_top_k

DIM, EXPERTS = 16, 4


def mixture(
    route: Route = mixtral_top_k, *, top_k: int = 2, scores: int = EXPERTS, **options: object
) -> MixtureOfExperts:
    torch.manual_seed(0)
    return MixtureOfExperts(
        Router(DIM, scores),
        MLPExperts(EXPERTS, DIM, 32),
        route,
        top_k=top_k,
        **options,  # type: ignore[arg-type]
    ).eval()


def rows(count: int = 24) -> torch.Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(1))


def batch(*lengths: int) -> Batch:
    return Batch.of(*lengths)


ROUTES: dict[str, dict[str, object]] = {
    "noisy top-k": {"route": noisy_top_k, "scores": 2 * EXPERTS},
    "GShard": {"route": gshard_top_2},
    "Switch": {"route": softmax_top_k, "top_k": 1, "jitter": 0.3},
    "Mixtral": {"route": mixtral_top_k},
    "expert choice": {"route": expert_choice},
}


@pytest.mark.parametrize("name", ROUTES)
def test_routing_is_random_only_in_training_with_a_generator(name: str) -> None:
    layer, x = mixture(**ROUTES[name]), rows()  # type: ignore[arg-type]
    random = name in ("noisy top-k", "GShard", "Switch")
    state = torch.get_rng_state()

    def run(seed: int | None, training: bool) -> torch.Tensor:
        layer.train(training)
        layer.generator = None if seed is None else torch.Generator().manual_seed(seed)
        return layer(x, batch(24))[0]

    plain = run(None, False)
    assert torch.equal(run(3, False), plain)
    assert torch.equal(run(None, True), plain)
    assert torch.equal(run(3, True), run(3, True))
    assert torch.equal(run(3, True), plain) is not random
    assert torch.equal(run(3, True), run(4, True)) is not random
    assert torch.equal(torch.get_rng_state(), state)


def test_jitter_changes_router_logits_within_its_bound() -> None:
    layer, x = mixture(softmax_top_k, top_k=1, jitter=0.01).train(), rows()
    _, plain = layer(x, batch(24))
    layer.generator = torch.Generator().manual_seed(0)
    _, jittered = layer(x, batch(24))
    change = (jittered.logits - plain.logits).abs()
    bound = 0.01 * (x.abs() @ layer.router.weight.abs().T)
    assert (change > 0).all()
    assert (change <= bound + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_router_computes_in_float32(dtype: torch.dtype) -> None:
    layer, x = mixture().to(dtype), rows().to(dtype)
    out, routing = layer(x, batch(24))
    assert out.dtype == routing.logits.dtype == routing.weights.dtype == torch.float32
    torch.testing.assert_close(routing.logits, x.float() @ layer.router.weight.float().T)


def test_a_capacity_changes_overflowing_tokens_only() -> None:
    """A token whose experts all have capacity is unchanged; other tokens lack the outputs of the full experts."""
    x, sequences = rows(), batch(4, 20)
    full, bounded = mixture(), mixture(capacity=Capacity(0.5, EXPERTS))
    (whole, before), (part, after) = full(x, sequences), bounded(x, sequences)
    expected = within_capacity(before, EXPERTS, sequences.layout, Capacity(0.5, EXPERTS))
    assert torch.equal(after.kept, expected.kept)
    same = after.kept.all(1)
    assert 0 < int(same.sum()) < 24
    torch.testing.assert_close(part[same], whole[same])
    gone = ~after.kept.any(1)
    assert gone.any()
    assert not part[gone].any()
    for n in (~same & ~gone).nonzero()[:, 0].tolist():
        (choice,) = after.kept[n].nonzero()[:, 0].tolist()
        expert = int(after.experts[n, choice])
        up, down = layer_weights(bounded, expert)
        torch.testing.assert_close(part[n], after.weights[n, choice] * (down @ (up @ x[n]).relu()))


def layer_weights(layer: MixtureOfExperts, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    experts = layer.experts
    assert isinstance(experts, MLPExperts)
    return experts.up_proj.weight[expert], experts.down_proj.weight[expert]


def test_an_ample_capacity_changes_nothing() -> None:
    x = rows()
    whole, _ = mixture()(x, batch(24))
    ample, routing = mixture(capacity=lambda tokens: tokens)(x, batch(24))
    assert torch.equal(whole, ample)
    assert routing.kept.all()


def test_groups_are_sequences_or_a_fixed_number_of_tokens() -> None:
    x = rows()
    by_sequence = mixture(capacity=lambda tokens: 2)
    _, routing = by_sequence(x, batch(12, 12))
    for half, part in zip((x[:12], x[12:]), routing.kept.chunk(2), strict=True):
        assert torch.equal(by_sequence(half, batch(12))[1].kept, part)
    _, grouped = mixture(capacity=lambda tokens: 2, group_size=12)(x, batch(5, 19))
    assert torch.equal(grouped.kept, routing.kept)
    _, chosen = mixture(expert_choice)(x, batch(12, 12))
    assert torch.equal(mixture(expert_choice)(x[:12], batch(12))[1].kept, chosen.kept[:12])


@pytest.mark.parametrize("name", ROUTES)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    layer = mixture(**ROUTES[name]).train()  # type: ignore[arg-type]
    layer.generator = torch.Generator().manual_seed(0)
    out, _ = layer(rows(), batch(24))
    out.square().sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.any()


def test_a_nan_router_gives_nan() -> None:
    """NaN reaches the logits, where generation reports damaged weights; nothing raises before."""
    layer = mixture(capacity=lambda tokens: 3)
    layer.router.weight.data.fill_(torch.nan)
    out, _ = layer(rows(2), batch(2))
    assert out.isnan().all()


def test_idle_parameters() -> None:
    assert mixture().idle_parameters == 2 * (2 * DIM * 32)
    assert mixture(softmax_top_k, top_k=1).idle_parameters == 3 * (2 * DIM * 32)
    assert mixture(top_k=EXPERTS).idle_parameters == 0


@pytest.mark.parametrize("top_k", [0, 5])
def test_top_k_outside_1_to_experts_is_refused(top_k: int) -> None:
    with pytest.raises(ValueError, match=f"top_k is {top_k}; expected 1 to 4"):
        mixture(top_k=top_k)


def test_a_capacity_of_zero_is_refused() -> None:
    with pytest.raises(BadInput, match="capacity for 3 tokens is 0"):
        mixture(capacity=lambda tokens: 0)(rows(3), batch(3))


def test_a_layer_can_be_copied_and_printed() -> None:
    layer = mixture()
    other = copy.deepcopy(layer)
    assert torch.equal(layer(rows(), batch(24))[0], other(rows(), batch(24))[0])
    assert "top_k=2" in repr(layer)

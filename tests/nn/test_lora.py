"""Low-rank layers: what they compute, how they start, and what is trained."""

import pytest
import torch
import torch.nn.functional as F

from pentad.nn.feedforward import SwiGLU
from pentad.nn.lora import LoRAGroupedLinear, LoRALinear, add_lora, lora_layers, merged_parameters
from pentad.nn.moe.experts import GroupedLinear, SwiGLUExperts


def with_random_b(layer: LoRALinear | LoRAGroupedLinear) -> LoRALinear | LoRAGroupedLinear:
    layer.lora_B.data.normal_()
    return layer


def test_a_low_rank_layer_is_the_formula_of_the_paper() -> None:
    base = torch.nn.Linear(6, 5)
    layer = with_random_b(LoRALinear(base, rank=2, scale=1.5))
    x = torch.randn(7, 6)
    expected = x @ base.weight.T + base.bias + 1.5 * (x @ layer.lora_A.T @ layer.lora_B.T)
    assert torch.allclose(layer(x), expected, atol=1e-6)
    assert torch.allclose(F.linear(x, layer.merged(), base.bias), expected, atol=1e-5)


@pytest.mark.parametrize("rank", [3, 4], ids=["rows that grouped_mm refuses", "aligned rows"])
def test_each_expert_has_factors_of_its_own(rank: int) -> None:
    base = GroupedLinear(3, 8, 4)
    layer = with_random_b(LoRAGroupedLinear(base, rank=rank, scale=0.5))
    x, ends = torch.randn(9, 8), torch.tensor([2, 2, 9], dtype=torch.int32)
    rows = zip(torch.split(x, [2, 0, 7]), base.weight, layer.lora_A, layer.lora_B, strict=True)
    expected = torch.cat([x @ w.T + 0.5 * (x @ a.T @ b.T) for x, w, a, b in rows])
    assert torch.allclose(layer(x, ends), expected, atol=1e-5)
    selected = layer(x[2:], torch.tensor([0, 7], dtype=torch.int32), slice(1, 3))
    assert torch.allclose(selected, expected[2:], atol=1e-5)
    base.weight.data.copy_(layer.merged())
    assert torch.allclose(base(x, ends), expected, atol=1e-5)


def test_it_starts_as_the_base_with_a_drawn_uniformly() -> None:
    base = torch.nn.Linear(400, 3)
    layer = LoRALinear(base, rank=50, scale=1.0, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 400)
    assert torch.equal(layer(x), base(x))
    bound = 1 / 400**0.5  # of a Kaiming-uniform matrix with a = sqrt(5)
    assert 0.99 * bound < float(layer.lora_A.detach().abs().max()) <= bound
    assert float(layer.lora_A.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.02)


def test_only_adapters_have_gradients_and_equal_seeds_give_equal_ones() -> None:
    networks = [SwiGLU(8, 12) for _ in range(3)]
    for network, seed in zip(networks, (0, 0, 1), strict=True):
        add_lora(network, ["up_proj", "down_proj"], rank=2, scale=1.0, seed=seed)
    network, equal, other = networks
    assert {n for n, p in network.named_parameters() if p.requires_grad} == {
        f"{name}.lora_{letter}" for name in ("up_proj", "down_proj") for letter in "AB"
    }
    network(torch.randn(4, 8)).sum().backward()
    assert network.gate_proj.weight.grad is None
    assert float(network.down_proj.lora_B.grad.abs().max()) > 0
    assert torch.equal(network.up_proj.lora_A, equal.up_proj.lora_A)
    assert not torch.equal(network.up_proj.lora_A, other.up_proj.lora_A)
    assert not torch.equal(network.up_proj.lora_A, network.down_proj.lora_A[:, :8])


def test_dropout_drops_inputs_of_the_low_rank_product_while_training() -> None:
    layer = with_random_b(LoRALinear(torch.nn.Linear(64, 4), rank=2, scale=1.0, dropout=0.5))
    x = torch.randn(3, 64)
    expected = layer.base(x) + F.linear(F.linear(x, layer.lora_A), layer.lora_B)
    torch.manual_seed(3)
    trained = layer(x)
    assert not torch.allclose(trained, expected)
    torch.manual_seed(3)
    assert torch.equal(layer(x), trained)
    assert torch.allclose(layer.eval()(x), expected, atol=1e-6)


def test_merged_parameters_have_the_names_of_the_plain_network() -> None:
    plain = SwiGLU(8, 12, bias=True)
    names = dict(plain.named_parameters()).keys()
    x = torch.randn(5, 8)
    add_lora(plain, ["gate_proj", "down_proj"], rank=2, scale=2.0)
    for layer in lora_layers(plain).values():
        layer.lora_B.data.normal_()
    expected, values = plain(x), merged_parameters(plain)
    assert values.keys() == names
    merged = SwiGLU(8, 12, bias=True)
    merged.load_state_dict({name: value() for name, value in values.items()})
    assert torch.allclose(merged(x), expected, atol=1e-5)


def test_experts_with_adapters_compute_the_merged_experts() -> None:
    experts = SwiGLUExperts(4, 8, 12)
    add_lora(experts, ["gate_proj", "up_proj", "down_proj"], rank=4, scale=0.7)
    for layer in lora_layers(experts).values():
        layer.lora_B.data.normal_()
    merged = SwiGLUExperts(4, 8, 12)
    merged.load_state_dict({name: value() for name, value in merged_parameters(experts).items()})
    x, ends = torch.randn(10, 8), torch.tensor([3, 3, 4, 10], dtype=torch.int32)
    assert torch.allclose(experts(x, ends), merged(x, ends), atol=1e-4)

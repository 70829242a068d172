"""The head's logits are float32 sums of the products of its weight in any dtype."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pentad.nn.linear
from pentad.generate.plan_step import PlanStep
from pentad.generate.step import PlainStep, Step
from pentad.nn.encoder_decoder import ScaledLinear
from pentad.nn.linear import HeadLinear, QuantizedHead
from tests.helpers.blocks import random_blocks
from tests.helpers.tiny import network_of, random_ids, rms, tiny_checkpoint

HALF = [torch.bfloat16, torch.float16]


def exact(x: Tensor, head: HeadLinear) -> Tensor:
    bias = 0 if head.bias is None else head.bias.double()
    return x.double() @ head.weight.double().T + bias


@pytest.mark.parametrize("rows", [0, 1, 5, 70])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@torch.inference_mode()
def test_logits_are_exact_products(dtype: torch.dtype, bias: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pentad.nn.linear, "MAX_CONVERTED", 640)  # 10 of 96 rows at a time
    head, x = HeadLinear(64, 96, bias=bias).to(dtype), torch.randn(rows, 64).to(dtype)
    logits = head(x)
    assert logits.dtype == torch.float32
    assert float((logits - exact(x, head)).abs().max() if rows else 0) < 1e-5


@torch.inference_mode()
def test_a_scaled_head_is_exact_too() -> None:
    head, x = ScaledLinear(64, 96, scale=0.3).bfloat16(), torch.randn(3, 64).bfloat16()
    assert float((head(x) - 0.3 * exact(x, head)).abs().max()) < 1e-5


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_logits_of_a_quantized_head_are_exact_products(dtype: torch.dtype, cached: bool) -> None:
    weight, bias = random_blocks("q4_1", 48, 64), nn.Parameter(torch.randn(48).to(dtype))
    head, x = QuantizedHead(weight, bias), torch.randn(3, 64).to(dtype).requires_grad_()
    if cached:
        head.cache_dequantized(dtype)
    logits, direction = head(x), torch.randn(3, 48)
    expected = x.double() @ weight.dequantize().double().T + bias.double()
    assert logits.dtype == torch.float32
    assert float((logits - expected).detach().abs().max()) < 1e-5
    (ours,), (exact,) = (torch.autograd.grad(y, x, direction.to(y.dtype)) for y in (logits, expected))
    assert rms(ours.double() - exact.double()) <= 4 * torch.finfo(dtype).eps * rms(exact)


@pytest.mark.parametrize("dtype", HALF)
def test_gradients_reach_input_and_weight(dtype: torch.dtype) -> None:
    head, x = HeadLinear(64, 96, bias=False).to(dtype), torch.randn(3, 64).to(dtype).requires_grad_()
    logits = head(x)
    assert logits.dtype == torch.float32
    logits.sum().backward()
    for given, ones in ((x.grad, head.weight.detach().double().sum(0)), (head.weight.grad, x.detach().double().sum(0))):
        assert given is not None
        assert rms(given.double() - ones) < 0.02 * rms(ones)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("backend", [PlainStep, PlanStep])
@pytest.mark.parametrize("dtype", HALF)
def test_a_near_tie_is_decided_in_prefill_and_decode(
    tmp_path: Path, dtype: torch.dtype, backend: type[Step], tied: bool
) -> None:
    """Every second row of the head is its neighbor's, with one number changed by the dtype's smallest step."""
    tiny_checkpoint(tmp_path, tie_word_embeddings=tied, dtype=dtype)
    network, ids = network_of(tmp_path, dtype), random_ids(20)
    weight = network.head.weight
    weight[1::2] = weight[::2]
    weight[1::2, 0] *= 1 + torch.finfo(dtype).eps
    hidden: list[Tensor] = []
    network.head.register_forward_pre_hook(lambda head, args: hidden.append(args[0]))
    plain = PlainStep(network)
    plain([(plain.cache.open(20), ids)], range(20))
    network.head._forward_pre_hooks.clear()
    step = backend(network)
    sequence = step.cache.open(20)
    logits = torch.cat([step([(sequence, ids[:15])], range(15)), *(step([(sequence, [i])], [0]) for i in ids[15:])])
    difference = logits[:, 1::2] - logits[:, ::2]
    expected = hidden[0].double()[:, :1] * (weight[1::2, 0] - weight[::2, 0]).double()
    assert expected.abs().max() > 0.001
    clear = expected.abs() > 3e-4
    assert torch.equal(difference[clear] > 0, expected[clear] > 0)

"""Relative position bias: buckets against transformers', attention against loops."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.t5.modeling_t5 import T5Attention

from pentad.nn import relative_bias as module
from pentad.nn.attention import Attention, attention
from pentad.nn.batch import Batch
from pentad.nn.cache import PagedCache
from pentad.nn.relative_bias import RelativeBias, bucket
from tests.helpers.plain import plain_attention

HEADS, DIM = 3, 8


def relative_bias(bidirectional: bool) -> RelativeBias:
    made = RelativeBias(HEADS, buckets=8, max_distance=20, bidirectional=bidirectional)
    torch.nn.init.normal_(made.weight)
    return made


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (4, 3), (8, 20), (10, 1000), (64, 65)])
def test_buckets_are_those_of_transformers(buckets: int, farthest: int, bidirectional: bool) -> None:
    distances = torch.arange(-3000, 3001)
    theirs = T5Attention._relative_position_bucket(distances, bidirectional, buckets, farthest)
    assert torch.equal(bucket(distances, buckets, farthest, bidirectional), theirs)
    assert int(theirs.max()) < buckets


@pytest.mark.parametrize("bidirectional", [True, False])
def test_any_block_of_the_bias_matches_its_definition(bidirectional: bool) -> None:
    made = relative_bias(bidirectional)
    bias = made(Batch.of(40, 7))
    for at_q, at_k in (
        (range(40), range(40)),
        (range(39, 40), range(40)),
        (range(10, 25), range(3, 30)),
        (range(1), range(1)),
    ):
        distance = torch.tensor(at_k)[None] - torch.tensor(at_q)[:, None]
        expected = made.weight[bucket(distance, 8, 20, bidirectional)].permute(2, 0, 1)
        assert torch.equal(bias(torch.empty(len(at_q), HEADS, DIM), at_q, at_k), expected)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [(1,), (30, 30), (5, 300, 1, 17)], ids=str)
def test_attention_with_a_relative_bias(causal: bool, lengths: tuple[int, ...]) -> None:
    batch = Batch.of(*lengths)
    q, k, v = torch.randn(3, sum(lengths), HEADS, DIM)
    options = {"causal": causal, "scale": 1.0, "bias": relative_bias(not causal)(batch)}
    ours = attention(q, k, v, batch.layout, batch.layout, **options)
    torch.testing.assert_close(
        ours, plain_attention(q, k, v, batch.layout, batch.layout, **options), atol=1e-5, rtol=1e-5
    )


@torch.inference_mode()
def test_a_cached_step_computes_the_bias_of_its_query_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step needs one row of the bias for each sequence, and looks up the buckets once for all layers."""
    bias = relative_bias(False)
    layers = [Attention(24, heads=HEADS, head_dim=DIM, position_bias=bias, layer=i) for i in range(3)]
    cache = PagedCache(3, HEADS, DIM, dtype=torch.float32, page_size=4)
    sequences = [cache.open(), cache.open()]
    shapes: list[tuple[int, ...]] = []
    lookups: list[int] = []

    def counted(distance: Tensor, *options: Any) -> Tensor:
        lookups.append((len(distance) + 1) // 2)
        return bucket(distance, *options)

    monkeypatch.setattr(module, "bucket", counted)

    def step(tokens: int) -> None:
        batch = cache.batch([(sequence, tokens) for sequence in sequences])
        x = torch.randn(len(batch.positions), 24)
        for layer in layers:
            x = layer(x, batch)
        bias_of = bias(batch)
        shapes.extend(tuple(bias_of(x, range(n - tokens, n), range(n)).shape) for n in batch.kv.lengths)
        for sequence in sequences:
            cache.advance(sequence, tokens)

    step(9)
    shapes.clear(), lookups.clear()
    step(1)
    assert shapes == [(HEADS, 1, 10)] * 2
    assert lookups == [10]


def test_gradients_reach_the_bias() -> None:
    made = relative_bias(True)
    batch = Batch.of(12)
    q, k, v = torch.randn(3, 12, HEADS, DIM)
    attention(q, k, v, batch.layout, batch.layout, scale=1.0, bias=made(batch)).square().sum().backward()
    assert made.weight.grad is not None
    assert (made.weight.grad != 0).any(1).sum() > 4

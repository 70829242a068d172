"""The attention function against float64 loops, and the attention layer."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pentad.nn.attention
from pentad.nn.attention import Attention, Bias, attention
from pentad.nn.batch import Batch, PagedKV, SequenceLayout
from pentad.nn.cache import PagedCache
from pentad.nn.rope import Rope
from tests.helpers.plain import plain_attention, read_pages

D = 8


def slope(q_BHQD: Tensor, queries: range, keys: range) -> Tensor:
    """A bias that depends on positions (as T5's does) and on q (as SAM's does)."""
    distance_QK = torch.tensor([[float(i - j) for j in keys] for i in queries])
    heads_H11 = torch.arange(1.0, 1 + q_BHQD.shape[1])[:, None, None]
    return -0.1 * heads_H11 * distance_QK + q_BHQD.mean(-1)[..., None] * distance_QK.cos()


def random_rows(lengths: list[int], heads: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(lengths), heads, D, generator=generator)


def check(queries: list[int], keys: list[int], heads: int, groups: int, **options: Any) -> tuple[Tensor, Tensor]:
    q = random_rows(queries, heads, 1)
    k, v = random_rows(keys, groups, 2), random_rows(keys, groups, 3)
    arguments = (q, k, v, SequenceLayout.of(queries), SequenceLayout.of(keys))
    ours, plain = attention(*arguments, **options), plain_attention(*arguments, **options)
    assert ours.shape == q.shape
    assert ours.dtype == q.dtype
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    return ours, plain


OPTIONS: dict[str, dict[str, Any]] = {
    "whole": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 3},
    "window of one": {"causal": True, "window": 1},
    "window wider than all": {"causal": True, "window": 99},
    "scale": {"causal": True, "scale": 0.9},
    "bias": {"bias": slope},
    "causal bias": {"causal": True, "bias": slope},
    "all": {"causal": True, "window": 4, "scale": 0.3, "bias": slope},
}
LENGTHS = {
    "one": ([7], [7]),
    "equal": ([6, 6, 6], [6, 6, 6]),
    "ragged": ([5, 1, 9, 2], [5, 1, 9, 2]),
    "with a past": ([3, 1, 4, 11], [9, 8, 4, 12]),
    "decoding": ([1, 1, 1], [9, 1, 4]),
}


@pytest.mark.parametrize("block", [512, 1, 2, 4])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("options", OPTIONS)
def test_attention_matches_float64_loops(
    options: str, lengths: str, heads: int, groups: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pentad.nn.attention, "QUERY_BLOCK", block)
    check(*LENGTHS[lengths], heads, groups, **OPTIONS[options])


@pytest.mark.parametrize("options", ["whole", "scale"])
def test_more_queries_than_keys(options: str) -> None:
    """An encoder-decoder's cross-attention: every query sees all keys of another sequence."""
    check([9, 2, 1], [4, 4, 3], 4, 2, **{**OPTIONS[options], "causal": False})


@pytest.mark.parametrize("chunk", [1, 4, 8])
def test_a_window_of_n_sees_n_keys_including_the_querys_own(chunk: int) -> None:
    """All scores are equal, so the output averages the values of the visible keys.

    transformers has the same window (``kv > q - window``). Mistral's one_file_ref.py sees one key more in prefill, but
    not from its cache.
    """
    values = torch.eye(8)[:, None]  # each key's value is the unit vector of its position
    for start in range(0, 8, chunk):
        queries, keys = SequenceLayout.of([chunk]), SequenceLayout.of([start + chunk])
        q, k, v = torch.zeros(chunk, 1, 8), torch.zeros(start + chunk, 1, 8), values[: start + chunk]
        y = attention(q, k, v, queries, keys, causal=True, window=3)
        for i, weights in enumerate(y[:, 0], start):
            assert weights.nonzero().flatten().tolist() == list(range(max(0, i - 2), i + 1))


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that operators return, and the operators' names."""

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.operators = 0, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operators.add(func.overloadpacket.__name__)
        for made in out if isinstance(out, Sequence) else [out]:
            if isinstance(made, Tensor):
                self.numel = max(self.numel, made.numel())
        return out


@torch.no_grad()  # in inference_mode the dispatch mode would see attention as one operator
@pytest.mark.parametrize("past", [0, 1000])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("bias", [None, lambda q, at_q, at_k: q.new_zeros(q.shape[1], len(at_q), len(at_k))])
def test_no_mask_or_scores_of_a_whole_sequence_are_materialized(bias: Any, window: int | None, past: int) -> None:
    """SDPA's math backend would materialize the scores."""
    length, heads = 4096, 2
    q, k, v = (torch.randn(n, h, D) for n, h in ((length - past, heads), (length, 1), (length, 1)))
    queries, keys = SequenceLayout.of([len(q)]), SequenceLayout.of([length])
    with LargestTensor() as largest:
        attention(q, k, v, queries, keys, causal=True, window=window, bias=bias)
    block = pentad.nn.attention.QUERY_BLOCK
    masked = block * (length if window is None else window + block)
    assert largest.numel <= max(q.numel(), masked * (heads if bias else 1)) < length * length / 4
    assert largest.operators & {"_scaled_dot_product_flash_attention_for_cpu"}
    assert not largest.operators & {"bmm", "_safe_softmax"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_and_matches_float64_loops(dtype: torch.dtype) -> None:
    q, k, v = (random_rows([9, 4], heads, heads).to(dtype) for heads in (4, 2, 2))
    arguments = (q, k, v, SequenceLayout.of([9, 4]), SequenceLayout.of([9, 4]))
    for options in ({"causal": True}, {"causal": True, "window": 3}, {"causal": True, "bias": slope}):
        ours = attention(*arguments, **options)
        assert ours.dtype == dtype
        plain = plain_attention(*arguments, **options)
        torch.testing.assert_close(ours, plain, rtol=0.03, atol=0.03)


def scattered(lengths: list[int], page_size: int, groups: int) -> tuple[Tensor, Tensor, PagedKV]:
    """Make keys and values in pages of random order; all other slots are NaN."""
    counts = [-(-length // page_size) for length in lengths]
    order = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(0)).tolist()
    pools = torch.full((2, len(order) * page_size, groups, D), torch.nan)
    tables = []
    for length, count in zip(lengths, counts, strict=True):
        tables.append(tuple(order.pop() for _ in range(count)))
        for i in range(length):
            slot = tables[-1][i // page_size] * page_size + i % page_size
            pools[:, slot] = torch.randn(2, groups, D)
    slots = torch.zeros(0, dtype=torch.int64)
    return pools[0], pools[1], PagedKV([], [], page_size, tuple(tables), tuple(lengths), slots)


@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("options", ["causal", "window", "all"])
@pytest.mark.parametrize("lengths", ["equal", "with a past", "decoding"])
def test_paged_keys_give_what_contiguous_keys_give(lengths: str, options: str, page_size: int) -> None:
    queries, keys = LENGTHS[lengths]
    k, v, pages = scattered(keys, page_size, groups=2)
    q = random_rows(queries, 4, 1)
    ours = attention(q, k, v, SequenceLayout.of(queries), pages, **OPTIONS[options])
    k_rows, v_rows = (torch.cat([read_pages(pool, pages, b) for b in range(len(keys))]) for pool in (k, v))
    rows = attention(q, k_rows, v_rows, SequenceLayout.of(queries), SequenceLayout.of(keys), **OPTIONS[options])
    plain = plain_attention(q, k, v, SequenceLayout.of(queries), pages, **OPTIONS[options])
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows, plain, rtol=1e-5, atol=1e-5)


def test_adjacent_pages_are_read_as_one_span() -> None:
    slots = torch.zeros(0, dtype=torch.int64)
    pages = PagedKV([], [], 4, ((2, 3, 4), (4, 3), (5,)), (10, 7, 1), slots)
    first, second, third = pages.spans
    assert first == (8, 10)
    assert isinstance(second, Tensor)
    assert second.tolist() == [16, 17, 18, 19, 12, 13, 14]
    assert third == (20, 1)
    assert pages.padded_block_tables.tolist() == [[2, 3, 4], [4, 3, 0], [5, 0, 0]]
    assert pages.seqused.tolist() == [10, 7, 1]


@pytest.mark.parametrize("window", [None, 2])
def test_gradients_flow_to_queries_keys_and_values(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pentad.nn.attention, "QUERY_BLOCK", 2)
    tensors = [random_rows([3, 2], heads, heads)[..., :2].double() for heads in (2, 1, 1)]
    for tensor in tensors:
        tensor.requires_grad_()
    rows = SequenceLayout.of([3, 2])
    assert torch.autograd.gradcheck(
        lambda q, k, v: attention(q, k, v, rows, rows, causal=True, window=window), tensors, fast_mode=True
    )


@torch.inference_mode()
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_the_layer_is_projections_rope_and_attention(bias: bool, window: int | None) -> None:
    rope = Rope(D)
    layer = Attention(
        24, heads=4, kv_heads=2, head_dim=D, rope=rope, layer=0, window=window, bias=bias,
        output_bias=bias,
    )  # fmt: skip
    batch = Batch.of(9, 5)
    x = torch.randn(14, 24)
    q, k, v = (
        torch.nn.functional.linear(x, part.weight, part.bias).unflatten(-1, (-1, D))
        for part in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    y = plain_attention(rope(q, batch), rope(k, batch), v, batch.layout, batch.layout, causal=True, window=window)
    expected = layer.o_proj(y.flatten(1))
    torch.testing.assert_close(layer(x, batch), expected, rtol=1e-5, atol=1e-5)
    cache = PagedCache(1, 2, D, dtype=torch.float32, page_size=4)
    paged = cache.batch([(cache.open(), 9), (cache.open(), 5)])
    torch.testing.assert_close(layer(x, paged), expected, rtol=1e-5, atol=1e-5)
    assert layer.o_proj.bias is None or layer.o_proj.bias.shape == (24,)
    assert math.isfinite(float(expected.sum()))


@torch.inference_mode()
@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("chunk", [4, 5])
def test_chunked_prefill_into_a_rolling_buffer_equals_whole_prefill(chunk: int, page_size: int) -> None:
    """Prefill in chunks of the window's length (Mistral 7B, arXiv:2310.06825, section 2) or of 5 tokens at a window of
    4 (mistral-src's own test), then decode. With two layers, a token depends on more than one window."""
    window, lengths = 4, (23, 30)
    layers = [
        Attention(16, heads=4, kv_heads=2, head_dim=D, rope=Rope(D), layer=i, window=window) for i in range(2)
    ]  # fmt: skip
    texts = torch.randn(sum(lengths), 16).split(lengths)

    def run(x: Tensor, batch: Batch) -> Tensor:
        for layer in layers:
            x = x + layer(x, batch)
        return x

    whole = run(torch.cat(texts), Batch.of(*lengths)).split(lengths)
    cache = PagedCache(2, 2, D, dtype=torch.float32, page_size=page_size, window=window)
    sequences, got = [cache.open(), cache.open()], [torch.empty(0, 16)] * 2
    while any(len(y) < len(text) for y, text in zip(got, texts, strict=True)):
        parts = [text[len(y) :][: chunk if len(y) < 3 * chunk else 1] for y, text in zip(got, texts, strict=True)]
        work = [(s, len(part)) for s, part in zip(sequences, parts, strict=True)]
        out = run(torch.cat(parts), cache.batch(work)).split([len(part) for part in parts])
        for sequence, part in zip(sequences, parts, strict=True):
            cache.advance(sequence, len(part))
        got = [torch.cat([y, part]) for y, part in zip(got, out, strict=True)]
    for ours, expected in zip(got, whole, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [None, slope])
@pytest.mark.parametrize("context", [None, 3])
def test_sequences_of_equal_length_need_one_sdpa_call(
    monkeypatch: pytest.MonkeyPatch, bias: Bias | None, context: int | None
) -> None:
    """25 windows of an image, with and without a bias, in self-attention or over a context of another length."""
    calls, sdpa = [], F.scaled_dot_product_attention

    def counted(*arguments: Any, **options: Any) -> Tensor:
        calls.append(1)
        return sdpa(*arguments, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    queries, keys = [6] * 25, [context or 6] * 25
    arguments = (random_rows(queries, 4, 1), random_rows(keys, 2, 2), random_rows(keys, 2, 3))
    layouts = SequenceLayout.of(queries), SequenceLayout.of(keys)
    ours = attention(*arguments, *layouts, bias=bias)
    assert len(calls) == 1
    torch.testing.assert_close(ours, plain_attention(*arguments, *layouts, bias=bias), rtol=1e-5, atol=1e-5)

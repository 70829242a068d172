"""Invariants of every decoder-only family: caching, chunking, batching and forking don't change the logits.

Each family needs one line in FAMILIES. Logits are compared within float32's rounding, or bit by bit if only the
bookkeeping differs.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pentad.nn.attention
from pentad.generate.engine import Engine
from pentad.generate.requests import Generation
from pentad.generate.sampling import Sampling
from pentad.generate.step import PlainStep
from pentad.nn.attention import Attention
from pentad.nn.batch import pack
from pentad.nn.cache import CachedSequence
from tests.helpers.plain import plain_attention
from tests.helpers.tiny import assert_equal_logits, logits_of, network_of, random_ids, tiny_checkpoint
from tests.helpers.tiny_openmoe import openmoe_checkpoint
from tests.helpers.tiny_qwen import qwen_checkpoint

# Settings of `tiny_checkpoint`, with at least 96 ids and 256 positions. For families that transformers lacks, `make`
# saves the checkpoint.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"family": "mistral"},
    "mixtral": {"family": "mixtral"},
    "openmoe": {"make": openmoe_checkpoint, "router_drop_tks": False},  # dropping depends on the chunk
    "phi": {"family": "phi"},
    "qwen": {"make": qwen_checkpoint, "seq_length": 24, "use_dynamic_ntk": True, "use_logn_attn": True},
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3", "head_dim": 16},
}
PAGE_SIZES = [1, 3, 16, 256]


@pytest.fixture(scope="module", params=FAMILIES)
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    settings = {"make": tiny_checkpoint, **FAMILIES[request.param]}
    return network_of(settings.pop("make")(tmp_path_factory.mktemp("family"), **settings).folder)


def windowed(network: nn.Module, window: int) -> nn.Module:
    """Copy a network and set every layer's window."""
    network = copy.deepcopy(network)
    for part in network.modules():
        if isinstance(part, Attention):
            part.window = window
    return network


def run_chunks(run: PlainStep, sequence: CachedSequence, ids: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """Run `ids` in chunks of `sizes`, repeating the last size; returns the logits of all tokens."""
    sizes, at, out = list(sizes), 0, []
    while at < len(ids):
        chunk = ids[at : at + (sizes.pop(0) if len(sizes) > 1 else sizes[0])]
        out.append(run([(sequence, chunk)], range(len(chunk))))
        at += len(chunk)
    return torch.cat(out)


def cached_logits(network: nn.Module, ids: Sequence[int], sizes: Sequence[int], **options: Any) -> Tensor:
    run = PlainStep(network, **options)
    return run_chunks(run, run.cache.open(len(ids)), ids, sizes)


def test_the_same_input_gives_the_same_bits(network: nn.Module) -> None:
    ids = random_ids(70)
    assert torch.equal(logits_of(network, ids), logits_of(network, ids))
    sizes = [33, 1]
    assert torch.equal(cached_logits(network, ids, sizes), cached_logits(network, ids, sizes))


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("sizes", [[1], [40, 1], [7], [64, 36], [100]], ids=str)
def test_cached_chunks_equal_one_uncached_run(network: nn.Module, sizes: list[int], page_size: int) -> None:
    ids = random_ids(100)
    cached = cached_logits(network, ids, sizes, page_size=page_size)
    assert_equal_logits(cached, logits_of(network, ids))


def test_page_sizes_give_the_same_bits(network: nn.Module) -> None:
    ids = random_ids(60)
    one, *others = (cached_logits(network, ids, [25, 1], page_size=size) for size in PAGE_SIZES)
    for other in others:
        assert torch.equal(one, other)


@torch.inference_mode()
@pytest.mark.parametrize("lengths", [(31, 31, 31), (1, 40, 17, 2), (1, 1)], ids=str)
def test_a_batch_equals_single_runs(network: nn.Module, lengths: tuple[int, ...]) -> None:
    sequences = [random_ids(length, seed=i) for i, length in enumerate(lengths)]
    batched = network.head(network(*pack(*sequences)))
    for one, ids in zip(batched.split(lengths), sequences, strict=True):
        assert_equal_logits(one, logits_of(network, ids))


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_batched_decoding_equals_single_decoding(network: nn.Module, page_size: int) -> None:
    run = PlainStep(network, page_size=page_size)
    texts = [random_ids(length + 20, seed=length) for length in (1, 5, 16, 40)]
    sequences = [run.cache.open(len(ids)) for ids in texts]
    rows = [[run([(s, ids[:-20])], [len(ids) - 21])] for s, ids in zip(sequences, texts, strict=True)]
    for at in range(-20, 0):
        work = [(s, [ids[at]]) for s, ids in zip(sequences, texts, strict=True)]
        for got, row in zip(rows, run(work, range(len(work))), strict=True):
            got.append(row[None])
    for got, ids in zip(rows, texts, strict=True):
        assert_equal_logits(torch.cat(got), logits_of(network, ids)[-21:])


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_a_mixed_step_equals_single_runs(network: nn.Module, page_size: int) -> None:
    """One Batch contains a chunk of a long prefill, three decodes and one scoring."""
    run = PlainStep(network, page_size=page_size)
    long, scored = random_ids(130, seed=1), random_ids(50, seed=2)
    talks = [random_ids(length + 4, seed=length) for length in (3, 20, 33)]
    prefill, scoring = run.cache.open(len(long)), run.cache.open(len(scored))
    decodes = [run.cache.open(len(ids)) for ids in talks]
    for sequence, ids in zip(decodes, talks, strict=True):
        run([(sequence, ids[:-4])], [])
    got: dict[str, list[Tensor]] = {name: [] for name in ("long", "scored", "0", "1", "2")}
    for step, chunk in enumerate(torch.tensor(long).split(37)):
        work = [("0", decodes[0], [talks[0][step - 4]]), ("long", prefill, chunk.tolist())]
        work += [("1", decodes[1], [talks[1][step - 4]])]
        if step == 1:
            work += [("scored", scoring, scored)]
        work += [("2", decodes[2], [talks[2][step - 4]])]
        total = sum(len(ids) for _, _, ids in work)
        logits = run([(sequence, ids) for _, sequence, ids in work], range(total))
        parts = logits.split([len(ids) for _, _, ids in work])
        for (name, _, _), part in zip(work, parts, strict=True):
            got[name].append(part)
    assert_equal_logits(torch.cat(got["long"]), logits_of(network, long))
    assert_equal_logits(torch.cat(got["scored"]), logits_of(network, scored))
    for i, ids in enumerate(talks):
        assert_equal_logits(torch.cat(got[str(i)]), logits_of(network, ids)[-4:])


def test_only_wanted_rows_are_returned(network: nn.Module) -> None:
    ids = random_ids(30)
    run = PlainStep(network)
    wanted = run([(run.cache.open(30), ids)], [29, 3])
    assert_equal_logits(wanted, logits_of(network, ids)[[29, 3]])
    assert run([(run.cache.open(30), ids)], []).shape == (0, wanted.shape[1])


def generate(network: nn.Module, prompts: Sequence[list[int]], **engine: Any) -> list[list[int]]:
    """Generate a text for each prompt; a prompt's seed is its length."""
    runner = Engine(PlainStep(network, **engine))
    requests = [
        Generation(ids, sampling=Sampling(), generator=torch.Generator().manual_seed(len(ids)), max_tokens=20)
        for ids in prompts
    ]
    for request in requests:
        runner.submit(request)
    while any(request.finish_reason is None for request in requests):
        assert runner.step()
    return [request.generated for request in requests]


@pytest.mark.parametrize("page_size", [1, 16])
def test_the_same_seed_gives_the_same_text_in_any_batch(network: nn.Module, page_size: int) -> None:
    prompts = [random_ids(length, seed=length) for length in (1, 9, 64, 150, 200, 33)]
    batched = generate(network, prompts, page_size=page_size)
    reversed_batch = generate(network, prompts[::-1], page_size=page_size)
    single = [generate(network, [ids])[0] for ids in prompts]
    assert batched == single == reversed_batch[::-1]
    assert len({tuple(ids) for ids in single}) == len(single)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_forks_are_independent_and_equal_unshared_sequences(network: nn.Module, page_size: int) -> None:
    """The shared prefix ends in a partly full page, which is copied when a fork writes to it."""
    prefix = random_ids(41, seed=9)
    ends = [random_ids(30, seed=seed) for seed in range(3)]
    run = PlainStep(network, page_size=page_size)
    first = run.cache.open(len(prefix) + 30)
    run([(first, prefix)], [])
    pages = run.cache.pages_in_use
    sequences = [first, run.cache.fork(first), run.cache.fork(first)]
    assert run.cache.pages_in_use == pages
    got: list[list[Tensor]] = [[], [], []]
    for start, stop in [(0, 1), (1, 2), (2, 19), (19, 30)]:
        work = [(s, end[start:stop]) for s, end in zip(sequences, ends, strict=True)]
        parts = run(work, range(3 * (stop - start))).chunk(3)
        for one, part in zip(got, parts, strict=True):
            one.append(part)
    for one, end in zip(got, ends, strict=True):
        assert_equal_logits(torch.cat(one), logits_of(network, prefix + end)[len(prefix) :])
    for sequence in sequences:
        run.cache.close(sequence)
    assert run.cache.pages_in_use == 0


def test_a_fork_of_a_sequence_with_reserved_pages(network: nn.Module) -> None:
    """Both sequences append more tokens than fit into the current page."""
    prefix, ends = random_ids(10), [random_ids(20, seed=1), random_ids(20, seed=2)]
    run = PlainStep(network, page_size=4)
    first = run.cache.open(30)
    run.cache.reserve(first, 30)
    run([(first, prefix)], [])
    second = run.cache.fork(first)
    parts = run([(first, ends[0]), (second, ends[1])], range(40)).chunk(2)
    for part, end in zip(parts, ends, strict=True):
        assert_equal_logits(part, logits_of(network, prefix + end)[10:])


@torch.inference_mode()
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_truncating_and_continuing(network: nn.Module, page_size: int) -> None:
    """Rejected drafts and edited chat turns need it."""
    ids, other = random_ids(60), random_ids(25, seed=5)
    run = PlainStep(network, page_size=page_size)
    sequence = run.cache.open(60)
    run([(sequence, ids)], [])
    for length in (48, 17, 0):
        run.cache.truncate(sequence, length)
        assert sequence.length == length
        again = run_chunks(run, sequence, other, [11, 1])
        tokens, whole = pack(ids[:length] + other)
        whole = replace(whole, rope_lengths=(60,))  # the length with which the sequence was opened
        assert_equal_logits(again, network.head(network(tokens, whole))[length:])


def test_growing_pools_keep_their_contents(network: nn.Module) -> None:
    run = PlainStep(network, page_size=4)
    texts = [random_ids(40, seed=seed) for seed in range(3)]
    sequences = [run.cache.open(40) for _ in texts]
    got: list[list[Tensor]] = [[], [], []]
    sizes = {run.cache.nbytes}
    for at in range(0, 40, 5):
        work = [(s, ids[at : at + 5]) for s, ids in zip(sequences, texts, strict=True)]
        for one, part in zip(got, run(work, range(15)).chunk(3), strict=True):
            one.append(part)
        sizes.add(run.cache.nbytes)
    assert len(sizes) > 3
    for one, ids in zip(got, texts, strict=True):
        assert_equal_logits(torch.cat(one), logits_of(network, ids))


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("window", [1, 5, 16])
def test_a_window_is_masked_full_attention(
    network: nn.Module, window: int, page_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sequence is several windows long, so its pages are reused, and memory is O(window)."""
    ids, chunk = random_ids(6 * window + 40), 9
    windowed_network = windowed(network, window)
    run = PlainStep(windowed_network, page_size=page_size)
    sequence, got, max_pages = run.cache.open(len(ids)), [], 0
    sizes = [chunk] * 4 + [1] * (len(ids) - 4 * chunk)
    at = 0
    for size in sizes:
        got.append(run([(sequence, ids[at : at + size])], range(size)))
        at += size
        max_pages = max(max_pages, run.cache.pages_in_use)
        tokens = window + (chunk if at <= 4 * chunk else 1)
        assert len(sequence.pages) <= -(-tokens // page_size) + 1
    pages = len(run.cache.keys[0]) // page_size  # of the whole pool
    assert pages <= 2 * (-(-(window + chunk) // page_size) + 2)
    assert max_pages < -(-len(ids) // page_size) or page_size == 256
    uncached = logits_of(windowed_network, ids)
    assert not torch.allclose(uncached, logits_of(network, ids), atol=1e-2)
    monkeypatch.setattr(pentad.nn.attention, "attention", plain_attention)
    reference = logits_of(windowed_network, ids)
    assert_equal_logits(uncached, reference)
    assert_equal_logits(torch.cat(got), reference)


def test_truncating_within_a_window(network: nn.Module) -> None:
    windowed_network = windowed(network, 8)
    run = PlainStep(windowed_network, page_size=4)
    ids, other = random_ids(50), random_ids(12, seed=3)
    sequence = run.cache.open(62)
    run_chunks(run, sequence, ids, [10])
    assert sequence.dropped > 0
    assert not run.cache.can_truncate(sequence, sequence.dropped + 3)
    run.cache.truncate(sequence, 48)
    again = run_chunks(run, sequence, other, [5, 1])
    assert_equal_logits(again, logits_of(windowed_network, ids[:48] + other)[48:])

"""Shared prefixes: kept sequences, sequences that are still running, and models that can't share."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pentad.generate.engine import Engine, EngineConfig
from pentad.generate.prefixes import common_length
from pentad.generate.requests import Evaluation
from pentad.generate.sampling import Sampling
from tests.helpers.engines import Counting, finish, greedy, leaked_pages, request
from tests.helpers.tiny import logits_of, network_of, random_ids, tiny_checkpoint
from tests.helpers.tiny_openmoe import openmoe_checkpoint

HOT = Sampling(temperature=1.5, top_p=1.0)


@given(st.lists(st.integers(0, 2), max_size=20), st.lists(st.integers(0, 2), max_size=20))
def test_common_length(one: list[int], other: list[int]) -> None:
    length = common_length(np.array(one, dtype=np.int32), np.array(other, dtype=np.int32))
    assert one[:length] == other[:length]
    assert length == min(len(one), len(other)) or one[length] != other[length]


def test_all_finished_sequences_are_kept(network: nn.Module, step: Counting) -> None:
    engine, prompts = Engine(step), [random_ids(30, seed=i) for i in range(3)]
    first = [request(prompt) for prompt in prompts]
    finish(engine, *first)
    step.ran.clear()
    for prompt, before in zip(prompts, first, strict=True):
        finish(engine, again := request(prompt))
        assert again.generated == before.generated == greedy(network, prompt, 12)
        assert again.cached_tokens == 29
        assert before.cached_tokens == 0
    assert step.ran == [[1]] * 3 * 12
    assert leaked_pages(engine) == 0


def test_the_longest_common_prefix_is_shared(network: nn.Module, step: Counting) -> None:
    engine, prompt = Engine(step), random_ids(60)
    finish(engine, request([*prompt[:20], *random_ids(20, seed=1)]), request([*prompt[:45], *random_ids(9, seed=2)]))
    step.ran.clear()
    pages = step.pages_in_use()
    finish(engine, one := request(prompt, max_tokens=1))
    assert step.ran == [[15]]
    assert one.cached_tokens == 45
    assert step.pages_in_use() == pages + 2  # of 60 tokens 32 are in shared pages
    assert one.generated == greedy(network, prompt, 1)


def test_a_shared_sequence_stays_as_it_was(network: nn.Module, step: Counting) -> None:
    """The second request begins like the first, and writes to the page where they part; the third repeats the first."""
    engine, prompt = Engine(step), random_ids(41)
    edited = [*prompt[:37], 5, 6]
    for ids in (prompt, edited, prompt, edited):
        finish(engine, one := request(ids))
        assert one.generated == greedy(network, ids, 12)
    assert step.tokens == (41 + 11) + (2 + 11) + 2 * 12


def test_the_next_turn_takes_the_sequence_without_a_copy(step: Counting) -> None:
    engine = Engine(step)
    finish(engine, first := request(random_ids(40)))
    finish(engine, request([*first.prompt, *first.generated, 7], max_tokens=2))
    assert step.pages_in_use() == 4  # 54 tokens


def test_a_repeated_reply_is_kept_once(step: Counting) -> None:
    engine = Engine(step)
    for _ in range(3):
        finish(engine, request(random_ids(30)))
    assert step.pages_in_use() == 3


@pytest.mark.parametrize(("batched", "shared"), [(32, 96), (50, 100), (512, 100)])
def test_a_request_waits_for_a_prefix_that_is_being_prefilled(
    network: nn.Module, step: Counting, batched: int, shared: int
) -> None:
    """It doesn't wait for the last few tokens."""
    system = random_ids(100)
    prompts = [[*system, *random_ids(5 + i, seed=i + 1)] for i in range(6)]
    requests = [request(prompt) for prompt in prompts]
    finish(Engine(step, EngineConfig(max_batched_tokens=batched)), *requests)
    assert [one.cached_tokens for one in requests] == [0] + 5 * [shared]
    assert step.tokens == sum(map(len, prompts)) - 5 * shared + 6 * 11
    for one, prompt in zip(requests, prompts, strict=True):
        assert one.generated == greedy(network, prompt, 12)


def test_a_short_common_prefix_is_not_waited_for(step: Counting) -> None:
    prompts = [[1, 2, 3, 4, *random_ids(20, seed=i)] for i in range(2)]
    finish(Engine(step), *map(request, prompts))
    assert step.ran[0] == [24, 24]


def test_others_overtake_a_request_that_waits(network: nn.Module, step: Counting) -> None:
    engine, prompt = Engine(step, EngineConfig(max_batched_tokens=60)), random_ids(100)
    first, second, other = request(prompt), request([*prompt, 3]), request(random_ids(9, seed=1), max_tokens=1)
    for one in (first, second, other):
        engine.submit(one)
    engine.step()
    engine.step()
    assert step.ran == [[60], [40, 9]]
    assert other.finish_reason == "length"
    while engine.requests:
        engine.step()
    assert second.generated == greedy(network, [*prompt, 3], 12)


def test_samples_of_one_prompt_prefill_it_once(network: nn.Module, step: Counting) -> None:
    single = []
    for seed in range(4):
        finish(Engine(Counting(network)), one := request(random_ids(50), seed=seed, sampling=HOT))
        single.append(one.generated)
    requests = [request(random_ids(50), seed=seed, sampling=HOT) for seed in range(4)]
    finish(Engine(step), *requests)
    assert [one.generated for one in requests] == single
    assert len({tuple(ids) for ids in single}) == 4
    assert step.tokens == 50 + 3 + 4 * 11


def test_a_waiting_request_runs_after_the_other_is_cancelled(network: nn.Module, step: Counting) -> None:
    engine, prompt = Engine(step, EngineConfig(max_batched_tokens=32)), random_ids(100)
    first, second = request(prompt), request([*prompt[:90], 5])
    engine.submit(first)
    engine.submit(second)
    engine.step()
    engine.cancel(first)
    while engine.requests:
        engine.step()
    assert second.cached_tokens == 32
    assert second.generated == greedy(network, [*prompt[:90], 5], 12)
    assert leaked_pages(engine) == 0


def test_evaluations_share_their_prompt(network: nn.Module, step: Counting) -> None:
    engine, prompt = Engine(step), random_ids(64)
    choices = [[*prompt, *random_ids(6, seed=i)] for i in range(4)]
    requests = [Evaluation(ids, first=64) for ids in choices]
    finish(engine, *requests)
    assert step.tokens == 63 + 4 * 6
    for one, ids in zip(requests, choices, strict=True):
        rows = logits_of(network, ids).log_softmax(-1)[63:-1]
        expected = float(rows.gather(1, torch.tensor(ids[64:])[:, None]).sum())
        assert one.log_likelihood == pytest.approx(expected, rel=1e-4)
    step.ran.clear()
    finish(engine, whole := Evaluation(prompt), text := request(prompt, max_tokens=1))
    assert step.ran == [[64, 1]]
    torch.testing.assert_close(torch.cat(whole.logits), logits_of(network, prompt), rtol=1e-4, atol=1e-4)
    assert text.generated == greedy(network, prompt, 1)


def test_pages_of_cancelled_requests_are_shared(network: nn.Module, step: Counting) -> None:
    engine, one = Engine(step), request(random_ids(40))
    engine.submit(one)
    engine.step()
    engine.cancel(one)
    finish(engine, again := request(random_ids(40)))
    assert again.cached_tokens == 39
    assert again.generated == greedy(network, random_ids(40), 12)


def test_a_window_is_shared_as_far_as_it_is_kept(tmp_path: Path) -> None:
    """The kept sequence has lost its first pages: the next turn shares the rest, an edit of the beginning nothing."""
    network = network_of(tiny_checkpoint(tmp_path, family="mistral", sliding_window=24).folder)
    step = Counting(network, page_size=4)
    engine, prompt = Engine(step), random_ids(80)
    finish(engine, first := request(prompt))
    step.ran.clear()
    turn = [*prompt, *first.generated, 5, 6]
    finish(engine, second := request(turn))
    assert step.ran[0] == [3]
    assert second.generated == greedy(network, turn, 12)
    edited = [*prompt[:40], 9, 9]
    finish(engine, third := request(edited), fourth := request([*edited, 3]))
    assert third.generated == greedy(network, edited, 12)
    assert fourth.generated == greedy(network, [*edited, 3], 12)
    assert third.cached_tokens == 0
    assert leaked_pages(engine) == 0


def test_mixtures_with_capacities_run_whole_and_unshared(tmp_path: Path) -> None:
    """Dropped tokens depend on the chunk: each prompt is one chunk, also beside others, and nothing is reused."""
    network = network_of(openmoe_checkpoint(tmp_path).folder)
    prompts = [[*random_ids(60), *random_ids(30, seed=i)] for i in range(1, 4)]
    alone = []
    for prompt in prompts:
        finish(Engine(step := Counting(network)), one := request(prompt, sampling=HOT))
        alone.append(one.generated)
        assert step.ran == [[90], *[[1]] * 11]
    step = Counting(network, page_size=16)
    engine = Engine(step, EngineConfig(max_batched_tokens=40, max_cache_bytes=14 * step.cache.page_bytes))
    for _ in range(2):
        requests = [request(prompt, sampling=HOT) for prompt in prompts]
        finish(engine, *requests)
        assert [one.generated for one in requests] == alone
        assert all(one.cached_tokens == 0 for one in requests)
    assert {count for ran in step.ran for count in ran} == {1, 90}
    assert leaked_pages(engine) == 0

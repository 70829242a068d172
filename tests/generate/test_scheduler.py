"""A cache with a limit: admission, eviction and preemption; and the time of steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from pentad.errors import BadInput
from pentad.generate.engine import Engine, EngineConfig
from pentad.generate.pace import Pace
from pentad.generate.requests import Evaluation, Generation
from pentad.generate.sampling import Sampling
from tests.helpers.engines import Counting, finish, greedy, leaked_pages, request
from tests.helpers.tiny import network_of, random_ids, tiny_checkpoint

HOT = Sampling(temperature=1.5, top_p=1.0)


def limited(step: Counting, pages: int, **options: Any) -> Engine:
    return Engine(step, EngineConfig(max_cache_bytes=pages * step.cache.page_bytes, **options))


def run(engine: Engine, *requests: Generation | Evaluation) -> list[int]:
    """Run requests to their end; returns the number of running sequences of each step."""
    for one in requests:
        engine.submit(one)
    counts = []
    while engine.requests:
        engine.step()
        counts.append(len(engine.executor.ran[-1]))  # type: ignore[attr-defined]
    return counts


def test_the_cache_is_allocated_once(step: Counting) -> None:
    engine = limited(step, 6)
    pools = [pool.data_ptr() for pool in (*step.cache.keys, *step.cache.values)]
    assert step.cache.nbytes == 6 * step.cache.page_bytes
    run(engine, *(request(random_ids(20 + i, seed=i)) for i in range(8)))
    assert [pool.data_ptr() for pool in (*step.cache.keys, *step.cache.values)] == pools


def test_a_request_that_can_never_fit_is_refused_with_the_numbers(step: Counting) -> None:
    engine = limited(step, 4)
    for too_long in (request(random_ids(60), max_tokens=6), Evaluation(random_ids(65), first=1)):
        with pytest.raises(BadInput, match=r"65 tokens.* 64 .*max_tokens"):
            engine.submit(too_long)
    run(engine, fits := request(random_ids(60), max_tokens=5))
    assert len(fits.generated) == 5


def test_a_limit_below_one_page_is_refused(step: Counting) -> None:
    with pytest.raises(BadInput, match=f"100 bytes.*{step.cache.page_bytes}"):
        Engine(step, EngineConfig(max_cache_bytes=100))


def test_admission_counts_known_tokens(step: Counting) -> None:
    """Five requests run together, though their longest replies would need 10 pages each."""
    requests = [request(random_ids(10, seed=i), max_tokens=150, end_ids=frozenset(range(96))) for i in range(5)]
    assert run(limited(step, 10), *requests) == [5]


def test_requests_wait_until_their_pages_are_free(network: nn.Module, step: Counting) -> None:
    engine = limited(step, 4)
    requests = [request(random_ids(20, seed=i)) for i in range(4)]
    assert max(run(engine, *requests)) == 2
    for i, one in enumerate(requests):
        assert one.generated == greedy(network, random_ids(20, seed=i), 12)


def test_the_least_recently_used_sequence_is_evicted(step: Counting) -> None:
    engine, prompts = limited(step, 6), [random_ids(30, seed=i) for i in range(3)]
    run(engine, request(prompts[0], max_tokens=2))  # 2 pages
    run(engine, request(prompts[1], max_tokens=2))
    run(engine, again := request(prompts[0], max_tokens=2))
    assert again.cached_tokens == 29
    run(engine, request(random_ids(50, seed=9), max_tokens=2))  # 4 pages
    run(engine, one := request(prompts[0], max_tokens=1), other := request(prompts[1], max_tokens=1))
    assert (one.cached_tokens, other.cached_tokens) == (29, 0)


def test_eviction_begins_at_the_end_of_a_sequence(step: Counting) -> None:
    engine = limited(step, 6)
    run(engine, request(random_ids(60), max_tokens=2))  # 4 pages
    run(engine, request(random_ids(50, seed=1), max_tokens=2))  # 4 pages; 2 are free
    run(engine, one := request(random_ids(60), max_tokens=2))
    assert one.cached_tokens == 32


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), HOT], ids=["greedy", "sampled"])
def test_preempted_requests_get_the_same_tokens(network: nn.Module, step: Counting, sampling: Sampling) -> None:
    def make() -> list[Generation]:
        return [request(random_ids(10, seed=i), 60, seed=i, sampling=sampling) for i in range(4)]

    alone = make()
    for one in alone:
        finish(Engine(Counting(network)), one)
    engine, requests = limited(step, 7), make()
    restarts = []
    restart = engine._scheduler.restart
    engine._scheduler.restart = lambda r: (restarts.append(r), restart(r))  # type: ignore[func-returns-value, method-assign, return-value]
    run(engine, *requests)
    assert [one.generated for one in requests] == [one.generated for one in alone]
    assert restarts
    assert requests[0] not in restarts, "the oldest request was preempted"
    assert leaked_pages(engine) == 0


def test_a_preempted_evaluation_counts_each_token_once(step: Counting) -> None:
    ids = random_ids(70, seed=3)
    run(Engine(Counting(step.network)), alone := Evaluation(ids, first=1))
    engine = limited(step, 6, max_batched_tokens=8)
    text, scored = request(random_ids(10), max_tokens=80), Evaluation(ids, first=1)
    run(engine, text, scored)
    assert scored.log_likelihood == pytest.approx(alone.log_likelihood, rel=1e-5)
    assert leaked_pages(engine) == 0


def test_a_windows_prompt_may_be_longer_than_the_cache(tmp_path: Path) -> None:
    network = network_of(tiny_checkpoint(tmp_path, family="mistral", sliding_window=24).folder)
    step = Counting(network, page_size=4)
    engine, prompts = limited(step, 16), [random_ids(150, seed=i) for i in range(3)]
    requests = [request(prompt) for prompt in prompts]
    run(engine, *requests)
    for one, prompt in zip(requests, prompts, strict=True):
        assert one.generated == greedy(network, prompt, 12)
    assert leaked_pages(engine) == 0


# --- the time of steps ------------------------------------------------------------------------------


class Timed(Counting):
    """A step that takes 10 seconds, and 2 seconds per token."""

    now = 0.0

    def __call__(self, work: Any, wanted: Sequence[int]) -> Tensor:
        self.now += 10 + 2 * sum(len(ids) for _, ids in work)
        return super().__call__(work, wanted)

    def clock(self) -> float:
        return self.now


def test_a_long_prompt_does_not_hold_up_decoding(network: nn.Module) -> None:
    step = Timed(network, page_size=16)
    engine, talking = Engine(step, clock=step.clock), [request(random_ids(5, seed=i), 150, seed=i) for i in range(3)]
    for one in talking:
        engine.submit(one)
    for _ in range(3):
        engine.step()
    decoding, before = 10 + 2 * 3, [len(one.generated) for one in talking]
    step.ran.clear()
    engine.submit(long := request(random_ids(240, seed=9), max_tokens=1))
    steps = 0
    while long.finish_reason is None:
        started = step.now
        engine.step()
        steps += 1
        assert step.now - started <= 3 * decoding
    assert [len(one.generated) for one in talking] == [count + steps for count in before]
    assert steps < 20, "a step prefills too few tokens"
    assert long.generated == greedy(network, random_ids(240, seed=9), 1)


def test_without_decoding_requests_prompts_run_in_large_chunks(network: nn.Module) -> None:
    step = Timed(network, page_size=16)
    finish(Engine(step, clock=step.clock), request(random_ids(200), 3), request(random_ids(200, seed=1), 3))
    assert step.ran[0] == [200, 200]


def test_the_pace_knows_the_number_of_decoding_sequences() -> None:
    pace = Pace(3.0)
    assert pace.prefill_tokens(1) == 0, "nothing was measured"
    pace.measure(100.0, 0, 50)  # 2 seconds per token
    pace.measure(12.0, 1, 0)
    assert pace.prefill_tokens(1) == 12
    assert pace.prefill_tokens(16) == 12 + 2 * 15
    for seconds in (12.0, 500.0, 12.0):  # one step was slow because of another process
        pace.measure(seconds, 1, 0)
    assert pace.prefill_tokens(1) == 12
    for _ in range(8):
        pace.measure(12 + 10 * 6.0, 1, 10)  # prefill has become slower
    assert pace.prefill_tokens(1) == 4
    assert Pace(None).prefill_tokens(5) == float("inf")

"""The engine: scheduling, events, prefix reuse, cancellation and failures."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pentad
from pentad.errors import BadInput
from pentad.generate.engine import Engine, EngineConfig
from pentad.generate.requests import Evaluation, Event, Generation
from pentad.generate.sampling import Sampling
from pentad.generate.step import PlainStep
from tests.helpers.engines import GREEDY, Counting, finish, greedy, leaked_pages, request
from tests.helpers.tiny import logits_of, network_of, random_ids, tiny_checkpoint


def test_greedy_tokens_equal_uncached_decoding(network: nn.Module, step: Counting) -> None:
    one, two = request(random_ids(9)), request(random_ids(40, seed=1), max_tokens=5)
    finish(Engine(step), one, two)
    assert one.generated == greedy(network, random_ids(9), 12)
    assert two.generated == greedy(network, random_ids(40, seed=1), 5)
    assert one.finish_reason == two.finish_reason == "length"


def test_any_end_id_ends_a_request(network: nn.Module, step: Counting) -> None:
    text = greedy(network, random_ids(9), 12)
    end = next(token for token in text[3:] if token not in text[:3])
    one = request(random_ids(9), end_ids=frozenset({1000, end}))
    finish(Engine(step), one)
    assert one.finish_reason == "stop"
    assert one.generated == text[: text.index(end)]


def test_logprobs_are_computed_before_sampling_options(network: nn.Module, step: Counting) -> None:
    hot = Sampling(temperature=3.0, top_k=5, presence_penalty=1.0)
    one = request(random_ids(9), sampling=hot, logprobs=4)
    finish(Engine(step), one)
    ids = random_ids(9) + one.generated
    expected_TV = logits_of(network, ids).log_softmax(-1)[8:-1]
    assert len(one.token_logprobs) == len(one.generated) == 12
    for report, token, row_V in zip(one.token_logprobs, one.generated, expected_TV, strict=True):
        assert report.token_id == token
        assert report.logprob == pytest.approx(float(row_V[token]), abs=1e-4)
        values, ids = row_V.topk(4)
        assert [i for i, _ in report.top] == ids.tolist()
        assert [value for _, value in report.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_logprobs_are_limited_by_the_vocabulary(step: Counting) -> None:
    one = request(random_ids(9), max_tokens=1, logprobs=10**6)
    finish(Engine(step), one)
    assert len(one.token_logprobs[0].top) == 96
    assert request([1]).token_logprobs == []


def test_requests_with_and_without_logprobs_run_together(network: nn.Module, step: Counting) -> None:
    requests = [request(random_ids(9, seed=i), 4, logprobs=count) for i, count in enumerate([2, None, 0, 5])]
    finish(Engine(step), *requests)
    assert [len(one.token_logprobs) for one in requests] == [4, 0, 4, 4]
    assert [len(one.token_logprobs[0].top) for one in requests if one.logprobs is not None] == [2, 0, 5]
    for one in (requests[0], requests[3]):
        assert [report.top[0][0] for report in one.token_logprobs] == one.generated


def test_a_bias_for_a_token_outside_the_vocabulary_is_refused(step: Counting) -> None:
    biased = request(random_ids(9), 3, sampling=GREEDY.replace(logit_bias={95: 100}))
    finish(Engine(step), biased)
    assert biased.generated == [95, 95, 95]
    with pytest.raises(BadInput, match=r"token 96.* 96"):
        Engine(step).submit(request(random_ids(9), sampling=GREEDY.replace(logit_bias={5: 1, 96: 1})))


def test_chunked_prefill_shares_steps_with_decoding(network: nn.Module, step: Counting) -> None:
    engine = Engine(step, EngineConfig(max_batched_tokens=32, max_step_ratio=None))
    short, long = request(random_ids(4)), request(random_ids(100, seed=2))
    engine.submit(short)
    engine.step()
    engine.submit(long)
    assert engine.step() == [Event(short, short.generated[-1], None)]
    assert step.ran == [[4], [1, 31]]
    for _ in range(20):
        engine.step()
    assert max(sum(ran) for ran in step.ran) <= 32
    assert short.generated == greedy(network, random_ids(4), 12)
    assert long.generated == greedy(network, random_ids(100, seed=2), 12)


def test_a_step_has_at_most_max_num_seqs_sequences(network: nn.Module, step: Counting) -> None:
    requests = [request(random_ids(5, seed=i), max_tokens=4) for i in range(8)]
    finish(Engine(step, EngineConfig(max_num_seqs=3)), *requests)
    assert max(len(ran) for ran in step.ran) == 3
    for i, one in enumerate(requests):
        assert one.generated == greedy(network, random_ids(5, seed=i), 4)


def test_the_next_turn_prefills_only_new_tokens(network: nn.Module, step: Counting) -> None:
    engine = Engine(step)
    first = request(random_ids(30), max_tokens=10)
    finish(engine, first)
    turn = [*first.prompt, *first.generated, *random_ids(7, seed=4)]
    step.ran.clear()
    second = request(turn, max_tokens=10)
    finish(engine, second)
    # 7 new tokens and the last token of the reply, which was chosen but not yet run
    assert step.ran == [[7 + 1], *[[1]] * 9]
    assert second.generated == greedy(network, turn, 10)


def test_an_edited_turn_reuses_the_common_prefix(network: nn.Module, step: Counting) -> None:
    engine = Engine(step)
    finish(engine, request(random_ids(30), max_tokens=10))
    other = [*random_ids(30)[:21], 5, 6, 7]
    step.ran.clear()
    one = request(other, max_tokens=8)
    finish(engine, one)
    assert step.ran[0] == [3]
    assert one.generated == greedy(network, other, 8)


@pytest.mark.parametrize("length", [1, 30])
def test_the_same_prompt_again_runs_one_token(network: nn.Module, step: Counting, length: int) -> None:
    engine = Engine(step)
    texts = []
    for _ in range(3):
        one = request(random_ids(length))
        finish(engine, one)
        texts.append(one.generated)
    assert texts == [greedy(network, random_ids(length), 12)] * 3
    assert sum(map(sum, step.ran)) == (length + 11) + 2 * 12


def test_a_prompt_without_a_common_prefix(network: nn.Module, step: Counting) -> None:
    engine = Engine(step)
    finish(engine, request([1, 2, 3]))
    one = request([9, 1, 2, 3])
    finish(engine, one)
    assert one.generated == greedy(network, [9, 1, 2, 3], 12)


def test_a_prefix_is_not_reused_if_rope_depends_on_the_length(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    shape = {"rope_parameters": rope, "max_position_embeddings": 32}
    network = network_of(tiny_checkpoint(tmp_path, **shape).folder)
    step = Counting(network)
    engine = Engine(step)
    first = request(random_ids(20), max_tokens=4)
    finish(engine, first)
    turn = [*first.prompt, *first.generated, *random_ids(30, seed=4)]
    second = request(turn, max_tokens=1)
    finish(engine, second)
    assert [len(turn)] in step.ran
    assert second.generated == greedy(network, turn, 1)


@pytest.mark.parametrize("steps", [0, 1, 2, 6])
def test_cancelling_frees_the_pages(network: nn.Module, step: Counting, steps: int) -> None:
    """The request is cancelled while it waits, during its prefill, and while it decodes."""
    engine = Engine(step, EngineConfig(max_batched_tokens=16))
    one, other = request(random_ids(40)), request(random_ids(5, seed=3), max_tokens=20)
    engine.submit(other)
    engine.submit(one)
    for _ in range(steps):
        engine.step()
    engine.cancel(one)
    generated = list(one.generated)
    for _ in range(30):
        assert one not in [event.request for event in engine.step()]
    assert one.finish_reason == "cancelled"
    assert one.generated == generated
    assert other.generated == greedy(network, random_ids(5, seed=3), 20)
    assert engine.step() == []
    assert leaked_pages(engine) == 0
    again = request(random_ids(40))
    finish(engine, again)
    assert again.generated == greedy(network, random_ids(40), 12)


def test_the_cache_stops_growing(step: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pentad.generate.scheduler.MAX_KEPT_BYTES", 4 * step.cache.page_bytes)
    engine = Engine(step)
    sizes = []
    for i in range(12):
        finish(engine, *(request(random_ids(9, seed=2 * i + j), max_tokens=3) for j in range(2)))
        sizes.append(step.cache.nbytes)
    assert sizes[4:] == [sizes[3]] * 8


def with_nan_embedding(tmp_path: Path, token: int) -> nn.Module:
    network = network_of(tiny_checkpoint(tmp_path).folder)
    weight = network.get_parameter("embed.weight").clone()
    weight[token] = torch.nan
    network.embed.weight = nn.Parameter(weight, requires_grad=False)
    return network


def test_nan_logits_end_a_request_with_an_error(tmp_path: Path) -> None:
    engine = Engine(PlainStep(with_nan_embedding(tmp_path, 7)))
    one = request([1, 7, 2])
    engine.submit(one)
    assert engine.step() == [Event(one, None, "error")]
    assert one.finish_reason == "error"
    assert "not numbers" in str(one.error)
    assert engine.step() == []


@pytest.mark.parametrize("bad_first", [True, False])
def test_other_requests_continue_after_nan_logits(tmp_path: Path, bad_first: bool) -> None:
    network = with_nan_embedding(tmp_path, 95)
    engine = Engine(PlainStep(network))
    bad, good = request([1, 95, 2]), request([4, 5, 6], max_tokens=4)
    for one in (bad, good) if bad_first else (good, bad):
        engine.submit(one)
    engine.step()
    assert "not numbers" in str(bad.error)
    for _ in range(10):
        if good.finish_reason is None:
            engine.step()
    assert good.finish_reason == "length"
    assert good.error is None
    assert good.generated == greedy(network, [4, 5, 6], 4)


# --- events, evaluations, limits --------------------------------------------------------------------


def test_events_report_each_token_and_the_finish_reason(network: nn.Module, step: Counting) -> None:
    engine, one = Engine(step), request(random_ids(9), max_tokens=3)
    engine.submit(one)
    events = [event for _ in range(4) for event in engine.step()]
    a, b, c = greedy(network, random_ids(9), 3)
    assert events == [Event(one, a, None), Event(one, b, None), Event(one, c, "length")]


@pytest.mark.parametrize("batched", [7, 512])
def test_evaluations_run_beside_generations(network: nn.Module, step: Counting, batched: int) -> None:
    engine = Engine(step, EngineConfig(max_batched_tokens=batched))
    ids = random_ids(40, seed=5)
    text, whole, part, scored = request(random_ids(9)), Evaluation(ids), Evaluation(ids[:20]), Evaluation(ids, first=4)
    for one in (text, whole, part, scored):
        engine.submit(one)
    while engine.requests:
        engine.step()
    expected = logits_of(network, ids)
    torch.testing.assert_close(torch.cat(whole.logits), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(part.logits), expected[:20], rtol=1e-4, atol=1e-4)
    logprobs = expected.log_softmax(-1)[3:-1].gather(1, torch.tensor(ids[4:])[:, None])
    assert scored.log_likelihood == pytest.approx(float(logprobs.sum()), rel=1e-5)
    assert not scored.logits
    assert text.generated == greedy(network, random_ids(9), 12)


@pytest.mark.parametrize("fails", [0, 1, 4])
def test_requests_continue_after_a_failed_step(network: nn.Module, fails: int) -> None:
    """One step fails before its tokens have run, one after."""

    class Failing(Counting):
        steps = 0

        def __call__(self, work: Any, wanted: Any) -> Tensor:
            self.steps += 1
            if self.steps == fails:
                raise RuntimeError("before")
            logits = super().__call__(work, wanted)
            if self.steps == fails + 2:
                raise KeyboardInterrupt
            return logits

    step = Failing(network, page_size=16)
    engine, ids = Engine(step, EngineConfig(max_batched_tokens=20)), random_ids(30, seed=1)
    text, scored, repeated = request(random_ids(9)), Evaluation(ids, first=1), Evaluation(ids, first=1)
    engine.submit(text)
    engine.submit(scored)
    while engine.requests:
        try:
            engine.step()
        except (RuntimeError, KeyboardInterrupt):
            continue
    assert text.generated == greedy(network, random_ids(9), 12)
    engine.submit(repeated)
    while engine.requests:
        engine.step()
    assert scored.log_likelihood == pytest.approx(repeated.log_likelihood, rel=1e-6)
    assert leaked_pages(engine) == 0


@pytest.mark.parametrize("fails", [0, 1, 2, 3, 23])
def test_a_failure_while_tokens_are_added_repeats_no_random_number(
    step: Counting, monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    """Two requests; adding a token fails for the first, for the second, or in a later step, the last one too."""
    hot = Sampling(temperature=2.0)

    def pair() -> list[Generation]:
        return [request(random_ids(9, seed=i), seed=i, sampling=hot, logprobs=1) for i in range(2)]

    undisturbed = pair()
    finish(Engine(step), *undisturbed)
    failing, make, calls = pair(), pentad.generate.engine.TokenLogprobs, []

    def failing_logprobs(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == fails + 1:
            raise RuntimeError("out of memory")
        return make(*arguments)

    monkeypatch.setattr(pentad.generate.engine, "TokenLogprobs", failing_logprobs)
    engine, events = Engine(step), []
    for one in failing:
        engine.submit(one)
    while engine.requests:
        try:
            events += engine.step()
        except RuntimeError:
            continue
    events += engine.step()
    assert len(calls) > fails
    for one, expected in zip(failing, undisturbed, strict=True):
        assert one.generated == expected.generated
        assert [event.token_id for event in events if event.request is one] == one.generated, "an event is lost"
        assert [report.token_id for report in one.token_logprobs] == one.generated


def test_the_memory_of_many_requests_is_returned(step: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pentad.generate.scheduler.MIN_SHRUNK_BYTES", 0)
    monkeypatch.setattr("pentad.generate.scheduler.MAX_KEPT_BYTES", 0)
    engine, prompt = Engine(step), random_ids(40)
    before, after = request(prompt), request(prompt)
    finish(engine, before)
    at_rest = step.cache.nbytes
    finish(engine, *(request(random_ids(40, seed=i)) for i in range(30)))
    assert step.cache.nbytes <= 4 * at_rest
    assert step.cache.pages_in_use <= 4
    finish(engine, after)
    assert after.generated == before.generated


def test_kept_pages_survive_when_memory_is_returned(step: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pentad.generate.scheduler.MIN_SHRUNK_BYTES", 0)
    monkeypatch.setattr("pentad.generate.scheduler.MAX_KEPT_BYTES", 8 * step.cache.page_bytes)
    engine, prompt = Engine(step), random_ids(40)
    finish(engine, *(request(random_ids(40, seed=i), max_tokens=2) for i in range(30)), last := request(prompt))
    continued = request([*prompt, *last.generated, 5])
    step.ran.clear()
    finish(engine, continued)
    assert step.ran[0] == [2]  # the token that was generated last, and the new one
    assert continued.generated == greedy(step.network, list(continued.prompt), 12)

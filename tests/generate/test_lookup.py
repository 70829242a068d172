"""Drafts by prompt lookup are used where they pay, and change no token."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import pentad
from pentad.generate.engine import Engine, EngineConfig
from pentad.generate.lookup import NGRAM, PAUSE, PromptLookup
from pentad.generate.pace import Pace
from pentad.generate.plan_step import PlanStep
from pentad.generate.requests import Generation
from pentad.generate.sampling import Sampling
from pentad.generate.step import PlainStep, Step
from tests.helpers.engines import leaked_pages
from tests.helpers.programs import needs_kernels
from tests.helpers.tiny import network_of, talking_checkpoint, tiny_checkpoint

TEXT = [5, 6, 7, 8, 9, 10, 11, 5, 6, 7]


def trusted(prompt: list[int]) -> PromptLookup:
    lookup = PromptLookup(prompt)
    lookup.learn(9, 9)
    return lookup


def test_drafts_are_what_followed_the_last_tokens() -> None:
    lookup = trusted(TEXT)
    assert lookup.draft([], 3, 0.0) == [8, 9, 10]
    assert lookup.draft([8], 2, 0.0) == [9, 10]
    assert lookup.draft([8, 1], 3, 0.0) == []
    assert lookup.draft([8, 1, 5, 6, 7], 3, 0.0) == [8, 1, 5]  # the last occurrence counts
    assert lookup.draft([8, 1, 5, 6, 7], 0, 0.0) == []
    assert trusted([1, 2, 1, 2, 1]).draft([], 3, 0.0) == [2, 1, 2]
    assert trusted(TEXT[: NGRAM - 1]).draft([], 3, 0.0) == []


def test_drafts_grow_when_they_are_accepted() -> None:
    lookup = PromptLookup(TEXT)
    assert lookup.draft([], 3, 0.9) == [8]
    lookup.learn(1, 1)
    assert lookup.draft([8], 3, 0.9) == [9, 10]


def test_drafts_that_do_not_pay_pause() -> None:
    lookup, generated = PromptLookup(TEXT), [1] * 10
    lookup.learn(9, 3)  # with two more for the benefit of the doubt, 5 of 11
    assert lookup.draft(generated, 3, 0.4) == [1, 1, 1]
    assert lookup.draft(generated, 3, 0.5) == []
    assert lookup.draft([1] * (9 + PAUSE), 3, 0.5) == []
    assert lookup.draft([1] * (10 + PAUSE), 3, 0.5) == [1]


def test_more_sequences_need_better_drafts() -> None:
    pace = Pace(None)
    assert pace.break_even(1) == 0  # nothing is known yet
    pace.measure(10.0, 0, 20)  # half a second a token
    pace.measure(2.0, 1, 0)
    assert pace.break_even(1) == 0.25
    assert pace.break_even(11) == pytest.approx(11 * 0.5 / 7)


def run(step: Step, max_drafts: int, *, prompt: list[int], pages: int | None = None, **options: Any) -> Any:
    """A request's result, and the number of steps that it took."""
    config = EngineConfig(
        max_drafts=max_drafts, max_cache_bytes=None if pages is None else pages * step.cache.page_bytes
    )
    clock = iter(range(10**6))
    engine = Engine(step, config, clock=lambda: next(clock) / 1e3)
    request = Generation(prompt, generator=torch.Generator().manual_seed(3), **options)
    engine.submit(request)
    steps, events = 0, []
    while request.finish_reason is None:
        events += engine.step()
        steps += 1
    assert [event.token_id for event in events if event.token_id is not None] == request.generated
    assert [event.logprobs for event in events if event.token_id is not None] == (
        request.token_logprobs or [None] * len(request.generated)
    )
    engine.drop_kept()
    assert leaked_pages(engine) == 0
    return request.generated, request.finish_reason, request.token_logprobs, steps


def forget_all_but_the_last_token(network: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()


@pytest.fixture
def repeating(tmp_path: Path) -> Any:
    """A network whose next token depends on the last one only, so that its texts repeat."""
    network = network_of(tiny_checkpoint(tmp_path).folder)
    forget_all_but_the_last_token(network)
    return network


@needs_kernels
@pytest.mark.parametrize(
    "options",
    [
        {"sampling": Sampling(temperature=0)},
        {"sampling": Sampling(temperature=0.2)},
        {"sampling": Sampling(temperature=0, frequency_penalty=0.05)},
    ],
    ids=["greedy", "sampled", "penalty"],
)
def test_drafts_save_steps_and_change_nothing(repeating: Any, options: dict[str, Any]) -> None:
    options = {"max_tokens": 200, "logprobs": 2, **options}
    steps = {0: 0, 3: 0}
    for first in range(4):
        results = {}
        for drafts in steps:
            step = PlanStep(repeating, page_size=16, threads=1)
            *results[drafts], count = run(step, drafts, prompt=[first] * 5, **options)
            steps[drafts] += count
        assert results[0] == results[3]
    assert steps[3] < 0.8 * steps[0]


@needs_kernels
def test_an_end_token_within_drafts_ends_the_text(repeating: Any) -> None:
    options: dict[str, Any] = {"sampling": Sampling(temperature=0)}
    chain = [2, *run(PlanStep(repeating, page_size=16, threads=1), 0, prompt=[2], max_tokens=12, **options)[0]]
    options |= {"prompt": chain + chain[:3], "end_ids": frozenset({chain[8]}), "max_tokens": 20}
    alone = run(PlanStep(repeating, page_size=16, threads=1), 0, **options)
    drafted = run(PlanStep(repeating, page_size=16, threads=1), 3, **options)
    assert drafted[:3] == alone[:3] == (chain[3:8], "stop", [])
    assert drafted[3] < alone[3]


@needs_kernels
def test_a_full_cache_gets_no_drafts(repeating: Any) -> None:
    options: dict[str, Any] = {"sampling": Sampling(temperature=0), "max_tokens": 60, "prompt": [1, 2, 3, 4]}
    *alone, many = run(PlanStep(repeating, page_size=16, threads=1), 0, **options)
    *drafted, steps = run(PlanStep(repeating, page_size=16, threads=1), 3, pages=4, **options)
    assert drafted == alone
    assert steps < many


@needs_kernels
def test_a_stop_string_within_drafts_ends_the_text(tmp_path: Path) -> None:
    talking_checkpoint(tmp_path)
    model = pentad.load(tmp_path)
    assert isinstance(model, pentad.LanguageModel)
    forget_all_but_the_last_token(model.network)
    whole = model.complete("hello", temperature=0, max_tokens=60, logprobs=1)
    completions: dict[int, list[Any]] = {}
    for drafts in (0, 3):
        model._engine._scheduler.config = replace(model._engine.config, max_drafts=drafts)
        for at in range(20, 30):
            stop = whole.text[at : at + 4]
            one = model.complete("hello", temperature=0, max_tokens=60, logprobs=1, stop=stop)
            completions.setdefault(at, []).append((one.text, one.token_ids, one.logprobs, one.finish_reason))
            model.clear_cache()
    assert all(one == other for one, other in completions.values())


def test_plain_torch_gets_no_drafts(tmp_path: Path) -> None:
    network = network_of(tiny_checkpoint(tmp_path).folder)
    options: dict[str, Any] = {"sampling": Sampling(temperature=0), "max_tokens": 30}
    *_, steps = run(PlainStep(network, page_size=16), 3, prompt=[1, 2, 3] * 5, **options)
    assert steps == 30


@needs_kernels
def test_a_grammar_that_ends_within_drafts_ends_the_text(tmp_path: Path) -> None:
    talking_checkpoint(tmp_path)
    model = pentad.load(tmp_path)
    assert isinstance(model, pentad.LanguageModel)
    completions = {}
    for drafts in (0, 3):
        model._engine._scheduler.config = replace(model._engine.config, max_drafts=drafts)
        constraint = pentad.Constraint.regex("(abc){9}d")
        one = model.complete("abcabcabcdabcabc", temperature=0, max_tokens=60, constraint=constraint)
        again = model.complete("abcabcabcdabcabc" + one.text, temperature=0, max_tokens=9)  # shares what was kept
        completions[drafts] = one.text, one.token_ids, one.finish_reason, again.text
        model.clear_cache()
    assert completions[0] == completions[3]
    assert completions[0][0] == "abc" * 9 + "d"

"""Many mixed requests, run by the kernels with few pages: each gets the tokens that it would get alone."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from pentad.generate.engine import Engine, EngineConfig
from pentad.generate.plan_step import PlanStep
from pentad.generate.requests import Evaluation, Generation, Request
from pentad.generate.sampling import Sampling
from pentad.text.grammar import Constraint
from tests.helpers.engines import ENDS, compiler, leaked_pages
from tests.helpers.programs import needs_kernels
from tests.helpers.tiny import network_of, tiny_checkpoint
from tests.helpers.tiny_openmoe import openmoe_checkpoint

pytestmark = needs_kernels
LONGEST = 3000
SAMPLINGS = [
    Sampling(temperature=0),
    Sampling(temperature=1.5, top_p=1.0),
    Sampling(temperature=0.8, top_p=0.9),
    Sampling(temperature=1.0, top_k=20, min_p=0.02, frequency_penalty=0.5),
    Sampling(temperature=0, repetition_penalty=1.3, presence_penalty=0.2),
]
CONSTRAINTS = [
    Constraint.json_schema({"type": "array", "items": {"type": "string", "maxLength": 9}, "minItems": 30}),
    Constraint.json_schema({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}),
    Constraint.regex("([0-9]{4} ){9,20}[a-z]{9}"),
    Constraint.choice(["the quick brown fox " * 7, "the quick brown dog", "lazy " * 40]),
]
COMPILER = compiler()
ROPE = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}


@dataclass(frozen=True)
class Model:
    """A tiny model, and its mix of requests.

    Attributes:
        options: of the checkpoint.
        requests: their number.
        longest: maximum length of a prompt.
        pages: pages of 16 tokens in the cache.
    """

    options: dict[str, Any]
    requests: int = 60
    longest: int = 400
    pages: int = 34
    make: Callable[..., Any] = tiny_checkpoint
    cache_dtype: torch.dtype | None = None


MODELS = {
    "llama": Model({}, requests=200, longest=LONGEST, pages=190),
    "sliding window": Model({"family": "mistral", "sliding_window": 100}, longest=1000, pages=24),
    "mixture": Model({"family": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixture with capacities": Model(
        {"moe_layer_interval": 1}, requests=40, longest=200, pages=22, make=openmoe_checkpoint
    ),
    "int8 cache": Model({}, cache_dtype=torch.int8),
    "dynamic RoPE": Model({"rope_parameters": ROPE, "max_position_embeddings": 400}),
}


@dataclass(frozen=True)
class Job:
    """A request, and when it comes and goes."""

    make: Callable[[], Request]
    arrives: int
    cancelled_after: int | None


def jobs(model: Model) -> list[Job]:
    """Draw requests: first short prompts with long replies, then prompts of all lengths; many share a prefix."""
    random = Random(7)
    prefixes = [random.choices(range(96), k=length) for length in (10, 40, 130, model.longest // 3)]
    prompts: list[list[int]] = []
    made = []
    for number in range(model.requests):
        short = number < 0.6 * model.requests
        longest = 30 if short else model.longest
        start = random.choice([*prefixes, [], [], [], *prompts[-2:]])
        prompt = start[: random.randint(1, longest)] + random.choices(range(96), k=int(longest ** random.random()))
        if prompts and random.random() < 0.1:
            prompt = random.choice(prompts)
        prompts.append(prompt[:longest])
        made.append(
            Job(
                evaluation(prompts[-1], random) if random.random() < 0.15 else generation(prompts[-1], number, random),
                arrives=number // 60 if short else number // 3,
                cancelled_after=random.randint(0, 30) if random.random() < 0.15 else None,
            )
        )
    return made


def generation(prompt: list[int], seed: int, random: Random) -> Callable[[], Request]:
    sampling, max_tokens, ends = (
        random.choice(SAMPLINGS),
        random.randint(1, 30) if len(prompt) > 30 else random.randint(40, 150),
        frozenset(random.choice([(), ENDS])),
    )
    constraint = Random(seed).choice([None, None, None, None, *CONSTRAINTS])
    return lambda: Generation(
        prompt,
        sampling=sampling,
        generator=torch.Generator().manual_seed(seed),
        max_tokens=max_tokens,
        end_ids=ends if constraint is None else frozenset(ENDS),
        matcher=None if constraint is None else COMPILER.matcher(constraint, opens=False),
    )


def evaluation(prompt: list[int], random: Random) -> Callable[[], Request]:
    first = random.randint(1, len(prompt))
    return lambda: Evaluation([*prompt, 7], first=first)


def result(request: Request) -> Any:
    if isinstance(request, Evaluation):
        return request.log_likelihood, request.greedy
    assert isinstance(request, Generation)
    return request.generated, request.finish_reason


@pytest.mark.parametrize("name", MODELS)
def test_each_request_gets_what_it_would_get_alone(tmp_path: Path, name: str) -> None:
    model = MODELS[name]
    checkpoint = model.make(tmp_path, **{"max_position_embeddings": 4096, **model.options})
    network, todo = network_of(checkpoint.folder), jobs(model)
    alone = [job.make() for job in todo]
    engine = Engine(PlanStep(network, page_size=16, threads=1, cache_dtype=model.cache_dtype))
    for request in alone:
        engine.submit(request)
        while request.finish_reason is None:
            engine.step()
        engine.drop_kept()

    random = Random(8)
    step = PlanStep(network, page_size=16, threads=1, cache_dtype=model.cache_dtype)
    config = EngineConfig(max_cache_bytes=model.pages * step.cache.page_bytes, max_num_seqs=100)
    engine = Engine(step, config, clock=lambda: 1e6 * random.random() ** 8)  # chunks of all sizes
    restarted: list[Request] = []
    restart = engine._scheduler.restart

    def counting_restart(request: Request) -> None:
        restarted.append(request)
        restart(request)

    engine._scheduler.restart = counting_restart  # type: ignore[method-assign]
    together = [job.make() for job in todo]
    events: dict[Request, list[int | None]] = {request: [] for request in together}
    now = 0
    while now <= todo[-1].arrives or engine.requests:
        for request, job in zip(together, todo, strict=True):
            if job.arrives == now:
                engine.submit(request)
            if job.cancelled_after is not None and job.arrives + job.cancelled_after == now:
                engine.cancel(request)
        for event in engine.step():
            events[event.request].append(event.token_id)
        now += 1

    for job, one, expected in zip(todo, together, alone, strict=True):
        if job.cancelled_after is None or one.finish_reason != "cancelled":
            assert result(one) == result(expected)
        if isinstance(one, Generation) and isinstance(expected, Generation):
            assert one.generated == expected.generated[: len(one.generated)]
            assert [token for token in events[one] if token is not None] == one.generated
    assert restarted, "pages never ran out"
    shared = sum(one.cached_tokens for one in together)
    assert (shared > 0) == (name != "mixture with capacities")
    assert {one.finish_reason for one in together} == {"stop", "length", "cancelled"}
    assert leaked_pages(engine) == 0

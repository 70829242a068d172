"""Embeddings: hidden states of prompts that run in chunks, beside other requests."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from pentad.generate.engine import Engine, EngineConfig
from pentad.generate.plan_step import PlanStep
from pentad.generate.requests import Embedding
from pentad.generate.step import PlainStep, Step
from pentad.nn.batch import pack
from tests.helpers.engines import finish, leaked_pages, request
from tests.helpers.programs import needs_kernels
from tests.helpers.tiny import random_ids


@pytest.mark.parametrize("make_step", [PlainStep, pytest.param(PlanStep, marks=needs_kernels)])
@pytest.mark.parametrize("last", [False, True])
def test_hidden_states_are_the_networks(network: nn.Module, make_step: Callable[..., Step], last: bool) -> None:
    engine = Engine(make_step(network, page_size=16), EngineConfig(max_batched_tokens=20))
    prompts = [random_ids(50), random_ids(3, seed=1)]
    embeddings = [Embedding(prompt, last=last) for prompt in prompts]
    finish(engine, request(random_ids(30), seed=2), *embeddings)
    for prompt, embedding in zip(prompts, embeddings, strict=True):
        with torch.inference_mode():
            hidden_ND = network(*pack(prompt))
        expected_D = hidden_ND[-1] if last else hidden_ND.sum(0)
        assert embedding.finish_reason == "stop"
        torch.testing.assert_close(embedding.hidden_D, expected_D, rtol=1e-4, atol=1e-4)
    assert leaked_pages(engine) == 0

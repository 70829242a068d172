"""Requests, and steps that record what they ran, for tests of the engine."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from pentad.generate.constraint import Compiler
from pentad.generate.engine import Engine
from pentad.generate.requests import Generation, Request
from pentad.generate.sampling import Sampling
from pentad.generate.step import PlainStep
from pentad.nn.cache import CachedSequence
from pentad.text import Tokenizer
from tests.helpers.tiny import logits_of

GREEDY = Sampling(temperature=0)
ENDS = (3, 4)


def compiler() -> Compiler:
    """Compiles constraints for networks of 96 tokens: the printable characters of ASCII, of which two end a text."""
    words = [bytes([32 + token]) for token in range(96)]
    control = {f"<{token}>": token for token in ENDS}
    tokenizer = SimpleNamespace(
        token_bytes=words.__getitem__, first_bytes=words.__getitem__, control=control, eos_ids=ENDS
    )
    return Compiler(cast(Tokenizer, tokenizer), 96)


def spelled(tokens: Sequence[int]) -> str:
    """The text of `compiler`'s tokens."""
    return "".join(chr(32 + token) for token in tokens)


class Counting(PlainStep):
    """A step that records how many tokens of each sequence it ran."""

    def __init__(self, network: nn.Module, **options: Any) -> None:
        super().__init__(network, **options)
        self.ran: list[list[int]] = []

    def __call__(self, work: Sequence[tuple[CachedSequence, Sequence[int]]], wanted: Sequence[int]) -> Tensor:
        self.ran.append([len(ids) for _, ids in work])
        return super().__call__(work, wanted)

    @property
    def tokens(self) -> int:
        """The number of tokens that all steps ran."""
        return sum(map(sum, self.ran))

    def pages_in_use(self) -> int:
        return self.cache.pages_in_use


def request(prompt: list[int], max_tokens: int = 12, seed: int = 0, **options: Any) -> Generation:
    generator = torch.Generator().manual_seed(seed)
    sampling = options.pop("sampling", GREEDY)
    return Generation(prompt, sampling=sampling, generator=generator, max_tokens=max_tokens, **options)


def finish(engine: Engine, *requests: Request) -> None:
    """Submit requests, and run the engine until all are finished."""
    for one in requests:
        engine.submit(one)
    for _ in range(1000):
        if any(one.finish_reason is None for one in requests):
            engine.step()
    assert all(one.finish_reason for one in requests), "a request is unfinished after 1000 steps"


def greedy(network: nn.Module, prompt: list[int], count: int) -> list[int]:
    """Decode greedily without a cache."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(logits_of(network, ids)[-1].argmax()))
    return ids[len(prompt) :]


def leaked_pages(engine: Engine) -> int:
    """Pages in use although no request is open and nothing is kept."""
    assert not engine.requests
    engine.drop_kept()
    return engine.executor.cache.pages_in_use

"""Sampling by the kernels chooses what plain torch chooses, by the same random numbers."""

import math

import pytest
import torch
from torch import Tensor

from pentad import kernels
from pentad.generate.sampling import MIN_TEMPERATURE, Choice, Sampling, candidates, sample
from pentad.kernels import Draw
from tests.helpers.programs import needs_kernels

pytestmark = needs_kernels
SAMPLINGS = [
    Sampling(temperature=0),
    Sampling(),
    Sampling(temperature=1.0, top_p=1.0),
    Sampling(temperature=2.0, top_p=1.0, min_p=0.05),
    Sampling(temperature=1.0, top_k=40, top_p=0.9),
    Sampling(temperature=1.5, top_k=7, top_p=1.0, min_p=0.1),
    Sampling(temperature=0.3, top_p=0.5),
    Sampling(temperature=30.0, top_p=0.99),
    Sampling(temperature=1.0, top_p=0.0),
]


def logits(rows: int, vocab: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab))


@pytest.mark.parametrize("isa", kernels.isas())
@pytest.mark.parametrize("vocab", [1, 5, 16, 96, 1000, 5001, 49152])
@pytest.mark.parametrize("options", SAMPLINGS, ids=str)
def test_a_uniform_number_chooses_among_the_candidates_of_plain_torch(options: Sampling, vocab: int, isa: str) -> None:
    """In order of weight, or of the ids if all tokens are kept, the number falls into the token's interval."""
    rows = 40 if vocab < 10_000 else 4
    logits_MV = logits(rows, vocab)
    uniform = [(row + 0.5) / rows for row in range(rows)]
    draws = [Draw(options.temperature, options.top_k, options.top_p, options.min_p, u) for u in uniform]
    tokens, largest = kernels.sample(logits_MV, draws, isa=isa)
    assert largest == logits_MV.amax(1).tolist()
    if options.temperature == 0:
        assert tokens == logits_MV.argmax(1).tolist()
        return
    for token, u, logits_1V in zip(tokens, uniform, logits_MV.split(1), strict=True):
        ((_, weights_1C, (ids_C,)),) = candidates(logits_1V, [options])
        weights_C = weights_1C[0].double()
        order_C = (-weights_C if options.top_k or options.top_p < 1 else ids_C).argsort(stable=True)
        ends_C = weights_C[order_C].cumsum(0) / weights_C.sum()
        at = int((ids_C[order_C] == token).nonzero())
        assert weights_C[order_C[at]] > 0
        assert (ends_C[at - 1] if at else 0) - 1e-5 <= u <= ends_C[at] + 1e-5


def test_a_token_is_drawn_as_often_as_it_is_likely() -> None:
    logits_1V, draws = logits(1, 300), 4000
    options = Sampling(temperature=1.2, top_p=0.9, top_k=50)
    ((_, weights_1C, ids_1C),) = candidates(logits_1V, [options])
    expected = dict(zip(ids_1C[0].tolist(), (weights_1C / weights_1C.sum())[0].tolist(), strict=True))
    uniform = [(i + 0.5) / draws for i in range(draws)]
    tokens, _ = kernels.sample(logits_1V.expand(draws, -1).contiguous(), [Draw(1.2, 50, 0.9, 0.0, u) for u in uniform])
    for token, probability in expected.items():
        assert abs(tokens.count(token) - draws * probability) <= 1


def test_a_row_does_not_depend_on_the_others() -> None:
    logits_MV = logits(64, 3000)
    draws = [Draw(s.temperature, s.top_k, s.top_p, s.min_p, 0.37) for s in SAMPLINGS * 7]
    together, _ = kernels.sample(logits_MV[: len(draws)], draws)
    assert together == [kernels.sample(logits_MV[i : i + 1], [draw])[0][0] for i, draw in enumerate(draws)]


def test_excluded_tokens_are_never_chosen() -> None:
    logits_MV = torch.full((3, 50), -math.inf)
    logits_MV[:, 17] = -1000.0
    for uniform in (0.0, 0.5, 1 - 1e-16):
        draws = [Draw(1.0, 0, 1.0, 0.0, uniform), Draw(1.0, 0, 0.9, 0.0, uniform), Draw(1.0, 3, 1.0, 0.0, uniform)]
        assert kernels.sample(logits_MV, draws)[0] == [17, 17, 17]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 20, 49])
def test_logits_that_are_not_numbers_are_reported(value: float, at: int) -> None:
    logits_MV = logits(3, 50)
    logits_MV[0, at] = value
    logits_MV[2] = value
    tokens, largest = kernels.sample(logits_MV, [Draw(), Draw(1.0), Draw(1.0, top_p=0.9)])
    assert all(0 <= token < 50 for token in tokens)
    assert math.isfinite(largest[0]) == (value == -math.inf)
    assert math.isfinite(largest[1])
    assert not math.isfinite(largest[2])


def test_logits_of_another_form_are_refused() -> None:
    for x in (logits(2, 8).double(), logits(8, 2).T, logits(1, 8)):
        with pytest.raises(ValueError, match="logits"):
            kernels.sample(x, [Draw(), Draw()])


def test_a_low_temperature_is_greedy() -> None:
    choice = Choice(Sampling(temperature=MIN_TEMPERATURE / 2), torch.Generator())
    state = choice.generator.get_state()
    logits_1V = logits(1, 100)
    assert sample(logits_1V, [choice])[0] == [int(logits_1V.argmax())]
    assert torch.equal(choice.generator.get_state(), state)

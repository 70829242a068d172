"""Mixtures of experts, against float64 loops over rows and experts."""

import math

import pytest
import torch
from torch import Tensor

from pentad.kernels import Buffer, CachePools, Norm, Program, Tokens, Weight
from pentad.nn.batch import SequenceLayout
from pentad.nn.moe.dispatch import EvenCapacity, within_capacity
from pentad.nn.moe.routers import mixtral_top_k, softmax_top_k
from pentad.weights.quantized import QuantizedTensor
from tests.helpers.blocks import random_blocks
from tests.helpers.programs import every_isa, needs_kernels

pytestmark = needs_kernels
WIDTH, HIDDEN, EXPERTS = 64, 96, 5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stack(type_name: str, rows: int, columns: int, seed: int) -> tuple[Weight, Tensor]:
    """The experts' matrices for the kernels, and the same weights in float64 [experts, rows, columns]."""
    if type_name == "float32":
        numbers = random(EXPERTS, rows, columns, seed=seed) * columns**-0.5
        return Weight.floats(numbers), numbers.double()
    blocks = random_blocks(type_name, EXPERTS * rows, columns, seed)
    shape = EXPERTS, rows, columns
    numbers = QuantizedTensor(blocks.blocks, type_name, shape).dequantize().double()
    return Weight.packed(blocks.blocks, type_name, shape), numbers


class Mixture:
    """A program that computes x + the weighted sum of each row's experts, and a float64 reference."""

    def __init__(
        self,
        type_name: str,
        top_k: int,
        normalized: bool = True,
        capacity: EvenCapacity | None = None,
        **options: object,
    ) -> None:
        self.top_k, self.route, self.capacity = top_k, mixtral_top_k if normalized else softmax_top_k, capacity
        self.router = random(EXPERTS, WIDTH, seed=1) / 4
        (gate, self.gate), (up, self.up) = (stack(type_name, HIDDEN, WIDTH, seed) for seed in (2, 3))
        down, self.down = stack(type_name, WIDTH, HIDDEN, 4)
        self.x = random(90, WIDTH, seed=5)
        made = Program(head_dim=16, kv_heads=1, layers=1, **{"threads": 2, **options})  # type: ignore[arg-type]
        made.embed(Weight.floats(self.x))
        made.norm(Norm(torch.ones(WIDTH), 0.0), quantize=False)
        made.matmul([Weight.floats(self.router)], Buffer.NORMED, Buffer.SCORES)
        made.route(top_k, normalized=normalized, capacity=capacity)
        made.gather(quantize=gate.is_quantized)
        made.gated([gate, up], Buffer.PAIRED)
        if down.is_quantized:
            made.quantize(Buffer.GATES)
        made.matmul([down], Buffer.GATES, Buffer.PAIRED)
        made.combine()
        made.matmul([Weight.floats(torch.eye(WIDTH))], Buffer.RESIDUAL, Buffer.LOGITS)
        self.program = made

    def run(self, *sequences: range) -> Tensor:
        """Run rows of x, as one or several sequences."""
        work = [Tokens(rows, 0, 0, range(6), torch.zeros(len(rows), 2, 8)) for rows in sequences]
        pools = CachePools([torch.zeros(96, 1, 16)], [torch.zeros(96, 1, 16)], 16)
        return self.program.run(work, range(sum(map(len, sequences))), pools)

    def exact(self, *sequences: range) -> Tensor:
        x = self.x[[row for rows in sequences for row in rows]]
        y = torch.rms_norm(x, (WIDTH,), eps=0.0)
        routing = self.route(y @ self.router.T, self.top_k)
        if self.capacity is not None:
            routing = within_capacity(
                routing, EXPERTS, SequenceLayout.of([len(rows) for rows in sequences]), self.capacity
            )
        out, y = x.double(), y.double()
        for row, (experts, weights, kept) in enumerate(
            zip(routing.experts, routing.weights, routing.kept, strict=True)
        ):
            for e, weight in zip(experts[kept].tolist(), weights[kept].tolist(), strict=True):
                gates = self.gate[e] @ y[row]
                out[row] += weight * (self.down[e] @ (gates * gates.sigmoid() * (self.up[e] @ y[row])))
        return out


@every_isa
@pytest.mark.parametrize("type_name", ["float32", "q4_0", "q8_0"])
def test_mixtures_match_float64(type_name: str, isa: str) -> None:
    for top_k, normalized, rows in ((2, True, 1), (2, False, 40), (1, True, 7), (EXPERTS, False, 9)):
        mixture = Mixture(type_name, top_k, normalized, isa=isa)
        exact = mixture.exact(range(rows))
        assert (mixture.run(range(rows)).double() - exact).abs().max() <= 1e-3 * exact.abs().max()


@pytest.mark.parametrize("capacity", [EvenCapacity(0.5, EXPERTS, 1), EvenCapacity(2.0, EXPERTS, 2)])
def test_each_sequence_has_its_own_capacity(capacity: EvenCapacity) -> None:
    mixture, sequences = Mixture("float32", 2, capacity=capacity), (range(50), range(50, 53), range(53, 90))
    exact = mixture.exact(*sequences)
    assert (mixture.run(*sequences).double() - exact).abs().max() <= 1e-4 * exact.abs().max()
    unbounded = Mixture("float32", 2).exact(*sequences)
    assert (unbounded - exact).abs().max() > 0.01


@every_isa
@pytest.mark.parametrize("type_name", ["float32", "q4_0"])
def test_a_row_does_not_depend_on_the_batch(type_name: str, isa: str) -> None:
    whole = Mixture(type_name, 2, isa=isa).run(range(90))
    for threads in (1, 3):
        mixture = Mixture(type_name, 2, isa=isa, threads=threads)
        for rows in (range(1), range(89, 90), range(7, 60)):
            assert torch.equal(mixture.run(rows), whole[rows.start : rows.stop])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_stay_in_their_row(bad: float) -> None:
    mixture = Mixture("q4_0", 2)
    expected = mixture.run(range(20))
    mixture.x[7, 3] = bad  # the plan reads x without a copy
    y = mixture.run(range(20))
    assert not torch.isfinite(y[7]).any()
    rest = [row for row in range(20) if row != 7]
    assert torch.equal(y[rest], expected[rest])


def test_inconsistent_operations_are_refused() -> None:
    made = Program(head_dim=16, kv_heads=1, layers=1, threads=1)
    made.embed(Weight.floats(torch.zeros(8, WIDTH)))
    made.norm(Norm(torch.ones(WIDTH), 0.0), quantize=False)
    made.matmul([Weight.floats(torch.zeros(EXPERTS, WIDTH))], Buffer.NORMED, Buffer.SCORES)
    for top_k in (0, EXPERTS + 1):
        with pytest.raises(ValueError, match=f"{top_k} of 5 experts"):
            made.route(top_k, normalized=True)
    made.route(2, normalized=True)
    with pytest.raises(ValueError, match="5 experts for rows of 0"):
        made.matmul([Weight.floats(torch.zeros(EXPERTS, 4, WIDTH))], Buffer.NORMED, Buffer.GATES)
    made.gather(quantize=False)
    with pytest.raises(ValueError, match="3 experts for rows of 5"):
        made.matmul([Weight.floats(torch.zeros(3, 4, WIDTH))], Buffer.PAIRED, Buffer.GATES)
    with pytest.raises(ValueError, match="0 experts for rows of 5"):
        made.matmul([Weight.floats(torch.zeros(4, WIDTH))], Buffer.PAIRED, Buffer.GATES)

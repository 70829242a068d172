"""Dispatch against a loop over tokens and experts, and against MegaBlocks' block-sparse products."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pentad.errors import BadInput
from pentad.nn.batch import SequenceLayout
from pentad.nn.moe.dispatch import Capacity, dispatch, groups_of, within_capacity
from pentad.nn.moe.experts import BLOCK_ROWS, MLPExperts, SwiGLUExperts
from pentad.nn.moe.routers import Routing

DIM, HIDDEN, EXPERTS = 16, 32, 4
CHOICES: dict[str, list[list[int]]] = {
    "even": [[i % 4, (i + 1) % 4] for i in range(24)],
    "empty experts": [[3, 1], [1, 3], [3, 1], [3, 1], [1, 3]],
    "one token": [[2, 0]],
    "all to one": [[2]] * 30,
    "all to the first": [[0]] * 9,
    "every expert": [[0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2]],
    "no token": [],
}


def routing_of(choices: list[list[int]], kept: Tensor | None = None) -> Routing:
    experts = torch.tensor(choices, dtype=torch.int64).view(len(choices), -1 if choices else 2)
    weights = torch.rand(experts.shape, generator=torch.Generator().manual_seed(1)) + 0.1
    everything = torch.ones_like(experts, dtype=torch.bool)
    logits = torch.zeros(len(choices), EXPERTS)
    return Routing(logits, experts, weights, everything if kept is None else kept, all_kept=kept is None)


def random_rows(count: int, width: int = DIM, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(2)).to(dtype)


def swiglu(dim: int = DIM, hidden: int = HIDDEN, dtype: torch.dtype = torch.float32) -> SwiGLUExperts:
    torch.manual_seed(3)
    return SwiGLUExperts(EXPERTS, dim, hidden).to(dtype)


def by_loop(x_ND: Tensor, routing: Routing, experts: SwiGLUExperts) -> Tensor:
    """Compute each token and expert separately, in float32."""
    gate, up, down = (p.weight.float() for p in (experts.gate_proj, experts.up_proj, experts.down_proj))
    rows = []
    for n, x in enumerate(x_ND.float()):
        y = x.new_zeros(x.shape)
        for e, weight, kept in zip(routing.experts[n].tolist(), routing.weights[n], routing.kept[n], strict=True):
            if kept:
                y = y + weight * (down[e] @ (F.silu(gate[e] @ x) * (up[e] @ x)))
        rows.append(y)
    return torch.stack(rows) if rows else x_ND.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [(16, 32), (15, 21)], ids=["aligned", "not aligned"])
@pytest.mark.parametrize("case", CHOICES)
def test_outputs_and_gradients_match_the_loop(case: str, width: tuple[int, int], dtype: torch.dtype) -> None:
    routing, experts = routing_of(CHOICES[case]), swiglu(*width, dtype=dtype)
    routing = routing._replace(weights=routing.weights.requires_grad_())
    x = random_rows(len(CHOICES[case]), width[0], dtype).requires_grad_()
    inputs = [x, routing.weights, *experts.parameters()]
    out, expected = dispatch(x, routing, EXPERTS, experts), by_loop(x, routing, experts)
    assert out.dtype == torch.float32
    direction = random_rows(*expected.shape)
    bound = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.02}
    torch.testing.assert_close(out, expected, **bound)
    got = torch.autograd.grad(out, inputs, direction)
    if not len(x):
        assert all(not gradient.any() for gradient in got)
        return
    for ours, theirs in zip(got, torch.autograd.grad(expected, inputs, direction), strict=True):
        torch.testing.assert_close(ours, theirs, **bound)


@pytest.mark.parametrize("share", [0.0, 0.4, 0.9])
def test_dropped_pairs_are_not_computed(share: float) -> None:
    """The experts get one row for each kept pair, and no padding."""
    kept = torch.rand(24, 2, generator=torch.Generator().manual_seed(4)) < share
    routing, experts, x = routing_of(CHOICES["even"], kept), swiglu(), random_rows(24)
    seen: list[tuple[int, list[int]]] = []

    def compute(x_SD: Tensor, ends_E: Tensor) -> Tensor:
        seen.append((len(x_SD), ends_E.tolist()))
        return experts(x_SD, ends_E)

    torch.testing.assert_close(dispatch(x, routing, EXPERTS, compute), by_loop(x, routing, experts))
    ((rows, ends),) = seen
    assert rows == ends[-1] == int(kept.sum())
    dropped = ~kept.any(1)
    assert not dispatch(x, routing, EXPERTS, experts)[dropped].any()


def test_without_drops_each_pair_is_computed_once() -> None:
    for case in ("even", "all to one", "empty experts"):
        routing, seen = routing_of(CHOICES[case]), []

        def compute(x_SD: Tensor, ends_E: Tensor, seen: list[int] = seen) -> Tensor:
            seen.append(len(x_SD))
            return x_SD

        dispatch(random_rows(len(CHOICES[case])), routing, EXPERTS, compute)
        assert seen == [routing.experts.numel()]


@pytest.mark.parametrize("kept", [None, 0.8], ids=["all kept", "some dropped"])
@pytest.mark.parametrize(
    "choices", [[[3, 0]] * 95 + [[1, 0]] * 3, [[1]] * 181, [[e, (e + 1) % 4] for e in range(4)] * 25], ids=len
)
def test_many_16_bit_rows_are_padded_to_whole_blocks(choices: list[list[int]], kept: float | None) -> None:
    """oneDNN compiles kernels for fewer sizes then. An expert without rows gets no padding, and padding changes neither
    outputs nor gradients."""
    shape = len(choices), len(choices[0])
    mask = None if kept is None else torch.rand(shape, generator=torch.Generator().manual_seed(4)) < kept
    routing, experts = routing_of(choices, mask), swiglu(dtype=torch.bfloat16)
    x, seen = random_rows(len(choices), dtype=torch.bfloat16).requires_grad_(), []

    def compute(x_SD: Tensor, ends_E: Tensor) -> Tensor:
        seen.append((len(x_SD), ends_E.dtype, ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()))
        return experts(x_SD, ends_E)

    out, expected = dispatch(x, routing, EXPERTS, compute), by_loop(x, routing, experts)
    bound = {"rtol": 0.05, "atol": 0.03}
    torch.testing.assert_close(out, expected, **bound)
    counts = routing.experts[routing.kept].bincount(minlength=EXPERTS).tolist()
    blocks = [-(-count // BLOCK_ROWS) * BLOCK_ROWS for count in counts]
    assert seen == [(sum(blocks), torch.int32, blocks)]
    inputs, direction = [x, *experts.parameters()], random_rows(*expected.shape)
    got, wanted = (torch.autograd.grad(y, inputs, direction) for y in (out, expected))
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours.float() / theirs.abs().max(), theirs.float() / theirs.abs().max(), **bound)


def test_rows_are_sorted_by_expert_then_by_position() -> None:
    x = torch.arange(5.0)[:, None]
    choices = [[1, 0], [0, 3], [1, 3], [0, 1], [3, 0]]

    def compute(x_SD: Tensor, ends_E: Tensor) -> Tensor:
        assert x_SD[:, 0].tolist() == [0, 1, 3, 4, 0, 2, 3, 1, 2, 4]
        assert ends_E.tolist() == [4, 7, 7, 10]
        assert ends_E.dtype == torch.int32
        return x_SD

    routing = routing_of(choices)
    out = dispatch(x, routing, EXPERTS, compute)
    torch.testing.assert_close(out[:, 0], x[:, 0] * routing.weights.sum(1))


def test_a_token_does_not_depend_on_the_batch() -> None:
    experts, x, routing = swiglu(), random_rows(24), routing_of(CHOICES["even"])
    whole = dispatch(x, routing, EXPERTS, experts)
    assert torch.equal(whole, dispatch(x, routing, EXPERTS, experts))
    some = torch.tensor([3, 4, 11, 20])
    part = routing._replace(experts=routing.experts[some], weights=routing.weights[some], kept=routing.kept[some])
    torch.testing.assert_close(dispatch(x[some], part, EXPERTS, experts), whole[some], rtol=1e-5, atol=1e-6)


# --- MegaBlocks ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Sparse BSR:UserWarning")
@pytest.mark.parametrize("case", ["even", "empty experts", "one token", "all to one"])
def test_grouped_products_equal_megablocks_block_sparse_products(case: str) -> None:
    """MegaBlocks (arXiv:2211.15841, section 4.1), with blocks of 4 instead of 128.

    The experts' weights are concatenated into one wide matrix. A token's row is nonzero only in its expert's columns.
    Rows are sorted by expert, and each expert's rows are padded to whole blocks. The product is then block-sparse: a
    block row of expert e has blocks in the H/4 block columns from e H/4.
    """
    block, x, routing = 4, random_rows(len(CHOICES[case])), routing_of(CHOICES[case])
    torch.manual_seed(3)
    experts = MLPExperts(EXPERTS, DIM, HIDDEN)
    pairs = sorted((e, n, k) for n, row in enumerate(CHOICES[case]) for k, e in enumerate(row))
    rows, owners = [], []  # padded_gather
    for e in range(EXPERTS):
        mine = [(n, k) for owner, n, k in pairs if owner == e]
        rows += [*mine, *[None] * (-len(mine) % block)]
        owners += [e] * (-(-len(mine) // block))
    gathered = torch.stack([x.new_zeros(DIM) if row is None else x[row[0]] for row in rows])
    wide_up = experts.up_proj.weight.flatten(0, 1)  # [E H, D]
    wide_down = experts.down_proj.weight.transpose(1, 2).flatten(0, 1)  # [E H, D]
    columns = [range(e * HIDDEN // block, (e + 1) * HIDDEN // block) for e in owners]
    crow = [0]
    for blocks in columns:
        crow.append(crow[-1] + len(blocks))
    values = [  # sparse = dense x dense, at the topology's blocks (SDD)
        gathered[r * block : (r + 1) * block] @ wide_up[c * block : (c + 1) * block].T
        for r, blocks in enumerate(columns)
        for c in blocks
    ]
    hidden = torch.sparse_bsr_tensor(
        torch.tensor(crow),
        torch.tensor([c for blocks in columns for c in blocks]),
        torch.stack(values).relu(),
        (len(gathered), EXPERTS * HIDDEN),
        check_invariants=True,
    )
    scattered = torch.zeros_like(x)  # padded_scatter of dense = sparse x dense (DSD)
    for row, y in zip(rows, hidden @ wide_down, strict=True):
        if row is not None:
            scattered[row[0]] += routing.weights[row] * y
    torch.testing.assert_close(dispatch(x, routing, EXPERTS, experts), scattered, rtol=1e-4, atol=1e-6)


# --- capacity -------------------------------------------------------------------------------------


def kept_by_loop(routing: Routing, groups: SequenceLayout, capacity: Callable[[int], int]) -> list[list[bool]]:
    """Assign each group's first choices in order of positions, then its second choices.

    A choice uses a slot even if it was dropped before.
    """
    kept = [[False] * routing.experts.shape[1] for _ in routing.experts]
    for start, count in groups.spans:
        free = [capacity(count)] * EXPERTS
        for k in range(routing.experts.shape[1]):
            for n in range(start, start + count):
                e = int(routing.experts[n, k])
                kept[n][k] = free[e] > 0 and bool(routing.kept[n, k])
                free[e] -= 1
    return kept


@pytest.mark.parametrize("capacity", [1, 2, 5, 24])
@pytest.mark.parametrize("starts", [(0, 24), (0, 7, 8, 24), (0, 24, 24)], ids=str)
@pytest.mark.parametrize("choices", [1, 2])
def test_capacity_is_assigned_by_position(choices: int, starts: tuple[int, ...], capacity: int) -> None:
    generator = torch.Generator().manual_seed(5)
    experts = torch.stack([torch.randperm(EXPERTS, generator=generator)[:choices] for _ in range(24)])
    before = routing_of(experts.tolist(), torch.rand(24, choices, generator=generator) < 0.8)
    groups = SequenceLayout(starts)
    after = within_capacity(before, EXPERTS, groups, lambda tokens: capacity)
    assert after.kept.tolist() == kept_by_loop(before, groups, lambda tokens: capacity)
    assert not after.all_kept
    assert torch.equal(after.weights, before.weights)


def test_capacity_grows_with_the_group() -> None:
    capacity = Capacity(1.25, EXPERTS)
    assert [capacity(tokens) for tokens in (1, 4, 16, 17)] == [1, 2, 5, 6]
    routing = routing_of([[0]] * 20)
    kept = within_capacity(routing, EXPERTS, SequenceLayout((0, 4, 20)), capacity).kept[:, 0]
    assert kept.tolist() == [True] * 2 + [False] * 2 + [True] * 5 + [False] * 11


def test_groups_of_a_fixed_size() -> None:
    assert groups_of(SequenceLayout((0, 3, 10)), 4) == SequenceLayout((0, 4, 8, 10))
    assert groups_of(SequenceLayout((0, 3, 8)), 4) == SequenceLayout((0, 4, 8))
    assert groups_of(SequenceLayout((0,)), 4) == SequenceLayout((0,))


def test_a_capacity_of_zero_is_refused() -> None:
    with pytest.raises(BadInput, match="capacity for 5 tokens is 0"):
        within_capacity(routing_of([[0]] * 5), EXPERTS, SequenceLayout((0, 5)), lambda tokens: 0)

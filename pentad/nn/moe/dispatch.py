"""Dispatch: tokens to their experts and back.

How it came about. GShard and Switch give each expert a buffer of so many tokens, its capacity: what doesn't fit is
dropped, and what isn't filled is computed in vain. MegaBlocks (arXiv:2211.15841) drops nothing and pads to whole blocks
of rows at most: tokens are sorted by expert, so each expert's are neighbors, and the experts' products are one: its
kernels write them as products with a block-sparse matrix (section 4: the rows of an expert's tokens have blocks in that
expert's columns and nowhere else; a test builds that matrix), and `torch.nn.functional.grouped_mm` takes the experts'
weights in a stack and where each one's rows end. Here both are the second way: a capacity only leaves tokens out before
they are sorted.

Legend: N tokens, K experts of a token, E experts, D width, S pairs of a token and one of its experts that are computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pentad.errors import BadInput
from pentad.nn.batch import SequenceLayout
from pentad.nn.moe.experts import BLOCK_ROWS
from pentad.nn.moe.routers import Routing


def dispatch(x_ND: Tensor, routing: Routing, experts: int, compute: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Each token's sum of what its experts make of it, by their weights; zero where it has none.

    Sort the pairs by expert, compute, and put them back (MegaBlocks, section 5): what is computed is what is kept,
    however uneven.

    Args:
        x_ND: [N, D].
        routing: what the router decided.
        experts: E.
        compute: from [S, D], the rows of expert 0 first, and int32 [E], where each expert's rows end, to [S, D]. Many
            rows of 16-bit numbers come to a CPU in whole blocks, as MegaBlocks' do: some rows are spare.

    Returns:
        float32 [N, D]. The sums are the same whatever other tokens there are.
    """
    tokens, choices = routing.experts.shape
    pairs_NK = routing.experts
    if not routing.all_kept:
        pairs_NK = pairs_NK.masked_fill(~routing.kept, experts)  # behind the last expert's
    sorted_S, order_S = pairs_NK.flatten().sort(stable=True)
    every_E = torch.arange(experts, device=x_ND.device)
    ends_E = torch.searchsorted(sorted_S, every_E, right=True, out_int32=True)
    if not routing.all_kept:
        order_S = order_S[: int(ends_E[-1])]
    tokens_S, rows_S = order_S // choices, torch.arange(len(order_S), device=x_ND.device)
    if x_ND.device.type == "cpu" and x_ND.element_size() == 2 and len(order_S) > experts * BLOCK_ROWS:
        ends_E, spare_E = _in_blocks(ends_E)
        rows_S += spare_E.index_select(0, sorted_S[: len(rows_S)])
        tokens_S = tokens_S.new_zeros(int(ends_E[-1])).index_copy(0, rows_S, tokens_S)  # spare: the first token's
    y_SD = compute(x_ND.index_select(0, tokens_S), ends_E).contiguous()  # else its rows are slow to gather
    back_NK = order_S.new_full((tokens * choices,), len(y_SD)).index_copy(0, order_S, rows_S).view(tokens, choices)
    if not routing.all_kept:
        y_SD = F.pad(y_SD, (0, 0, 0, 1))  # a row of zeros, for pairs that aren't there
    y_ND = y_SD.index_select(0, back_NK[:, 0]) * routing.weights[:, :1]
    for k in range(1, choices):
        y_ND.addcmul_(y_SD.index_select(0, back_NK[:, k]), routing.weights[:, k, None])
    return y_ND


def _in_blocks(ends_E: Tensor) -> tuple[Tensor, Tensor]:
    """Where each expert's rows end when each has whole blocks, and how many spare rows are in front of its first."""
    counts_E = ends_E.diff(prepend=ends_E.new_zeros(1))
    spare_E = -counts_E % BLOCK_ROWS
    before_E = spare_E.cumsum(0, dtype=ends_E.dtype)
    return ends_E + before_E, before_E - spare_E


@dataclass(frozen=True)
class Capacity:
    """How many of a group's tokens an expert takes at most: tokens * factor / experts, rounded up.

    GShard (arXiv:2006.16668, section 2.2) has a factor of 2, the number of a token's experts; Switch (arXiv:2101.03961,
    equation 3) the capacity factor, 1 to 2.
    """

    factor: float
    experts: int

    def __call__(self, tokens: int) -> int:
        return math.ceil(tokens * self.factor / self.experts)


@dataclass(frozen=True)
class EvenCapacity:
    """tokens * factor / experts, rounded down, then up to an even number; `least` where that is more.

    So OpenMoE is run (ColossalAI's moe/routers.py, `get_capacity`), with 2, the number of a token's experts, times 1.25
    when training and times 2 otherwise, and a least of 4.
    """

    factor: float
    experts: int
    least: int

    def __call__(self, tokens: int) -> int:
        capacity = math.floor(tokens * self.factor / self.experts)
        return max(capacity + capacity % 2, self.least)


def within_capacity(routing: Routing, experts: int, groups: SequenceLayout, capacity: Callable[[int], int]) -> Routing:
    """The same decisions, where an expert takes no more of a group's tokens than its capacity.

    Tokens come in the order of their positions, and all first choices before all second ones (GShard, algorithm 1). A
    second choice that chance left out takes a place all the same (line 22 there).

    Args:
        routing: what the router decided.
        experts: E.
        groups: the rows of each group: a sequence's, or of so many tokens.
        capacity: from a group's number of tokens to how many an expert takes.

    Raises:
        BadInput: a capacity is below 1.
    """
    limits = [capacity(tokens) for tokens in groups.lengths]
    for tokens, limit in zip(groups.lengths, limits, strict=True):
        if limit < 1:
            raise BadInput(f"an expert's capacity for {tokens} tokens is {limit}; it takes at least 1")
    device = routing.experts.device
    lengths = torch.tensor(groups.lengths, device=device)
    group_N = torch.arange(len(limits), device=device).repeat_interleave(lengths)
    limit_N = torch.tensor(limits, device=device).repeat_interleave(lengths)
    # Of all pairs with the same group and expert, the first choices are first, each in the order of positions.
    sorted_KN, order_KN = (group_N * experts + routing.experts.T).flatten().sort(stable=True)
    rank_KN = torch.empty_like(order_KN)
    rank_KN[order_KN] = torch.arange(len(order_KN), device=device) - torch.searchsorted(sorted_KN, sorted_KN)
    rank_NK = rank_KN.view(routing.experts.T.shape).T
    return routing._replace(kept=routing.kept & (limit_N[:, None] > rank_NK), all_kept=False)


def groups_of(layout: SequenceLayout, size: int) -> SequenceLayout:
    """Groups of `size` tokens, wherever sequences start, as GShard and Switch were trained; the last may be shorter."""
    tokens = layout.cu_seqlens[-1]
    return SequenceLayout((*range(0, tokens, size), tokens))

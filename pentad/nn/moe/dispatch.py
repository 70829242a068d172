"""Dispatch tokens to their experts, and combine the outputs.

GShard and Switch give each expert a buffer of fixed capacity: tokens beyond it are dropped, and empty slots waste
computation. MegaBlocks (arXiv:2211.15841) drops nothing and pads at most to whole blocks of rows. It sorts tokens by
expert, so that the matmuls of all experts become one matmul with a block-sparse matrix (section 4; a test builds that
matrix). `torch.nn.functional.grouped_mm` computes it from the stacked weights and the end of each expert's rows. pentad
always dispatches like MegaBlocks: a capacity only removes tokens before the sort.

Legend: N tokens, K experts of a token, E experts, D width, S (token, expert) pairs that are computed.
"""

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
    """Sum the outputs of each token's experts, weighted by the router; the sum is 0 for a token without an expert.

    Sort the pairs by expert, compute, and scatter the results back (MegaBlocks, section 5).

    Args:
        x_ND: the tokens.
        routing: the router's decisions.
        experts: E.
        compute: (rows [S, D] sorted by expert, int32 [E] with the end of each expert's rows) -> [S, D]. On a CPU many
            16-bit rows are padded to whole blocks, as in MegaBlocks.

    Returns:
        float32 [N, D]. A token's sum doesn't depend on the other tokens.
    """
    tokens, choices = routing.experts.shape
    pairs_NK = routing.experts
    if not routing.all_kept:
        pairs_NK = pairs_NK.masked_fill(~routing.kept, experts)  # dropped pairs are sorted after the last expert
    sorted_S, order_S = pairs_NK.flatten().sort(stable=True)
    every_E = torch.arange(experts, device=x_ND.device)
    ends_E = torch.searchsorted(sorted_S, every_E, right=True, out_int32=True)
    if not routing.all_kept:
        order_S = order_S[: int(ends_E[-1])]
    tokens_S, rows_S = order_S // choices, torch.arange(len(order_S), device=x_ND.device)
    if x_ND.device.type == "cpu" and x_ND.element_size() == 2 and len(order_S) > experts * BLOCK_ROWS:
        ends_E, spare_E = _in_blocks(ends_E)
        rows_S += spare_E.index_select(0, sorted_S[: len(rows_S)])
        tokens_S = tokens_S.new_zeros(int(ends_E[-1])).index_copy(
            0, rows_S, tokens_S
        )  # padding rows repeat the first token
    y_SD = compute(x_ND.index_select(0, tokens_S), ends_E).contiguous()  # strided rows are slow to gather
    back_NK = order_S.new_full((tokens * choices,), len(y_SD)).index_copy(0, order_S, rows_S).view(tokens, choices)
    if not routing.all_kept:
        y_SD = F.pad(y_SD, (0, 0, 0, 1))  # a row of zeros, for dropped pairs
    y_ND = y_SD.index_select(0, back_NK[:, 0]) * routing.weights[:, :1]
    for k in range(1, choices):
        y_ND.addcmul_(y_SD.index_select(0, back_NK[:, k]), routing.weights[:, k, None])
    return y_ND


def _in_blocks(ends_E: Tensor) -> tuple[Tensor, Tensor]:
    """The end of each expert's rows after padding to whole blocks, and the padding before its first row."""
    counts_E = ends_E.diff(prepend=ends_E.new_zeros(1))
    spare_E = -counts_E % BLOCK_ROWS
    before_E = spare_E.cumsum(0, dtype=ends_E.dtype)
    return ends_E + before_E, before_E - spare_E


@dataclass(frozen=True)
class Capacity:
    """The maximum number of a group's tokens that an expert takes: tokens * factor / experts, rounded up.

    The factor is 2 in GShard (arXiv:2006.16668, section 2.2), the number of experts per token, and 1 to 2 in Switch
    (arXiv:2101.03961, equation 3).
    """

    factor: float
    experts: int

    def __call__(self, tokens: int) -> int:
        return math.ceil(tokens * self.factor / self.experts)


@dataclass(frozen=True)
class EvenCapacity:
    """tokens * factor / experts, rounded down, then up to an even number, and at least `least`.

    OpenMoE's capacity (ColossalAI's moe/routers.py, `get_capacity`). Its factor is 2, the number of experts per token,
    times 1.25 when training and times 2 otherwise; `least` is 4.
    """

    factor: float
    experts: int
    least: int

    def __call__(self, tokens: int) -> int:
        capacity = math.floor(tokens * self.factor / self.experts)
        return max(capacity + capacity % 2, self.least)


def within_capacity(routing: Routing, experts: int, groups: SequenceLayout, capacity: Callable[[int], int]) -> Routing:
    """Drop the pairs that exceed an expert's capacity in a group.

    Tokens fill an expert's capacity in the order of their positions, all first choices before any second choice
    (GShard, algorithm 1). A second choice that was dropped at random still uses capacity (line 22 of the algorithm).

    Args:
        routing: the router's decisions.
        experts: E.
        groups: the rows of each group.
        capacity: a group's number of tokens -> the maximum number that an expert takes.

    Raises:
        BadInput: a capacity is below 1.
    """
    limits = [capacity(tokens) for tokens in groups.lengths]
    for tokens, limit in zip(groups.lengths, limits, strict=True):
        if limit < 1:
            raise BadInput(f"an expert's capacity for {tokens} tokens is {limit}; expected at least 1")
    device = routing.experts.device
    lengths = torch.tensor(groups.lengths, device=device)
    group_N = torch.arange(len(limits), device=device).repeat_interleave(lengths)
    limit_N = torch.tensor(limits, device=device).repeat_interleave(lengths)
    # The sort is stable: within a group and an expert, first choices come first, then positions in order.
    sorted_KN, order_KN = (group_N * experts + routing.experts.T).flatten().sort(stable=True)
    rank_KN = torch.empty_like(order_KN)
    rank_KN[order_KN] = torch.arange(len(order_KN), device=device) - torch.searchsorted(sorted_KN, sorted_KN)
    rank_NK = rank_KN.view(routing.experts.T.shape).T
    return routing._replace(kept=routing.kept & (limit_N[:, None] > rank_NK), all_kept=False)


def groups_of(layout: SequenceLayout, size: int) -> SequenceLayout:
    """Groups of `size` tokens regardless of sequences, as GShard and Switch were trained; the last may be shorter."""
    tokens = layout.cu_seqlens[-1]
    return SequenceLayout((*range(0, tokens, size), tokens))

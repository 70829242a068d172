"""Attention that knows positions by a learned number for each distance, as T5 has it (arXiv:1910.10683, section 2.1).

Legend: N rows of tokens, H heads, D numbers a head; within one sequence Q queries and K keys; L distances, of which the
middle one is 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pentad.nn.attention import Bias, attention
from pentad.nn.batch import Batch
from pentad.nn.linear import project


class RelativeBias(nn.Module):
    """What is added to a score for the distance from its query to its key: a number for each head and each bucket of
    distances. The layers of a stack share one.

    Args:
        heads: H.
        buckets: how many buckets there are, at least 4.
        max_distance: from here on all distances are in one bucket.
        bidirectional: whether half of the buckets are for keys after the query.
    """

    def __init__(self, heads: int, *, buckets: int, max_distance: int, bidirectional: bool) -> None:
        super().__init__()
        self.buckets = buckets
        self.max_distance = max_distance
        self.bidirectional = bidirectional
        self.weight = nn.Parameter(torch.empty(buckets, heads))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, batch: Batch) -> Bias:
        """The bias of any of a batch's sequences.

        Distances are looked up once for all layers; a step of one query takes K numbers of each head from them.
        """
        longest = max((batch.rows if batch.pages is None else batch.pages).lengths)
        bias_HL = batch.memo(self, lambda: self._by_distance(longest))

        def bias(q_QHD: Tensor, at_q: range, at_k: range) -> Tensor:
            first = at_k.start - (at_q.stop - 1) + longest - 1  # the distance from the last query to the first key
            rows_HR = bias_HL[:, first : first + len(at_q) + len(at_k) - 1]
            return rows_HR.unfold(1, len(at_k), 1).flip(1)  # each query's row is the next one's, moved by a key

        return bias

    def _by_distance(self, longest: int) -> Tensor:
        """[H, L], for sequences of up to `longest` tokens."""
        distance_L = torch.arange(1 - longest, longest, device=self.weight.device)
        return self.weight[bucket(distance_L, self.buckets, self.max_distance, self.bidirectional)].T


def bucket(distance: Tensor, buckets: int, max_distance: int, bidirectional: bool) -> Tensor:
    """Which bucket a distance, the key's position less the query's, is in: int64 of its shape.

    Half of the buckets (of either direction's) are for single distances, the others for ranges that grow by a factor,
    up to `max_distance`. Without `bidirectional` all keys after the query are in bucket 0.
    """
    if bidirectional:
        buckets //= 2
        first, distance = torch.where(distance > 0, buckets, 0), distance.abs()
    else:
        first, distance = torch.zeros_like(distance), (-distance).clamp(min=0)
    single = buckets // 2
    ratio = torch.log(distance.clamp(min=single).float() / single) / math.log(max_distance / single)
    large = (single + (ratio * (buckets - single)).long()).clamp(max=buckets - 1)
    return first + torch.where(distance < single, distance, large)


class RelativeAttention(nn.Module):
    """T5's self-attention: scores are not divided by sqrt(D), and get a bias by distance; no projection has a bias.

    Args:
        dim: width of the residual stream.
        heads, head_dim: H and D.
        relative_bias: the stack's.
        causal: whether tokens see only those before them, and are cached: a decoder's.
        layer: which of the cache's pools is this layer's.
    """

    def __init__(
        self, dim: int, *, heads: int, head_dim: int, relative_bias: RelativeBias, causal: bool, layer: int = 0
    ) -> None:
        super().__init__()
        self.heads = heads
        self.kv_heads = heads
        self.head_dim = head_dim
        self.causal = causal
        self.layer = layer
        self.q_proj = nn.Linear(dim, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(dim, heads * head_dim, bias=False)
        self.v_proj = nn.Linear(dim, heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, dim, bias=False)
        self.relative_bias = relative_bias

    def forward(self, x_ND: Tensor, batch: Batch) -> Tensor:
        """[N, dim] -> [N, dim]; the keys and values of the batch's tokens are written to its pages, if it has any."""
        projected = project(x_ND, self.q_proj, self.k_proj, self.v_proj)
        q_NHD, k, v = (x.view(x.shape[0], -1, self.head_dim) for x in projected)
        bias = self.relative_bias(batch)
        causal = self.causal and max(batch.rows.lengths) > 1  # a sequence's last query sees all keys
        if batch.pages is None:
            y_NHD = attention(q_NHD, k, v, batch.rows, batch.rows, causal=causal, scale=1.0, bias=bias)
        else:
            k, v = batch.pages.write(self.layer, k, v)
            q_NHD = q_NHD.to(k.dtype)  # the cache may be kept in another
            y_NHD = attention(q_NHD, k, v, batch.rows, batch.pages, causal=causal, scale=1.0, bias=bias).to(x_ND.dtype)
        out_ND: Tensor = self.o_proj(y_NHD.flatten(-2))
        return out_ND

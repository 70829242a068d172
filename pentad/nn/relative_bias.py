"""T5's relative position bias: a learned bias for each distance (arXiv:1910.10683, section 2.1).

Legend: H heads, D head dimension; within one sequence Q queries and K keys; L distances, the middle one 0.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pentad.nn.batch import Batch


class RelativeBias(nn.Module):
    """A learned bias for each head and each bucket of query-key distances, added to the scores.

    All layers of a stack share one instance.

    Args:
        heads: H.
        buckets: number of buckets, at least 4.
        max_distance: this distance and all greater ones share one bucket.
        bidirectional: whether half of the buckets are for keys after the query.
    """

    def __init__(self, heads: int, *, buckets: int, max_distance: int, bidirectional: bool) -> None:
        super().__init__()
        self.buckets = buckets
        self.max_distance = max_distance
        self.bidirectional = bidirectional
        self.weight = nn.Parameter(torch.empty(buckets, heads))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, batch: Batch) -> Callable[[Tensor, range, range], Tensor]:
        """The bias for the sequences of a batch, as `attention` takes it: a function that returns [H, Q, K]."""
        longest = max((batch.layout if batch.kv is None else batch.kv).lengths)
        bucket_L = batch.memo(self, lambda: self._buckets_by_distance(longest))
        bias_HL = self.weight[bucket_L].T

        def bias(q_BHQD: Tensor, at_q: range, at_k: range) -> Tensor:
            first = at_k.start - (at_q.stop - 1) + longest - 1  # the distance from the last query to the first key
            rows_HR = bias_HL[:, first : first + len(at_q) + len(at_k) - 1]
            return rows_HR.unfold(1, len(at_k), 1).flip(1)  # a query's row is the next query's row, shifted by one key

        return bias

    def _buckets_by_distance(self, longest: int) -> Tensor:
        """int64 [L], for sequences of up to `longest` tokens."""
        distance_L = torch.arange(1 - longest, longest, device=self.weight.device)
        return bucket(distance_L, self.buckets, self.max_distance, self.bidirectional)


def bucket(distance: Tensor, buckets: int, max_distance: int, bidirectional: bool) -> Tensor:
    """The buckets of distances (key position minus query position): int64 of the same shape.

    In each direction half of the buckets hold one distance each. The others hold ranges of geometrically growing width,
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

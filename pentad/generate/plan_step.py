"""Steps executed by the kernels, or by plain torch where a network has no plan."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pentad import kernels
from pentad.generate.guards import UnsupportedByKernels
from pentad.generate.plan import Planner, check_network
from pentad.generate.step import PlainStep, Step, Work
from pentad.kernels import CachePools, Tokens, pool_dim
from pentad.memory import physical_memory
from pentad.nn.cache import PagedCache
from pentad.nn.decoder import Decoder
from pentad.nn.linear import cache_dequantized

MAX_TABLES = 64  # of RoPE's angles; only scalings that depend on length have more than one or two


class PlanStep:
    """Executes steps by the kernels, and owns the cache that they fill; takes the place of a `PlainStep`.

    Args:
        network: a decoder-only language model of `pentad.models`, its weights on the CPU. They are packed anew: what a
            part held before, mapped from its file, is read no more.
        cache_dtype: what keys and values are kept in: by default float32 where all weights are, else float16; also
            bfloat16, and int8 with a scale for each token and head.
        page_size: tokens a page, a multiple of 16.
        fast: activations in 8 bits instead of 16.
        threads: how many are used; by default as many as torch uses.
        isa: one of `pentad.kernels.isas()`; the fastest by default.

    Raises:
        UnsupportedByKernels: the network has no plan, or there are no kernels.
    """

    def __init__(
        self,
        network: Decoder,
        *,
        cache_dtype: torch.dtype | None = None,
        page_size: int = 256,
        fast: bool = False,
        threads: int | None = None,
        isa: str | None = None,
    ) -> None:
        if page_size % 16:
            raise ValueError(f"pages of {page_size} tokens; the kernels take multiples of 16")
        self.network = network
        self._options: dict[str, Any] = {
            "cache_dtype": cache_dtype,
            "page_size": page_size,
            "fast": fast,
            "threads": threads,
            "isa": isa,
        }
        threads = threads or torch.get_num_threads()
        with self.single_threaded():
            self._plan = plan = Planner(network, fast=fast, threads=threads, isa=isa)
        self.backend = f"by the kernels ({isa or next(iter(kernels.isas()))}, {threads} threads)"
        self._tables: dict[int, Tensor] = {}
        windows = [window for window in plan.windows if window is not None]
        dtype = cache_dtype or (torch.float16 if plan.reduced else torch.float32)
        self.cache = PagedCache(
            plan.program.layers,
            plan.program.kv_heads,
            pool_dim(plan.program.head_dim, dtype),
            dtype=dtype,
            page_size=page_size,
            window=max(windows) if len(windows) == len(plan.windows) else None,
        )

    def rope_scaling_key(self, length: int) -> int:
        return self._plan.rope.scaling.scaling_key(length)

    def refresh(self) -> Step:
        if self._plan.guards.unchanged():
            return self
        return step_for(self.network, **self._options)

    @contextmanager
    def single_threaded(self) -> Iterator[None]:
        """By one thread: torch's others would go on spinning for a while, on the cores that the next step needs."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    def __call__(self, work: Work, wanted: Sequence[int]) -> Tensor:
        if len(self._tables) > MAX_TABLES:
            self._tables.clear()
        cache, plan, tokens = self.cache, self._plan, []
        for sequence, ids in work:
            cache.reserve(sequence, len(ids))
            rotation = self._rotation(sequence.rope_length, sequence.length + len(ids))
            tokens.append(Tokens(ids, sequence.length, sequence.dropped, sequence.pages, rotation))
        pools = CachePools(cache.keys, cache.values, cache.page_size)
        logits_MV = plan.program.run(tokens, wanted, pools)
        for sequence, ids in work:
            cache.advance(sequence, len(ids))
        return logits_MV

    def _rotation(self, rope_length: int, positions: int) -> Tensor:
        """Cosines and sines of a sequence's RoPE, float32 [at least `positions`, 2, D / 2]."""
        rope = self._plan.rope
        regime = rope.scaling.scaling_key(rope_length)
        table = self._tables.get(regime)
        if table is None or len(table) < positions:
            at = torch.arange(max(512, 2 * positions), dtype=torch.float32)
            angles = at[:, None] * rope.scaling.frequencies(rope.theta, rope.dim, rope_length)
            table = torch.stack((angles.cos(), angles.sin()), 1) * rope.scaling.attention_scaling()
            self._tables[regime] = table
        return table


def step_for(
    network: Decoder,
    *,
    cache_dtype: torch.dtype | None = None,
    page_size: int = 256,
    **options: Any,
) -> Step:
    """The kernels' step of a network if they take it, else plain torch's, which gives way once they do."""

    def planned() -> PlanStep:
        return PlanStep(network, cache_dtype=cache_dtype, page_size=page_size, **options)

    def replan() -> Step | None:
        try:
            check_network(network)
            return planned()
        except UnsupportedByKernels:
            return None

    try:
        return planned()
    except UnsupportedByKernels as reason:
        why, weights = str(reason), cache_dequantized(network, network.dtype, (physical_memory() or math.inf) / 2)
        if weights:
            why += f" ({weights})"
        return PlainStep(network, cache_dtype=cache_dtype, page_size=page_size, why=why, replan=replan)

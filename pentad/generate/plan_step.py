"""Steps executed by the kernels, or in plain torch if the kernels don't support the network."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
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

MAX_ROPE_TABLES = 64  # only scalings that depend on the length have more than one or two


class PlanStep(Step):
    """Executes steps with the kernels, and owns their cache; the counterpart of `PlainStep`.

    Args:
        network: a decoder-only language model of `pentad.models` with its weights on the CPU. Quantized weights are
            packed, and the memory of the originals, mapped from the file, is released.
        cache_dtype: dtype of keys and values: float32, float16, bfloat16, or int8 with a scale per token and head. By
            default float32 if all weights are float32, else float16.
        page_size: tokens per page, a multiple of 16.
        fast: quantize activations to 8 bits instead of 16.
        threads: number of threads; torch's number by default.
        isa: one of `pentad.kernels.isas()`; the fastest by default.

    Raises:
        UnsupportedByKernels: the kernels don't support the network, or are not available.
    """

    exact = True

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
            raise ValueError(f"page_size is {page_size}; expected a multiple of 16")
        self.network = network
        self._make_again = partial(
            step_for, network, cache_dtype=cache_dtype, page_size=page_size, fast=fast, threads=threads, isa=isa
        )
        threads = threads or torch.get_num_threads()
        with self.single_threaded():
            self._plan = plan = Planner(network, fast=fast, threads=threads, isa=isa)
        self.backend = f"by the kernels ({isa or next(iter(kernels.isas()))}, {threads} threads)"
        self._rope_tables: dict[int, Tensor] = {}
        self._wanted = 0  # rows of the last step
        windows = [window for window in plan.windows if window is not None]
        dtype = cache_dtype or (torch.float16 if plan.reduced_precision else torch.float32)
        self.cache = PagedCache(
            plan.program.layers,
            plan.program.kv_heads,
            pool_dim(plan.program.head_dim, dtype),
            dtype=dtype,
            page_size=page_size,
            window=max(windows) if len(windows) == len(plan.windows) else None,
            contiguous=False,  # the kernels read any pages in place
        )

    def rope_scaling_key(self, length: int) -> int:
        return self._plan.rope.scaling.scaling_key(length)

    def refresh(self) -> Step:
        return self if self._plan.guards.unchanged() else self._make_again()

    @contextmanager
    def single_threaded(self) -> Iterator[None]:
        """Use one torch thread: idle torch threads would spin for a while on the cores that the next step needs."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    def __call__(self, work: Work, wanted: Sequence[int]) -> Tensor:
        if len(self._rope_tables) > MAX_ROPE_TABLES:
            self._rope_tables.clear()
        cache, plan, tokens = self.cache, self._plan, []
        for sequence, ids in work:
            cache.reserve(sequence, len(ids))
            rotation = self._rotation(sequence.rope_length, sequence.length + len(ids))
            tokens.append(Tokens(ids, sequence.length, sequence.dropped, sequence.pages, rotation))
        pools = CachePools(cache.keys, cache.values, cache.page_size)
        logits_MV = plan.program.run(tokens, wanted, pools)
        self._wanted = len(wanted)
        for sequence, ids in work:
            cache.advance(sequence, len(ids))
        return logits_MV

    def hidden_states(self) -> Tensor:
        return self._plan.program.normed(self._wanted)

    def _rotation(self, rope_length: int, positions: int) -> Tensor:
        """Cosines and sines of a sequence's RoPE, float32 [at least `positions`, 2, D / 2]."""
        rope = self._plan.rope
        scaling_key = rope.scaling.scaling_key(rope_length)
        table = self._rope_tables.get(scaling_key)
        if table is None or len(table) < positions:
            at = torch.arange(max(512, 2 * positions), dtype=torch.float32)
            angles = at[:, None] * rope.scaling.frequencies(rope.theta, rope.dim, rope_length)
            table = torch.stack((angles.cos(), angles.sin()), 1) * rope.scaling.attention_scaling()
            self._rope_tables[scaling_key] = table
        return table


def step_for(network: Decoder, *, cache_dtype: torch.dtype | None = None, page_size: int = 256, **options: Any) -> Step:
    """A `PlanStep` if the kernels support the network, else a `PlainStep` that is replaced once they do.

    Args:
        network, cache_dtype, page_size, options: see `PlanStep`.
    """

    def plan_step() -> PlanStep:
        return PlanStep(network, cache_dtype=cache_dtype, page_size=page_size, **options)

    def replan() -> Step | None:
        try:
            check_network(network)  # much cheaper than a plan
            return plan_step()
        except UnsupportedByKernels:
            return None

    try:
        return plan_step()
    except UnsupportedByKernels as reason:
        why = str(reason) + cached_weights(network)
        return PlainStep(network, cache_dtype=cache_dtype, page_size=page_size, why=why, replan=replan)


def cached_weights(network: Decoder) -> str:
    """Dequantize weights once if that takes at most half of the memory; returns a note in parentheses, or nothing."""
    note = cache_dequantized(network, network.dtype, (physical_memory() or math.inf) / 2)
    return note and f" ({note})"

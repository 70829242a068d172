"""A plan as a flat list of operations, checked as it is written; one call runs it for a step's tokens.

Legend: N tokens of a step, M rows whose logits are wanted, B sequences.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor

from pentad.kernels.binding import (
    BLOCK_BYTES,
    BLOCKS_BUFFER,
    BUFFERS,
    FEW_QUERIES,
    MOST_DIMS,
    MOST_ROWS,
    PARTS_BUFFER,
    SPLIT,
    TYPES,
    CMatrix,
    COp,
    CStep,
    isas,
    library,
)
from pentad.kernels.weight import FLOATS, LARGEST, Weight, vector

EMBED, NORM, QUANTIZE, MATMUL, GATED, ROTATE, ATTEND, MERGE = range(8)
QUANTIZED, ADD, WANTED = 1, 4, 8  # flags

RESIDUAL, NORMED, PROJECTED, ATTENDED, GATES, LOGITS = range(6)
"""The buffers: the residual stream; what a norm gives; queries, keys and values; attention's output; the feed-forward
layer's middle; the result."""


@dataclass(frozen=True)
class Tokens:
    """The next tokens of one sequence.

    Attributes:
        ids: the tokens.
        past: how many tokens the sequence has before them.
        dropped: how many of those are no longer in the cache, a multiple of the page size.
        pages: where the others are, and these will be.
        rotation: float32 [positions, 2, head_dim / 2], cosines and sines for every position.
    """

    ids: Sequence[int]
    past: int
    dropped: int
    pages: Sequence[int]
    rotation: Tensor


@dataclass
class CachePools:
    """Memory for keys and values: for each layer a pool [pages * page_size, kv_heads, padded_dim].

    Within a page the kernels have an order of their own (kernels.h).
    """

    keys: list[Tensor]
    values: list[Tensor]
    page_size: int


class Program:
    """Operations in order, the weights that they read and the buffers between them.

    Args:
        head_dim, kv_heads, layers: what the cache holds; `padded_dim` is `head_dim` rounded up to a multiple of 16.
        fast: activations in one int8 instead of two (16 bits in all).
        threads: how many are used.
        isa: one of `isas()`; the fastest by default.
    """

    def __init__(
        self, *, head_dim: int, kv_heads: int, layers: int, threads: int, fast: bool = False, isa: str | None = None
    ) -> None:
        if not 2 <= head_dim <= MOST_DIMS or head_dim % 2 or kv_heads < 1 or layers < 1 or threads < 1:
            raise ValueError(f"heads of {head_dim} numbers, {kv_heads} of them, {layers} layers, {threads} threads")
        self.head_dim, self.kv_heads, self.layers = head_dim, kv_heads, layers
        self.padded_dim = -(-head_dim // 16) * 16
        self._heads = 0
        self._ops: list[COp] = []
        self._kept: list[Weight | Tensor] = []  # what the operations point to
        self._widths = [0] * BUFFERS  # floats a row that an operation has left; of the int8 blocks, numbers
        self._widest = [0] * BUFFERS  # of all operations
        self._blocks_of: int | None = None  # the buffer whose numbers the int8 blocks are
        self._vocab = LARGEST
        self._step = CStep(threads=threads, fast=fast, isa=isas()[isa or next(iter(isas()))])
        self._step.padded_dim = self.padded_dim
        self._buffers: list[Tensor] = []
        self._pools: tuple[Tensor, ...] = ()  # what `_step` points to
        self._array: ctypes.Array[COp] | None = None
        self._gives_all = False  # LOGITS has all rows, not only the wanted ones

    @property
    def weight_bytes(self) -> int:
        return sum(kept.nbytes for kept in self._kept)

    # Writing the plan

    def embed(self, table: Weight, out: int = RESIDUAL) -> None:
        """out = the rows of `table` that the step's ids name."""
        self._vocab = table.rows
        self._add(EMBED, out=out, out_width=table.columns, weights=[table])

    def norm(self, weight: Tensor, eps: float, *, quantize: bool, wanted: bool = False) -> None:
        """NORMED = RMS norm of RESIDUAL (of the wanted rows), in int8 too where `quantize`."""
        width = self._widths[RESIDUAL]
        flags = (QUANTIZED if quantize else 0) | (WANTED if wanted else 0)
        self._add(NORM, flags, RESIDUAL, NORMED, width, width, eps=eps, vectors=[vector(weight, width)])

    def quantize(self, source: int) -> None:
        """The int8 blocks of a buffer, for the products that follow."""
        self._add(QUANTIZE, in_=source, in_width=self._widths[source], out=source)

    def matmul(
        self, weights: Sequence[Weight], source: int, out: int, *, add: bool = False, wanted: bool = False
    ) -> None:
        """out = source times each weight, side by side; or added to what is there."""
        flags = (ADD if add else 0) | (WANTED if wanted else 0)
        width = sum(weight.rows for weight in weights)
        self._add(MATMUL, flags, source, out, weights[0].columns, width, weights=weights)

    def gated(self, gate: Weight, up: Weight, source: int = NORMED, out: int = GATES) -> None:
        """out = silu(source times gate) * (source times up)."""
        if gate.rows != up.rows:
            raise ValueError(f"a gate of {gate.rows} rows beside {up.rows}")
        self._add(GATED, 0, source, out, gate.columns, gate.rows, weights=[gate, up])

    def attention(
        self,
        layer: int,
        heads: int,
        *,
        window: int | None = None,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        """ATTENDED = attention of the queries in PROJECTED; its keys and values go to the layer's pools first."""
        dim, width = self.head_dim, (heads + 2 * self.kv_heads) * self.head_dim
        if heads % self.kv_heads or not 0 <= layer < self.layers or self._widths[PROJECTED] != width:
            raise ValueError(
                f"{heads} heads on {self.kv_heads}, layer {layer}, {self._widths[PROJECTED]} numbers a row"
            )
        if window is not None and window < 1:
            raise ValueError(f"a window of {window} keys")
        self._heads = max(self._heads, heads)
        about: dict[str, Any] = {
            "layer": layer,
            "heads": heads,
            "kv_heads": self.kv_heads,
            "head_dim": dim,
            "window": window or 0,
        }
        norms = [None if weight is None else vector(weight, dim) for weight in (q_norm, k_norm)]
        self._add(ROTATE, out=PROJECTED, out_width=width, vectors=norms, scale=dim**-0.5, eps=eps, **about)
        for kind in (ATTEND, MERGE):
            self._add(kind, 0, PROJECTED, ATTENDED, width, heads * dim, **about)

    def _add(
        self,
        kind: int,
        flags: int = 0,
        in_: int = 0,
        out: int = 0,
        in_width: int = 0,
        out_width: int = 0,
        *,
        weights: Sequence[Weight] = (),
        vectors: Sequence[Tensor | None] = (),
        **about: float,
    ) -> None:
        quantized = any(weight.is_quantized for weight in weights)
        for weight in weights:
            if kind != EMBED and weight.columns != in_width:
                raise ValueError(f"weights of {weight.columns} columns for rows of {in_width} numbers")
        if in_width and kind != NORM and self._widths[in_] != in_width:
            raise ValueError(f"rows of {in_width} numbers wanted, the buffer has {self._widths[in_]}")
        if len(weights) > 3 or not 0 <= max(in_width, out_width) <= LARGEST:
            raise ValueError(f"{len(weights)} weights, {in_width} to {out_width} numbers")
        if (kind == QUANTIZE or flags & QUANTIZED) and in_width % 32:
            raise ValueError(f"rows of {in_width} numbers are not whole blocks of 32")
        if kind in (MATMUL, GATED) and quantized and self._blocks_of != in_:
            raise ValueError("quantized weights want activations that are quantized first")
        if kind == QUANTIZE or flags & QUANTIZED:
            self._blocks_of = in_ if kind == QUANTIZE else out
            self._widest[BLOCKS_BUFFER] = max(self._widest[BLOCKS_BUFFER], in_width)
        else:
            self._blocks_of = None if out == self._blocks_of else self._blocks_of
        if kind != QUANTIZE:
            self._widths[out] = out_width
            self._widest[out] = max(self._widest[out], out_width)
            self._gives_all |= out == LOGITS and not flags & WANTED
        matrices = (CMatrix * 3)(*(weight.struct() for weight in weights))
        pointers = {
            name: v.data_ptr() for name, v in zip(("weight", "weight2"), vectors, strict=False) if v is not None
        }
        op = COp(kind, flags, in_, out, in_width, out_width, len(weights), w=matrices, **pointers)
        for name, value in about.items():
            setattr(op, name, value)
        self._ops.append(op)
        self._kept += [*weights, *(v for v in vectors if v is not None)]
        self._array = None

    # Running it

    def run(self, work: Sequence[Tokens], wanted: Sequence[int], pools: CachePools) -> Tensor:
        """Run a step.

        Args:
            work: the sequences' next tokens; their pages have room for them.
            wanted: rows of the step, that is of all tokens laid end to end.
            pools: the cache that the pages are of.

        Returns:
            float32 [M, V], what the plan leaves in LOGITS.

        Raises:
            ValueError: anything in `work`, `wanted` or `pools` that is out of range.
        """
        step = self._step
        ids, positions, starts = array("i"), array("i"), array("i", [0])
        for tokens in work:
            ids.extend(tokens.ids)
            positions.extend(range(tokens.past, tokens.past + len(tokens.ids)))
            starts.append(len(ids))
        self._point_to(pools)
        self._check(work, ids, wanted, pools)
        width = max(len(tokens.pages) for tokens in work) if work else 0
        tables = array("i")
        for tokens in work:
            tables.extend((*tokens.pages, *[0] * (width - len(tokens.pages))))
        lengths = array("i", [tokens.past + len(tokens.ids) for tokens in work])
        dropped = array("i", [tokens.dropped for tokens in work])
        rotations = (ctypes.c_void_p * len(work))(*(tokens.rotation.data_ptr() for tokens in work))
        rows = array("i", wanted)
        step.rows, step.wanted, step.sequences, step.table_width = len(ids), len(rows), len(work), width
        for name, values in (("ids", ids), ("positions", positions), ("wanted_rows", rows), ("starts", starts),
                             ("lengths", lengths), ("dropped", dropped), ("tables", tables)):  # fmt: skip
            setattr(step, name, values.buffer_info()[0])
        step.page_size = pools.page_size
        step.rotations = ctypes.addressof(rotations)
        logits_MV = self._reserve(len(ids), len(rows), self._parts(work))
        if self._array is None:
            self._array = (COp * len(self._ops))(*self._ops)
        library().pentad_run(self._array, len(self._array), step)
        return logits_MV

    def _check(self, work: Sequence[Tokens], ids: array[int], wanted: Sequence[int], pools: CachePools) -> None:
        if pools.page_size < 16 or pools.page_size % 16:
            raise ValueError(f"pages of {pools.page_size} tokens, which are not a multiple of 16")
        pages = len(pools.keys[0]) // pools.page_size
        if max(len(ids), len(wanted)) > MOST_ROWS:
            raise ValueError(f"{len(ids)} tokens in one step; it takes {MOST_ROWS}")
        if ids and not 0 <= min(ids) <= max(ids) < self._vocab:
            raise ValueError(f"a token id is outside the vocabulary of {self._vocab}")
        if len(wanted) and not 0 <= min(wanted) <= max(wanted) < len(ids):
            raise ValueError(f"a wanted row is outside the step's {len(ids)}")
        if self._gives_all and len(wanted) != len(ids):
            raise ValueError(f"the plan gives all {len(ids)} rows, {len(wanted)} are wanted")
        for tokens in work:
            length = tokens.past + len(tokens.ids)
            if not 0 <= tokens.dropped <= tokens.past or tokens.dropped % pools.page_size:
                raise ValueError(f"{tokens.dropped} tokens dropped of {tokens.past}, in pages of {pools.page_size}")
            if len(tokens.pages) * pools.page_size < length - tokens.dropped:
                raise ValueError(f"{len(tokens.pages)} pages don't hold {length - tokens.dropped} tokens")
            if tokens.pages and not 0 <= min(tokens.pages) <= max(tokens.pages) < pages:
                raise ValueError(f"a page is outside the pool's {pages}")
            table = tokens.rotation
            if table.shape[1:] != (2, self.head_dim // 2) or len(table) < length or table.dtype != torch.float32:
                raise ValueError(f"a rotation of {tuple(table.shape)} for {length} positions")
            if table.device.type != "cpu" or not table.is_contiguous():
                raise ValueError("a rotation is contiguous, and on the CPU")

    def _point_to(self, pools: CachePools) -> None:
        """Let the step point to the pools, where they are others than before: a cache has new ones when it grows."""
        given = (*pools.keys, *pools.values)
        if len(given) == len(self._pools) and all(map(is_, given, self._pools)):
            return
        if len(pools.keys) != self.layers or len(pools.values) != self.layers:
            raise ValueError(f"{len(pools.keys)} pools of keys for {self.layers} layers")
        first = given[0]
        for pool in given:
            if pool.shape != first.shape or pool.dtype != first.dtype or not pool.is_contiguous():
                raise ValueError("the pools differ, or are not contiguous")
        if (
            first.shape[1:] != (self.kv_heads, self.padded_dim)
            or first.dtype not in FLOATS
            or not first.device.type == "cpu"
        ):
            raise ValueError(f"a pool of {first.dtype} {tuple(first.shape)}")
        pointers = ctypes.c_void_p * self.layers
        self._pool_pointers = [pointers(*(pool.data_ptr() for pool in each)) for each in (pools.keys, pools.values)]
        self._step.keys, self._step.values = (ctypes.addressof(each) for each in self._pool_pointers)
        self._step.cache_type = TYPES[FLOATS[first.dtype]]
        self._pools = given

    def _parts(self, work: Sequence[Tokens]) -> int:
        """Parts of attention that are put together later, at most."""
        return sum(
            len(tokens.ids) * self._heads * (-(-(tokens.past + len(tokens.ids)) // SPLIT))
            for tokens in work
            if len(tokens.ids) <= FEW_QUERIES
        )

    def _reserve(self, rows: int, wanted: int, parts: int) -> Tensor:
        """Buffers for so many rows; returns the one for the result."""
        most = max(rows, wanted)
        sizes = [most * width for width in self._widest]
        sizes[LOGITS] = 0
        sizes[BLOCKS_BUFFER] = most * (self._widest[BLOCKS_BUFFER] // 32) * BLOCK_BYTES // 4
        sizes[PARTS_BUFFER] = parts * (self.padded_dim + 2)
        if not self._buffers:
            self._buffers = [torch.empty(0)] * BUFFERS
        for i, size in enumerate(sizes):
            if len(self._buffers[i]) < size:
                self._buffers[i] = torch.empty(size)
                self._step.buffers[i] = self._buffers[i].data_ptr()
        logits_MV = torch.empty(wanted, self._widths[LOGITS])
        self._step.buffers[LOGITS] = logits_MV.data_ptr()
        return logits_MV

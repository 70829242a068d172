"""A plan as a flat list of operations, checked as it is written; one call runs it for a step's tokens.

Legend: N tokens of a step, M rows whose logits are wanted, B sequences.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor

from pentad.errors import BadInput
from pentad.kernels.arguments import CACHE_TYPES, CachePools, Tokens, check_rotation, pool_dim
from pentad.kernels.binding import (
    BLOCK_BYTES,
    BLOCKS_BUFFER,
    BUFFERS,
    FEW_QUERIES,
    MAX_DIMS,
    MAX_ROWS,
    PARTS_BUFFER,
    ROUTES_BUFFER,
    SPLIT,
    TYPES,
    CMatrix,
    COp,
    CStep,
    isas,
    library,
)
from pentad.kernels.weight import MAX_SIZE, Weight, vector

EMBED, NORM, QUANTIZE, MATMUL, GATED, ROTATE, ATTEND, MERGE, ROUTE, GATHER, COMBINE = range(11)
QUANTIZED, CENTERED, ADD, WANTED, PAIRS, NORMALIZED = 1, 2, 4, 8, 16, 32  # flags
LINEAR, GELU = range(2)  # activations

RESIDUAL, NORMED, PROJECTED, ATTENDED, GATES, LOGITS, SCORES, PAIRED = range(8)
"""The buffers: the residual stream; what a norm gives; queries, keys and values; attention's output; the feed-forward
layer's middle; the result; a router's scores; rows for experts, and then what those make of them."""


@dataclass(frozen=True)
class Norm:
    """An RMSNorm's, or where it is `centered` a LayerNorm's, numbers.

    Attributes:
        weight, bias: [width]; of a LayerNorm there are both.
    """

    weight: Tensor
    eps: float
    bias: Tensor | None = None

    @property
    def centered(self) -> bool:
        return self.bias is not None


class Program:
    """Operations in order, the weights that they read and the buffers between them.

    Args:
        head_dim, kv_heads, layers: what the cache holds.
        rotary_dim: numbers of a head that RoPE rotates; all by default.
        fast: activations in one int8 instead of two (16 bits in all).
        threads: how many are used.
        isa: one of `isas()`; the fastest by default.
    """

    def __init__(
        self,
        *,
        head_dim: int,
        kv_heads: int,
        layers: int,
        threads: int,
        rotary_dim: int | None = None,
        fast: bool = False,
        isa: str | None = None,
    ) -> None:
        self.head_dim, self.kv_heads, self.layers = head_dim, kv_heads, layers
        self.rotary_dim = head_dim if rotary_dim is None else rotary_dim
        if not 2 <= head_dim <= MAX_DIMS or kv_heads < 1 or layers < 1 or threads < 1:
            raise ValueError(f"heads of {head_dim} numbers, {kv_heads} of them, {layers} layers, {threads} threads")
        if not 0 < self.rotary_dim <= head_dim or self.rotary_dim % 2:
            raise ValueError(f"RoPE on {self.rotary_dim} numbers of {head_dim}")
        self._heads = self.ahead = 0
        self._experts = self._top_k = 0  # of the last router
        self._routes = self._most_experts = 0  # of all: integers a row that one leaves, and experts
        self._paired: set[int] = set()  # buffers whose rows are pairs of a row and one of its experts
        self._capacities: list[Callable[[int], int]] = []
        self._ops: list[COp] = []
        self._kept: list[Weight | Tensor] = []  # what the operations point to
        self._widths = [0] * BUFFERS  # floats a row that an operation has left; of the int8 blocks, numbers
        self._widest = [0] * BUFFERS  # of all operations
        self._blocks_of: int | None = None  # the buffer whose numbers the int8 blocks are
        self._vocab = MAX_SIZE
        self._step = CStep(threads=threads, fast=fast, isa=isas()[isa or next(iter(isas()))])
        self._step.padded_dim = pool_dim(head_dim, torch.float32)
        self._buffers: list[Tensor] = []
        self._most_rows = self._most_parts = 0  # that the buffers have room for
        self._pools: tuple[Tensor, ...] = ()  # what `_step` points to
        self._pool_tokens = 0
        self._rotation: Tensor | None = None  # the last that was checked
        self._array: ctypes.Array[COp] | None = None
        self._gives_all = False  # LOGITS has all rows, not only the wanted ones

    # Writing the plan

    def embed(self, table: Weight, out: int = RESIDUAL) -> None:
        """out = the rows of `table` that the step's ids name."""
        self._vocab = table.rows
        self._add(EMBED, out=out, out_width=table.columns, weights=[table])

    def norm(self, norm: Norm, *, quantize: bool, wanted: bool = False) -> None:
        """NORMED = the norm of RESIDUAL (of the wanted rows), in int8 too where `quantize`."""
        width = self._widths[RESIDUAL]
        flags = (QUANTIZED if quantize else 0) | (WANTED if wanted else 0) | (CENTERED if norm.centered else 0)
        vectors = {"weight": vector(norm.weight, width), "bias": _vector_or_none(norm.bias, width)}
        self._add(NORM, flags, RESIDUAL, NORMED, width, width, vectors=vectors, eps=norm.eps)

    def quantize(self, source: int) -> None:
        """The int8 blocks of a buffer, for the products that follow."""
        self._add(QUANTIZE, 0, source, source, self._widths[source], self._widths[source])

    def matmul(
        self,
        weights: Sequence[Weight],
        source: int,
        out: int,
        *,
        add: bool = False,
        wanted: bool = False,
        activation: int = LINEAR,
    ) -> None:
        """out = activation(source times each weight), side by side; or added to what is there.

        A stack of weights takes the rows of PAIRED or what was made of them, each expert's by its own.
        """
        flags = (ADD if add else 0) | (WANTED if wanted else 0)
        width = sum(weight.rows for weight in weights)
        self._add(MATMUL, flags, source, out, weights[0].columns, width, weights=weights, activation=activation)

    def gated(self, weights: Sequence[Weight], source: int = NORMED, out: int = GATES) -> None:
        """out = silu(source times the first weight), times source times each other weight; there are two or three."""
        if len({weight.rows for weight in weights}) != 1:
            raise ValueError(f"gates of {', '.join(str(weight.rows) for weight in weights)} rows")
        self._add(GATED, 0, source, out, weights[0].columns, weights[0].rows, weights=weights)

    def attention(
        self,
        layer: int,
        heads: int,
        *,
        scale: float | None = None,
        window: int | None = None,
        q_norm: Norm | None = None,
        k_norm: Norm | None = None,
        ahead: int = 0,
        log_scale_after: int = 0,
    ) -> None:
        """ATTENDED = attention of the queries in PROJECTED; its keys and values go to the layer's pools first.

        The arguments are those of `pentad.nn.attention.Attention`.
        """
        dim, width = self.head_dim, (heads + 2 * self.kv_heads) * self.head_dim
        if heads % self.kv_heads or not 0 <= layer < self.layers or self._widths[PROJECTED] != width:
            raise ValueError(
                f"{heads} heads on {self.kv_heads}, layer {layer}, {self._widths[PROJECTED]} numbers a row"
            )
        if window is not None and window < 1:
            raise ValueError(f"a window of {window} keys")
        if q_norm and k_norm and (q_norm.eps, q_norm.centered) != (k_norm.eps, k_norm.centered):
            raise ValueError("the norms of queries and keys differ in their kind")
        if not 0 <= ahead <= MAX_SIZE or (log_scale_after and not 1 < log_scale_after <= MAX_SIZE):
            raise ValueError(f"queries ahead by {ahead}, scaled after {log_scale_after} tokens")
        self._heads, self.ahead = max(self._heads, heads), max(self.ahead, ahead)
        about: dict[str, Any] = {
            "layer": layer,
            "heads": heads,
            "kv_heads": self.kv_heads,
            "head_dim": dim,
            "window": window or 0,
        }
        rotation: dict[str, Any] = {
            "rotary_dim": self.rotary_dim,
            "ahead": ahead,
            "log_scale_after": log_scale_after,
            "scale": dim**-0.5 if scale is None else scale,
        }
        vectors: dict[str, Tensor | None] = {}
        for norm, n in ((q_norm, ""), (k_norm, "2")):
            if norm is not None:
                vectors |= {f"weight{n}": vector(norm.weight, dim), f"bias{n}": _vector_or_none(norm.bias, dim)}
                rotation["eps"] = norm.eps
        centered = CENTERED if q_norm and q_norm.centered else 0
        self._add(ROTATE, centered, out=PROJECTED, out_width=width, vectors=vectors, **about, **rotation)
        for kind in (ATTEND, MERGE):
            self._add(kind, 0, PROJECTED, ATTENDED, width, heads * dim, **about)

    def route(self, top_k: int, *, normalized: bool, capacity: Callable[[int], int] | None = None) -> None:
        """Decide which `top_k` experts each row goes to, by SCORES: the experts' logits.

        Args:
            top_k: experts of a row.
            normalized: whether weights are a softmax over those alone, not over all experts.
            capacity: from a sequence's number of rows to how many of them an expert takes; None: all.
        """
        experts = self._widths[SCORES]
        if not 0 < top_k <= experts:
            raise ValueError(f"{top_k} of {experts} experts")
        self._experts, self._top_k = experts, top_k
        if capacity is not None and capacity not in self._capacities:
            self._capacities.append(capacity)
        at = -1 if capacity is None else self._capacities.index(capacity)
        self._routes = max(self._routes, 4 * top_k)
        self._most_experts = max(self._most_experts, experts)
        flags = NORMALIZED if normalized else 0
        self._add(ROUTE, flags, SCORES, SCORES, experts, experts, count=top_k, experts=experts, capacity=at)

    def gather(self, *, quantize: bool) -> None:
        """PAIRED = a copy of its row in NORMED for each pair of a row and one of its experts, in int8 too."""
        width = self._widths[NORMED]
        self._paired = {PAIRED}
        self._add(GATHER, QUANTIZED if quantize else 0, NORMED, PAIRED, width, width, count=self._top_k)

    def combine(self) -> None:
        """RESIDUAL += what a row's experts have left in PAIRED, by their weights."""
        width = self._widths[RESIDUAL]
        self._add(COMBINE, 0, PAIRED, RESIDUAL, width, width, count=self._top_k, experts=self._experts)
        self._paired = set()

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
        vectors: Mapping[str, Tensor | None] | None = None,
        **about: float,
    ) -> None:
        writes_blocks = kind == QUANTIZE or bool(flags & QUANTIZED)
        if kind == GATHER or (kind in (QUANTIZE, MATMUL, GATED) and in_ in self._paired):
            flags |= PAIRS
            about["experts"] = self._experts
            self._paired.add(out)
        self._check_widths(kind, in_, in_width, out_width, writes_blocks)
        self._check_weights(kind, in_, in_width, weights, self._experts if flags & PAIRS else 0)
        copies = self._top_k if flags & PAIRS else 1
        if writes_blocks:
            self._blocks_of = out
            self._widest[BLOCKS_BUFFER] = max(self._widest[BLOCKS_BUFFER], in_width * copies)
        elif out == self._blocks_of:
            self._blocks_of = None
        self._widths[out] = out_width
        self._widest[out] = max(self._widest[out], out_width * copies)
        self._gives_all |= out == LOGITS and not flags & WANTED
        pointers = {name: v.data_ptr() for name, v in (vectors or {}).items() if v is not None}
        matrices = (CMatrix * 3)(*(weight.struct() for weight in weights))
        about = {"count": len(weights), **about, **pointers}
        self._ops.append(COp(kind, flags, in_, out, in_width, out_width, w=matrices, **about))
        self._kept += [*weights, *(v for v in (vectors or {}).values() if v is not None)]
        self._array, self._most_rows = None, 0

    def _check_widths(self, kind: int, in_: int, in_width: int, out_width: int, writes_blocks: bool) -> None:
        if in_width and self._widths[in_] != in_width:
            raise ValueError(f"rows of {in_width} numbers wanted, the buffer has {self._widths[in_]}")
        if not 0 <= max(in_width, out_width) <= MAX_SIZE:
            raise ValueError(f"{in_width} to {out_width} numbers")
        if writes_blocks and in_width % 32:
            raise ValueError(f"rows of {in_width} numbers are not whole blocks of 32")

    def _check_weights(self, kind: int, in_: int, in_width: int, weights: Sequence[Weight], experts: int) -> None:
        if len(weights) > 3:
            raise ValueError(f"{len(weights)} weights")
        for weight in weights:
            if kind != EMBED and weight.columns != in_width:
                raise ValueError(f"weights of {weight.columns} columns for rows of {in_width} numbers")
            if kind != EMBED and weight.is_quantized and self._blocks_of != in_:
                raise ValueError("quantized weights want activations that are quantized first")
            if weight.experts != experts:
                raise ValueError(f"weights of {weight.experts} experts for rows of {experts}")

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
        lengths = array("i", [tokens.length for tokens in work])
        dropped = array("i", [tokens.dropped for tokens in work])
        rotations = (ctypes.c_void_p * len(work))(*(tokens.rotation.data_ptr() for tokens in work))
        rows = array("i", wanted)
        limits = array("i", [_limit(capacity, len(t.ids)) for capacity in self._capacities for t in work])
        step.rows, step.wanted, step.sequences, step.table_width = len(ids), len(rows), len(work), width
        arrays = {"ids": ids, "positions": positions, "wanted_rows": rows, "starts": starts, "lengths": lengths}
        arrays |= {"dropped": dropped, "tables": tables, "limits": limits}
        for name, values in arrays.items():
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
        if max(len(ids), len(wanted)) > MAX_ROWS:
            raise ValueError(f"{len(ids)} tokens in one step; it takes {MAX_ROWS}")
        if ids and not 0 <= min(ids) <= max(ids) < self._vocab:
            raise ValueError(f"a token id is outside the vocabulary of {self._vocab}")
        if len(wanted) and not 0 <= min(wanted) <= max(wanted) < len(ids):
            raise ValueError(f"a wanted row is outside the step's {len(ids)}")
        if self._gives_all and len(wanted) != len(ids):
            raise ValueError(f"the plan gives all {len(ids)} rows, {len(wanted)} are wanted")
        for tokens in work:
            if tokens.rotation is not self._rotation:  # most often it is the last step's
                check_rotation(tokens.rotation, self.rotary_dim)
                self._rotation = tokens.rotation
            tokens.check(pools.page_size, self._pool_tokens // pools.page_size, self.ahead)

    def _point_to(self, pools: CachePools) -> None:
        """Let the step point to the pools, where they are others than before: a cache has new ones when it grows."""
        given = (*pools.keys, *pools.values)
        if len(given) == len(self._pools) and all(map(is_, given, self._pools)):
            return
        pools.check(self.layers, self.kv_heads, self.head_dim)
        pointers = ctypes.c_void_p * self.layers
        self._pool_pointers = [pointers(*(pool.data_ptr() for pool in each)) for each in (pools.keys, pools.values)]
        self._step.keys, self._step.values = (ctypes.addressof(each) for each in self._pool_pointers)
        self._step.cache_type = TYPES[CACHE_TYPES[given[0].dtype]]
        self._pools, self._pool_tokens = given, len(given[0])

    def _parts(self, work: Sequence[Tokens]) -> int:
        """Parts of attention that are put together later, at most."""
        return sum(
            len(tokens.ids) * self._heads * -(-tokens.length // SPLIT)
            for tokens in work
            if len(tokens.ids) <= FEW_QUERIES
        )

    def _reserve(self, rows: int, wanted: int, parts: int) -> Tensor:
        """Buffers for so many rows; returns the one for the result."""
        most = max(rows, wanted)
        if most > self._most_rows or parts > self._most_parts:
            most, parts = max(most, self._most_rows), max(parts, self._most_parts)
            sizes = [most * width for width in self._widest]
            sizes[LOGITS] = 0
            sizes[BLOCKS_BUFFER] = most * (self._widest[BLOCKS_BUFFER] // 32) * BLOCK_BYTES // 4
            sizes[PARTS_BUFFER] = parts * (self._step.padded_dim + 2)
            sizes[ROUTES_BUFFER] = most * self._routes + 2 * self._most_experts
            self._buffers = [torch.empty(size) for size in sizes]
            self._step.buffers = (ctypes.c_void_p * BUFFERS)(*(buffer.data_ptr() for buffer in self._buffers))
            self._most_rows, self._most_parts = most, parts
        logits_MV = torch.empty(wanted, self._widths[LOGITS])
        self._step.buffers[LOGITS] = logits_MV.data_ptr()
        return logits_MV


def _limit(capacity: Callable[[int], int], tokens: int) -> int:
    limit = capacity(tokens)
    if limit < 1:
        raise BadInput(f"an expert's capacity for {tokens} tokens is {limit}; it takes at least 1")
    return min(limit, MAX_SIZE)


def _vector_or_none(values: Tensor | None, size: int) -> Tensor | None:
    return None if values is None else vector(values, size)

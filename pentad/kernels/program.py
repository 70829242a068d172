"""A plan: a flat list of operations, each checked when it is added. One call runs the plan for the tokens of a step.

Legend: N tokens of a step, M rows whose logits are wanted, B sequences.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from array import array
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pentad.errors import BadInput
from pentad.kernels.arguments import CACHE_TYPES, CachePools, Tokens, check_rotation, narrowed, pool_dim
from pentad.kernels.binding import Activation, Buffer, CMatrix, COp, CStep, Flag, OpKind, isas, library, limit
from pentad.kernels.weight import Weight, optional_vector, vector

_one_step = threading.RLock()  # a step uses the program's buffers, and the library runs one step at a time anyway
if hasattr(os, "register_at_fork"):  # a fork waits for the running step, so that the child's copy is consistent
    os.register_at_fork(before=_one_step.acquire, after_in_parent=_one_step.release, after_in_child=_one_step.release)


@dataclass(frozen=True)
class Norm:
    """The parameters of an RMSNorm or, with a bias, of a LayerNorm.

    Attributes:
        weight: [width].
        eps: added to the mean square.
        bias: [width], or None for RMSNorm.
    """

    weight: Tensor
    eps: float
    bias: Tensor | None = None

    @property
    def centered(self) -> bool:
        return self.bias is not None


class Program:
    """Operations in order, the weights that they read and the buffers between them.

    Threads may share a program. The steps of all programs run one after the other, on one pool of threads. A forked
    child starts its own threads.

    Args:
        head_dim, kv_heads, layers: the shape of the KV cache.
        threads: the number of threads.
        rotary_dim: the dimensions of a head that RoPE rotates; all by default.
        fast: round activations to 8 bits instead of 16.
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
        if not 2 <= head_dim <= limit("MAX_HEAD_DIM") or kv_heads < 1 or layers < 1 or threads < 1:
            raise ValueError(
                f"head_dim is {head_dim}, expected 2 to {limit('MAX_HEAD_DIM')}; kv_heads, layers and threads are"
                f" {kv_heads}, {layers} and {threads}, expected at least 1"
            )
        if not 0 < self.rotary_dim <= head_dim or self.rotary_dim % 2:
            raise ValueError(f"rotary_dim is {self.rotary_dim}; expected an even number up to {head_dim}")
        self._experts = self._top_k = 0  # of the last `route`
        self._paired: set[int] = set()  # buffers whose rows are (row, expert) pairs
        self._capacities: list[Callable[[int], int]] = []
        self._ops: list[COp] = []
        self._alive: list[Weight | Tensor] = []  # the operations point to their memory
        self._widths = [0] * len(Buffer)  # floats per row, as the last operation wrote them
        self._quantized: int | None = None  # the buffer that the int8 blocks were computed from
        self._vocab = limit("MAX_SIZE")
        self._step = CStep(threads=threads, fast=fast, isa=isas()[isa or next(iter(isas()))])
        self._step.padded_dim = pool_dim(head_dim, torch.float32)
        self._buffers = [torch.empty(0) for _ in Buffer]
        self._pools: list[weakref.ref[Tensor]] = []  # `_step` points to them; the cache owns them
        self._pool_tokens = 0
        self._rotation: Tensor | None = None  # the last table that was checked
        self._array: ctypes.Array[COp] | None = None
        self._all_rows = False  # LOGITS gets all rows, not only the wanted ones
        self._narrowed_at: int | None = None

    # Writing the plan

    def embed(self, table: Weight, out: int = Buffer.RESIDUAL) -> None:
        """out = the rows of `table` selected by the token ids."""
        self._vocab = table.rows
        self._add(OpKind.EMBED, out=out, out_width=table.columns, weights=[table])

    def norm(self, norm: Norm, *, quantize: bool, wanted: bool = False) -> None:
        """NORMED = the norm of RESIDUAL, of all or the `wanted` rows; `quantize` also writes int8 blocks."""
        width = self._widths[Buffer.RESIDUAL]
        flags = Flag.QUANTIZED * quantize | Flag.WANTED * wanted | Flag.CENTERED * norm.centered
        vectors = {"weight": vector(norm.weight, width), "bias": optional_vector(norm.bias, width)}
        self._add(OpKind.NORM, flags, Buffer.RESIDUAL, Buffer.NORMED, width, width, vectors=vectors, eps=norm.eps)

    def quantize(self, source: int) -> None:
        """Write the int8 blocks of a buffer, for the matmuls that follow."""
        self._add(OpKind.QUANTIZE, 0, source, source, self._widths[source], self._widths[source])

    def narrow(self) -> None:
        """From here on only the wanted rows of RESIDUAL are needed: a step that wants few drops the other rows.

        The next operation must read RESIDUAL. The layer before has written all keys and values that are attended to.
        """
        self._narrowed_at = len(self._ops)

    def matmul(
        self,
        weights: Sequence[Weight],
        source: int,
        out: int,
        *,
        add: bool = False,
        wanted: bool = False,
        gelu: bool = False,
    ) -> None:
        """out = source times each weight, side by side; `gelu` applies GELU, and `add` adds to `out`.

        A stack of weights multiplies the rows of PAIRED (or of a buffer computed from them), each expert's rows by its
        own matrix.
        """
        flags = Flag.ADD * add | Flag.WANTED * wanted
        width = sum(weight.rows for weight in weights)
        self._add(
            OpKind.MATMUL,
            flags,
            source,
            out,
            weights[0].columns,
            width,
            weights=weights,
            activation=gelu and Activation.GELU,
        )

    def gated(self, weights: Sequence[Weight], source: int = Buffer.NORMED, out: int = Buffer.GATES) -> None:
        """out = silu(source times the first weight) * (source times each of the one or two other weights)."""
        if len({weight.rows for weight in weights}) != 1:
            raise ValueError(f"gated weights have {[weight.rows for weight in weights]} rows; expected equal numbers")
        self._add(OpKind.GATED, 0, source, out, weights[0].columns, weights[0].rows, weights=weights)

    def attention(
        self,
        layer: int,
        heads: int,
        *,
        scale: float | None = None,
        window: int | None = None,
        q_norm: Norm | None = None,
        k_norm: Norm | None = None,
        log_scale_after: int = 0,
    ) -> None:
        """Write PROJECTED's keys and values to the cache, then ATTENDED = attention of PROJECTED's queries.

        The arguments are those of `pentad.nn.attention.Attention`. Without queries (no `heads`) only the cache is
        written. If PROJECTED has only queries, keys and values are in the cache already.
        """
        dim, width = self.head_dim, self._widths[Buffer.PROJECTED]
        kv_heads = 0 if heads and width == heads * self.head_dim else self.kv_heads
        if heads % self.kv_heads or not 0 <= layer < self.layers or width != (heads + 2 * kv_heads) * dim:
            raise ValueError(
                f"PROJECTED has rows of {width}; expected {(heads + 2 * self.kv_heads) * dim} for {heads} heads, a"
                f" multiple of {self.kv_heads}, and layer {layer} below {self.layers}"
            )
        if window is not None and window < 1:
            raise ValueError(f"window is {window}; expected at least 1")
        if q_norm and k_norm and (q_norm.eps, q_norm.centered) != (k_norm.eps, k_norm.centered):
            raise ValueError("the norms of queries and keys differ in eps or type; expected equal ones")
        if log_scale_after and not 1 < log_scale_after <= limit("MAX_SIZE"):
            raise ValueError(f"log_scale_after is {log_scale_after}; expected 0 or at least 2")
        fields: dict[str, Any] = {"layer": layer, "heads": heads, "head_dim": dim, "window": window or 0}
        rotation: dict[str, Any] = {"rotary_dim": self.rotary_dim, "log_scale_after": log_scale_after}
        rotation["kv_heads"] = kv_heads
        rotation["scale"] = dim**-0.5 if scale is None else scale
        vectors: dict[str, Tensor | None] = {}
        for norm, n in ((q_norm, ""), (k_norm, "2")):
            if norm is not None:
                vectors |= {f"weight{n}": vector(norm.weight, dim), f"bias{n}": optional_vector(norm.bias, dim)}
                rotation["eps"] = norm.eps
        centered = Flag.CENTERED * bool(q_norm and q_norm.centered)
        self._add(OpKind.ROTATE, centered, out=Buffer.PROJECTED, out_width=width, vectors=vectors, **fields, **rotation)
        for op in (OpKind.ATTEND, OpKind.MERGE) if heads else ():
            self._add(op, 0, Buffer.PROJECTED, Buffer.ATTENDED, width, heads * dim, kv_heads=self.kv_heads, **fields)

    def route(self, top_k: int, *, normalized: bool, capacity: Callable[[int], int] | None = None) -> None:
        """Route each row to `top_k` experts by the router logits in SCORES.

        Args:
            top_k: experts per row.
            normalized: compute the softmax over the chosen experts only, instead of over all experts.
            capacity: maps a sequence's number of rows to the maximum that an expert accepts; None: no limit.
        """
        experts = self._widths[Buffer.SCORES]
        if not 0 < top_k <= experts:
            raise ValueError(f"top_k is {top_k} of {experts} experts; expected 1 to {experts}")
        self._experts, self._top_k = experts, top_k
        if capacity is not None and capacity not in self._capacities:
            self._capacities.append(capacity)
        index = -1 if capacity is None else self._capacities.index(capacity)
        flags = Flag.NORMALIZED * normalized
        self._add(
            OpKind.ROUTE,
            flags,
            Buffer.SCORES,
            Buffer.SCORES,
            experts,
            experts,
            count=top_k,
            experts=experts,
            capacity=index,
        )

    def gather(self, *, quantize: bool) -> None:
        """PAIRED = a copy of the row of NORMED for each (row, expert) pair; `quantize` also writes int8 blocks."""
        width = self._widths[Buffer.NORMED]
        self._paired = {Buffer.PAIRED}
        self._add(
            OpKind.GATHER, Flag.QUANTIZED * quantize, Buffer.NORMED, Buffer.PAIRED, width, width, count=self._top_k
        )

    def combine(self) -> None:
        """RESIDUAL += the weighted sum of each row's pairs in PAIRED."""
        width = self._widths[Buffer.RESIDUAL]
        self._add(
            OpKind.COMBINE, 0, Buffer.PAIRED, Buffer.RESIDUAL, width, width, count=self._top_k, experts=self._experts
        )
        self._paired = set()

    def _add(
        self,
        kind: OpKind,
        flags: int = 0,
        in_: int = 0,
        out: int = 0,
        in_width: int = 0,
        out_width: int = 0,
        *,
        weights: Sequence[Weight] = (),
        vectors: Mapping[str, Tensor | None] | None = None,
        **fields: float,
    ) -> None:
        if kind == OpKind.GATHER or (kind in (OpKind.QUANTIZE, OpKind.MATMUL, OpKind.GATED) and in_ in self._paired):
            flags |= Flag.PAIRS
            fields["experts"] = self._experts
            self._paired.add(out)
        writes_blocks = kind == OpKind.QUANTIZE or bool(flags & Flag.QUANTIZED)
        self._check_widths(in_, in_width, out_width, writes_blocks)
        self._check_weights(kind, in_, in_width, weights, self._experts if flags & Flag.PAIRS else 0)
        if writes_blocks:
            self._quantized = out
        elif out == self._quantized:
            self._quantized = None
        self._widths[out] = out_width
        self._all_rows |= out == Buffer.LOGITS and not flags & Flag.WANTED
        present = {name: v for name, v in (vectors or {}).items() if v is not None}
        pointers = {name: v.data_ptr() for name, v in present.items()}
        matrices = (CMatrix * 3)(*(weight.struct() for weight in weights))
        fields = {"count": len(weights), **fields, **pointers}
        self._ops.append(COp(kind, flags, in_, out, in_width, out_width, w=matrices, **fields))
        self._alive += [*weights, *present.values()]
        self._array = None

    def _check_widths(self, in_: int, in_width: int, out_width: int, writes_blocks: bool) -> None:
        if in_width and self._widths[in_] != in_width:
            raise ValueError(f"{Buffer(in_).name} has rows of {self._widths[in_]} numbers; expected rows of {in_width}")
        if not 0 <= max(in_width, out_width) <= limit("MAX_SIZE"):
            raise ValueError(f"rows have {in_width} and {out_width} numbers; expected at most {limit('MAX_SIZE')}")
        if writes_blocks and in_width % limit("BLOCK"):
            raise ValueError(f"rows to quantize have {in_width} numbers; expected a multiple of {limit('BLOCK')}")

    def _check_weights(self, kind: int, in_: int, in_width: int, weights: Sequence[Weight], experts: int) -> None:
        if len(weights) > 3:
            raise ValueError(f"an operation has {len(weights)} weights; expected at most 3")
        for weight in weights:
            if kind != OpKind.EMBED and weight.columns != in_width:
                raise ValueError(f"a weight has {weight.columns} columns; expected {in_width}")
            if kind != OpKind.EMBED and weight.is_quantized and self._quantized != in_:
                raise ValueError(f"quantized weights need {Buffer(in_).name} quantized first")
            if weight.experts != experts:
                raise ValueError(f"a weight has {weight.experts} experts for rows of {experts}")

    # Running the plan

    def run(self, work: Sequence[Tokens], wanted: Sequence[int], pools: CachePools) -> Tensor:
        """Run a step.

        Args:
            work: each sequence's next tokens, and pages with room for them.
            wanted: the rows whose logits are returned, as indices into the concatenated tokens.
            pools: the KV cache that contains the pages.

        Returns:
            float32 [M, V], the buffer LOGITS.

        Raises:
            ValueError: a value in `work`, `wanted` or `pools` is out of range.
        """
        with _one_step:
            return self._run(work, wanted, pools)

    def normed(self, rows: int) -> Tensor:
        """A copy of the first rows of NORMED, as the last step has left them: float32 [rows, width]."""
        width = self._widths[Buffer.NORMED]
        return self._buffers[Buffer.NORMED][: rows * width].view(rows, width).clone()

    def _run(self, work: Sequence[Tokens], wanted: Sequence[int], pools: CachePools) -> Tensor:
        self._point_to(pools)
        self._check(work, wanted, pools)
        self._step.page_size = pools.page_size
        if self._array is None:
            self._array = (COp * len(self._ops))(*self._ops)
        first, kept, rows = 0, sorted(set(wanted)), sum(len(tokens.ids) for tokens in work)
        if self._narrowed_at is not None and len(kept) < rows:
            first, width = self._narrowed_at, self._widths[Buffer.RESIDUAL]
            logits_MV = self._execute((COp * first).from_buffer(self._array), work, ())
            if not kept:
                return logits_MV
            residual_ND = self._buffers[Buffer.RESIDUAL][: rows * width].view(rows, width)
            residual_ND[: len(kept)] = residual_ND[kept]
            work, wanted = narrowed(work, kept), [bisect_left(kept, row) for row in wanted]
        ops = (COp * (len(self._ops) - first)).from_buffer(self._array, first * ctypes.sizeof(COp))
        return self._execute(ops, work, wanted)

    def _execute(self, ops: ctypes.Array[COp], work: Sequence[Tokens], wanted: Sequence[int]) -> Tensor:
        """Run operations for all tokens of `work`."""
        step = self._step
        ids, positions, cu_seqlens = array("i"), array("i"), array("i", [0])
        for tokens in work:
            ids.extend(tokens.ids)
            positions.extend(range(tokens.past, tokens.past + len(tokens.ids)))
            cu_seqlens.append(len(ids))
        width = max(len(tokens.pages) for tokens in work) if work else 0
        block_tables = array("i")
        for tokens in work:
            block_tables.extend((*tokens.pages, *[0] * (width - len(tokens.pages))))
        lengths = array("i", [tokens.length for tokens in work])
        dropped = array("i", [tokens.dropped for tokens in work])
        rotations = (ctypes.c_void_p * len(work))(*(tokens.rotation.data_ptr() for tokens in work))
        rows = array("i", wanted)
        limits = array("i", [_capped(capacity, len(t.ids)) for capacity in self._capacities for t in work])
        step.rows, step.wanted, step.sequences, step.block_table_width = len(ids), len(rows), len(work), width
        arrays = {"ids": ids, "positions": positions, "wanted_rows": rows, "cu_seqlens": cu_seqlens, "limits": limits}
        arrays |= {"lengths": lengths, "dropped": dropped, "block_tables": block_tables}
        for name, values in arrays.items():
            setattr(step, name, values.buffer_info()[0])
        step.rotations = ctypes.addressof(rotations)
        logits_MV = self._reserve(ops, len(rows))
        library().pentad_run(ops, len(ops), step)
        return logits_MV

    def _check(self, work: Sequence[Tokens], wanted: Sequence[int], pools: CachePools) -> None:
        ids = [token for tokens in work for token in tokens.ids]
        if pools.page_size < 1 or pools.page_size % limit("LANES"):
            raise ValueError(f"page_size is {pools.page_size}; expected a multiple of {limit('LANES')}")
        if max(len(ids), len(wanted)) > limit("MAX_STEP_ROWS"):
            raise ValueError(f"the step has {len(ids)} tokens; expected at most {limit('MAX_STEP_ROWS')}")
        if ids and not 0 <= min(ids) <= max(ids) < self._vocab:
            raise ValueError(f"token ids are {min(ids)} to {max(ids)}; expected 0 to {self._vocab - 1}")
        if len(wanted) and not 0 <= min(wanted) <= max(wanted) < len(ids):
            raise ValueError(f"wanted rows are {min(wanted)} to {max(wanted)}; expected 0 to {len(ids) - 1}")
        if self._all_rows and len(wanted) != len(ids):
            raise ValueError(f"{len(wanted)} rows are wanted; the plan computes all {len(ids)} rows")
        for tokens in work:
            if tokens.rotation is not self._rotation:  # usually the table of the previous step
                check_rotation(tokens.rotation, self.rotary_dim)
                self._rotation = tokens.rotation
            tokens.check(pools.page_size, self._pool_tokens // pools.page_size)

    def _point_to(self, pools: CachePools) -> None:
        """Make the step point to the pools if they changed; a cache gets new pools when it grows."""
        tensors = (*pools.keys, *pools.values)
        if len(tensors) == len(self._pools) and all(
            tensor is ref() for tensor, ref in zip(tensors, self._pools, strict=True)
        ):
            return
        pools.check(self.layers, self.kv_heads, self.head_dim)
        pointers = ctypes.c_void_p * self.layers
        self._pool_pointers = [pointers(*(pool.data_ptr() for pool in each)) for each in (pools.keys, pools.values)]
        self._step.keys, self._step.values = (ctypes.addressof(each) for each in self._pool_pointers)
        self._step.cache_type = CACHE_TYPES[tensors[0].dtype]
        self._pools, self._pool_tokens = list(map(weakref.ref, tensors)), len(tensors[0])

    def _reserve(self, ops: ctypes.Array[COp], wanted: int) -> Tensor:
        """Enlarge the buffers that are too small for the step, and return a new LOGITS buffer."""
        sizes = (ctypes.c_int64 * len(Buffer))()
        library().pentad_buffer_sizes(ops, len(ops), self._step, sizes)
        for index, size in enumerate(sizes):
            if size > len(self._buffers[index]) and index != Buffer.LOGITS:
                self._buffers[index] = torch.empty(size)
                self._step.buffers[index] = self._buffers[index].data_ptr()
        logits_MV = torch.empty(wanted, self._widths[Buffer.LOGITS])
        if sizes[Buffer.LOGITS] > logits_MV.numel():
            raise ValueError(
                f"an operation writes {sizes[Buffer.LOGITS]} numbers to LOGITS; expected {logits_MV.numel()}"
            )
        self._step.buffers[Buffer.LOGITS] = logits_MV.data_ptr()
        return logits_MV


def _capped(capacity: Callable[[int], int], tokens: int) -> int:
    rows = capacity(tokens)
    if rows < 1:
        raise BadInput(f"an expert's capacity for {tokens} tokens is {rows}; expected at least 1")
    return min(rows, limit("MAX_SIZE"))

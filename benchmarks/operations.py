"""The names, bytes read and multiply-adds of a plan's operations, from the structures passed to the kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import pairwise

from pentad.generate.plan_step import PlanStep
from pentad.generate.step import Step
from pentad.kernels.binding import Buffer, CMatrix, COp, CStep, Flag, OpKind, Type, library

FLOAT_BYTES = {Type.F32: 4, Type.BF16: 2, Type.F16: 2}
KINDS = {
    OpKind.EMBED: "embed",
    OpKind.NORM: "norm",
    OpKind.QUANTIZE: "quantize",
    OpKind.GATED: "gate, up",
    OpKind.ROTATE: "rotate, cache",
    OpKind.ATTEND: "attend",
    OpKind.MERGE: "merge",
    OpKind.ROUTE: "route",
    OpKind.GATHER: "gather",
    OpKind.COMBINE: "combine",
}
PRODUCTS = {
    (Buffer.NORMED, Buffer.PROJECTED): "q, k, v",
    (Buffer.ATTENDED, Buffer.RESIDUAL): "o",
    (Buffer.NORMED, Buffer.GATES): "up",
    (Buffer.GATES, Buffer.RESIDUAL): "down",
    (Buffer.GATES, Buffer.PAIRED): "down",
    (Buffer.NORMED, Buffer.SCORES): "router",
    (Buffer.NORMED, Buffer.LOGITS): "head",
}
"""The name of a matmul, by its input and output buffers."""


def name(op: COp) -> str:
    return KINDS.get(op.kind) or PRODUCTS.get((op.in_, op.out), f"kind {op.kind}")


def operations(step: Step) -> Sequence[COp]:
    """The operations of a model's plan; empty if plain torch runs the model."""
    return step._plan.program._ops if isinstance(step, PlanStep) else []


def matrices(op: COp) -> list[CMatrix]:
    return [matrix for matrix in op.w if matrix.data]


def matrix_bytes(matrix: CMatrix) -> int:
    """Bytes of a matrix; for a stack of experts, of one expert's matrix."""
    if matrix.type in FLOAT_BYTES:
        return int(matrix.rows * matrix.columns * FLOAT_BYTES[matrix.type])
    return int(library().pentad_packed_bytes(matrix.type, matrix.rows, matrix.columns))


def weight_bytes(ops: Sequence[COp]) -> int:
    """Bytes of all matrices; a matrix that is used twice counts once."""
    sizes = {m.data: matrix_bytes(m) * (op.experts if op.flags & Flag.PAIRS else 1) for op in ops for m in matrices(op)}
    return sum(sizes.values())


def token_bytes(ops: Sequence[COp]) -> int:
    """Bytes of the matrices that one token's step reads: not the embedding, and only the experts it is routed to."""
    total = experts = 0
    for op in ops:
        experts = op.count if op.kind == OpKind.ROUTE else experts
        if op.kind != OpKind.EMBED:
            total += sum(map(matrix_bytes, matrices(op))) * (experts if op.flags & Flag.PAIRS else 1)
    return total


def rows_of(op: COp, step: CStep) -> int:
    """The number of rows of an operation that has just run."""
    if op.flags & Flag.PAIRS:
        return _pairs(op, step)[-1]
    return int(step.wanted if op.flags & Flag.WANTED else step.rows)


def bytes_read(op: COp, step: CStep) -> int:
    """Bytes read by an operation that has just run: weights, keys and values, and input rows, each byte once."""
    rows = rows_of(op, step)
    if op.kind == OpKind.MERGE:
        return 0  # its inputs are small
    if op.kind == OpKind.EMBED:
        return rows * matrix_bytes(op.w[0]) // op.w[0].rows
    busy = sum(last > first for first, last in pairwise([0, *_pairs(op, step)])) if op.flags & Flag.PAIRS else 1
    width = op.out_width if op.kind == OpKind.ROTATE else op.in_width
    total = busy * sum(map(matrix_bytes, matrices(op))) + rows * width * 4
    if op.kind == OpKind.ATTEND:
        size = step.padded_dim * FLOAT_BYTES[step.cache_type] if step.cache_type in FLOAT_BYTES else step.padded_dim + 4
        total += sum(last - first for first, last in _seen(op, step)) * op.kv_heads * 2 * size
    return int(total)


def multiply_adds(op: COp, step: CStep) -> int:
    """Multiply-adds of matmuls and attention; other operations have few."""
    if op.kind == OpKind.ATTEND:
        pairs = 0
        for (first, last), queries in zip(_seen(op, step), _queries(step), strict=True):
            window = op.window or last
            pairs += sum(min(position + 1 - first, window) for position in range(last - queries, last))
        return int(2 * pairs * op.heads * op.head_dim)
    return 0 if op.kind == OpKind.EMBED else sum(int(rows_of(op, step) * m.rows * m.columns) for m in matrices(op))


def _ints(address: int, count: int) -> list[int]:
    return list((ctypes.c_int32 * count).from_address(address))


def _pairs(op: COp, step: CStep) -> list[int]:
    """The cumulative numbers of (row, expert) pairs, by expert."""
    return _ints(step.buffers[Buffer.ROUTES], op.experts)


def _queries(step: CStep) -> list[int]:
    """The number of queries of each sequence."""
    return [last - first for first, last in pairwise(_ints(step.cu_seqlens, step.sequences + 1))]


def _seen(op: COp, step: CStep) -> list[tuple[int, int]]:
    """The range of key positions that the queries of each sequence attend to."""
    lengths = _ints(step.lengths, step.sequences)
    return [
        (max(0, length - queries + 1 - op.window) if op.window else 0, length)
        for length, queries in zip(lengths, _queries(step), strict=True)
    ]

"""What the operations of a plan are called, read and compute, by the structures that the kernels are given."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import pairwise

from pentad.generate.plan import PlanStep
from pentad.generate.step import Step
from pentad.kernels import program as p
from pentad.kernels.binding import TYPES, CMatrix, COp, CStep, library

FLOAT_BYTES = {TYPES["f32"]: 4, TYPES["bf16"]: 2, TYPES["f16"]: 2}
KINDS = {
    p.EMBED: "embed",
    p.NORM: "norm",
    p.QUANTIZE: "quantize",
    p.GATED: "gate, up",
    p.ROTATE: "rotate, cache",
    p.ATTEND: "attend",
    p.MERGE: "merge",
}
PRODUCTS = {
    (p.NORMED, p.PROJECTED): "q, k, v",
    (p.ATTENDED, p.RESIDUAL): "o",
    (p.GATES, p.RESIDUAL): "down",
    (p.NORMED, p.LOGITS): "head",
}
"""What a product is, by the buffers that it goes from and to."""


def name(op: COp) -> str:
    return KINDS.get(op.kind) or PRODUCTS.get((op.in_, op.out), f"kind {op.kind}")


def operations(step: Step) -> Sequence[COp]:
    """Those of a model's plan; none where plain torch runs it."""
    return step._plan.program._ops if isinstance(step, PlanStep) else []


def matrices(op: COp) -> list[CMatrix]:
    return list(op.w[: op.count])


def matrix_bytes(matrix: CMatrix) -> int:
    if matrix.type in FLOAT_BYTES:
        return int(matrix.rows * matrix.columns * FLOAT_BYTES[matrix.type])
    return int(library().pentad_packed_bytes(matrix.type, matrix.rows, matrix.columns))


def held_bytes(ops: Sequence[COp]) -> int:
    """What all matrices take in memory, one that is used twice once."""
    return sum({matrix.data: matrix_bytes(matrix) for op in ops for matrix in matrices(op)}.values())


def token_bytes(ops: Sequence[COp]) -> int:
    """Matrices that a step reads whole, whatever its tokens: all but the embedding."""
    return sum(matrix_bytes(matrix) for op in ops if op.kind != p.EMBED for matrix in matrices(op))


def bytes_read(op: COp, step: CStep) -> int:
    """By an operation, each byte counted once: weights, keys and values, and the rows that it goes from."""
    rows = step.wanted if op.flags & p.WANTED else step.rows
    if op.kind == p.MERGE:
        return 0  # what it reads is counted in parts of softmax, and small
    if op.kind == p.EMBED:
        return rows * matrix_bytes(op.w[0]) // op.w[0].rows
    total = (
        sum(map(matrix_bytes, matrices(op))) + rows * max(op.in_width, op.out_width if op.kind == p.ROTATE else 0) * 4
    )
    if op.kind == p.ATTEND:
        number = FLOAT_BYTES[step.cache_type]
        total += sum(last - first for first, last in _seen(op, step)) * op.kv_heads * step.padded_dim * 2 * number
    return int(total)


def multiply_adds(op: COp, step: CStep) -> int:
    """Of products and attention; the rest has few."""
    rows = step.wanted if op.flags & p.WANTED else step.rows
    if op.kind == p.ATTEND:
        pairs = 0
        for (first, last), queries in zip(_seen(op, step), _queries(step), strict=True):
            window = op.window or last
            pairs += sum(min(position + 1 - first, window) for position in range(last - queries, last))
        return int(2 * pairs * op.heads * op.head_dim)
    return 0 if op.kind == p.EMBED else sum(int(rows * m.rows * m.columns) for m in matrices(op))


def _ints(address: int, count: int) -> list[int]:
    return list((ctypes.c_int32 * count).from_address(address))


def _queries(step: CStep) -> list[int]:
    """Of each sequence."""
    starts = _ints(step.starts, step.sequences + 1)
    return [last - first for first, last in pairwise(starts)]


def _seen(op: COp, step: CStep) -> list[tuple[int, int]]:
    """The first and last keys that any of a sequence's queries sees, by position."""
    lengths = _ints(step.lengths, step.sequences)
    return [
        (max(0, length - queries + 1 - op.window) if op.window else 0, length)
        for length, queries in zip(lengths, _queries(step), strict=True)
    ]

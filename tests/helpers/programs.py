"""Small kernel programs, each of one matmul or one attention, for any instruction set and number of threads."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from pentad import kernels
from pentad.kernels import Buffer, CachePools, Program, Tokens, Weight
from pentad.weights.quantized import QuantizedTensor

needs_kernels = pytest.mark.skipif(not kernels.isas(), reason=f"there are no kernels: {kernels.reason()}")
every_isa = pytest.mark.parametrize("isa", list(kernels.isas()))

NO_POOLS = CachePools([torch.zeros(16, 1, 16)], [torch.zeros(16, 1, 16)], 16)


def program(threads: int = 2, **options: object) -> Program:
    """Make a program that doesn't use its cache."""
    return Program(**{"head_dim": 16, "kv_heads": 1, "layers": 1, "threads": threads, **options})  # type: ignore[arg-type]


def packed(weight: QuantizedTensor, bias: Tensor | None = None) -> Weight:
    return Weight.packed(weight.blocks, weight.type, (weight.shape[0], weight.shape[1]), bias)


def run_rows(made: Program, ids: Sequence[int], wanted: Sequence[int] | None = None) -> Tensor:
    """Run a step that looks up embedding rows by their ids."""
    work = [Tokens(ids, 0, 0, range(-(-len(ids) // 16)), torch.zeros(len(ids), 2, 8))]
    pages = max(1, -(-len(ids) // 16))
    pools = CachePools([torch.zeros(16 * pages, 1, 16)], [torch.zeros(16 * pages, 1, 16)], 16)
    return made.run(work, range(len(ids)) if wanted is None else wanted, pools)


def product(x_NK: Tensor, *weights: Weight, rows: Sequence[int] | None = None, **options: object) -> Tensor:
    """Multiply x, or its `rows`, by each weight and concatenate the products: float32 [N, outputs]."""
    made = program(**options)  # type: ignore[arg-type]
    made.embed(Weight.floats(x_NK.contiguous()))
    if any(weight.is_quantized for weight in weights):
        made.quantize(Buffer.RESIDUAL)
    made.matmul(weights, Buffer.RESIDUAL, Buffer.LOGITS)
    return run_rows(made, range(len(x_NK)) if rows is None else rows)


def attended(
    projected_NW: Tensor,
    work: Sequence[Tokens],
    pools: CachePools,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    window: int | None = None,
    threads: int = 2,
    isa: str | None = None,
) -> Tensor:
    """Attention over projected queries, keys and values: float32 [N, heads * head_dim]. A token's id is its row."""
    made = Program(head_dim=head_dim, kv_heads=kv_heads, layers=1, threads=threads, isa=isa)
    made.embed(Weight.floats(projected_NW.contiguous()), Buffer.PROJECTED)
    made.attention(0, heads, window=window)
    made.matmul([Weight.floats(torch.eye(heads * head_dim))], Buffer.ATTENDED, Buffer.LOGITS)
    return made.run(work, range(sum(len(tokens.ids) for tokens in work)), pools)

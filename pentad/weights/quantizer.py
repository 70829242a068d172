"""Quantize numbers to ggml's blocks: q4_k here, the simpler types by ggml's Python package, which can't write q4_k."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pentad.errors import BadInput

QUANTIZED = ("q4_0", "q4_1", "q4_k", "q5_0", "q5_1", "q8_0")
"""The types of `pentad.weights.quantized.BLOCKS` that pentad can quantize to."""

SLAB = 1 << 17  # numbers that a thread quantizes at a time: as float32 they fit in a CPU's cache
ROUNDINGS = 21  # scales that q4_k tries for each group

Array = np.ndarray[Any, np.dtype[Any]]


def quantize(value: Tensor, type: str) -> Tensor:
    """Quantize rows of whole blocks, with as many threads as torch uses.

    Args:
        value: finite numbers [*, columns].
        type: one of `QUANTIZED`.

    Returns:
        uint8 [*, bytes a row].

    Raises:
        BadInput: pentad can't quantize to the type.
    """
    if type not in QUANTIZED:
        raise BadInput(f"pentad quantizes to {', '.join(QUANTIZED)}, not to {type}")
    rows = value.reshape(-1, value.shape[-1])
    slabs = rows.split(max(1, SLAB // rows.shape[1]))  # type: ignore[no-untyped-call]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # NumPy runs in one thread, and without the GIL
        parts = list(pool.map(lambda slab: _quantize(slab.float().cpu().numpy(), type), slabs))
    return torch.from_numpy(np.concatenate(parts)).view(*value.shape[:-1], -1)


def _quantize(x: Array, type: str) -> Array:
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    with np.errstate(all="ignore"):  # groups of equal numbers are divided by their span, 0
        return _q4_k(x) if type == "q4_k" else quantize(x, GGMLQuantizationType[type.upper()])


def _q4_k(x: Array) -> Array:
    """float32 [rows, columns] -> uint8 [rows, bytes a row], as `quantize_row_q4_K_ref` in ggml-quants.c.

    A number is `scale * integer - minimum`. The scales and minimums of a block's 8 groups are 6-bit integers times one
    float16 of the block each; `pentad.weights.quantized` describes how they are packed.
    """
    groups = x.reshape(-1, 8, 32)
    fitted = np.stack(_fit(np.ascontiguousarray(groups.reshape(-1, 32).T))).reshape(2, -1, 8).transpose(1, 0, 2)
    largest = fitted.max(2, keepdims=True)
    levels = np.nan_to_num(np.rint(fitted * (63 / largest)), nan=0).clip(0, 63)
    halves = (largest / 63).astype(np.float16)
    scale, minimum = np.moveaxis(levels * halves.astype(np.float32), 1, 0)[..., None]
    integers = np.nan_to_num(np.rint((groups + minimum) / scale), nan=0).clip(0, 15).astype(np.uint8)
    first, last = np.split(levels.astype(np.uint8), 2, 2)
    blocks = (
        halves.view(np.uint8),
        first | last >> 4 << 6,
        last[:, :1] & 15 | last[:, 1:] << 4,
        integers[:, ::2] | integers[:, 1::2] << 4,
    )
    joined: Array = np.concatenate([part.reshape(len(groups), -1) for part in blocks], 1)
    return joined.reshape(len(x), -1)


def _fit(x: Array) -> tuple[Array, Array]:
    """The scales and minimums for integers 0 to 15 with the least weighted squared error; neither is negative.

    A group is rounded to integers 21 times, with the minimum found so far and another scale. Linear regression on the
    integers then gives the best scale and minimum (`make_qkx2_quants` in ggml-quants.c). Large numbers weigh more.

    Args:
        x: float32 [32, groups].

    Returns:
        float32 [groups] each.
    """
    weight = np.sqrt(np.square(x).mean(0)) + np.abs(x)
    weighted = weight * x
    sum_w, sum_x, sum_xx = weight.sum(0), weighted.sum(0), (weighted * x).sum(0)
    integers, product = np.empty_like(x), np.empty_like(x)

    def sums(low: Array, inverse: Array) -> tuple[Array, Array, Array]:
        """The weighted sums of the integers `(x - low) * inverse`, of their squares, and of their products with x."""
        np.multiply(np.subtract(x, low, out=integers), inverse, out=integers)
        np.rint(integers, out=integers).clip(0, 15, out=integers)
        sum_xl = np.multiply(weighted, integers, out=product).sum(0)
        sum_l = np.multiply(weight, integers, out=product).sum(0)
        return sum_l, np.multiply(product, integers, out=product).sum(0), sum_xl

    def error(scale: Array, low: Array, sum_l: Array, sum_ll: Array, sum_xl: Array) -> Any:
        cross = scale * low * sum_l - scale * sum_xl - low * sum_x
        return scale * scale * sum_ll + low * low * sum_w + 2 * cross + sum_xx

    highest, best_low = x.max(0), np.minimum(x.min(0), 0)
    best_scale = (highest - best_low) / 15
    best_error = error(best_scale, best_low, *sums(best_low, 1 / best_scale))
    for levels in np.linspace(14, 16, ROUNDINGS, dtype=np.float32):
        sum_l, sum_ll, sum_xl = sums(best_low, levels / (highest - best_low))
        determinant = sum_w * sum_ll - sum_l * sum_l
        low = (sum_ll * sum_x - sum_l * sum_xl) / determinant
        scale = np.where(low > 0, sum_xl / sum_ll, (sum_w * sum_xl - sum_x * sum_l) / determinant)
        low = np.minimum(low, 0)
        found = error(scale, low, sum_l, sum_ll, sum_xl)
        better = (determinant > 0) & (found < best_error)
        best_error = np.where(better, found, best_error)
        best_scale, best_low = np.where(better, scale, best_scale), np.where(better, low, best_low)
    return best_scale, -best_low

"""Attention among the cells of square images, or of their windows, with relative positions in two dimensions."""

import ctypes

import torch
from torch import Tensor

from pentad.kernels.binding import CGridOp, isas, library, limit


def supports(q_ND: Tensor, window: int, head_dim: int) -> bool:
    """True if a kernel supports these queries, and windows with `window` cells a side."""
    if q_ND.device.type != "cpu" or q_ND.dtype != torch.float32 or not isas():
        return False
    return window <= limit("MAX_GRID_SIDE") and head_dim <= limit("MAX_GRID_DIM") and not head_dim % limit("LANES")


def attend(
    q_ND: Tensor,
    k_ND: Tensor,
    v_ND: Tensor,
    rows_XD: Tensor,
    columns_XD: Tensor,
    k_padding: Tensor,
    v_padding: Tensor,
    *,
    side: int,
    window: int,
    isa: str | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(D) + q rows[dy] + q columns[dx]) v, for a query dy rows and dx columns after a key.

    Args:
        q_ND, k_ND, v_ND: float32 rows of images, cell by cell [images * side * side, heads * D].
        rows_XD, columns_XD: a vector for each difference from 1 - `window` to `window` - 1.
        k_padding, v_padding: a key and a value [1, heads * D] of cells outside of the image.
        side: rows and columns of cells of an image.
        window: those of a window; its cells see each other.
        isa: one of `isas()`; the fastest by default.

    Returns:
        Rows like `q_ND`.
    """
    lanes, (offsets, dim) = limit("LANES"), rows_XD.shape
    rows, width = q_ND.shape
    padded = -(-offsets // lanes) * lanes
    heads, images, tiles = width // dim, rows // side**2, window * -(-window // lanes)
    if offsets != 2 * window - 1 or columns_XD.shape != rows_XD.shape or width % dim or rows % side**2:
        raise ValueError(f"rows are {tuple(q_ND.shape)} and positions {tuple(rows_XD.shape)}; expected whole images")
    if {k_ND.shape, v_ND.shape} != {q_ND.shape} or not supports(q_ND, window, dim):
        raise ValueError("queries, keys and values differ, or no kernel supports them")
    positions = q_ND.new_zeros(2, dim, padded)
    for place, vectors_XD in zip(positions, (rows_XD, columns_XD), strict=True):
        place[:, :offsets] = vectors_XD.flip(0).T
    positions = positions.view(2, dim, -1, lanes).transpose(1, 2)
    floats = 2 * images * (-(-side // window)) ** 2 * heads * tiles * lanes * dim
    packed, out_ND = q_ND.new_empty(floats), q_ND.new_empty(rows, width)
    given = {"q": q_ND, "k": k_ND, "v": v_ND, "k_padding": k_padding, "v_padding": v_padding, "positions": positions}
    held = {name: tensor.contiguous() for name, tensor in given.items()} | {"out": out_ND, "packed": packed}
    op = CGridOp(images, side, window, heads, dim, padded, dim**-0.5)
    for name, tensor in held.items():
        setattr(op, name, tensor.data_ptr())
    library().pentad_attend_grid(ctypes.byref(op), isas()[isa or next(iter(isas()))], torch.get_num_threads())
    return out_ND

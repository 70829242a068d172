"""Images as rows: patches, and the positions of a grid of patches.

Legend: B images of C channels, H by W pixels; P patches an image; Q = C * side^2 numbers a patch; D width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Tokens(nn.Module):
    """Rows [1, N, D] of the network itself, under the name ``weight``: class and mask tokens, positions.

    Args:
        count, dim: N and D.
        learned: a parameter; else a buffer, which checkpoints store all the same.
    """

    weight: Tensor

    def __init__(self, count: int, dim: int, *, learned: bool = True) -> None:
        super().__init__()
        rows = torch.zeros(1, count, dim)
        if learned:
            self.weight = nn.Parameter(rows)
        else:
            self.register_buffer("weight", rows)


def patchify(images_BCHW: Tensor, side: int) -> Tensor:
    """Square patches, row by row: [B, P, Q] with the numbers of a patch ordered as in a convolution's weight
    (channel, row, column)."""
    channels, height, width = images_BCHW.shape[1:]
    rows, columns = height // side, width // side
    images_BCHW = images_BCHW[:, :, : rows * side, : columns * side]
    split = images_BCHW.reshape(-1, channels, rows, side, columns, side)
    return split.permute(0, 2, 4, 1, 3, 5).reshape(len(images_BCHW), rows * columns, channels * side**2)


def unpatchify(patches_BPQ: Tensor, side: int, rows: int) -> Tensor:
    """The inverse of `patchify`, for a grid with this number of rows."""
    batch, count, numbers = patches_BPQ.shape
    grid = patches_BPQ.reshape(batch, rows, count // rows, numbers // side**2, side, side)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, rows * side, count // rows * side)


def embed_patches(patches_BPQ: Tensor, convolution: nn.Conv2d) -> Tensor:
    """What a convolution whose stride is its kernel gives for each patch: [B, P, D]."""
    return F.linear(patches_BPQ, convolution.weight.flatten(1), convolution.bias)


def resized_positions(positions_1ND: Tensor, rows: int, columns: int) -> Tensor:
    """Positions of a square grid, after the class token's, resized to another grid by bicubic interpolation as in
    transformers' ``interpolate_pos_encoding``."""
    side = math.isqrt(positions_1ND.shape[1] - 1)
    if (rows, columns) == (side, side):
        return positions_1ND
    grid = positions_1ND[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)  # type: ignore[no-untyped-call]
    grid = F.interpolate(grid.float(), size=(rows, columns), mode="bicubic").to(positions_1ND.dtype)
    return torch.cat([positions_1ND[:, :1], grid.flatten(2).transpose(1, 2)], 1)


def sin_cos_positions(side: int, dim: int) -> Tensor:
    """MAE's fixed positions of a square grid, after zeros for the class token: float32 [1, side^2 + 1, dim].

    Half of a row encodes the column, half the row: sines, then cosines of dim / 4 frequencies (models_mae.py).
    """
    frequencies = 1.0 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    encoded = torch.cat([angles.sin(), angles.cos()], 1)
    grid = torch.cat([encoded.repeat(side, 1), encoded.repeat_interleave(side, 0)], 1)
    return torch.cat([torch.zeros(1, dim), grid.float()])[None]

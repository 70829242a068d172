"""Square crops of objects, as an encoder of whole images sees them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def object_crop(
    image_3HW: Tensor, mask_HW: Tensor, box: Sequence[float], factor: float, side: int
) -> tuple[Tensor, Tensor]:
    """The square around an object, resized; what is beyond the image is black.

    Args:
        image_3HW: float, from 0 to 255.
        mask_HW: the object's, bool.
        box: around the object: x0, y0, x1, y1.
        factor: the square's side, by the longer side of the box.
        side: of the crop, S.

    Returns:
        The crop [3, S, S], and the mask in it [S, S].
    """
    x0, y0, x1, y1 = box
    size = max(1, round(max(x1 - x0, y1 - y0) * factor))
    left, top = math.floor((x0 + x1 - size) / 2 + 0.5), math.floor((y0 + y1 - size) / 2 + 0.5)
    height, width = mask_HW.shape
    both = torch.cat((image_3HW, mask_HW[None] * 255.0))
    square = F.pad(both, (-left, left + size - width, -top, top + size - height))  # cuts where it is below zero
    resized = F.interpolate(square[None], (side, side), mode="bicubic", antialias=True)[0].clamp(0, 255)
    return resized[:3], resized[3] > 127.5

"""Batches of images with objects."""

from typing import NamedTuple

from torch import Tensor


class ObjectBatch(NamedTuple):
    """B images of one size, as the network expects them.

    Attributes:
        images_BCHW: float32.
        boxes: each image's objects, float32 [M, 4]: x0, y0, x1, y1 in pixels of `images_BCHW`.
        labels: their classes, int64 [M].
        examples: the numbers of the images in the data set.
    """

    images_BCHW: Tensor
    boxes: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]
    examples: tuple[int, ...] = ()

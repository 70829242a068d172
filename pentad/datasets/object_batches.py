"""Batches of images with objects."""

from typing import NamedTuple

from torch import Tensor


class ObjectBatch(NamedTuple):
    """B images as the network expects them.

    Attributes:
        images_BCHW: float32, padded to one size at the right and the bottom.
        boxes: each image's objects, float32 [M, 4]: x0, y0, x1, y1 in pixels of `images_BCHW`.
        labels: their classes, int64 [M].
        examples: the numbers of the images in the data set.
        sizes: height and width of each image without padding.
        masks: each image's masks, bool [M, H, W] without padding; None for a detector that learns boxes only.
    """

    images_BCHW: Tensor
    boxes: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]
    examples: tuple[int, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    masks: tuple[Tensor, ...] | None = None

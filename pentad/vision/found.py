"""The objects of one image, as tensors."""

from typing import NamedTuple

from torch import Tensor

from pentad.vision.masks import RLE


class Found(NamedTuple):
    """The objects of one image, by falling score.

    Attributes:
        boxes_N4: x0, y0, x1, y1 in pixels of the image.
        scores_N: from 0 to 1.
        labels_N: numbers of the classes.
        masks: COCO's run-length codes; None if the detector finds boxes only.
    """

    boxes_N4: Tensor
    scores_N: Tensor
    labels_N: Tensor
    masks: list[RLE] | None = None

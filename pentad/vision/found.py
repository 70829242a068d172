"""The objects of one image, as tensors."""

from typing import NamedTuple

from torch import Tensor

from pentad.nn.boxes import batched_nms
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


def choose(boxes_N4: Tensor, scores_NK: Tensor, threshold: float, overlap: float) -> Found:
    """Each box with its best class, if the score is above `threshold`, after NMS among the boxes of a class.

    Args:
        boxes_N4, scores_NK: all boxes, and their scores for each class, on the CPU.
        threshold: of scores.
        overlap: the IoU above which the better box stays alone.
    """
    scores_N, labels_N = scores_NK.max(1)
    chosen = (scores_N > threshold).nonzero()[:, 0]
    boxes_N4, scores_N, labels_N = boxes_N4[chosen], scores_N[chosen], labels_N[chosen]
    kept = batched_nms(boxes_N4, scores_N, labels_N, overlap)
    return Found(boxes_N4[kept], scores_N[kept], labels_N[kept])

"""Boxes from YOLOX, with its own pre- and postprocessing."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pentad.models.vision.yolox import YOLOX, cells, decode
from pentad.vision.found import Found, choose
from pentad.vision.preprocess import yolox_letterbox

NMS = 0.65
"""Among boxes of one class, those that overlap a better one by more than this IoU are dropped; as published."""


def fit_objects(image_3HW: Tensor, boxes_N4: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The network's input of a size, made of a uint8 image, and boxes of the image in its pixels."""
    fitted = yolox_letterbox(image_3HW, height, width)
    return fitted.image, boxes_N4 * fitted.scale


class YOLOXPredictor:
    """Finds objects in images of any size; they are fitted into the size that the config asks for.

    Args:
        network: the network, in inference mode.
        letterbox: has no effect: YOLOX always keeps the aspect ratio.
    """

    def __init__(self, network: YOLOX, *, letterbox: bool = False) -> None:
        self.network = network

    @torch.inference_mode()
    def __call__(self, images: Sequence[Tensor], threshold: float) -> list[Found]:
        """Find the objects of uint8 images [3, H, W] whose scores are above a threshold."""
        first = next(self.network.parameters())
        height, width = self.network.config.test_size
        fitted = [yolox_letterbox(image, height, width) for image in images]
        out_BNO = self.network(torch.stack([one.image for one in fitted]).to(first.device, first.dtype)).float().cpu()
        boxes_BN4, scores_BNK = decode(out_BNO, cells(height, width)), out_BNO[..., 5:].sigmoid()
        scores_BNK *= out_BNO[..., 4:5].sigmoid()
        found = []
        for one, boxes_N4, scores_NK in zip(fitted, boxes_BN4, scores_BNK, strict=True):
            best = choose(boxes_N4, scores_NK, threshold, NMS)
            found.append(best._replace(boxes_N4=best.boxes_N4 / one.scale))
        return found

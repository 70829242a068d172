"""Boxes from the networks of Darknet's .cfg files: pre- and postprocessing as in OpenCV's reader or in Darknet."""

import threading
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pentad.models.vision.darknet import Darknet
from pentad.vision.darknet_plan import DarknetPlan
from pentad.vision.found import Found, choose
from pentad.vision.preprocess import resize_opencv

NMS = 0.45
"""Among boxes of one class, those that overlap a better one by more than this IoU are dropped; Darknet's default."""


def fit_objects(image_3HW: Tensor, boxes_N4: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The network's input of a size, made of a uint8 image, and boxes of the image in its pixels."""
    stretch = boxes_N4.new_tensor((width / image_3HW.shape[2], height / image_3HW.shape[1]) * 2)
    return _stretched(image_3HW, height, width), boxes_N4 * stretch


class DarknetPredictor:
    """Finds objects in images of any size; they are resized to the size that the .cfg file asks for.

    Args:
        network: the network, in inference mode.
        letterbox: keep the aspect ratio and fill the rest with gray, as Darknet does. By default images are stretched,
            as by OpenCV's users.
    """

    def __init__(self, network: Darknet, *, letterbox: bool = False) -> None:
        self.network, self.letterbox = network, letterbox
        self._plan: DarknetPlan | None = None
        self._one_at_a_time = threading.Lock()  # a plan has one memory

    @torch.inference_mode()
    def __call__(self, images: Sequence[Tensor], threshold: float) -> list[Found]:
        """Find the objects of uint8 images [3, H, W] whose scores are above a threshold."""
        first = next(self.network.parameters())
        _, height, width = self.network.cfg.shape
        resize = _letterboxed if self.letterbox else _stretched
        batch = torch.stack([resize(image, height, width) for image in images]).to(first.device, first.dtype)
        with self._one_at_a_time:
            predictions = self.network.decode(self._outputs(batch))
        found = []
        for image, boxes_N4, scores_NK in zip(images, predictions.boxes_BN4, predictions.scores_BNK, strict=True):
            boxes_N4 = self._to_pixels(boxes_N4.cpu(), image.shape[1], image.shape[2])
            found.append(choose(boxes_N4, scores_NK.cpu(), threshold, NMS))
        return found

    def _outputs(self, batch_BCHW: Tensor) -> list[Tensor]:
        """The inputs of the detection layers: by the CPU kernels if they have all layers, else by torch."""
        if not DarknetPlan.supports(self.network):
            return self.network.outputs(batch_BCHW.contiguous(memory_format=torch.channels_last))
        if self._plan is None or not self._plan.fits(batch_BCHW):
            self._plan = DarknetPlan(self.network, len(batch_BCHW), torch.get_num_threads())
        return self._plan.run(batch_BCHW)

    def _to_pixels(self, boxes_N4: Tensor, height: int, width: int) -> Tensor:
        """Boxes in pixels of the image, from shares of what the network has seen."""
        if self.letterbox:
            _, net_height, net_width = self.network.cfg.shape
            inner = _fitted(height, width, net_height, net_width)
            share = boxes_N4.new_tensor((inner[1] / net_width, inner[0] / net_height) * 2)
            boxes_N4 = (boxes_N4 - (1 - share) / 2) / share
        return boxes_N4 * boxes_N4.new_tensor((width, height, width, height))


def _stretched(image_3HW: Tensor, height: int, width: int) -> Tensor:
    """Resize as OpenCV does."""
    return resize_opencv(image_3HW, height, width).float() / 255


def _letterboxed(image_3HW: Tensor, height: int, width: int) -> Tensor:
    """Resize as Darknet does: bilinear between corners, without antialiasing, on gray."""
    inner = _fitted(image_3HW.shape[1], image_3HW.shape[2], height, width)
    resized = F.interpolate(image_3HW[None] / 255, inner, mode="bilinear", align_corners=True)[0]
    canvas = resized.new_full((3, height, width), 0.5)
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    canvas[:, top : top + inner[0], left : left + inner[1]] = resized
    return canvas


def _fitted(height: int, width: int, net_height: int, net_width: int) -> tuple[int, int]:
    """The largest size of the image's aspect ratio that the network's input has room for."""
    if net_width * height < net_height * width:
        return max(1, height * net_width // width), net_width
    return net_height, max(1, width * net_height // height)

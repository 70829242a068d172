"""Boxes and masks from Faster R-CNN and Mask R-CNN, with torchvision's pre- and postprocessing."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pentad.models.vision.config import Preprocessing
from pentad.models.vision.mask_rcnn import MaskRCNN
from pentad.vision import masks
from pentad.vision.found import Found
from pentad.vision.masks import paste_masks
from pentad.vision.preprocess import fit_sides, pad_batch

DIVISOR = 32


def fit_objects(image_3HW: Tensor, boxes_N4: Tensor, shorter: int, longer: int) -> tuple[Tensor, Tensor]:
    """The network's input made of a uint8 image, and boxes of the image in its pixels; see `fit_sides`."""
    fitted = fit_sides(normalized(image_3HW.float() / 255), shorter, longer)
    stretch = boxes_N4.new_tensor((fitted.shape[2] / image_3HW.shape[2], fitted.shape[1] / image_3HW.shape[1]) * 2)
    return fitted, boxes_N4 * stretch


class MaskRCNNPredictor:
    """Finds objects in images of any size; they are resized as the config asks for.

    Args:
        network: the network, in inference mode.
        letterbox: has no effect: the aspect ratio is always kept.
    """

    def __init__(self, network: MaskRCNN, *, letterbox: bool = False) -> None:
        self.network = network

    @torch.inference_mode()
    def __call__(self, images: Sequence[Tensor], threshold: float) -> list[Found]:
        """Find the objects of uint8 images [3, H, W] whose scores are above a threshold."""
        first, config = next(self.network.parameters()), self.network.config
        fitted = [fit_sides(normalized(image.float() / 255), config.min_size, config.max_size) for image in images]
        padded_B3HW, sizes = pad_batch(fitted, DIVISOR)
        found = []
        padded_B3HW = padded_B3HW.to(first.device, first.dtype)
        for image, size, one in zip(images, sizes, self.network(padded_B3HW, sizes, threshold), strict=True):
            height, width = image.shape[1:]
            scale = torch.tensor([width / size[1], height / size[0]] * 2)
            boxes_N4 = one.boxes_N4.float().cpu() * scale
            codes = None
            if one.masks_NMM is not None:
                pasted = (
                    paste_masks(mask_MM[None].float().cpu(), box_4[None], height, width)[0]
                    for mask_MM, box_4 in zip(one.masks_NMM, boxes_N4, strict=True)
                )
                codes = [masks.encode(mask_HW) for mask_HW in pasted]
            found.append(Found(boxes_N4, one.scores_N.float().cpu(), one.labels_N.cpu(), codes))
        return found


def normalized(image_3HW: Tensor) -> Tensor:
    """Pixels from 0 to 1, by ImageNet's mean and standard deviation."""
    mean, std = (image_3HW.new_tensor(values).view(3, 1, 1) for values in (Preprocessing.mean, Preprocessing.std))
    return (image_3HW - mean) / std

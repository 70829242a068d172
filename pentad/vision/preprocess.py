"""Resizing as each model's own code does it, rounding included. Images are uint8 [3, H, W], red, green, blue."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "Letterbox",
    "center_crop",
    "fit_sides",
    "pad_batch",
    "resize_masks",
    "resize_opencv",
    "resize_pillow",
    "yolox_letterbox",
]

YOLOX_GRAY = 114
_CACHED = 32_768  # numbers, of which temporary arrays stay in the second-level cache


class Letterbox(NamedTuple):
    """A picture inside of a larger one.

    Attributes:
        image: the larger picture.
        scale: the inner picture's size by the original's.
    """

    image: Tensor
    scale: float


def resize_opencv(image_3HW: Tensor, height: int, width: int) -> Tensor:
    """`cv2.resize` with INTER_LINEAR, bit for bit: no antialiasing, weights of 11 bits, sums rounded in two steps."""
    if image_3HW.shape[1:] == (height, width):
        return image_3HW
    rows, columns = image_3HW.shape[1:]
    # NumPy runs on this thread alone: many short operations would wait for each other's threads.
    pixels_HR = image_3HW.permute(1, 2, 0).reshape(rows, 3 * columns).numpy()
    below, share_y = _neighbors(rows, height)
    left, share_x = _neighbors(columns, width)
    share_x = np.where((left < 0) | (left >= columns - 1), 0, share_x)  # past the border OpenCV has one column only
    left = left.clip(0, columns - 1)
    sides = [
        ((3 * column[:, None] + np.arange(3)).ravel(), _fixed_point(share).repeat(3))
        for column, share in ((left, 1 - share_x), ((left + 1).clip(max=columns - 1), share_x))
    ]
    resized = np.empty((height, 3 * width), np.uint8)
    step = max(1, _CACHED // (3 * width))
    for start in range(0, height, step):
        part = slice(start, start + step)
        total = 2
        for row, share in ((below[part], 1 - share_y[part]), (below[part] + 1, share_y[part])):
            line = pixels_HR[row.clip(0, rows - 1)]
            first, second = (line.take(index, 1) * weight for index, weight in sides)
            first += second
            first >>= 4
            first *= _fixed_point(share)[:, None]
            first >>= 16
            total += first
        resized[part] = total >> 2
    return torch.from_numpy(resized.reshape(height, width, 3)).permute(2, 0, 1)


def _neighbors(length: int, resized: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The pixel before each resized pixel's center, and the next one's share, in single precision as OpenCV."""
    at = ((np.arange(resized) + 0.5) * (length / resized) - 0.5).astype(np.float32)
    before = np.floor(at)
    return before.astype(np.int64), at - before


def _fixed_point(share: NDArray[np.float32]) -> NDArray[np.int32]:
    return np.rint(share * 2048).astype(np.int32)


def yolox_letterbox(image_3HW: Tensor, height: int, width: int) -> Letterbox:
    """Resize into the top left corner of a gray picture, as YOLOX does; blue, green, red as it expects, 0 to 255.

    Returns:
        float32 [3, height, width], and the scale.
    """
    scale = min(height / image_3HW.shape[1], width / image_3HW.shape[2])
    inner = [max(1, int(side * scale)) for side in image_3HW.shape[1:]]
    padded = torch.full((3, height, width), float(YOLOX_GRAY))
    padded[:, : inner[0], : inner[1]] = resize_opencv(image_3HW, *inner).flip(0)
    return Letterbox(padded, scale)


def fit_sides(image_CHW: Tensor, shorter: int, longer: int) -> Tensor:
    """Resize float pixels so that the shorter side has a length, unless the other would be too long.

    As torchvision's detectors do it: bilinear, no antialiasing, sizes rounded down.
    """
    scale = min(shorter / min(image_CHW.shape[1:]), longer / max(image_CHW.shape[1:]))
    size = [max(1, int(side * scale)) for side in image_CHW.shape[1:]]
    return F.interpolate(image_CHW[None], size, mode="bilinear", align_corners=False)[0]


def pad_batch(images: Sequence[Tensor], divisor: int = 1) -> tuple[Tensor, list[tuple[int, int]]]:
    """Images in one tensor, padded with zeros at the right and the bottom to a multiple; and their sizes."""
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    height, width = (-(-max(side) // divisor) * divisor for side in zip(*sizes, strict=True))
    padded = [
        F.pad(image, (0, width - size[1], 0, height - size[0])) for image, size in zip(images, sizes, strict=True)
    ]
    return torch.stack(padded), sizes


def resize_masks(masks_NHW: Tensor, height: int, width: int) -> Tensor:
    """Resize bool masks: a pixel is in a mask if most of it is."""
    if masks_NHW.shape[1:] == (height, width):
        return masks_NHW
    if not len(masks_NHW):
        return masks_NHW.new_zeros(0, height, width)
    return F.interpolate(masks_NHW[None].float(), (height, width), mode="bilinear", align_corners=False)[0] > 0.5


def resize_pillow(image_3HW: Tensor, size: int | tuple[int, int], *, bicubic: bool = False) -> Tensor:
    """Pillow's antialiased resize, as the image processors of ViT and its kin.

    Args:
        image_3HW: uint8.
        size: height and width; a single number is the shorter side, and the longer one keeps the aspect ratio.
        bicubic: bilinear otherwise.
    """
    from PIL import Image

    from pentad.media.images import from_pil, to_pil

    if isinstance(size, int):
        shorter, longer = sorted(image_3HW.shape[1:])
        resized = size, int(size * longer / shorter)
        size = resized if image_3HW.shape[1] == shorter else (resized[1], resized[0])
    method = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    return from_pil(to_pil(image_3HW).resize((size[1], size[0]), method))


def center_crop(image_CHW: Tensor, height: int, width: int) -> Tensor:
    """Cut the middle; where the image is smaller, it is padded with zeros."""
    missing = max(0, height - image_CHW.shape[1]), max(0, width - image_CHW.shape[2])
    if any(missing):
        top, left = ((side + 1) // 2 for side in missing)
        image_CHW = F.pad(image_CHW, (left, missing[1] - left, top, missing[0] - top))
    top, left = (image_CHW.shape[1] - height) // 2, (image_CHW.shape[2] - width) // 2
    return image_CHW[:, top : top + height, left : left + width]

"""Resizing as each model's own code does it, rounding included. Images are uint8 [3, H, W], red, green, blue."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Letterbox", "center_crop", "fit_sides", "resize_opencv", "resize_pillow", "yolox_letterbox"]

YOLOX_GRAY = 114


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
    pixels_HR = image_3HW.permute(1, 2, 0).reshape(rows, 3 * columns)
    below, share_y = _neighbors(rows, height)
    left, share_x = _neighbors(columns, width)
    share_x = torch.where((left < 0) | (left >= columns - 1), 0, share_x)  # past the border OpenCV has one column only
    left = left.clamp(0, columns - 1)
    sides = []
    for column, share in ((left, 1 - share_x), ((left + 1).clamp(max=columns - 1), share_x)):
        index = (3 * column[:, None] + torch.arange(3)).flatten()
        sides.append((index.numpy(), _fixed_point(share).repeat_interleave(3)))
    total = torch.full((height, 3 * width), 2, dtype=torch.int32)
    for row, share in ((below, 1 - share_y), (below + 1, share_y)):
        line = pixels_HR.index_select(0, row.clamp(0, rows - 1)).numpy()
        first, second = (torch.from_numpy(line.take(index, 1)).int().mul_(weight) for index, weight in sides)
        sums = first.add_(second).bitwise_right_shift_(4)
        total += sums.mul_(_fixed_point(share)[:, None]).bitwise_right_shift_(16)
    return total.bitwise_right_shift_(2).to(torch.uint8).view(height, width, 3).permute(2, 0, 1)


def _neighbors(length: int, resized: int) -> tuple[Tensor, Tensor]:
    """The pixel before each resized pixel's center, and the next one's share, in single precision as OpenCV."""
    at = ((torch.arange(resized, dtype=torch.float64) + 0.5) * (length / resized) - 0.5).float()
    before = at.floor()
    return before.long(), at - before


def _fixed_point(share: Tensor) -> Tensor:
    return (share * 2048).round().to(torch.int32)


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

"""Random changes of labeled images: mosaic, mixup, affine maps, mirrors and colors, as in YOLOX (arXiv:2107.08430).

Images are uint8 [3, H, W]; boxes are x0, y0, x1, y1 in pixels, and lie around their masks where there are masks.
"""

import math
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pentad.nn.boxes import box_area, clip_boxes, mask_boxes
from pentad.vision.preprocess import resize_masks, resize_opencv

GRAY = 114
LEAST_SEEN = 0.1
"""A box is dropped if less of its area is left, or if a side is at most a pixel."""
DEGREES, SHEAR, SHIFT = 10.0, 2.0, 0.1  # degrees, and the share of the size
HUE, SATURATION, VALUE = 5, 30, 30  # of Pillow's 0 to 255


class Labeled(NamedTuple):
    """An image and its objects: [3, H, W], [N, 4], [N], and bool [N, H, W] or None."""

    image: Tensor
    boxes: Tensor
    labels: Tensor
    masks: Tensor | None = None


def mosaic(parts: Sequence[Labeled], height: int, width: int, scale: tuple[float, float], random: Random) -> Labeled:
    """Four images around a point, then a random affine map of them.

    Args:
        parts: four images.
        height, width: of the result, which shows about half of the mosaic's sides.
        scale: the least and the largest factor of the objects' sizes.
        random: the source of randomness.
    """
    canvas = torch.full((3, 2 * height, 2 * width), GRAY, dtype=torch.uint8)
    x, y = (int(random.uniform(0.5, 1.5) * side) for side in (width, height))
    boxes, masks = [], []
    for number, part in enumerate(parts):
        factor = min(height / part.image.shape[1], width / part.image.shape[2])
        rows, columns = (max(1, int(side * factor)) for side in part.image.shape[1:])
        left, top = x - columns if number % 2 == 0 else x, y - rows if number < 2 else y
        inside = slice(max(top, 0), min(top + rows, 2 * height)), slice(max(left, 0), min(left + columns, 2 * width))
        seen_y, seen_x = (slice(one.start - at, one.stop - at) for one, at in zip(inside, (top, left), strict=True))
        canvas[:, *inside] = resize_opencv(part.image, rows, columns)[:, seen_y, seen_x]
        if part.masks is not None:
            masks_NHW = torch.zeros(len(part.masks), 2 * height, 2 * width, dtype=torch.bool)
            masks_NHW[:, *inside] = resize_masks(part.masks, rows, columns)[:, seen_y, seen_x]
            masks.append(masks_NHW)
        stretch = torch.tensor((columns / part.image.shape[2], rows / part.image.shape[1]) * 2)
        boxes.append(part.boxes * stretch + torch.tensor((left, top) * 2, dtype=torch.float32))
    labels = torch.cat([part.labels for part in parts])
    whole = Labeled(canvas, torch.cat(boxes), labels, torch.cat(masks) if masks else None)
    return affine(_kept(whole, box_area(whole.boxes)), height, width, scale, random)


def affine(one: Labeled, height: int, width: int, scale: tuple[float, float], random: Random) -> Labeled:
    """A random rotation, scaling, shearing and shift about the centers of the image and of the result."""
    angle, factor = math.radians(random.uniform(-DEGREES, DEGREES)), random.uniform(*scale)
    shear = [math.tan(math.radians(random.uniform(-SHEAR, SHEAR))) for _ in range(2)]
    shift = [random.uniform(-SHIFT, SHIFT) * side for side in (width, height)]
    turn = factor * torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    map_22 = torch.tensor([[1, shear[0]], [shear[1], 1]]) @ turn
    old, new = torch.tensor([one.image.shape[2], one.image.shape[1]]) / 2, torch.tensor([width, height]) / 2
    offset = new + torch.tensor(shift) - map_22 @ old
    grid = _grid(one.image, map_22, offset, height, width)
    shifted = one.image[None].float().sub_(GRAY)  # so that zeros are gray
    image = F.grid_sample(shifted, grid, align_corners=False)[0].add_(GRAY).round_().to(torch.uint8)
    masks = one.masks
    if masks is not None:
        masks = F.grid_sample(masks[None].float(), grid, align_corners=False)[0] > 0.5
    areas_N = box_area(one.boxes) * abs(float(torch.linalg.det(map_22)))
    return _kept(Labeled(image, _mapped(one.boxes, map_22, offset), one.labels, masks), areas_N)


def mixup(one: Labeled, other: Labeled) -> Labeled:
    """The mean of two images of one size, with the objects of both."""
    image = one.image.float().add(other.image).div_(2).round_().to(torch.uint8)
    masks = None if one.masks is None or other.masks is None else torch.cat((one.masks, other.masks))
    return Labeled(image, torch.cat((one.boxes, other.boxes)), torch.cat((one.labels, other.labels)), masks)


def mirror(one: Labeled) -> Labeled:
    """Left becomes right."""
    x0, y0, x1, y1 = one.boxes.unbind(1)
    width = one.image.shape[2]
    masks = None if one.masks is None else one.masks.flip(2)
    return Labeled(one.image.flip(2), torch.stack((width - x1, y0, width - x0, y1), 1), one.labels, masks)


def recolor(one: Labeled, random: Random) -> Labeled:
    """Shift hue, saturation and brightness a little."""
    from PIL import Image

    from pentad.media.images import from_pil, to_pil

    shifts = [round(random.uniform(-most, most)) for most in (HUE, SATURATION, VALUE)]
    bands = to_pil(one.image).convert("HSV").split()
    tables = [[(v + shifts[0]) % 256 for v in range(256)]]
    tables += [[min(255, max(0, v + shift)) for v in range(256)] for shift in shifts[1:]]
    moved = [band.point(table) for band, table in zip(bands, tables, strict=True)]
    return one._replace(image=from_pil(Image.merge("HSV", moved).convert("RGB")))


def _grid(image_3HW: Tensor, map_22: Tensor, offset_2: Tensor, height: int, width: int) -> Tensor:
    """Where each pixel under ``x -> map x + offset`` comes from, for `grid_sample`."""
    inverse = torch.linalg.inv(map_22)
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    at = (torch.stack((columns, rows), -1) - offset_2) @ inverse.T
    grid: Tensor = at / torch.tensor([image_3HW.shape[2], image_3HW.shape[1]]) * 2 - 1
    return grid[None]


def _mapped(boxes_N4: Tensor, map_22: Tensor, offset_2: Tensor) -> Tensor:
    """The boxes around the images of the boxes' corners."""
    corners_N42 = boxes_N4[:, [0, 1, 2, 1, 2, 3, 0, 3]].view(-1, 4, 2) @ map_22.T + offset_2
    return torch.cat((corners_N42.amin(1), corners_N42.amax(1)), 1)


def _kept(one: Labeled, areas_N: Tensor) -> Labeled:
    """The objects of which enough of an area is inside of the image."""
    boxes_N4 = one.boxes if one.masks is None else mask_boxes(one.masks)
    inside_N4 = clip_boxes(boxes_N4, one.image.shape[1], one.image.shape[2])
    sides_N2 = inside_N4[:, 2:] - inside_N4[:, :2]
    kept = (sides_N2 > 1).all(1) & (sides_N2.prod(1) > LEAST_SEEN * areas_N)
    return Labeled(one.image, inside_N4[kept], one.labels[kept], None if one.masks is None else one.masks[kept])

"""Boxes, labels and masks on a picture, legible at any size."""

import colorsys
from collections.abc import Iterable, Sequence

import torch
from PIL import ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from pentad.media.images import from_pil, to_pil

__all__ = ["color", "draw_detections", "draw_masks"]

Rectangle = tuple[float, float, float, float]

_GOLDEN = 0.618033988749895  # steps of the golden ratio keep any number of hues apart


def draw_detections(
    image_3HW: Tensor,
    boxes_N4: Tensor,
    captions: Sequence[str],
    *,
    label_ids: Sequence[int] | None = None,
    masks_NHW: Tensor | None = None,
) -> Tensor:
    """Draw boxes with their captions, and masks that the picture shines through.

    Lines and letters grow with the picture. A caption stands where it fits and hides no other, never outside of the
    picture; one that is wider than the picture is cut.

    Args:
        image_3HW: uint8 [3, H, W].
        boxes_N4: x0, y0, x1, y1 in pixels, the most important first: it is drawn last.
        captions: N texts, such as "dog 0.93".
        label_ids: N numbers; equal ones have equal colors. By default each box has its own.
        masks_NHW: bool [N, H, W].

    Returns:
        uint8 [3, H, W], a new picture.
    """
    count, (height, width) = len(boxes_N4), image_3HW.shape[1:]
    colors = [color(index) for index in (label_ids if label_ids is not None else range(count))]
    if masks_NHW is not None:
        image_3HW = _blend(image_3HW, masks_NHW, colors)
    picture = to_pil(image_3HW)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(max(9.0, min(0.028 * max(height, width), 0.06 * min(height, width))))
    line = max(1, round(font.size / 7)) if isinstance(font, ImageFont.FreeTypeFont) else 1
    shown = [_clip(box, width, height) for box in boxes_N4.tolist()]
    for box, fill in reversed(list(zip(shown, colors, strict=True))):
        draw.rectangle(box, outline=fill, width=line)
    taken = list[Rectangle]()
    for box, fill, caption in zip(shown, colors, captions, strict=True):
        _write(draw, font, caption, box, fill, taken)
    return from_pil(picture)


def draw_masks(
    image_3HW: Tensor,
    masks: Iterable[Tensor],
    *,
    points_N2: Sequence[Sequence[float]] = (),
    labels_N: Sequence[int] = (),
    boxes_N4: Sequence[Sequence[float]] = (),
) -> Tensor:
    """Draw masks that the picture shines through, and the prompts that asked for them.

    Args:
        image_3HW: uint8 [3, H, W].
        masks: bool [H, W] each; the first one is drawn last.
        points_N2, labels_N: dots, green for the label 1 and red for 0.
        boxes_N4: white rectangles.

    Returns:
        uint8 [3, H, W], a new picture.
    """
    masks = list(masks)
    picture = to_pil(_blend(image_3HW, masks, [color(index) for index in range(len(masks))]))
    draw, radius = ImageDraw.Draw(picture), max(2.0, 0.008 * max(picture.size))
    for box in boxes_N4:
        draw.rectangle(_clip(box, *picture.size), outline="white", width=max(1, round(radius / 3)))
    for (x, y), label in zip(points_N2, labels_N, strict=True):
        inside = "lime" if label else "red"
        draw.circle((x, y), radius, fill=inside, outline="white", width=max(1, round(radius / 4)))
    return from_pil(picture)


def color(index: int) -> tuple[int, int, int]:
    """The color of a label, the same in every picture."""
    hue, ring = (0.02 + index * _GOLDEN) % 1, index % 3
    red, green, blue = colorsys.hsv_to_rgb(hue, (0.85, 0.65, 1.0)[ring], (1.0, 0.95, 0.75)[ring])
    return round(255 * red), round(255 * green), round(255 * blue)


def _clip(box: Sequence[float], width: int, height: int) -> Rectangle:
    x0, x1 = sorted((min(max(box[0], 0), width - 1), min(max(box[2], 0), width - 1)))
    y0, y1 = sorted((min(max(box[1], 0), height - 1), min(max(box[3], 0), height - 1)))
    return x0, y0, x1, y1


def _blend(image_3HW: Tensor, masks_NHW: Tensor | Sequence[Tensor], colors: Sequence[tuple[int, int, int]]) -> Tensor:
    """Color the masks' pixels by half, and their outlines fully."""
    blended = image_3HW.float()
    for mask_HW, rgb in reversed(list(zip(masks_NHW, colors, strict=True))):
        rows, columns = (mask_HW.any(axis).nonzero()[:, 0] for axis in (1, 0))
        if not len(rows):
            continue
        part = tuple(slice(max(0, int(at[0]) - 1), int(at[-1]) + 2) for at in (rows, columns))
        mask_hw, under = mask_HW[part], blended[:, *part]
        edge_hw = mask_hw & (F.max_pool2d(1 - mask_hw.float()[None, None], 3, 1, 1)[0, 0] > 0)
        fill_311 = torch.tensor(rgb, dtype=torch.float32)[:, None, None]
        blended[:, *part] = torch.lerp(under, fill_311.expand_as(under), 0.45 * mask_hw + 0.55 * edge_hw)
    return blended.round().to(torch.uint8)


def _write(
    draw: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    caption: str,
    box: Rectangle,
    fill: tuple[int, int, int],
    taken: list[Rectangle],
) -> None:
    """Write a caption on its color at the first place that no other caption covers: above, inside or below its box."""
    width, height = draw.im.size
    margin = 2
    while caption and draw.textlength(caption, font) + 2 * margin > width:
        caption = caption.rstrip("…")[:-1] + ("…" if len(caption) > 2 else "")
    if not caption:
        return
    text_width = draw.textlength(caption, font)
    _, top, _, bottom = draw.textbbox((0, 0), "Ágß", font)
    size_x, size_y = text_width + 2 * margin, bottom - top + 2 * margin
    x0, y0, x1, y1 = box
    corners = [(x0, y0 - size_y), (x0, y0), (x0, y1), (x1 - size_x, y0 - size_y), (x1 - size_x, y0), (x0, y1 - size_y)]
    places = [_inside(x, y, size_x, size_y, width, height) for x, y in corners]
    fitting = [place for place, (x, y) in zip(places, corners, strict=True) if place[1] == y] or places
    place = next((p for p in fitting if not any(_overlap(p, other) for other in taken)), fitting[0])
    taken.append(place)
    draw.rectangle(place, fill=fill)
    bright = 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2] > 140
    draw.text((place[0] + margin, place[1] + margin - top), caption, fill="black" if bright else "white", font=font)


def _inside(x: float, y: float, size_x: float, size_y: float, width: int, height: int) -> Rectangle:
    x, y = max(0.0, min(x, width - 1 - size_x)), max(0.0, min(y, height - 1 - size_y))
    return x, y, x + size_x, y + size_y


def _overlap(one: Rectangle, other: Rectangle) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]

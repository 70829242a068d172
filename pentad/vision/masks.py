"""Masks of objects: pasted into their image, as COCO's run-length codes, and as polygons.

A run-length code (RLE) is COCO's: ``{"size": [height, width], "counts": …}``. Counts are the lengths of runs of zeros
and ones by turns, down the first column, then the next; as a list ("uncompressed"), or as a string of characters.
"""

from collections.abc import Iterable, Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from pentad.errors import BadInput

__all__ = [
    "RLE",
    "decode",
    "encode",
    "fill_polygons",
    "from_polygons",
    "paste_masks",
    "rle_area",
    "rle_box",
    "rle_counts",
    "to_polygons",
    "to_text",
]

MAX_MASK_PIXELS = 89_478_485  # as for images
_CHARACTERS = 9  # of a number in a code
_UPSAMPLED = 5  # COCO draws polygons on a grid so much finer than pixels


class RLE(TypedDict):
    """COCO's run-length code of a mask, as JSON has it."""

    size: list[int]
    counts: str | list[int]


def encode(mask_HW: Tensor, left: int = 0, width: int | None = None) -> RLE:
    """The compressed code of a bool mask [H, W].

    Args:
        mask_HW: all columns of an image, or some.
        left: the first one.
        width: the image's; there is nothing in the columns that aren't given.
    """
    height, columns = mask_HW.shape
    width = columns if width is None else width
    flat, start = mask_HW.cpu().numpy().ravel(order="F"), left * height
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1 + start
    first, last = [start] * bool(flat[:1].any()), [start + flat.size] * bool(flat[-1:].any() and left + columns < width)
    ends = np.concatenate((first, changes, last, [height * width])).astype(np.int64)
    return {"size": [height, width], "counts": to_text(np.diff(ends, prepend=0))}


def decode(rle: RLE | dict[str, Any]) -> Tensor:
    """The bool mask [H, W] of a code of either kind.

    Raises:
        BadInput: the code is malformed, or doesn't have as many pixels as its size.
    """
    counts, (height, width) = rle_counts(rle), rle["size"]
    flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return torch.from_numpy(flat.reshape(height, width, order="F"))


def rle_counts(rle: RLE | dict[str, Any]) -> list[int]:
    """The runs of a code of either kind, checked."""
    size, counts = rle.get("size"), rle.get("counts")
    if not (isinstance(size, list | tuple) and len(size) == 2 and all(type(n) is int and n >= 0 for n in size)):
        raise BadInput(f"an RLE's size is {size!r}; expected [height, width]")
    if size[0] * size[1] > MAX_MASK_PIXELS:
        raise BadInput(f"an RLE's size is {size}; expected at most {MAX_MASK_PIXELS:,} pixels")
    if isinstance(counts, str | bytes):
        counts = _from_text(counts)
    if not isinstance(counts, list) or not all(type(n) is int and n >= 0 for n in counts):
        raise BadInput("an RLE's counts are not whole numbers of at least 0")
    if sum(counts) != size[0] * size[1]:
        raise BadInput(f"an RLE has {sum(counts)} pixels; expected {size[0]} x {size[1]}")
    return counts


def to_text(counts: Sequence[int] | NDArray[np.int64]) -> str:
    """Write counts as COCO's string: differences to the count before the last, 5 bits a character."""
    values_N = np.array(counts, np.int64)
    values_N[3:] -= np.asarray(counts, np.int64)[1:-2]
    shifted_NK = values_N[:, None] >> np.arange(0, 5 * _CHARACTERS, 5)
    rest_NK, bits_NK = shifted_NK >> 5, shifted_NK & 31
    done_NK = rest_NK == -(bits_NK >> 4)  # what is left is the sign
    before_NK = np.cumsum(done_NK, 1) - done_NK
    characters_NK = 48 + bits_NK + 32 * ~done_NK
    return bytes(characters_NK[before_NK == 0].astype(np.uint8)).decode()


def _from_text(text: str | bytes) -> list[int]:
    bits = np.frombuffer(text.encode() if isinstance(text, str) else text, np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(bits & 32 == 0)
    starts = np.concatenate(([0], ends[:-1] + 1)).astype(np.int64)
    lengths = ends + 1 - starts[: len(ends)]
    if ((bits < 0) | (bits >= 64)).any() or (lengths > _CHARACTERS).any():
        raise BadInput("an RLE's counts are not a string that COCO's tools write")
    if len(bits) and bits[-1] & 32:
        raise BadInput("an RLE's counts end within a number")
    if not len(bits):
        return []
    shifts = 5 * (np.arange(len(bits)) - np.repeat(starts, lengths))
    values = np.add.reduceat((bits & 31) << shifts, starts) - ((bits[ends] & 16) << shifts[ends] + 1)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    counts: list[int] = values.tolist()
    return counts


def rle_area(rle: RLE | dict[str, Any]) -> int:
    """The number of the mask's pixels."""
    return sum(rle_counts(rle)[1::2])


def rle_box(rle: RLE | dict[str, Any]) -> tuple[float, float, float, float]:
    """The smallest x0, y0, x1, y1 around a mask, in whole pixels; zeros if it has none."""
    height = rle["size"][0]
    ends = np.cumsum(rle_counts(rle))
    start, last = ends[0::2][: len(ends) // 2], ends[1::2] - 1
    start, last = start[start <= last], last[start <= last]
    if not len(start):
        return 0.0, 0.0, 0.0, 0.0
    over = (start // height != last // height).any()  # a run over the end of a column has the image's full height
    top, bottom = (0, height - 1) if over else ((start % height).min(), (last % height).max())
    return float(start[0] // height), float(top), float(last[-1] // height + 1), float(bottom + 1)


def fill_polygons(polygons: Iterable[Sequence[float]], height: int, width: int) -> Tensor:
    """The mask [H, W] of the union of polygons ``[x0, y0, x1, y1, …]``, pixel for pixel as COCO's tools draw them."""
    flat = np.zeros(height * width, np.bool_)
    for polygon in polygons:
        ends = _fill(np.asarray(polygon, np.float64).reshape(-1, 2), height, width)
        flat |= np.repeat(np.arange(len(ends)) % 2 == 1, np.diff(ends, prepend=0))
    return torch.from_numpy(flat.reshape(height, width, order="F"))


def from_polygons(polygons: Iterable[Sequence[float]], height: int, width: int) -> RLE:
    """The code of `fill_polygons`."""
    return encode(fill_polygons(polygons, height, width))


def _fill(points_N2: NDArray[np.float64], height: int, width: int) -> NDArray[np.int64]:
    """Where the runs of a polygon's mask end.

    The polygon's edges are drawn on a finer grid. Where an edge passes the middle of a column of pixels, the mask
    changes between the pixels above and below it.
    """
    start = np.trunc(np.clip(points_N2, -1e6, 1e6) * _UPSAMPLED + 0.5).astype(np.int64)
    end = np.roll(start, -1, 0)
    steps = np.abs(end - start).max(1)
    steep = np.abs(end - start)[:, 1] > np.abs(end - start)[:, 0]
    axis = np.where(steep, 1, 0)[:, None]
    swap = np.take_along_axis(start, axis, 1) > np.take_along_axis(end, axis, 1)
    start, end = np.where(swap, end, start), np.where(swap, start, end)
    edge = np.repeat(np.arange(len(steps)), steps + 1)
    step = np.arange(len(edge)) - np.repeat(np.cumsum(steps + 1) - steps - 1, steps + 1)
    slope = (end - start) / np.maximum(steps, 1)[:, None]
    along = np.trunc(start[edge] + slope[edge] * step[:, None] + 0.5).astype(np.int64)  # exact along the longer axis
    x, y = along[:, 0], along[:, 1]
    column = np.minimum(x[1:], x[:-1])
    crossing = (x[1:] != x[:-1]) & (edge[1:] == edge[:-1]) & (column % _UPSAMPLED == _UPSAMPLED // 2)
    column, y = column[crossing] // _UPSAMPLED, np.minimum(y[1:], y[:-1])[crossing]
    row = np.ceil(np.clip((y + 0.5) / _UPSAMPLED - 0.5, 0, height)).astype(np.int64)
    inside = (column >= 0) & (column < width)
    changes, times = np.unique(column[inside] * height + row[inside], return_counts=True)
    changes = changes[(times % 2 == 1) & (changes < height * width)]
    return np.append(changes, height * width)


def to_polygons(mask_HW: Tensor) -> list[list[float]]:
    """The outlines of a mask's connected parts, along the edges of pixels.

    A part's holes belong to its polygon, joined to the outline by a line there and back. `from_polygons` gives the same
    mask again.
    """
    outlines, holes = list[NDArray[np.int64]](), list[NDArray[np.int64]]()
    for loop in _loops(mask_HW.cpu().numpy()):
        x, y = loop.T
        (outlines if (x * np.roll(y, -1) - np.roll(x, -1) * y).sum() > 0 else holes).append(loop)
    joined = [[outline, outline[:1]] if holes else [outline] for outline in outlines]
    for hole in holes:
        parts = joined[_around(hole, outlines)]
        parts += [hole, hole[:1], parts[0][:1]]
    return [np.concatenate(parts).flatten().astype(float).tolist() for parts in joined]


def _loops(mask_HW: NDArray[np.bool_]) -> Iterable[NDArray[np.int64]]:
    """The corners of each closed line between pixels inside and outside; the inside is to the right."""
    padded = np.pad(mask_HW, 1)
    inside = padded[1:-1, 1:-1]
    following = dict[tuple[int, int], list[tuple[int, int]]]()
    for (dy, dx), (from_x, from_y), (to_x, to_y) in (
        ((0, 1), (0, 0), (1, 0)),  # the pixel above is outside
        ((2, 1), (1, 1), (0, 1)),
        ((1, 0), (0, 1), (0, 0)),
        ((1, 2), (1, 0), (1, 1)),
    ):
        outside = ~padded[dy : dy + mask_HW.shape[0], dx : dx + mask_HW.shape[1]]
        for y, x in zip(*(axis.tolist() for axis in np.nonzero(inside & outside)), strict=True):
            following.setdefault((x + from_x, y + from_y), []).append((x + to_x, y + to_y))
    while following:
        point = start = min(following)
        before, loop = (0, 0), list[tuple[int, int]]()
        while not loop or point != start or point in following:
            ways = following[point]
            ways.sort(key=lambda way: _turn(before, point, way))
            way = ways.pop(0)
            if not ways:
                del following[point]
            direction = way[0] - point[0], way[1] - point[1]
            if direction != before:
                loop.append(point)
            before, point = direction, way
            if point == start:
                break
        yield np.array(loop)


def _turn(before: tuple[int, int], point: tuple[int, int], way: tuple[int, int]) -> int:
    """Negative for a turn to the right, which keeps to the same pixel where two meet at a corner."""
    direction = way[0] - point[0], way[1] - point[1]
    return -(before[0] * direction[1] - before[1] * direction[0])


def _around(hole: NDArray[np.int64], outlines: Sequence[NDArray[np.int64]]) -> int:
    """The smallest outline that contains a hole."""
    along = np.sign(hole[1] - hole[0])
    x, y = hole[0] + 0.5 * (along + along[::-1] * (1, -1))  # the middle of a pixel to the left, in the hole
    best, smallest = 0, np.inf
    for index, outline in enumerate(outlines):
        x0, y0 = outline.T
        x1, y1 = np.roll(outline, -1, 0).T
        crosses = ((y0 > y) != (y1 > y)) & (x0 > x)
        area = abs((x0 * y1 - x1 * y0).sum())
        if crosses.sum() % 2 and area < smallest:
            best, smallest = index, area
    return best


def paste_masks(
    masks_NMM: Tensor, boxes_N4: Tensor, height: int, width: int, *, threshold: float | None = 0.5
) -> Tensor:
    """Resize a detector's square masks to their boxes, in an image (Mask R-CNN), as torchvision does.

    Args:
        masks_NMM: probabilities [N, M, M].
        boxes_N4: in pixels of the image.
        height, width: of the image.
        threshold: None gives the probabilities.

    Returns:
        [N, height, width], bool or float.
    """
    count, side = masks_NMM.shape[:2]
    padded = F.pad(masks_NMM, (1, 1, 1, 1))  # so that the border fades out
    scale = (side + 2) / side
    center, half = (boxes_N4[:, 2:] + boxes_N4[:, :2]) * 0.5, (boxes_N4[:, 2:] - boxes_N4[:, :2]) * 0.5 * scale
    corners = torch.cat((center - half, center + half), 1).long().tolist()
    pasted = masks_NMM.new_zeros(count, height, width, dtype=None if threshold is None else torch.bool)
    for index, (x0, y0, x1, y1) in enumerate(corners):
        size = max(y1 - y0 + 1, 1), max(x1 - x0 + 1, 1)
        mask = F.interpolate(padded[index][None, None], size, mode="bilinear", align_corners=False)[0, 0]
        top, left, bottom, right = max(y0, 0), max(x0, 0), min(y1 + 1, height), min(x1 + 1, width)
        if top < bottom and left < right:
            part = mask[top - y0 : bottom - y0, left - x0 : right - x0]
            pasted[index, top:bottom, left:right] = part if threshold is None else part > threshold
    return pasted

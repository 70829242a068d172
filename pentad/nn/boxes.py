"""Boxes: overlap, coding, non-maximum suppression, and pooling of a box's features.

A box is x0, y0, x1, y1. Shapes: N, M, K boxes; C channels; H, W a feature map; P, Q rows and columns of a pooled box.
"""

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "batched_nms",
    "box_area",
    "clip_boxes",
    "decode_boxes",
    "encode_boxes",
    "mask_boxes",
    "nms",
    "paired_iou",
    "pairwise_iou",
    "roi_align",
    "roi_pool",
    "to_centers",
    "to_corners",
]

MAX_LOG_SCALE = math.log(1000 / 16)  # decoded boxes are at most so much larger than their reference
_BLOCK, _CHUNK = 128, 1024  # temporaries of NMS stay in the second-level cache
_ONE_PASS = 700  # so many boxes are compared faster in one pass than label by label


def box_area(boxes_N4: Tensor) -> Tensor:
    """Areas [N]."""
    x0, y0, x1, y1 = boxes_N4.unbind(-1)
    return (x1 - x0) * (y1 - y0)


def pairwise_iou(one_N4: Tensor, other_M4: Tensor) -> Tensor:
    """Intersection over union of each pair, [N, M]; 0 for a pair without any area."""
    iou_NM = _iou(_planes(one_N4), _planes(other_M4))
    return iou_NM.nan_to_num_(nan=0.0)


def paired_iou(one_M4: Tensor, other_M4: Tensor, kind: str = "iou") -> Tensor:
    """IoU of pairs of boxes [M], or its variants ``giou`` (1902.09630), ``diou`` and ``ciou`` (1911.08287)."""
    start_M2, end_M2 = one_M4[:, :2].maximum(other_M4[:, :2]), one_M4[:, 2:].minimum(other_M4[:, 2:])
    inside = (end_M2 - start_M2).clamp(min=0).prod(1)
    union = sum((boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (one_M4, other_M4)) - inside
    iou: Tensor = inside / (union + 1e-16)
    if kind == "iou":
        return iou
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = one_M4.unbind(-1), other_M4.unbind(-1)
    hull_w, hull_h = (
        torch.maximum(ax1, bx1) - torch.minimum(ax0, bx0),
        torch.maximum(ay1, by1) - torch.minimum(ay0, by0),
    )
    if kind == "giou":
        hull = (hull_w * hull_h).clamp(min=1e-12)
        return iou - (hull - union) / hull
    apart = ((ax0 + ax1 - bx0 - bx1) ** 2 + (ay0 + ay1 - by0 - by1) ** 2) / 4
    distance = apart / (hull_w**2 + hull_h**2).clamp(min=1e-12)
    if kind == "diou":
        return iou - distance
    shapes = [torch.atan(w / h.clamp(min=1e-12)) for w, h in ((ax1 - ax0, ay1 - ay0), (bx1 - bx0, by1 - by0))]
    shape = 4 / math.pi**2 * (shapes[0] - shapes[1]) ** 2
    weight = (shape / (1 - iou + shape + 1e-6)).detach()
    return iou - distance - weight * shape


def to_corners(boxes_N4: Tensor) -> Tensor:
    """Center x, center y, width, height -> x0, y0, x1, y1."""
    center, half = boxes_N4[..., :2], boxes_N4[..., 2:] / 2
    return torch.cat((center - half, center + half), -1)


def to_centers(boxes_N4: Tensor) -> Tensor:
    """x0, y0, x1, y1 -> center x, center y, width, height."""
    start, end = boxes_N4[..., :2], boxes_N4[..., 2:]
    return torch.cat(((start + end) / 2, end - start), -1)


def clip_boxes(boxes_N4: Tensor, height: float, width: float) -> Tensor:
    """Move corners that are outside of an image to its border."""
    limit = boxes_N4.new_tensor((width, height, width, height))
    return boxes_N4.clamp(min=0).minimum(limit)


def mask_boxes(masks_NHW: Tensor) -> Tensor:
    """The boxes around bool masks, float32 [N, 4]; zeros around an empty one."""
    boxes_N4 = torch.zeros(len(masks_NHW), 4, device=masks_NHW.device)
    for box_4, mask_HW in zip(boxes_N4, masks_NHW, strict=True):
        if mask_HW.any():
            rows, columns = mask_HW.any(1).nonzero()[:, 0], mask_HW.any(0).nonzero()[:, 0]
            box_4[:] = torch.stack((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    return boxes_N4


def encode_boxes(boxes_N4: Tensor, references_N4: Tensor, weights: tuple[float, float, float, float]) -> Tensor:
    """Boxes as differences to references (R-CNN, arXiv:1311.2524): shifts by its size, and logarithms of scales.

    Args:
        boxes_N4: the boxes to encode.
        references_N4: anchors or proposals.
        weights: what the differences in x, y, width and height are multiplied by.
    """
    target, reference = to_centers(boxes_N4), to_centers(references_N4)
    shift = (target[..., :2] - reference[..., :2]) / reference[..., 2:]
    scale = (target[..., 2:] / reference[..., 2:]).log()
    return torch.cat((shift, scale), -1) * target.new_tensor(weights)


def decode_boxes(deltas_N4: Tensor, references_N4: Tensor, weights: tuple[float, float, float, float]) -> Tensor:
    """The inverse of `encode_boxes`; scales are limited to exp(`MAX_LOG_SCALE`)."""
    deltas, reference = deltas_N4 / deltas_N4.new_tensor(weights), to_centers(references_N4)
    center = deltas[..., :2] * reference[..., 2:] + reference[..., :2]
    size = deltas[..., 2:].clamp(max=MAX_LOG_SCALE).exp() * reference[..., 2:]
    return to_corners(torch.cat((center, size), -1))


def nms(boxes_N4: Tensor, scores_N: Tensor, threshold: float) -> Tensor:
    """Non-maximum suppression: drop each box whose IoU with a kept box of a higher score is above the threshold.

    Among equal scores the first box wins. The order and the rounding are those of torchvision's CPU operator.

    Returns:
        The indices of the kept boxes, by falling score.
    """
    return _kept(boxes_N4, scores_N, None, threshold)


def batched_nms(boxes_N4: Tensor, scores_N: Tensor, labels_N: Tensor, threshold: float) -> Tensor:
    """`nms` among the boxes of each label; the indices of all kept boxes, by falling score."""
    if len(boxes_N4) <= _ONE_PASS:
        return _kept(boxes_N4, scores_N, labels_N, threshold)
    kept_N = torch.zeros_like(labels_N, dtype=torch.bool)
    for label in torch.unique(labels_N):
        members = (labels_N == label).nonzero()[:, 0]
        kept_N[members[nms(boxes_N4[members], scores_N[members], threshold)]] = True
    kept = kept_N.nonzero()[:, 0]
    return kept[scores_N[kept].argsort(descending=True, stable=True)]


def _kept(boxes_N4: Tensor, scores_N: Tensor, labels_N: Tensor | None, threshold: float) -> Tensor:
    """`nms`, in which boxes of different labels don't suppress each other."""
    order_N = scores_N.argsort(descending=True, stable=True)
    planes_5N = _planes(boxes_N4[order_N].float() if boxes_N4.dtype.itemsize < 4 else boxes_N4[order_N])
    labels_N = None if labels_N is None else labels_N[order_N]
    limit = _largest_at_most(threshold, planes_5N.dtype)

    def suppresses(winners: Tensor, losers: Tensor) -> Tensor:
        """Which of some places in the order suppress which others."""
        over = _iou(planes_5N[:, winners], planes_5N[:, losers]) > limit
        return over if labels_N is None else over & (labels_N[winners, None] == labels_N[losers])

    kept = list[Tensor]()
    left = torch.arange(len(order_N), device=order_N.device)
    # The best boxes left are compared with each other, and the kept ones among them with all the rest.
    while len(left):
        block, left = left[:_BLOCK], left[_BLOCK:]
        kept.append(block[_first_of_each(suppresses(block, block))])
        if len(left):
            hit = torch.cat([suppresses(kept[-1], chunk).any(0) for chunk in torch.split(left, _CHUNK)])
            left = left[~hit]
    return order_N[torch.cat(kept)] if kept else order_N


def _planes(boxes_N4: Tensor) -> Tensor:
    """x0, y0, x1, y1 and area, each in one piece: [5, N]."""
    return torch.cat((boxes_N4.T, box_area(boxes_N4)[None]))


def _iou(one_5N: Tensor, other_5M: Tensor) -> Tensor:
    ax0, ay0, ax1, ay1, area = one_5N[:, :, None].unbind()
    bx0, by0, bx1, by1, other_area = other_5M.unbind()
    width_NM = torch.minimum(ax1, bx1).sub_(torch.maximum(ax0, bx0)).clamp_(min=0)
    height_NM = torch.minimum(ay1, by1).sub_(torch.maximum(ay0, by0)).clamp_(min=0)
    intersection_NM = width_NM.mul_(height_NM)
    return intersection_NM / (area + other_area).sub_(intersection_NM)


def _first_of_each(suppresses_KK: Tensor) -> Tensor:
    """The rows that no kept row before them suppresses."""
    packed = np.packbits(suppresses_KK.cpu().numpy(), axis=1, bitorder="little")
    rows, width = packed.tobytes(), packed.shape[1]
    suppressed, kept = 0, list[int]()
    for index in range(len(packed)):
        if not suppressed >> index & 1:
            kept.append(index)
            suppressed |= int.from_bytes(rows[index * width : (index + 1) * width], "little")
    return torch.tensor(kept, device=suppresses_KK.device)


@cache
def _largest_at_most(threshold: float, dtype: torch.dtype) -> float:
    """The largest number of a dtype that is <= threshold: a float32 above it is above the threshold in double."""
    rounded = torch.tensor(threshold, dtype=dtype)
    if float(rounded) > threshold:
        rounded = torch.nextafter(rounded, rounded.new_tensor(-math.inf))
    return float(rounded)


def roi_align(
    features_NCHW: Tensor,
    boxes_K4: Tensor,
    images_K: Tensor,
    output_size: tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> Tensor:
    """Average bilinear samples of each cell of a box (Mask R-CNN, arXiv:1703.06870); nothing is rounded to the grid.

    A cell is a weighted sum of rows of features, which torch computes as the sum of a bag of embeddings.

    Args:
        features_NCHW: one map for each image; gradients reach them, not the boxes. Fastest in channels_last.
        boxes_K4: in pixels of the images.
        images_K: the image of each box.
        output_size: rows and columns of cells.
        spatial_scale: the map's size by the image's.
        sampling_ratio: rows and columns of samples in a cell; 0: as many as the cell has pixels, rounded up.
        aligned: pixel centers lie at halves (Detectron2). Otherwise at whole numbers, and boxes are at least a pixel
            wide (torchvision's detectors).

    Returns:
        [K, C, rows, columns].
    """
    channels = features_NCHW.shape[1]
    with torch.no_grad():
        exact = torch.promote_types(features_NCHW.dtype, torch.float32)
        edges = boxes_K4.to(exact) * spatial_scale - (0.5 if aligned else 0.0)
        start, size = edges[:, :2], edges[:, 2:] - edges[:, :2]
        if not aligned:
            size = size.clamp(min=1)
        cells = size.new_tensor((output_size[1], output_size[0]))
        grid_K2 = (size / cells).ceil().clamp(min=0).long() if sampling_ratio <= 0 else None
    rows_RC = features_NCHW.permute(0, 2, 3, 1).reshape(-1, channels)
    result = features_NCHW.new_zeros(len(boxes_K4), *output_size, channels)
    counts = [[sampling_ratio] * 2] if grid_K2 is None else torch.unique(grid_K2, dim=0).tolist()
    for samples_x, samples_y in counts:
        if not samples_x or not samples_y:
            continue  # an empty box has no samples
        chosen = slice(None) if grid_K2 is None else (grid_K2 == grid_K2.new_tensor((samples_x, samples_y))).all(1)
        with torch.no_grad():
            x = _taps(start[chosen, 0], size[chosen, 0], output_size[1], samples_x, features_NCHW.shape[3])
            y = _taps(start[chosen, 1], size[chosen, 1], output_size[0], samples_y, features_NCHW.shape[2])
            index, weight = _outer(x, y, images_K[chosen], features_NCHW.shape[2], features_NCHW.shape[3])
        pooled = F.embedding_bag(index, rows_RC, per_sample_weights=weight.to(rows_RC.dtype), mode="sum")
        result[chosen] = pooled.view(-1, *output_size, channels)
    return result.permute(0, 3, 1, 2)


def _taps(start_K: Tensor, size_K: Tensor, cells: int, samples: int, length: int) -> tuple[Tensor, Tensor]:
    """Positions along one axis and their weights: two neighbors for each sample, both [K, cells, 2 * samples]."""
    cell_K11 = (size_K / cells)[:, None, None]
    sample = torch.arange(samples, device=size_K.device) + 0.5
    at = start_K[:, None, None] + torch.arange(cells, device=size_K.device)[:, None] * cell_K11
    at = at + sample * (cell_K11 / samples)
    inside = (at >= -1) & (at <= length)
    at = at.clamp(0, length - 1)
    low = at.floor().clamp(max=max(length - 2, 0))
    above = at - low
    index = torch.cat((low, (low + 1).clamp(max=length - 1)), -1).long()
    return index, torch.cat((1 - above, above), -1) * (inside.repeat(1, 1, 2) / samples)


def _outer(
    x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor], images_K: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """The bag of each cell: which rows of features, and their weights, both [K * rows * columns, samples]."""
    row = (images_K[:, None, None] * height + y[0]) * width
    index = row[:, :, None, :, None] + x[0][:, None, :, None, :]
    weight = y[1][:, :, None, :, None] * x[1][:, None, :, None, :]
    return index.flatten(3).flatten(0, 2), weight.flatten(3).flatten(0, 2)


def roi_pool(
    features_NCHW: Tensor, boxes_K4: Tensor, images_K: Tensor, output_size: tuple[int, int], spatial_scale: float = 1.0
) -> Tensor:
    """The maximum of each cell of a box that is rounded to the grid (Fast R-CNN, arXiv:1504.08083).

    Args and shapes as for `roi_align`. An empty cell is 0.
    """
    channels, height, width = features_NCHW.shape[1:]
    with torch.no_grad():
        corners = boxes_K4.double() * spatial_scale
        corners = (corners.sign() * (corners.abs() + 0.5).floor()).long()  # as C's round
        x_from, x_to = _bins(corners[:, 0], corners[:, 2], output_size[1], width)
        y_from, y_to = _bins(corners[:, 1], corners[:, 3], output_size[0], height)
        columns = (x_to - x_from).clamp(min=0)[:, None, :].expand(-1, output_size[0], -1).flatten()
        counts = columns * (y_to - y_from).clamp(min=0)[:, :, None].expand(-1, -1, output_size[1]).flatten()
        offsets = counts.cumsum(0) - counts
        cell = torch.repeat_interleave(counts)  # the cell of each pixel
        pixel = torch.arange(len(cell), device=cell.device) - offsets[cell]
        x = x_from[:, None, :].expand(-1, output_size[0], -1).flatten()[cell] + pixel % columns[cell]
        y = y_from[:, :, None].expand(-1, -1, output_size[1]).flatten()[cell] + pixel // columns[cell]
        image = images_K.repeat_interleave(output_size[0] * output_size[1])[cell]
    rows_RC = features_NCHW.permute(0, 2, 3, 1).reshape(-1, channels)
    pooled = F.embedding_bag((image * height + y) * width + x, rows_RC, offsets, mode="max")
    return pooled.view(len(boxes_K4), *output_size, channels).permute(0, 3, 1, 2)


def _bins(start_K: Tensor, end_K: Tensor, cells: int, length: int) -> tuple[Tensor, Tensor]:
    """Where each cell begins and ends along one axis, both [K, cells]."""
    cell_K1 = ((end_K - start_K + 1).clamp(min=1).float() / cells)[:, None]
    at = torch.arange(cells, device=start_K.device)
    first = (at * cell_K1).floor().long() + start_K[:, None]
    last = ((at + 1) * cell_K1).ceil().long() + start_K[:, None]
    return first.clamp(0, length), last.clamp(0, length)

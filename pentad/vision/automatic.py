"""Everything in an image: masks for a grid of points, without bad ones and duplicates (arXiv:2304.02643, appendix B).

Legend: P points, N masks, U rows and columns of a mask's logits.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pentad.errors import BadInput
from pentad.nn.boxes import nms
from pentad.vision.masks import RLE, encode, rle_box
from pentad.vision.prompts import Request
from pentad.vision.segmenter import Mask, Segmenter
from pentad.vision.thresholding import Thresholder
from pentad.weights.cache import Progress, task

NEAR = 20.0  # pixels from a crop's edge within which a mask counts as cut off


@dataclass(frozen=True, kw_only=True)
class Everything:
    """How to segment everything; names and defaults are those of the published generator.

    Attributes:
        points_per_side: points a side of the grid.
        points_per_batch: points that are decoded together; bounds memory, and changes no mask.
        pred_iou_thresh: masks whose predicted IoU is not above it are dropped.
        stability_score_thresh: masks whose stability is below it are dropped.
        box_nms_thresh: IoU of boxes from which on the mask with the lower predicted IoU is a duplicate.
        crop_n_layers: layer i cuts the image into 2^i by 2^i crops that overlap, each with a grid of its own.
        crop_nms_thresh: as `box_nms_thresh`, for masks of different crops; the one of the smaller crop stays.
        crop_overlap_ratio: share of the image's shorter side by which the crops of the first layer overlap.
        crop_n_points_downscale_factor: in each layer grids have so many times fewer points a side.
        min_mask_region_area: parts and holes of masks with fewer pixels are removed.
    """

    points_per_side: int = 32
    points_per_batch: int = 64
    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    box_nms_thresh: float = 0.7
    crop_n_layers: int = 0
    crop_nms_thresh: float = 0.7
    crop_overlap_ratio: float = 512 / 1500
    crop_n_points_downscale_factor: int = 1
    min_mask_region_area: int = 0

    LIMITS = {"points_per_side": (1, 256), "points_per_batch": (1, 4096), "crop_n_layers": (0, 4)}  # noqa: RUF012
    LEAST = {"crop_n_points_downscale_factor": 1}  # noqa: RUF012

    def check(self) -> None:
        """Raise BadInput if a value is out of range."""
        for field in fields(self):
            value = getattr(self, field.name)
            share = (-math.inf if field.name == "pred_iou_thresh" else 0, 1)
            low, high = self.LIMITS.get(field.name, share if field.type is float else (0, 2**31))
            low = self.LEAST.get(field.name, low)
            if not low <= value <= high:
                raise BadInput(f"{field.name} is {value}; expected a number from {low} to {high}")

    def grid(self, layer: int) -> Tensor:
        """The points of a layer's crops as shares of width and height, float64 [P, 2], row by row."""
        count = max(1, int(self.points_per_side / self.crop_n_points_downscale_factor**layer))
        at = torch.from_numpy(np.linspace(1 / (2 * count), 1 - 1 / (2 * count), count))
        y, x = torch.meshgrid(at, at, indexing="ij")
        return torch.stack((x, y), -1).view(-1, 2)

    def crops(self, height: int, width: int) -> Iterator["Crop"]:
        """The whole image, then the crops of each layer."""
        yield Crop(0, 0, width, height, 0)
        for layer in range(1, self.crop_n_layers + 1):
            count = 2**layer
            overlap = int(self.crop_overlap_ratio * min(height, width) * (2 / count))
            crop_width, crop_height = (
                math.ceil((overlap * (count - 1) + length) / count) for length in (width, height)
            )
            for i, j in product(range(count), range(count)):
                x, y = (crop_width - overlap) * i, (crop_height - overlap) * j
                yield Crop(x, y, min(x + crop_width, width), min(y + crop_height, height), layer)


class Crop(NamedTuple):
    """A part of an image, in pixels.

    Attributes:
        layer: 0 is the whole image.
    """

    x0: int
    y0: int
    x1: int
    y1: int
    layer: int


class Candidates(NamedTuple):
    """Masks before duplicates are removed.

    Attributes:
        boxes_N4: first and last column and row, of the image.
        scores_N: predicted IoU.
        masks: N masks.
    """

    boxes_N4: Tensor
    scores_N: Tensor
    masks: list[Mask]

    def chosen(self, index: Tensor) -> "Candidates":
        return Candidates(self.boxes_N4[index], self.scores_N[index], [self.masks[i] for i in index.tolist()])


class Decoded(NamedTuple):
    """Masks of N / M points.

    Attributes:
        logits_NUU, iou_N: what the network says.
        points_N2: in pixels of the crop.
    """

    logits_NUU: Tensor
    iou_N: Tensor
    points_N2: Tensor


def segment_everything(
    segmenter: Segmenter, image_3HW: Tensor, how: Everything, progress: Progress | None = None
) -> list[Mask]:
    """All masks of an image, as the published generator finds them.

    Args:
        segmenter: the network.
        image_3HW: uint8.
        how: settings.
        progress: counts points.

    Returns:
        Masks by falling predicted IoU; with crops those of the smallest ones first. ``prompt`` has the point and, if
        the mask is from a part of the image, that ``crop``.

    Raises:
        BadInput: a setting is out of range.
    """
    how.check()
    height, width = image_3HW.shape[1:]
    crops = list(how.crops(height, width))
    found, areas = list[Candidates](), list[int]()
    progress = progress or Progress()
    with task(progress, "points", sum(len(how.grid(crop.layer)) for crop in crops)):
        for crop in crops:
            found.append(_in_crop(segmenter, image_3HW, crop, how, progress))
            areas += [(crop.x1 - crop.x0) * (crop.y1 - crop.y0)] * len(found[-1].masks)
    all_found = _joined(found)
    if len(crops) > 1:
        smallest_first = 1 / torch.tensor(areas, dtype=torch.float32)
        all_found = all_found.chosen(nms(all_found.boxes_N4, smallest_first, how.crop_nms_thresh))
    if how.min_mask_region_area:
        all_found = _without_small_regions(all_found, how)
    return all_found.masks


def _in_crop(segmenter: Segmenter, image_3HW: Tensor, crop: Crop, how: Everything, progress: Progress) -> Candidates:
    cut_3HW = image_3HW[:, crop.y0 : crop.y1, crop.x0 : crop.x1]
    embedded = segmenter.image(cut_3HW, cached=not crop.layer)
    size = torch.tensor([embedded.width, embedded.height])
    points_P12 = (how.grid(crop.layer) * size)[:, None]
    request = Request(points_P12, torch.ones(len(points_P12), 1, dtype=torch.int64), None, None)
    whole = (image_3HW.shape[1], image_3HW.shape[2])
    threshold = Thresholder(embedded.fitted, 4 * segmenter.sam.config.side, whole, crop.y0, crop.x0)
    found = list[Candidates]()
    for start in range(0, len(points_P12), how.points_per_batch):
        chosen = slice(start, start + how.points_per_batch)
        logits, iou = embedded.decode(request, chosen, multimask=True)
        points_N2 = points_P12[chosen].expand(-1, iou.shape[1], -1).flatten(0, 1)
        iou_N = iou.flatten()
        kept_N = iou_N > how.pred_iou_thresh if how.pred_iou_thresh > 0 else torch.ones_like(iou_N, dtype=torch.bool)
        kept = Decoded(logits.flatten(0, 1)[kept_N], iou_N[kept_N], points_N2[kept_N])
        found.append(_candidates(threshold, kept, crop, whole, how))
        progress.advance(len(points_P12[chosen]))
    joined = _joined(found)
    return joined.chosen(nms(joined.boxes_N4, joined.scores_N, how.box_nms_thresh))


def _candidates(
    threshold: Thresholder, decoded: Decoded, crop: Crop, whole: tuple[int, int], how: Everything
) -> Candidates:
    """The stable masks that aren't cut off by a crop's edge."""
    offset, kept = torch.tensor([crop.x0, crop.y0]), list[Mask]()
    for logits_UU, iou, point_2 in zip(*decoded, strict=True):
        found = threshold(logits_UU)
        if how.stability_score_thresh > 0 and found.stability_score < how.stability_score_thresh:
            continue
        prompt = {"points": [(point_2 + offset).tolist()], "labels": [1]}
        prompt |= {"crop": [*crop[:4]]} if crop.layer else {}
        rle = found.rle
        kept.append(Mask(rle, rle_box(rle), float(iou), found.stability_score, prompt))
    boxes_N4 = edges(kept, offset)
    scores_N = torch.tensor([mask.predicted_iou for mask in kept])
    return Candidates(boxes_N4, scores_N, kept).chosen((~_is_cut_off(boxes_N4, crop, whole)).nonzero()[:, 0])


def edges(masks: Sequence[Mask], start_2: Tensor) -> Tensor:
    """The first and last column and row of each mask, x0, y0, x1, y1 [N, 4]; for an empty one where its crop starts."""
    boxes_N4 = torch.tensor([mask.box for mask in masks]).reshape(-1, 4)
    is_empty_N1 = (boxes_N4 == 0).all(1, keepdim=True)
    return torch.where(is_empty_N1, start_2.float().repeat(2), boxes_N4 - torch.tensor([0.0, 0, 1, 1]))


def _is_cut_off(boxes_N4: Tensor, crop: Crop, whole: tuple[int, int]) -> Tensor:
    """True for boxes near an edge of the crop that is no edge of the image."""
    image = boxes_N4.new_tensor((0, 0, whole[1], whole[0]))
    near_crop, near_image = ((boxes_N4 - side).abs() <= NEAR for side in (boxes_N4.new_tensor(crop[:4]), image))
    return (near_crop & ~near_image).any(1)


def _joined(found: Sequence[Candidates]) -> Candidates:
    if not found:
        return Candidates(torch.zeros(0, 4), torch.zeros(0), [])
    masks = [mask for one in found for mask in one.masks]
    return Candidates(torch.cat([one.boxes_N4 for one in found]), torch.cat([one.scores_N for one in found]), masks)


def _without_small_regions(found: Candidates, how: Everything) -> Candidates:
    """Remove small parts and holes, then duplicates, of which those stay that needed no repair."""
    repaired, unchanged = list[Mask](), list[bool]()
    for mask in found.masks:
        filled = remove_small_regions(mask.mask, how.min_mask_region_area, holes=True)
        cleaned = remove_small_regions(filled, how.min_mask_region_area, holes=False)
        unchanged.append(torch.equal(cleaned, mask.mask))
        rle: RLE = mask.rle if unchanged[-1] else encode(cleaned)
        repaired.append(replace(mask, rle=rle, box=rle_box(rle)))
    boxes_N4 = edges(repaired, torch.zeros(2))
    kept = nms(boxes_N4, torch.tensor(unchanged).float(), max(how.box_nms_thresh, how.crop_nms_thresh))
    return Candidates(boxes_N4, found.scores_N, repaired).chosen(kept)


def remove_small_regions(mask_HW: Tensor, least: int, *, holes: bool) -> Tensor:
    """A mask without connected parts, or without holes, of fewer than `least` pixels. Diagonal neighbors are connected;
    of a mask with small parts only the largest one stays."""
    from scipy.ndimage import label

    regions, count = label((~mask_HW if holes else mask_HW).numpy(), structure=np.ones((3, 3)))
    areas = np.bincount(regions.ravel(), minlength=count + 1)[1:]
    if not (areas < least).any():
        return mask_HW
    kept = areas >= least
    if not holes and not kept.any():
        kept[areas.argmax()] = True
    chosen = torch.from_numpy(np.append(False, kept)[regions])
    return ~chosen if holes else chosen

"""The losses of YOLO's versions, as Darknet computes them; the options are those of the .cfg file's sections.

Darknet has no loss functions: it writes gradients. Those of objectness and classes are the gradients of binary
cross-entropy, and x and y get the box's gradient without the derivative of their sigmoid; so it is here.

Legend: B images; T objects of an image; H, W cells of a grid; A anchors of a cell; K classes; N = H W A; M pairs of an
object and an anchor that answers for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pentad.datasets.object_batches import ObjectBatch
from pentad.models.vision.darknet import AnchorHead, Darknet, GridHead
from pentad.nn.boxes import paired_iou, pairwise_iou, to_centers
from pentad.train.objectives.loss import Loss

Parts = dict[str, Tensor]
"""The parts of a loss by name, each summed over the images."""


class Objects(NamedTuple):
    """The objects of one image.

    Attributes:
        boxes_T4: x0, y0, x1, y1 as shares of the image's width and height.
        labels_T: numbers of their classes.
    """

    boxes_T4: Tensor
    labels_T: Tensor


def grid_loss(head: GridHead, x: Tensor, objects: Sequence[Objects]) -> Parts:
    """The loss of version 1 (1506.02640, equation 3): sums of squares.

    Each cell with an object's center answers for one object, with the box that overlaps it most.
    """
    options, side = head.layer.texts, head.layer.side
    classes_BSK, objectness_BSA, raw_BSA4 = head.raw(x)
    predicted_BSA4 = head.boxes(raw_BSA4).detach()
    targets = torch.zeros_like(objectness_BSA)
    weights = torch.full_like(objectness_BSA, _number(options, "noobject_scale", 1))
    box, kinds = x.new_zeros(()), x.new_zeros(())
    for image, (boxes_T4, labels_T) in enumerate(objects):
        cell_of = dict[int, int]()
        for number, (cx, cy) in enumerate(to_centers(boxes_T4)[:, :2].tolist()):
            cell_of[min(int(cy * side), side - 1) * side + min(int(cx * side), side - 1)] = (
                number  # the last one counts
            )
        for cell, number in cell_of.items():
            truth_4 = boxes_T4[number]
            answers = predicted_BSA4[image, cell]
            overlap_A = pairwise_iou(answers, truth_4[None])[:, 0]
            distance_A = (to_centers(answers) - to_centers(truth_4[None])).square().sum(1)
            best = int(overlap_A.argmax() if overlap_A.max() > 0 else distance_A.argmin())
            center, size = torch.split(to_centers(truth_4[None])[0], 2)
            offset = center * side - center.new_tensor((cell % side, cell // side))
            target_4 = torch.cat((offset, size.sqrt() if head.layer.sqrt else size))
            box = box + (raw_BSA4[image, cell, best] - target_4).square().sum()
            wanted_K = F.one_hot(labels_T[number], head.layer.classes).to(x)
            kinds = kinds + (classes_BSK[image, cell] - wanted_K).square().sum()
            targets[image, cell, best] = overlap_A[best] if _number(options, "rescore", 0) else 1
            weights[image, cell, best] = _number(options, "object_scale", 1)
    found = (weights * (objectness_BSA - targets).square()).sum()
    scales = _number(options, "coord_scale", 1), _number(options, "class_scale", 1)
    return {"box": scales[0] * box / 2, "objectness": found / 2, "classes": scales[1] * kinds / 2}


@dataclass(frozen=True)
class Pairs:
    """Objects and the anchors that answer for them, of all images; each field has M numbers, or rows.

    Attributes:
        index: image, row, column and anchor.
        boxes_M4, labels_M: of the objects.
    """

    index: tuple[Tensor, Tensor, Tensor, Tensor]
    boxes_M4: Tensor
    labels_M: Tensor

    def last(self) -> Pairs:
        """Of several objects of one anchor in one cell the last, whose box is learned."""
        rows = {row: place for place, row in enumerate(zip(*(one.tolist() for one in self.index), strict=True))}
        kept = torch.tensor(sorted(rows.values()), dtype=torch.long, device=self.labels_M.device)
        image, row, column, anchor = (one[kept] for one in self.index)
        return Pairs((image, row, column, anchor), self.boxes_M4[kept], self.labels_M[kept])


def _pairs(head: AnchorHead, grid: tuple[int, int], objects: Sequence[Objects], device: torch.device) -> Pairs:
    """Assign objects to anchors by shape.

    The anchor most like an object's shape answers for it, if it is one of the head's; in version 4 also those whose
    IoU exceeds ``iou_thresh``.
    """
    (height, width), layer = grid, head.layer
    mask = list(layer.mask) if head.is_yolo else list(range(len(head.anchors)))
    unit = layer_unit(head, grid)
    all_A2 = torch.tensor(list(zip(layer.anchors[::2], layer.anchors[1::2], strict=True))) / torch.tensor(unit)
    shapes_A4 = torch.cat((torch.zeros_like(all_A2), all_A2), 1)
    above = _number(layer.texts, "iou_thresh", 1) if head.is_yolo else 1.0
    rows: list[tuple[int, int, int, int]] = []
    boxes, labels = [], []
    for image, (boxes_T4, labels_T) in enumerate(objects):
        if not len(boxes_T4):
            continue
        centers_T4 = to_centers(boxes_T4.cpu())
        sizes_T4 = torch.cat((torch.zeros_like(centers_T4[:, 2:]), centers_T4[:, 2:]), 1)
        overlap_TA = pairwise_iou(sizes_T4, shapes_A4)
        for number, (cx, cy, _, _) in enumerate(centers_T4.tolist()):
            best = int(overlap_TA[number].argmax())
            for place, anchor in enumerate(mask):
                if anchor == best or float(overlap_TA[number, anchor]) > above:
                    cell = min(int(cy * height), height - 1), min(int(cx * width), width - 1)
                    rows.append((image, *cell, place))
                    boxes.append(boxes_T4[number])
                    labels.append(labels_T[number])
    index = torch.tensor(rows, dtype=torch.long, device=device).reshape(-1, 4).unbind(1)
    boxes_M4 = torch.stack(boxes) if boxes else torch.zeros(0, 4, device=device)
    labels_M = torch.stack(labels) if labels else torch.zeros(0, dtype=torch.long, device=device)
    return Pairs((index[0], index[1], index[2], index[3]), boxes_M4, labels_M)


def layer_unit(head: AnchorHead, grid: tuple[int, int]) -> tuple[float, float]:
    """The width and height that anchors are shares of."""
    return (head.image[2], head.image[1]) if head.is_yolo else (grid[1], grid[0])


def anchor_loss(head: AnchorHead, x: Tensor, objects: Sequence[Objects], *, seen: int | None = None) -> Parts:
    """The loss of versions 2 (``region``), 3 and 4 (``yolo``).

    Args:
        head: the detection layer.
        x: its input [B, channels, H, W].
        objects: of each image.
        seen: images seen before; a ``region`` layer draws boxes to its anchors during the first 12,800.
    """
    raw, options = head.raw(x).float(), head.layer.texts
    grid = raw.shape[1], raw.shape[2]
    pairs = _pairs(head, grid, objects, x.device)
    last = pairs.last()
    predicted = _boxes(head, raw[..., :4])
    best = torch.stack(
        [_best_overlap(boxes, one.boxes_T4) for boxes, one in zip(predicted.detach(), objects, strict=True)]
    )
    ignored = best > _number(options, "ignore_thresh" if head.is_yolo else "thresh", 0.5)
    targets, weights = torch.zeros_like(best), torch.where(ignored, 0.0, _number(options, "noobject_scale", 1))
    index = last.index
    overlap_M = paired_iou(predicted[index].detach(), last.boxes_M4, "iou")
    targets[index] = overlap_M if not head.is_yolo and _number(options, "rescore", 0) else torch.ones_like(overlap_M)
    weights[index] = _number(options, "object_scale", 1)
    if head.is_yolo:
        weights = weights * _number(options, "obj_normalizer", 1)
    parts = {
        "box": _box_loss(head, raw, predicted, last),
        "objectness": (weights * _cross_entropy(head, raw[..., 4], targets)).sum(),
        "classes": _class_loss(head, raw[..., 5:], pairs),
    }
    if not head.is_yolo and seen is not None and seen < 12_800:
        rest = torch.ones_like(best).index_put(index, torch.zeros_like(overlap_M))
        offset = raw[..., :2].sigmoid().detach() - 0.5
        towards = raw[..., :2] * offset + raw[..., 2:4].square() / 2
        parts["box"] = parts["box"] + 0.01 * (rest[..., None] * towards).sum()
    return parts


def _boxes(head: AnchorHead, raw: Tensor) -> Tensor:
    """The predicted boxes; x and y have the derivative 1 instead of that of the sigmoid."""
    if head.new_coords:
        return head.boxes(raw)
    xy = raw[..., :2]
    straight = xy - xy.detach()
    boxes = head.boxes(torch.cat((xy.detach(), raw[..., 2:]), -1))
    height, width = raw.shape[1:3]
    shift = straight / straight.new_tensor((width, height))
    return boxes + torch.cat((shift, shift), -1)


def _best_overlap(boxes: Tensor, truth_T4: Tensor) -> Tensor:
    """The highest IoU of each predicted box [H, W, A, 4] with an object."""
    if not len(truth_T4):
        return boxes.new_zeros(boxes.shape[:-1])
    return pairwise_iou(boxes.flatten(0, 2), truth_T4).amax(1).view(boxes.shape[:-1])


def _box_loss(head: AnchorHead, raw: Tensor, predicted: Tensor, pairs: Pairs) -> Tensor:
    options, index = head.layer.texts, pairs.index
    kind = options.get("iou_loss", "mse") if head.is_yolo else "mse"
    if kind != "mse":
        similarity_M = paired_iou(predicted[index], pairs.boxes_M4, kind)
        return _number(options, "iou_normalizer", 0.75) * (1 - similarity_M).sum()
    height, width = raw.shape[1:3]
    centers_M4 = to_centers(pairs.boxes_M4)
    cell_M2 = torch.stack((index[2], index[1]), 1)
    offset_M2 = centers_M4[:, :2] * centers_M4.new_tensor((width, height)) - cell_M2
    anchors_A2 = raw.new_tensor(head.anchors) / raw.new_tensor(layer_unit(head, (height, width)))
    ratio_M2 = centers_M4[:, 2:].clamp(min=1e-9) / anchors_A2[index[3]]
    size_M2 = (ratio_M2 / 4).sqrt() if head.new_coords else ratio_M2.log()
    scale_M1 = (2 - centers_M4[:, 2:3] * centers_M4[:, 3:]) * _number(options, "coord_scale", 1)
    scale_M1 = scale_M1 * (_number(options, "iou_normalizer", 0.75) if "iou_normalizer" in options else 1)
    raw_M4 = raw[index][:, :4]
    moved_M2 = raw_M4[:, :2] if head.new_coords else raw_M4[:, :2].sigmoid()
    moved_M2 = moved_M2 * head.scale_xy - (head.scale_xy - 1) / 2
    straight_M2 = raw_M4[:, :2] * (moved_M2 - offset_M2).detach()  # its gradient is Darknet's
    centers = (scale_M1 * (straight_M2 - straight_M2.detach() + (moved_M2 - offset_M2).detach() ** 2 / 2)).sum()
    return centers + (scale_M1 * (raw_M4[:, 2:] - size_M2).square() / 2).sum()


def _cross_entropy(head: AnchorHead, raw: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy; with ``new_coords`` the network's last convolution has applied the sigmoid."""
    if not head.new_coords:
        return F.binary_cross_entropy_with_logits(raw, targets, reduction="none")
    return F.mse_loss(raw, targets, reduction="none") / 2  # Darknet's gradient is the difference


def _class_loss(head: AnchorHead, raw: Tensor, pairs: Pairs) -> Tensor:
    """Each anchor with objects learns all their classes; a softmax learns the last one."""
    options = head.layer.texts
    cells, inverse_M = torch.unique(torch.stack(pairs.index, 1), dim=0, return_inverse=True)
    logits_UK = raw[cells.unbind(1)]
    if not head.is_yolo and head.layer.softmax:
        last_U = torch.zeros(len(cells), dtype=torch.long, device=raw.device)
        for place, label in zip(inverse_M.tolist(), pairs.labels_M.tolist(), strict=True):
            last_U[place] = label
        return _number(options, "class_scale", 1) * F.cross_entropy(logits_UK, last_U, reduction="sum")
    wanted_UK = torch.zeros_like(logits_UK).index_put(
        (inverse_M, pairs.labels_M), torch.ones(len(inverse_M), device=raw.device)
    )
    smooth = _number(options, "label_smooth_eps", 0) if head.is_yolo else 0.0
    wanted_UK = wanted_UK * (1 - smooth) + smooth / 2
    return _number(options, "class_scale", 1) * _cross_entropy(head, logits_UK, wanted_UK).sum()


def _number(options: Mapping[str, str], name: str, default: float) -> float:
    return float(options[name]) if name in options else default


def losses(network: Darknet, outputs: Sequence[Tensor], objects: Sequence[Objects], seen: int | None = None) -> Parts:
    """The parts of the loss, summed over detection layers and images.

    Args:
        network: the network.
        outputs: the inputs of its detection layers (`Darknet.outputs`).
        objects: of each image.
        seen: see `anchor_loss`.
    """
    total: Parts = {}
    for number, x in zip(network.heads, outputs, strict=True):
        head = network.layers[number]
        parts = (
            grid_loss(head, x, objects) if isinstance(head, GridHead) else anchor_loss(head, x, objects, seen=seen)  # type: ignore[arg-type]
        )
        for name, part in parts.items():
            total[name] = total[name] + part if name in total else part
    return total


class YoloObjective:
    """The mean loss of the images of a step, which are red, green and blue from 0 to 1."""

    def totals(self, network: Darknet, batch: ObjectBatch) -> list[float]:
        """The number of images."""
        return [len(batch.images_BCHW)]

    def __call__(
        self, network: Darknet, batch: ObjectBatch, totals: Sequence[float], *, checkpointing: str = "none"
    ) -> Loss:
        """The share of the mean over images."""
        height, width = batch.images_BCHW.shape[2:]
        whole = batch.images_BCHW.new_tensor((width, height) * 2)
        objects = [Objects(boxes / whole, labels) for boxes, labels in zip(batch.boxes, batch.labels, strict=True)]
        outputs = network.outputs(batch.images_BCHW)
        with torch.autocast(batch.images_BCHW.device.type, enabled=False):
            parts = losses(network, [x.float() for x in outputs], objects)
        share = torch.stack(list(parts.values())).sum() / totals[0]
        return Loss(share, {f"{name}_loss": part.detach() / totals[0] for name, part in parts.items()})

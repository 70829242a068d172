"""The loss of YOLOX (arXiv:2107.08430): SimOTA decides which cells learn which object.

Legend: B images; N cells; C cells near an object; M objects of an image; K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pentad.datasets.object_batches import ObjectBatch
from pentad.models.vision.yolox import YOLOX, Cells, cells, decode
from pentad.nn.boxes import paired_iou, pairwise_iou, to_centers
from pentad.train.objectives.loss import Loss

RADIUS = 1.5
"""Cells within so many strides of an object's center may learn it."""
IOU_COST, FAR_COST = 3.0, 1e6
CANDIDATES = 10
BOX_WEIGHT = 5.0


class Assignment(NamedTuple):
    """The cells of an image that learn an object.

    Attributes:
        cells: int64 [P], their indices.
        objects: int64 [P], the object of each.
        ious: [P], of the predicted box and the object's.
    """

    cells: Tensor
    objects: Tensor
    ious: Tensor


@torch.no_grad()
def assign(out_NO: Tensor, predicted_N4: Tensor, boxes_M4: Tensor, labels_M: Tensor, at: Cells) -> Assignment:
    """SimOTA: an object takes the cells that predict it at the least cost, as many as overlap it well.

    Args:
        out_NO: the network's output, [N, 5 + K].
        predicted_N4: its boxes, in pixels.
        boxes_M4: the objects, in pixels.
        labels_M: their classes.
        at: the cells.
    """
    center_M2 = to_centers(boxes_M4)[:, :2]
    cell_N2 = (torch.stack((at.x_N, at.y_N), -1) + 0.5) * at.stride_N[:, None]
    near_MN = ((cell_N2 - center_M2[:, None]).abs() < RADIUS * at.stride_N[:, None]).all(-1)
    candidates = near_MN.any(0).nonzero()[:, 0]
    near_MC, out_CO = near_MN[:, candidates], out_NO[candidates].float()
    iou_MC = pairwise_iou(boxes_M4, predicted_N4[candidates].float())
    score_CK = (out_CO[:, 5:].sigmoid() * out_CO[:, 4:5].sigmoid()).sqrt()
    target_MK = F.one_hot(labels_M, out_CO.shape[1] - 5).float()
    shape = (len(boxes_M4), *score_CK.shape)
    score_MCK, target_MCK = score_CK.expand(shape), target_MK[:, None].expand(shape)
    class_MC = F.binary_cross_entropy(score_MCK, target_MCK, reduction="none").sum(-1)
    cost_MC = class_MC - IOU_COST * (iou_MC + 1e-8).log() + FAR_COST * ~near_MC
    counts_M = iou_MC.topk(min(CANDIDATES, len(candidates))).values.sum(1).int().clamp(min=1)
    chosen_MC = torch.zeros_like(near_MC)
    for row, cost_C, count in zip(chosen_MC, cost_MC, counts_M.tolist(), strict=True):
        row[cost_C.topk(min(count, len(cost_C)), largest=False).indices] = True
    several_C = chosen_MC.sum(0) > 1
    cheapest_MC = F.one_hot(cost_MC.argmin(0), len(boxes_M4)).T.bool()
    chosen_MC = torch.where(several_C, cheapest_MC, chosen_MC)
    taken = chosen_MC.any(0).nonzero()[:, 0]
    objects = chosen_MC[:, taken].int().argmax(0)
    return Assignment(candidates[taken], objects, iou_MC[objects, taken])


@dataclass(frozen=True)
class YOLOXObjective:
    """Box, objectness and class losses by the number of cells that learn an object.

    That number depends on what the network predicts. As in the published code it is counted for each forward pass:
    micro-batches weigh as much as they have images.
    """

    def totals(self, network: YOLOX, batch: ObjectBatch) -> list[float]:
        """The number of images."""
        return [len(batch.images_BCHW)]

    def __call__(
        self, network: YOLOX, batch: ObjectBatch, totals: Sequence[float], *, checkpointing: str = "none"
    ) -> Loss:
        """The share of the mean over images."""
        out_BNO = network(batch.images_BCHW).float()
        height, width = batch.images_BCHW.shape[2:]
        at = cells(height, width, out_BNO.device)
        predicted_BN4 = decode(out_BNO, at)
        learns_BN = torch.zeros_like(out_BNO[..., 4])
        predicted, boxes, logits, targets = list[Tensor](), list[Tensor](), list[Tensor](), list[Tensor]()
        for i, (boxes_M4, labels_M) in enumerate(zip(batch.boxes, batch.labels, strict=True)):
            if not len(boxes_M4):
                continue
            found = assign(out_BNO[i], predicted_BN4[i], boxes_M4, labels_M, at)
            learns_BN[i, found.cells] = 1
            predicted.append(predicted_BN4[i, found.cells])
            boxes.append(boxes_M4[found.objects])
            logits.append(out_BNO[i, found.cells, 5:])
            targets.append(F.one_hot(labels_M[found.objects], logits[-1].shape[1]) * found.ious[:, None])
        weight = len(batch.images_BCHW) / totals[0] / max(1.0, float(learns_BN.sum()))
        object_loss = F.binary_cross_entropy_with_logits(out_BNO[..., 4], learns_BN, reduction="sum") * weight
        box_loss = class_loss = object_loss.new_zeros(())
        if predicted:
            overlap_P = paired_iou(torch.cat(predicted), torch.cat(boxes))
            box_loss = BOX_WEIGHT * weight * (1 - overlap_P**2).sum()
            class_loss = weight * F.binary_cross_entropy_with_logits(
                torch.cat(logits), torch.cat(targets), reduction="sum"
            )
        metrics = {"box_loss": box_loss, "object_loss": object_loss, "class_loss": class_loss}
        return Loss(box_loss + object_loss + class_loss, {name: value.detach() for name, value in metrics.items()})

"""The losses of Faster R-CNN and Mask R-CNN, equal to torchvision's.

Legend: N boxes or anchors, G true boxes, K classes with the background (0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pentad.datasets.object_batches import ObjectBatch
from pentad.models.vision.mask_rcnn import BOX_WEIGHTS, RPN_WEIGHTS, MaskRCNN, Proposals
from pentad.nn.boxes import encode_boxes, pairwise_iou, roi_align
from pentad.train.objectives.loss import Loss

RPN_BATCH, RPN_POSITIVE, RPN_HIGH, RPN_LOW = 256, 0.5, 0.7, 0.3
BOX_BATCH, BOX_POSITIVE, BOX_THRESHOLD = 512, 0.25, 0.5
IGNORED = -1
BETA = 1 / 9  # of the smooth L1 losses


class Truth(NamedTuple):
    """The objects of an image.

    Attributes:
        boxes_G4: in pixels of the network's input.
        labels_G: from 1.
        masks_GHW: bool or float, of the input's size without padding; None for a Faster R-CNN.
    """

    boxes_G4: Tensor
    labels_G: Tensor
    masks_GHW: Tensor | None = None


@dataclass(frozen=True)
class MaskRCNNObjective:
    """The sum of the losses; micro-batches weigh as much as they have images.

    Attributes:
        proposals: the heads learn from so many boxes an image.
    """

    proposals: int = BOX_BATCH

    def totals(self, network: MaskRCNN, batch: ObjectBatch) -> list[float]:
        """The number of images."""
        return [len(batch.images_BCHW)]

    def __call__(
        self, network: MaskRCNN, batch: ObjectBatch, totals: Sequence[float], *, checkpointing: str = "none"
    ) -> Loss:
        """The share of the mean over images."""
        masks = batch.masks or [None] * len(batch.boxes)
        truths = [Truth(*one) for one in zip(batch.boxes, [k + 1 for k in batch.labels], masks, strict=True)]
        losses = mask_rcnn_losses(network, batch.images_BCHW, batch.sizes, truths, self.proposals)
        weight = len(batch.images_BCHW) / totals[0]
        parts = {name: weight * value for name, value in losses.items()}
        share = torch.stack(list(parts.values())).sum()
        return Loss(share, {name: value.detach() for name, value in parts.items()})


def mask_rcnn_losses(
    network: MaskRCNN,
    images_B3HW: Tensor,
    image_sizes: Sequence[tuple[int, int]],
    truths: Sequence[Truth],
    count: int = BOX_BATCH,
) -> dict[str, Tensor]:
    """The five losses (four without a mask head), whose sum is minimized.

    Boxes and anchors are sampled by torch's global generator.

    Args:
        network: in training mode.
        images_B3HW, image_sizes: see `MaskRCNN.forward`.
        truths: the objects of each image.
        count: the heads learn from so many boxes an image.
    """
    maps = network.maps(images_B3HW)
    proposals = network.propose(maps, images_B3HW.shape[2:], image_sizes)
    losses = _rpn_losses(proposals, truths)
    samples = [_sample(boxes_N4, truth, count) for boxes_N4, truth in zip(proposals.boxes, truths, strict=True)]
    boxes, matches, labels = zip(*samples, strict=True)
    logits_NK, deltas_NX = network.classify(maps, boxes, images_B3HW.shape[2])
    losses |= _box_losses(logits_NK, deltas_NX, boxes, matches, labels, truths)
    if network.config.masks:
        positive = [(label_N > 0).nonzero()[:, 0] for label_N in labels]
        chosen = [box_N4[at] for box_N4, at in zip(boxes, positive, strict=True)]
        matched = [match_N[at] for match_N, at in zip(matches, positive, strict=True)]
        logits_NKMM = network.masks(maps, chosen, images_B3HW.shape[2])
        losses["loss_mask"] = _mask_loss(logits_NKMM, chosen, matched, truths)
    return losses


def match(iou_GN: Tensor, high: float, low: float, *, best: bool) -> Tensor:
    """The true box of each box; -1 below `low`, -2 between the thresholds.

    Args:
        iou_GN: with at least one true box.
        high: from this IoU on boxes match.
        low: below it they are background.
        best: the boxes with the highest IoU of a true box match their own best, however low it is.
    """
    values_N, matches_N = iou_GN.max(0)
    found_N = torch.where(values_N < low, -1, torch.where(values_N < high, -2, matches_N))
    if best:
        tops = (iou_GN == iou_GN.max(1, keepdim=True)[0]).any(0)
        found_N = torch.where(tops, matches_N, found_N)
    return found_N


def balanced(labels_N: Tensor, count: int, positive: float) -> tuple[Tensor, Tensor]:
    """A random sample: the numbers of positive boxes (labels from 1), and of negative ones (0)."""
    positives, negatives = (labels_N >= 1).nonzero()[:, 0], (labels_N == 0).nonzero()[:, 0]
    some = min(len(positives), int(count * positive))
    rest = min(len(negatives), count - some)
    first = positives[torch.randperm(len(positives), device=labels_N.device)[:some]]
    return first.sort().values, negatives[torch.randperm(len(negatives), device=labels_N.device)[:rest]].sort().values


@torch.no_grad()
def _anchor_targets(anchors_N4: Tensor, truth: Truth) -> tuple[Tensor, Tensor]:
    """Labels (1, 0 or ignored) and matched boxes of anchors."""
    if not len(truth.boxes_G4):
        return anchors_N4.new_zeros(len(anchors_N4)), torch.zeros_like(anchors_N4)
    matches_N = match(pairwise_iou(truth.boxes_G4, anchors_N4), RPN_HIGH, RPN_LOW, best=True)
    labels_N = torch.where(matches_N >= 0, 1.0, torch.where(matches_N == -1, 0.0, float(IGNORED)))
    return labels_N, truth.boxes_G4[matches_N.clamp(min=0)]


def _rpn_losses(proposals: Proposals, truths: Sequence[Truth]) -> dict[str, Tensor]:
    targets = [_anchor_targets(proposals.anchors_N4, truth) for truth in truths]
    sampled = [balanced(labels_N, RPN_BATCH, RPN_POSITIVE) for labels_N, _ in targets]
    count = sum(len(positive) + len(negative) for positive, negative in sampled)
    objectness, wanted, box_loss = [], [], proposals.deltas_BN4.new_zeros(())
    for i, ((labels_N, boxes_N4), (positive, negative)) in enumerate(zip(targets, sampled, strict=True)):
        both = torch.cat([positive, negative])
        objectness.append(proposals.objectness_BN[i, both])
        wanted.append(labels_N[both])
        aims_P4 = encode_boxes(boxes_N4[positive], proposals.anchors_N4[positive], RPN_WEIGHTS)
        box_loss = box_loss + F.smooth_l1_loss(proposals.deltas_BN4[i, positive], aims_P4, beta=BETA, reduction="sum")
    loss = F.binary_cross_entropy_with_logits(torch.cat(objectness), torch.cat(wanted))
    return {"loss_objectness": loss, "loss_rpn_box_reg": box_loss / max(1, count)}


@torch.no_grad()
def _sample(proposals_N4: Tensor, truth: Truth, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """A sample of proposals and true boxes, the true box of each, and its label."""
    boxes_N4 = torch.cat([proposals_N4, truth.boxes_G4])
    if len(truth.boxes_G4):
        found_N = match(pairwise_iou(truth.boxes_G4, boxes_N4), BOX_THRESHOLD, BOX_THRESHOLD, best=False)
        matches_N = found_N.clamp(min=0)
        labels_N = torch.where(found_N == -1, 0, truth.labels_G[matches_N])
    else:
        matches_N = labels_N = torch.zeros(len(boxes_N4), dtype=torch.int64, device=boxes_N4.device)
    chosen = torch.cat(balanced(labels_N, count, BOX_POSITIVE)).sort().values
    return boxes_N4[chosen], matches_N[chosen], labels_N[chosen]


def _box_losses(
    logits_NK: Tensor,
    deltas_NX: Tensor,
    boxes: Sequence[Tensor],
    matches: Sequence[Tensor],
    labels: Sequence[Tensor],
    truths: Sequence[Truth],
) -> dict[str, Tensor]:
    labels_N = torch.cat(list(labels))
    true_N4 = torch.cat(
        [
            truth.boxes_G4[match_N] if len(truth.boxes_G4) else torch.zeros_like(box_N4)
            for truth, match_N, box_N4 in zip(truths, matches, boxes, strict=True)
        ]
    )
    positive = (labels_N > 0).nonzero()[:, 0]
    deltas_P4 = deltas_NX.view(len(labels_N), -1, 4)[positive, labels_N[positive]]
    aims_P4 = encode_boxes(true_N4[positive], torch.cat(list(boxes))[positive], BOX_WEIGHTS)
    box_loss = F.smooth_l1_loss(deltas_P4, aims_P4, beta=BETA, reduction="sum") / len(labels_N)
    return {"loss_classifier": F.cross_entropy(logits_NK, labels_N), "loss_box_reg": box_loss}


def _mask_loss(
    logits_NKMM: Tensor, boxes: Sequence[Tensor], matches: Sequence[Tensor], truths: Sequence[Truth]
) -> Tensor:
    if not len(logits_NKMM):
        return logits_NKMM.sum() * 0
    side, aims, labels = logits_NKMM.shape[-1], [], []
    for boxes_N4, matches_N, truth in zip(boxes, matches, truths, strict=True):
        assert truth.masks_GHW is not None
        masks_G1HW = truth.masks_GHW[:, None].to(boxes_N4.dtype)
        aims.append(roi_align(masks_G1HW, boxes_N4, matches_N, (side, side), aligned=False)[:, 0])
        labels.append(truth.labels_G[matches_N])
    labels_N = torch.cat(labels)
    chosen_NMM = logits_NKMM[torch.arange(len(labels_N), device=labels_N.device), labels_N]
    return F.binary_cross_entropy_with_logits(chosen_NMM, torch.cat(aims))

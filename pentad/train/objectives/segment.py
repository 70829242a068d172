"""Training Segment Anything (arXiv:2304.02643, appendix A): each object is asked for several times, as by a person who
clicks where the last answer was wrong.

Legend: P objects of all images of a batch, M masks of a prompt, H by W pixels of the network's input, U a quarter of
them, K points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pentad.datasets.object_batches import ObjectBatch
from pentad.models.vision.sam.mask_decoder import ImageRows
from pentad.models.vision.sam.prompt_encoder import BACKGROUND, FOREGROUND, Prompts
from pentad.models.vision.sam.sam import MASK_THRESHOLD, Sam
from pentad.train.objectives.loss import Loss
from pentad.train.objectives.words import Words

WEIGHTS = (20.0, 1.0, 1.0)
"""Of the focal loss, the dice loss, and the error of the predicted IoU."""
FOCUS, POSITIVE = 2.0, 0.25
"""Gamma and alpha of the focal loss (arXiv:1708.02002)."""
BOX_NOISE, MOST_NOISE = 0.1, 20.0
"""The standard deviation of a box's corners by its sides, and the most that they move, in pixels."""


@dataclass(frozen=True)
class SegmentObjective:
    """Focal and dice losses of the best mask, and the error of all predicted IoUs: the mean over rounds and objects.

    The first round's prompt is a point of the object, its box moved a little, or words. Each later one adds the last
    mask and a point of where it was wrong, but for two rounds that add the mask only.

    Attributes:
        clicks: rounds with another point.
        objects: the most objects of an image.
        words: chooses the objects that begin with words; None for none.
    """

    clicks: int = 8
    objects: int = 64
    words: Words | None = None

    def totals(self, network: Sam, batch: ObjectBatch) -> list[float]:
        """The number of objects, and how many begin with words."""
        objects = sum(min(len(boxes), self.objects) for boxes in batch.boxes)
        return [objects] if self.words is None else [objects, float(self._chosen(self._objects(batch)[2]).sum())]

    def __call__(
        self, network: Sam, batch: ObjectBatch, totals: Sequence[float], *, checkpointing: str = "none"
    ) -> Loss:
        """The share of the mean over objects."""
        image_P, boxes_P4, truth_PHW = self._objects(batch)
        spoken_P = self._chosen(truth_PHW)  # drawn as in `totals`, so before the network draws anything
        maps_BDSS = network.image_encoder(batch.images_BCHW, checkpointing=checkpointing)
        share, metrics = maps_BDSS.sum() * 0, dict[str, Tensor]()
        for words, P in ((False, (~spoken_P).nonzero()[:, 0]), (True, spoken_P.nonzero()[:, 0])):
            if not len(P):
                continue
            if words:
                assert self.words is not None
                prompts = Prompts(text_PE=self.words.embed(batch, image_P[P], boxes_P4[P], truth_PHW[P]))
            else:
                prompts = first_prompts(boxes_P4[P], truth_PHW[P])
            image_PND = maps_BDSS.flatten(2).transpose(1, 2)[image_P[P]]
            loss = self._losses(network, image_PND, prompts, truth_PHW[P], totals[0])
            share = share + loss.share
            for name, value in loss.metrics.items():
                metrics[name] = metrics[name] + value if name in metrics else value
            if words:
                metrics["words_iou"] = loss.metrics["first_iou"] * totals[0] / totals[1]
        return Loss(share, metrics)

    def _losses(self, network: Sam, image_PND: Tensor, prompts: Prompts, truth_PHW: Tensor, objects: float) -> Loss:
        """All rounds of objects with prompts of one kind; a share of the mean over `objects`."""
        at_P = torch.arange(len(truth_PHW), device=truth_PHW.device)
        rounds, losses, ious = self._rounds(), list[Tensor](), list[Tensor]()
        positions_ND = network.prompt_encoder.grid()
        for number, click in enumerate([*rounds, False]):
            sparse_PTD, dense = network.prompt_encoder(prompts)
            image = ImageRows.of(image_PND + dense, positions_ND)
            logits_PMUU, predicted_PM = network.mask_decoder(image, positions_ND, sparse_PTD, multimask=number == 0)
            predicted_PM, logits_PMUU = predicted_PM.float(), logits_PMUU.float()
            losses_3, ious_PM = mask_losses(logits_PMUU, predicted_PM, truth_PHW)
            losses.append(losses_3)
            best_P = predicted_PM.argmax(1)
            ious.append(ious_PM[at_P, best_P].sum() / objects)
            prompts = next_prompts(prompts, logits_PMUU[at_P, best_P].detach()[:, None], truth_PHW, click=click)
        shares_3 = torch.stack(losses).mean(0) * losses[0].new_tensor(WEIGHTS) / objects
        metrics = dict(zip(("focal_loss", "dice_loss", "iou_loss"), shares_3.detach(), strict=True))
        return Loss(shares_3.sum(), metrics | {"first_iou": ious[0], "last_iou": ious[-1]})

    def _objects(self, batch: ObjectBatch) -> tuple[Tensor, Tensor, Tensor]:
        """The image of each object [P], boxes [P, 4], and masks in the padded input [P, H, W]; a random choice."""
        assert batch.masks is not None
        height, width = batch.images_BCHW.shape[2:]
        images, boxes, masks = list[int](), list[Tensor](), list[Tensor]()
        for number, (boxes_N4, masks_NHW) in enumerate(zip(batch.boxes, batch.masks, strict=True)):
            chosen = torch.randperm(len(boxes_N4), device=boxes_N4.device)[: self.objects]
            images += [number] * len(chosen)
            boxes.append(boxes_N4[chosen])
            below, right = height - masks_NHW.shape[1], width - masks_NHW.shape[2]
            masks.append(F.pad(masks_NHW[chosen], (0, right, 0, below)))
        return torch.tensor(images, device=boxes[0].device, dtype=torch.int64), torch.cat(boxes), torch.cat(masks)

    def _chosen(self, truth_PHW: Tensor) -> Tensor:
        """Which objects begin with words, [P]."""
        if self.words is None:
            return torch.zeros(len(truth_PHW), dtype=torch.bool, device=truth_PHW.device)
        return self.words.choose(truth_PHW)

    def _rounds(self) -> list[bool]:
        """Whether each round after the first begins with a click; one at random and the last one don't."""
        if not self.clicks:
            return []
        rounds = [True] * self.clicks
        rounds.insert(int(torch.randint(len(rounds) + 1, ())), False)
        return [*rounds, False]


def mask_losses(logits_PMUU: Tensor, predicted_PM: Tensor, truth_PHW: Tensor) -> tuple[Tensor, Tensor]:
    """Losses, summed over prompts: focal and dice of the best mask, and the predicted IoUs' squared error.

    Returns:
        The losses [3] and the masks' IoUs [P, M].
    """
    logits_PMHW = F.interpolate(logits_PMUU, truth_PHW.shape[1:], mode="bilinear", align_corners=False)
    truth_PN1 = truth_PHW.flatten(1)[:, :, None].float()
    area_P1 = truth_PN1.sum(1)
    against_PMN = logits_PMHW.flatten(2) * (1 - 2 * truth_PN1).mT  # above 0 where the mask is wrong
    wrong_PMN = against_PMN.sigmoid()  # the probability that the mask is wrong
    focal_PMN = wrong_PMN**FOCUS * F.softplus(against_PMN)
    inside_PM, all_PM = (focal_PMN @ truth_PN1)[..., 0], focal_PMN.sum(2)
    focal_PM = (POSITIVE * inside_PM + (1 - POSITIVE) * (all_PM - inside_PM)) / truth_PN1.shape[1]
    missed_PM, wrong_PM = (wrong_PMN @ truth_PN1)[..., 0], wrong_PMN.sum(2)
    dice_PM = 1 - (2 * (area_P1 - missed_PM) + 1) / (2 * (area_P1 - missed_PM) + wrong_PM + 1)
    with torch.no_grad():
        error_PMN = (logits_PMHW.flatten(2) > MASK_THRESHOLD) ^ (truth_PN1 > 0).mT
        missed_PM = (error_PMN.float() @ truth_PN1)[..., 0]
        ious_PM = (area_P1 - missed_PM) / (area_P1 - missed_PM + error_PMN.sum(2)).clamp(min=1)
        best_P1 = (WEIGHTS[0] * focal_PM + WEIGHTS[1] * dice_PM).argmin(1, keepdim=True)
    errors_P = (predicted_PM - ious_PM).square().mean(1)
    return torch.stack((focal_PM.gather(1, best_P1).sum(), dice_PM.gather(1, best_P1).sum(), errors_P.sum())), ious_PM


def first_prompts(boxes_P4: Tensor, truth_PHW: Tensor) -> Prompts:
    """Points of the objects or their boxes moved a little, with equal probability for all objects."""
    if torch.rand(()) < 0.5:
        labels_P1 = torch.full((len(truth_PHW), 1), FOREGROUND, device=truth_PHW.device)
        return Prompts(random_points(truth_PHW)[:, None], labels_P1)
    sides_P4 = (boxes_P4[:, 2:] - boxes_P4[:, :2]).repeat(1, 2)
    noise_P4 = (torch.randn_like(boxes_P4) * BOX_NOISE * sides_P4).clamp(-MOST_NOISE, MOST_NOISE)
    return Prompts(boxes_P4=boxes_P4 + noise_P4)


@torch.no_grad()
def next_prompts(prompts: Prompts, logits_P1UU: Tensor, truth_PHW: Tensor, *, click: bool) -> Prompts:
    """The prompts with the last mask and, if `click`, a point of its error: missed foreground or wrong background.

    Where the mask is right, the point is one of the object.
    """
    prompts = replace(prompts, masks_P1MM=logits_P1UU)
    if not click:
        return prompts
    logits_P1HW = F.interpolate(logits_P1UU, truth_PHW.shape[1:], mode="bilinear", align_corners=False)
    wrong_PHW = (logits_P1HW[:, 0] > MASK_THRESHOLD) ^ truth_PHW
    right_P = ~wrong_PHW.flatten(1).any(1)
    points_P2 = random_points(torch.where(right_P[:, None, None], truth_PHW, wrong_PHW))
    x_P, y_P = points_P2.long().unbind(1)
    inside_P = truth_PHW[torch.arange(len(truth_PHW), device=x_P.device), y_P, x_P]
    labels_P = torch.where(inside_P, FOREGROUND, BACKGROUND)
    if prompts.points_PK2 is None or prompts.labels_PK is None:
        return replace(prompts, points_PK2=points_P2[:, None], labels_PK=labels_P[:, None])
    points_PK2 = torch.cat((prompts.points_PK2, points_P2[:, None]), 1)
    return replace(prompts, points_PK2=points_PK2, labels_PK=torch.cat((prompts.labels_PK, labels_P[:, None]), 1))


def random_points(areas_PHW: Tensor) -> Tensor:
    """A random pixel of each area, x and y [P, 2]; of an empty one, any pixel."""
    weights_PN = areas_PHW.flatten(1).float()
    weights_PN = torch.where(weights_PN.any(1, keepdim=True), weights_PN, 1.0)
    at_P = torch.multinomial(weights_PN, 1)[:, 0]
    return torch.stack((at_P % areas_PHW.shape[2], at_P // areas_PHW.shape[2]), 1).float()

"""How good detectors, segmenters and classifiers of images are: COCO's AP and AR, mean IoU, top-k accuracy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pentad.datasets.coco import coco_json
from pentad.datasets.objects import LabeledImage
from pentad.errors import BadInput
from pentad.vision.masks import RLE

__all__ = ["CocoMetrics", "Confusion", "coco_metrics", "coco_results", "top_k_accuracy"]


@dataclass(frozen=True)
class CocoMetrics:
    """COCO's numbers, each from 0 to 1; None where no object is of that size.

    Attributes:
        by_class: `ap` of each class that has objects.
        ap: average precision, the mean over IoU thresholds from 0.50 to 0.95, and over classes.
        ap50, ap75: at one threshold.
        ap_small, ap_medium, ap_large: of objects below 32², below 96² and above 96² pixels.
        ar1, ar10, ar100: average recall with so many detections an image.
        ar_small, ar_medium, ar_large: average recall by size, with 100 detections.
    """

    by_class: dict[str, float]
    ap: float | None
    ap50: float | None
    ap75: float | None
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    ar1: float | None
    ar10: float | None
    ar100: float | None
    ar_small: float | None
    ar_medium: float | None
    ar_large: float | None


def coco_results(
    image: LabeledImage, boxes_N4: Tensor, scores_N: Tensor, labels_N: Tensor, masks: Sequence[RLE] | None = None
) -> list[dict[str, Any]]:
    """Detections of an image in COCO's format of results; the category of label 0 is 1, as in `coco_json`."""
    rows = zip(boxes_N4.tolist(), scores_N.tolist(), labels_N.tolist(), strict=True)
    results: list[dict[str, Any]] = [
        {"image_id": image.number, "category_id": label + 1, "bbox": [x0, y0, x1 - x0, y1 - y0], "score": score}
        for (x0, y0, x1, y1), score, label in rows
    ]
    for result, mask in zip(results, masks or (), strict=masks is not None):
        result["segmentation"] = mask
    return results


def coco_metrics(
    names: Sequence[str], images: Iterable[LabeledImage], results: Sequence[dict[str, Any]], *, masks: bool = False
) -> CocoMetrics:
    """Compare detections with the truth, as COCO's tools do (by faster-coco-eval).

    Args:
        names: of the classes.
        images: the true objects; crowds neither count as missed nor as found.
        results: detections of all images, as `coco_results` gives them.
        masks: compare masks instead of boxes.

    Raises:
        BadInput: an object has no mask to compare with, or a result is of an unknown image.
    """
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ModuleNotFoundError as error:
        raise BadInput("COCO's metrics need faster-coco-eval; install it: pip install 'pentad[vision]'") from error
    truth = coco_json(names, images)
    for annotation in truth["annotations"] if masks else ():
        if "segmentation" not in annotation:
            raise BadInput(f"an object of image {annotation['image_id']} has no mask; expected masks of all objects")
    known = {image["id"] for image in truth["images"]}
    if strangers := {result["image_id"] for result in results} - known:
        raise BadInput(f"a result is of image {min(strangers)}, which the data set doesn't have")
    if not results or not truth["annotations"]:
        value = None if not truth["annotations"] else 0.0
        return CocoMetrics({}, *[value] * 12)
    peer = COCO(truth)
    kept = ("image_id", "category_id", "score", "segmentation" if masks else "bbox")
    evaluation = COCOeval_faster(
        peer, peer.loadRes([{key: result[key] for key in kept} for result in results]), "segm" if masks else "bbox"
    )
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    numbers = [None if number < 0 else float(number) for number in evaluation.stats[:12]]
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # thresholds, recalls, classes
    each = {name: precision[:, :, label] for label, name in enumerate(names)}
    return CocoMetrics({name: float(p.mean()) for name, p in each.items() if (p >= 0).all()}, *numbers)


class Confusion:
    """Counts pixels (or images) of each true class by their predicted class.

    Args:
        classes: how many there are.
        ignored: a true label that isn't counted.
    """

    def __init__(self, classes: int, *, ignored: int = 255) -> None:
        self.classes, self.ignored = classes, ignored
        self.counts = torch.zeros(classes, classes, dtype=torch.int64)

    def add(self, predicted: Tensor, truth: Tensor) -> None:
        """Count labels, two tensors of one shape."""
        chosen = truth != self.ignored
        pairs = truth[chosen].long() * self.classes + predicted[chosen].long()
        self.counts += torch.bincount(pairs.cpu(), minlength=self.classes**2).view(self.classes, self.classes)

    def iou(self) -> Tensor:
        """Intersection over union of each class; NaN if it neither is there nor was predicted."""
        right = self.counts.diagonal().double()
        return right / (self.counts.sum(0) + self.counts.sum(1) - right)

    def mean_iou(self) -> float:
        """The mean of `iou` over the classes that have it."""
        return self.iou().nanmean().item()

    def accuracy(self) -> float:
        """The share of labels that are right."""
        return (self.counts.diagonal().sum() / self.counts.sum()).item()


def top_k_accuracy(logits_NC: Tensor, labels_N: Tensor, k: int = 1) -> float:
    """The share of rows whose label is among the k highest logits; NaN without rows."""
    best_NK = logits_NC.topk(min(k, logits_NC.shape[1])).indices
    return float(np.mean((best_NK == labels_N[:, None]).any(1).cpu().numpy())) if len(labels_N) else float("nan")

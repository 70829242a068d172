"""A detector on a data set of labeled objects: COCO's numbers, and how long an image takes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pentad.datasets.objects import ObjectDataset
from pentad.errors import BadInput
from pentad.evaluate.vision import CocoMetrics, coco_metrics
from pentad.vision.detector import Detector
from pentad.weights.cache import Progress, task

__all__ = ["DetectorReport", "evaluate_detector", "same_classes"]

THRESHOLD = 0.001
"""AP counts objects by falling score, so even unlikely ones are wanted."""
MAX_DETECTIONS = 100
_OTHER_NAMES = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}
"""Darknet's and Pascal VOC's names of COCO's classes."""


@dataclass(frozen=True)
class DetectorReport:
    """A detector's numbers.

    Attributes:
        boxes: COCO's, of boxes.
        masks: of masks; None if the detector or the data set has none.
        seconds: for all images, with reading them.
        missing: classes of the data set that the detector doesn't know.
    """

    boxes: CocoMetrics
    masks: CocoMetrics | None
    seconds: float
    missing: tuple[str, ...]


def evaluate_detector(
    detector: Detector,
    dataset: ObjectDataset,
    *,
    threshold: float = THRESHOLD,
    progress: Progress | None = None,
    **options: Any,
) -> DetectorReport:
    """Detect the objects of all images, and compare them with the truth.

    Args:
        detector: a loaded model.
        dataset: the truth; classes are matched by name, or by number where both have equally many.
        threshold: the least score.
        progress: is told of each image.
        options: of `Detector.detect`.

    Raises:
        BadInput: detector and data set have no class in common, or an image can't be read.
    """
    classes = same_classes(detector.labels, dataset.names)
    results = list[dict[str, Any]]()
    started = time.perf_counter()
    with task(progress or Progress(), "Detecting", len(dataset)):
        for image in dataset.images:
            [found] = detector.detect(image.path, threshold=threshold, **options)
            known = [one for one in found.detections if one.label_id in classes][:MAX_DETECTIONS]
            results += [_result(image.number, classes[one.label_id], one) for one in known]
            if progress is not None:
                progress.advance(1)
    seconds = time.perf_counter() - started
    with_masks = any("segmentation" in result for result in results) and all(
        one.segmentation is not None for image in dataset.images for one in image.objects
    )
    return DetectorReport(
        coco_metrics(dataset.names, dataset.images, results),
        coco_metrics(dataset.names, dataset.images, results, masks=True) if with_masks else None,
        seconds,
        tuple(name for label, name in enumerate(dataset.names) if label not in classes.values()),
    )


def _result(image: int, label: int, one: Any) -> dict[str, Any]:
    x0, y0, x1, y1 = one.box
    result = {"image_id": image, "category_id": label + 1, "bbox": [x0, y0, x1 - x0, y1 - y0], "score": one.score}
    mask = getattr(one, "mask", None)
    return result if mask is None else {**result, "segmentation": mask}


def same_classes(labels: Sequence[str], names: Sequence[str]) -> dict[int, int]:
    """A detector's classes and those of a data set that are the same: number -> number."""
    numbers = {_plain(name): number for number, name in enumerate(names)}
    found = {label: numbers[_plain(name)] for label, name in enumerate(labels) if _plain(name) in numbers}
    if len(found) < len(names) and len(labels) == len(names):
        return {number: number for number in range(len(names))}
    if not found:
        raise BadInput(f"the model and the data have no class in common: {_some(labels)}; {_some(names)}")
    return found


def _plain(name: str) -> str:
    name = name.lower().strip()
    return _OTHER_NAMES.get(name, name)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (" …" if len(names) > 5 else "")

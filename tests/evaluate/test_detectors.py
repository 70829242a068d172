"""Detectors on data sets of labeled objects."""

from pathlib import Path

import pytest

from pentad import BadInput
from pentad.datasets.object_folders import read_objects
from pentad.evaluate.detectors import evaluate_detector, same_classes
from pentad.vision.detector import Detection, Detections
from tests.helpers.labeled_images import write_coco


class Oracle:
    """Finds what it was told to find."""

    labels = ("dog", "bird", "cat", "tvmonitor")

    def __init__(self, **found: list[Detection]) -> None:
        self.found = found

    def detect(self, image: Path, *, threshold: float) -> list[Detections]:
        return [Detections(str(image), 1, 1, tuple(self.found.get(image.stem, ())))]


def test_classes_are_matched_by_name(tmp_path: Path) -> None:
    dataset = read_objects(write_coco(tmp_path))
    right = Detection((2, 3, 12, 8), "dog", 0, 0.9)
    strange = Detection((0, 0, 5, 5), "bird", 1, 0.95)
    report = evaluate_detector(Oracle(a=[strange, right]), dataset)
    assert report.boxes.by_class == {"dog": pytest.approx(1), "cat": 0}
    assert report.boxes.ap50 == pytest.approx(0.5)
    assert report.missing == ("unseen",)
    assert report.masks is None
    assert same_classes(["aeroplane", "TV"], ["tv", "airplane", "x"]) == {0: 1, 1: 0}
    assert same_classes(["a", "b"], ["c", "d"]) == {0: 0, 1: 1}
    assert same_classes(["b", "a"], ["a", "b"]) == {0: 1, 1: 0}
    with pytest.raises(BadInput, match="no class in common: a; b, c"):
        same_classes(["a"], ["b", "c"])

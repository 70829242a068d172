"""The real weights of pentad's detectors on real photos: OpenCV's boxes."""

from pathlib import Path

import pytest

import pentad
from pentad.vision.detector import Detector
from pentad.weights.registry import locate
from tests.helpers.opencv_yolo import OpenCVDetector, assert_same_boxes
from tests.helpers.shared_data import shared_data


@pytest.mark.network
@pytest.mark.parametrize("name", ["yolov3-tiny", "yolo-fastest-1.1", "yolo-fastest-1.1-xl"])
def test_boxes_are_opencvs(name: str) -> None:
    photos = sorted(shared_data("photos").glob("*.jpg"))
    try:
        path: Path = locate(name)
    except pentad.PentadError as error:
        pytest.skip(f"{name} can't be pulled here: {error}")
    model, peer = pentad.load(name), OpenCVDetector(path)
    assert isinstance(model, Detector)
    found = 0
    for photo in photos:
        (ours,) = model.detect(photo, threshold=0.2)
        assert_same_boxes(ours, *peer(photo, 0.2))
        found += len(ours.detections)
    assert found >= 15

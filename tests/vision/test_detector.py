"""The Detector: real weights on real photos give OpenCV's boxes; inputs, letterboxes, classes and errors."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import pentad
from pentad.media.images import image_size
from pentad.vision.detector import Detector
from tests.helpers.darknet_files import net, section, v4, write
from tests.helpers.opencv_yolo import OpenCVDetector, assert_same_boxes
from tests.helpers.shared_data import shared_data


def load(path: Path) -> Detector:
    model = pentad.load(path)
    assert isinstance(model, Detector)
    return model


@pytest.fixture(scope="module")
def fastest() -> Detector:
    """The real Yolo-Fastest 1.1."""
    return load(shared_data("yolo/yolo-fastest-1.1.cfg"))


@pytest.fixture
def tiny(tmp_path: Path) -> Detector:
    return load(write(tmp_path, v4()))


@pytest.mark.parametrize("photo", ["dog", "horses", "person", "sam_dog", "sam_groceries", "sam_truck"])
def test_real_weights_give_opencvs_boxes(fastest: Detector, photo: str) -> None:
    path = shared_data(f"photos/{photo}.jpg")
    peer = OpenCVDetector(shared_data("yolo/yolo-fastest-1.1.cfg"))
    (found,) = fastest.detect(path, threshold=0.2)
    assert_same_boxes(found, *peer(path, 0.2))
    assert (found.image, found.width, found.height) == (str(path), *reversed(image_size(path)))
    assert [one.score for one in found.detections] == sorted((one.score for one in found.detections), reverse=True)


def test_the_dog_is_a_dog(fastest: Detector) -> None:
    (found,) = fastest.detect(shared_data("photos/dog.jpg"), threshold=0.5)
    assert {"dog", "car", "bicycle"} <= {one.label for one in found.detections}
    (found,) = fastest.detect(shared_data("photos/dog.jpg"), threshold=0.5, classes=["dog", 2])
    assert [(one.label, one.label_id) for one in found.detections] == [("car", 2), ("dog", 16)]
    (letterboxed,) = fastest.detect(shared_data("photos/dog.jpg"), threshold=0.3, letterbox=True)
    dog = next(one for one in letterboxed.detections if one.label == "dog")
    assert dog.box == pytest.approx(found.detections[1].box, abs=60)


def test_batches_and_kinds_of_images_give_the_same(tiny: Detector, tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (3, 40, 70), dtype=torch.uint8)
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    picture.save(tmp_path / "x.png")
    other = torch.randint(0, 256, (3, 20, 9), dtype=torch.uint8)
    kinds = [pixels, picture, tmp_path / "x.png", str(tmp_path / "x.png"), (tmp_path / "x.png").read_bytes(), other]
    results = tiny.detect(kinds, threshold=0.4, batch_size=4)
    assert len(results) == len(kinds)
    assert results[0].detections
    for result in results[:5]:
        assert result.detections == results[0].detections
    (alone,) = tiny.detect(other, threshold=0.4)
    assert [one.label for one in alone.detections] == [one.label for one in results[5].detections]
    fields = json.loads(json.dumps(results[2].to_json()))
    assert (fields["image"], fields["width"], fields["height"]) == (str(tmp_path / "x.png"), 70, 40)
    one = results[0].detections[0]
    expected = {"box": list(one.box), "label": one.label, "label_id": one.label_id, "score": one.score}
    assert fields["detections"][0] == expected


def test_letterboxes_as_darknet_does() -> None:
    """The loops of Darknet's resize_image and embed_image, in double precision."""
    from pentad.vision.darknet import _letterboxed

    image = torch.randint(0, 256, (3, 9, 14), dtype=torch.uint8)
    out = _letterboxed(image, 16, 16)
    height = 9 * 16 // 14
    assert out.shape == (3, 16, 16)
    top = (16 - height) // 2
    assert torch.all(out[:, :top] == 0.5)
    assert torch.all(out[:, top + height :] == 0.5)
    y, x = 4, 11
    sy, sx = y * (9 - 1) / (height - 1), x * (14 - 1) / (16 - 1)
    iy, ix = int(sy), int(sx)
    dy, dx = sy - iy, sx - ix
    pixel = image[:, iy : iy + 2, ix : ix + 2].double() / 255
    expected = (1 - dy) * ((1 - dx) * pixel[:, 0, 0] + dx * pixel[:, 0, 1])
    expected += dy * ((1 - dx) * pixel[:, 1, 0] + dx * pixel[:, 1, 1])
    torch.testing.assert_close(out[:, top + y, x], expected.float(), atol=1e-6, rtol=0)


def test_boxes_of_letterboxed_images_are_in_the_images_pixels(tmp_path: Path) -> None:
    """A network that always sees an object in the middle of its input, half as large as it."""
    text = net(32, 16) + section("avgpool") + section("convolutional", filters=6, size=1, stride=1, activation="linear")
    text += section("region", classes=1, num=1, anchors="0.5,0.5", softmax=1)
    path = tmp_path / "middle.cfg"
    path.write_text(text)
    numbers = torch.tensor([0.0, 0, 0, 0, 5, 0] + [0.0] * 18)
    path.with_suffix(".weights").write_bytes(bytes([0, 0, 0, 0, 2, 0, 0, 0] + [0] * 12) + numbers.numpy().tobytes())
    detector = load(path)
    for height, width, expected in ((60, 60, (0, 15, 60, 45)), (20, 80, (20, 0, 60, 20))):
        image = torch.zeros(3, height, width, dtype=torch.uint8)
        (found,) = detector.detect(image, letterbox=True)
        assert found.detections[0].box == pytest.approx(expected, abs=1e-4)
        (stretched,) = detector.detect(image)
        assert stretched.detections[0].box == pytest.approx((width / 4, height / 4, width * 0.75, height * 0.75))
        assert stretched.detections[0].label == "class 0"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.5}, r"threshold is 1\.5; expected"),
        ({"threshold": float("nan")}, r"threshold is nan; expected"),
        ({"classes": ["dog"]}, r"class is 'dog'; expected one of class 0, class 1, class 2, or a number below 3"),
        ({"classes": [3]}, r"class is 3; expected"),
        ({"batch_size": 0}, r"batch_size is 0; expected"),
    ],
)
def test_bad_options(tiny: Detector, options: dict[str, object], message: str) -> None:
    with pytest.raises(pentad.BadInput, match=message):
        tiny.detect(torch.zeros(3, 8, 8, dtype=torch.uint8), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("image", [torch.zeros(3, 8, 8), torch.zeros(8, 8, 3).byte(), torch.zeros(3, 0, 8).byte()])
def test_bad_tensors(tiny: Detector, image: torch.Tensor) -> None:
    with pytest.raises(pentad.BadInput, match=r"the image is .*; expected uint8 \[3, height, width\]"):
        tiny.detect(image)


def test_a_network_without_a_detection_layer_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, net(8, 8) + section("convolutional", filters=2, activation="linear"))
    with pytest.raises(pentad.BadInput, match="no detection layer"):
        pentad.load(path)


def test_no_images_give_no_results(tiny: Detector) -> None:
    assert tiny.detect([]) == []

"""Detectors: boxes with labels and scores, for images of any size."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from pentad.errors import BadInput
from pentad.vision.darknet import DarknetPredictor
from pentad.vision.found import Found
from pentad.vision.mask_rcnn import MaskRCNNPredictor
from pentad.vision.masks import RLE
from pentad.vision.runner import VisionModel, pixels_of
from pentad.vision.yolox import YOLOXPredictor
from pentad.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from pentad.vision.runner import Image

THRESHOLD = 0.25
PREDICTORS: dict[str, Callable[..., Any]] = {
    "Darknet": DarknetPredictor,
    "YOLOX": YOLOXPredictor,
    "MaskRCNN": MaskRCNNPredictor,
}
"""A network's class -> its pre- and postprocessing."""


@dataclass(frozen=True, slots=True)
class Detection:
    """One object.

    Attributes:
        box: x0, y0, x1, y1 in pixels; as in OpenCV it may reach beyond the image.
        label: name of its class.
        label_id: number of its class.
        score: from 0 to 1.
        mask: COCO's run-length code; None if the detector finds boxes only.
    """

    box: tuple[float, float, float, float]
    label: str
    label_id: int
    score: float
    mask: RLE | None = None


@dataclass(frozen=True, slots=True)
class Detections:
    """The objects of one image.

    Attributes:
        image: the image's path; None if it has none.
        width, height: of the image, in pixels.
        detections: the objects, by falling score.
    """

    image: str | None
    width: int
    height: int
    detections: tuple[Detection, ...]

    def to_json(self, frame: int | None = None, time: float | None = None) -> dict[str, Any]:
        """The fields as JSON has them.

        Args:
            frame, time: number and seconds of a video's frame.
        """
        moment = {} if frame is None else {"frame": frame, "time": time}
        found = [{k: v for k, v in asdict(one).items() if v is not None} for one in self.detections]
        return {"image": self.image, **moment, **asdict(self), "detections": found}


class Detector(VisionModel):
    """A detector that is ready to run.

    >>> import pentad
    >>> detector = pentad.load("yolov3-tiny")
    >>> for found in detector.detect(["dog.jpg", "cat.jpg"], threshold=0.5):
    ...     print(found.image, [(one.label, one.score, one.box) for one in found.detections])
    """

    task: ClassVar[str] = "detect"

    def __init__(self, name: str, network: nn.Module, checkpoint: Checkpoint, *, load_seconds: float = 0.0) -> None:
        super().__init__(name, network, checkpoint, load_seconds=load_seconds)
        self._predictors: dict[bool, Any] = {}
        if not self.labels:
            raise BadInput(f"{name} has no detection layer, so it finds no boxes; expected one of a detector")

    @property
    def labels(self) -> Sequence[str]:
        """The labels of all classes, by number."""
        labels: Sequence[str] = self.network.config.names  # type: ignore[union-attr, assignment]
        return labels

    def detect(
        self,
        images: Image | Sequence[Image],
        *,
        threshold: float = THRESHOLD,
        letterbox: bool = False,
        classes: Collection[str | int] | None = None,
        batch_size: int = 1,
    ) -> list[Detections]:
        """Find the objects of images.

        Args:
            images: one image or several.
            threshold: the least score of an object.
            letterbox: keep the aspect ratio and fill the rest with gray, as Darknet does; the default stretches images
                to the network's size, as OpenCV's users do.
            classes: labels or numbers of the classes to look for; all by default.
            batch_size: images that go through the network together.

        Returns:
            One result for each image.

        Raises:
            BadInput: an image can't be read, or an argument is out of range.
        """
        single = isinstance(images, str | Path | bytes | Tensor) or not isinstance(images, Sequence)
        many: Sequence[Image] = [images] if single else images  # type: ignore[list-item, assignment]
        if not 0 <= threshold <= 1:
            raise BadInput(f"threshold is {threshold}; expected a number from 0 to 1")
        if batch_size < 1:
            raise BadInput(f"batch_size is {batch_size}; expected a whole number of at least 1")
        wanted = None if classes is None else {self.label_id(one) for one in classes}
        predict = self._predictor(letterbox)
        results = []
        for start in range(0, len(many), batch_size):
            batch = many[start : start + batch_size]
            pixels = [pixels_of(image) for image in batch]
            for image, tensor, found in zip(batch, pixels, predict(pixels, threshold), strict=True):
                name = str(image) if isinstance(image, str | Path) else None
                height, width = tensor.shape[1:]
                results.append(Detections(name, width, height, tuple(self._objects(found, wanted))))
        return results

    def _predictor(self, letterbox: bool) -> Any:
        if letterbox not in self._predictors:
            make = PREDICTORS[type(self.network).__name__]
            self._predictors[letterbox] = make(self.network, letterbox=letterbox)
        return self._predictors[letterbox]

    def _objects(self, found: Found, wanted: set[int] | None) -> Iterator[Detection]:
        masks: Sequence[RLE | None] = found.masks or [None] * len(found.labels_N)
        for box, score, label, mask in zip(*(one.tolist() for one in found[:3]), masks, strict=True):
            if wanted is None or label in wanted:
                yield Detection(tuple(box), self.labels[label], label, score, mask)

    def label_id(self, label: str | int) -> int:
        """The number of a class, by its label or number.

        Raises:
            BadInput: there is none.
        """
        if label in self.labels:
            return self.labels.index(str(label))
        if str(label).isdecimal() and int(label) < len(self.labels):
            return int(label)
        known = ", ".join(self.labels[:100])
        raise BadInput(f"class is {label!r}; expected one of {known}, or a number below {len(self.labels)}")

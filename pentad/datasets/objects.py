"""Labeled objects in images: what every reader of a data set gives, and every writer takes.

A data set is a sequence of samples with the classes' names: `ObjectDataset` of files, `pentad.datasets.scenes.Scenes`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pentad.errors import BadInput
from pentad.vision import masks
from pentad.vision.masks import RLE

__all__ = ["LabeledImage", "Object", "ObjectDataset", "Objects", "Problems", "Sample", "fitting_box"]

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Object:
    """One object of an image.

    Attributes:
        box: x0, y0, x1, y1 in pixels, inside of the image.
        label: the number of its class, from 0.
        segmentation: polygons ``[x0, y0, x1, y1, …]``, or COCO's run-length code; None if only the box is known.
        crowd: not one object but many, or one too hard to see: neither trained nor counted as missed.
        area: in pixels, of the mask where there is one.
    """

    box: Box
    label: int
    segmentation: RLE | list[list[float]] | None = None
    crowd: bool = False
    area: float = 0.0

    def mask(self, height: int, width: int) -> Tensor:
        """The bool mask [H, W]; the box filled, if that is all that is known."""
        if isinstance(self.segmentation, list):
            return masks.fill_polygons(self.segmentation, height, width)
        if self.segmentation is not None:
            return masks.decode(self.segmentation)
        x0, y0, x1, y1 = (round(edge) for edge in self.box)
        mask_HW = torch.zeros(height, width, dtype=torch.bool)
        mask_HW[y0:y1, x0:x1] = True
        return mask_HW

    def rle(self, height: int, width: int) -> RLE | None:
        """The compressed code of the mask; None if only the box is known."""
        if isinstance(self.segmentation, list):
            return masks.from_polygons(self.segmentation, height, width)
        return self.segmentation


@dataclass(frozen=True, slots=True)
class LabeledImage:
    """An image file and the objects in it.

    Attributes:
        path: the file.
        height, width: in pixels, as a viewer shows it.
        objects: in the order of their file.
        number: COCO's id of the image.
    """

    path: Path
    height: int
    width: int
    objects: tuple[Object, ...]
    number: int


class Sample(NamedTuple):
    """An image and its N objects as tensors.

    Attributes:
        image: uint8 [3, H, W], red, green, blue.
        boxes: float32 [N, 4], x0, y0, x1, y1 in pixels.
        labels: int64 [N].
        crowd: bool [N].
        masks: bool [N, H, W].
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    crowd: Tensor
    masks: Tensor


class Objects(Protocol):
    """A data set of labeled objects."""

    @property
    def names(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def labeled(self, index: int) -> LabeledImage:
        """The objects without the pixels; the path of the image may not exist yet."""
        ...


@dataclass
class ObjectDataset:
    """Images of a folder.

    Attributes:
        names: of the classes.
        images: the images, each with its objects.
        skipped: one line for each malformed record that was left out.
    """

    names: tuple[str, ...]
    images: list[LabeledImage]
    skipped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images)

    def labeled(self, index: int) -> LabeledImage:
        """The objects of an image."""
        return self.images[index]

    def pixels(self, index: int) -> Tensor:
        """Read an image, uint8 [3, H, W].

        Raises:
            BadInput: it is damaged, or has another size than the annotations say.
        """
        from pentad.media.images import read_image

        labeled = self.images[index]
        image_3HW = read_image(labeled.path)
        if image_3HW.shape[1:] != (labeled.height, labeled.width):
            size = f"{image_3HW.shape[2]} x {image_3HW.shape[1]}"
            raise BadInput(f"{labeled.path} is {size}; its annotations expect {labeled.width} x {labeled.height}")
        return image_3HW

    def __getitem__(self, index: int) -> Sample:
        """Read an image with its objects. Raises BadInput as `pixels` does."""
        labeled = self.images[index]
        found = labeled.objects
        return Sample(
            self.pixels(index),
            torch.tensor([o.box for o in found], dtype=torch.float32).view(-1, 4),
            torch.tensor([o.label for o in found], dtype=torch.int64),
            torch.tensor([o.crowd for o in found], dtype=torch.bool),
            torch.stack([o.mask(labeled.height, labeled.width) for o in found])
            if found
            else torch.zeros(0, labeled.height, labeled.width, dtype=torch.bool),
        )

    def counts(self) -> dict[str, int]:
        """How many objects each class has, none included."""
        counts = Counter(o.label for image in self.images for o in image.objects)
        return {name: counts[label] for label, name in enumerate(self.names)}


class Problems:
    """Malformed records, each with the file and the record that it is in.

    Args:
        skip: collect them; otherwise the first is raised.
    """

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.lines = list[str]()

    def add(self, where: str, what: str) -> None:
        """Note a record that is left out. Raises BadInput unless such records are skipped."""
        self.lines.append(f"{where}: {what}")
        if not self.skip:
            raise BadInput(self.lines[0])


def fitting_box(box: Box, height: int, width: int) -> Box:
    """A box, checked and cut to its image.

    Raises:
        BadInput: a corner isn't finite or more than a pixel outside of the image, or the box has no area.
    """
    x0, y0, x1, y1 = box
    if not all(map(math.isfinite, box)):
        raise BadInput(f"the box {_shown(box)} is not finite")
    if x1 <= x0 or y1 <= y0:
        raise BadInput(f"the box {_shown(box)} has no area")
    if min(x0, y0) < -1 or x1 > width + 1 or y1 > height + 1:
        raise BadInput(f"the box {_shown(box)} reaches beyond the image, which is {width} x {height}")
    cut = max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))
    if cut[2] <= cut[0] or cut[3] <= cut[1]:
        raise BadInput(f"the box {_shown(box)} is outside of the image, which is {width} x {height}")
    return cut


def _shown(box: Box) -> str:
    return "[" + ", ".join(f"{edge:g}" for edge in box) + "]"

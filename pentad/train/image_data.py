"""Images to learn from: folders of classes, the objects of detection data sets, or any images; and their micro-batches.

A step's images, crops and mirrors are a function of (seed, step), as for texts.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from pentad.datasets.coco import annotation_file
from pentad.datasets.object_folders import read_objects
from pentad.datasets.order import Order
from pentad.errors import BadInput
from pentad.media.images import read_image
from pentad.models.vision.config import Preprocessing
from pentad.vision.preprocess import resize_pillow

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
CACHE_BYTES = 1_000_000_000
MARGIN = 0.1  # around an object's box, of the box's longer side


class Example(NamedTuple):
    """An image, or an object's box in it.

    Attributes:
        path: the file.
        label: the number of its class; -1 if it has none.
        box: x0, y0, x1, y1 of the part that is shown; None for all.
    """

    path: Path
    label: int
    box: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class ImageExamples:
    """The examples of a folder.

    Attributes:
        path: the folder.
        names: the classes' names; empty if the images have none.
        examples: the images, or objects.
        skipped: what was left out, and why.
    """

    path: Path
    names: list[str]
    examples: list[Example]
    skipped: list[str]

    def location(self, number: int) -> str:
        """The file of an example."""
        return str(self.examples[number].path)

    def fraction(self, share: float) -> ImageExamples:
        """The first images of each class: `share` of them, and at least one."""
        counts = {label: [e.label for e in self.examples].count(label) for label in {e.label for e in self.examples}}
        left = {label: max(1, round(count * share)) for label, count in counts.items()}
        kept = []
        for example in self.examples:
            if left[example.label]:
                left[example.label] -= 1
                kept.append(example)
        return ImageExamples(self.path, self.names, kept, self.skipped)

    @cached_property
    def files(self) -> dict[str, str]:
        """The folder, with a hash of the examples and of the files' sizes."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(f"{example.path.name} {example.path.stat().st_size} {example[1:]}\n".encode())
        return {str(self.path): digest.hexdigest()}


def read_examples(path: Path, *, labeled: bool, skip_bad: bool = False) -> ImageExamples:
    """List the examples of a folder.

    Args:
        path: a folder with one subfolder for each class; a data set in COCO's, YOLO's or Pascal VOC's format, whose
            objects are the examples; or, if not `labeled`, any folder with images.
        labeled: every example needs a class.
        skip_bad: leave out malformed records of a data set.

    Raises:
        BadInput: the folder has no images, or no classes.
    """
    if not path.is_dir():
        raise BadInput(f"{path} is not a folder of images")
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir())
    if annotation_file(path) or (path / "Annotations").is_dir() or (path / "data.yaml").is_file():
        data = read_objects(path, skip_bad=skip_bad)
        examples = [
            Example(image.path, one.label, one.box) for image in data.images for one in image.objects if not one.crowd
        ]
        names, skipped = list(data.names), list(data.skipped)
    else:
        found = [(folder, _images(folder)) for folder in folders]
        names, skipped = [folder.name for folder, files in found if files], []
        examples = [Example(file, names.index(folder.name)) for folder, files in found for file in files]
        loose = [file for file in path.iterdir() if file.suffix.lower() in SUFFIXES]
        if loose and labeled:
            raise BadInput(f"{path}: {len(loose)} images are in no subfolder; expected one subfolder for each class")
        examples += [Example(file, -1) for file in sorted(loose)]
    if not examples:
        raise BadInput(f"{path} has no images; expected a subfolder for each class, or a data set of labeled objects")
    return ImageExamples(path, names, examples, skipped)


def _images(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())


class ImageBatch(NamedTuple):
    """Images to learn from.

    Attributes:
        images_B3HW: float32, normalized.
        labels_B: int64; -1 without a class.
        examples: the number of each example.
    """

    images_B3HW: Tensor
    labels_B: Tensor
    examples: tuple[int, ...]


@dataclass(frozen=True)
class ImageData:
    """Batches of images.

    Attributes:
        source: the examples.
        batch_size: images a step, over all processes.
        micro_batch: the most images of a micro-batch.
        seed: seed of the order and of crops.
        size: side of the images.
        how: the normalization and the kind of resizing.
        crop, flip: see the recipe.
        rank, world: this process, and the number of processes.
        device: where batches go.
        shuffle: False for the examples in order, without crops: validation.
    """

    source: ImageExamples
    batch_size: int
    micro_batch: int
    seed: int
    size: int
    how: Preprocessing
    crop: float = 1.0
    flip: bool = False
    rank: int = 0
    world: int = 1
    device: torch.device | str = "cpu"
    shuffle: bool = True

    def step(self, step: int) -> list[ImageBatch]:
        """This process's micro-batches of a step."""
        mine = range(self.rank, self.batch_size, self.world)
        positions = [step * self.batch_size + position for position in mine]
        return [
            self._batch(positions[start : start + self.micro_batch])
            for start in range(0, len(positions), self.micro_batch)
        ]

    @cached_property
    def _order(self) -> Order:
        return Order([len(self.source.examples)], None, self.seed)

    def _batch(self, positions: Sequence[int]) -> ImageBatch:
        numbers = [self._order[position][1] if self.shuffle else position for position in positions]
        images = [self._image(number, position) for number, position in zip(numbers, positions, strict=True)]
        labels_B = torch.tensor([self.source.examples[number].label for number in numbers])
        pixels_B3HW = torch.stack(images).float().div_(255)
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (self.how.mean, self.how.std))
        images_B3HW = pixels_B3HW.sub_(mean).div_(std).to(self.device)
        return ImageBatch(images_B3HW, labels_B.to(self.device), tuple(numbers))

    def _image(self, number: int, position: int) -> Tensor:
        image_3HW = self._read(number)
        random = Random(hash((self.seed, position)))
        if self.shuffle and self.crop < 1:
            image_3HW = _random_crop(image_3HW, self.crop, random)
        image_3HW = resize_pillow(image_3HW, (self.size, self.size), bicubic=self.how.resample == "bicubic")
        return image_3HW.flip(2) if self.shuffle and self.flip and random.random() < 0.5 else image_3HW

    @cached_property
    def _read(self) -> Callable[[int], Tensor]:
        """Reads an example; small copies of the last ones are kept in memory."""
        side = 2 * self.size

        @lru_cache(CACHE_BYTES // (3 * side * side))
        def read(number: int) -> Tensor:
            example = self.source.examples[number]
            image_3HW = read_image(example.path)
            if example.box is not None:
                image_3HW = _around(image_3HW, example.box)
            if min(image_3HW.shape[1:]) > side:
                image_3HW = resize_pillow(image_3HW, side)
            return image_3HW

        return read

    def tokens(self, batch: ImageBatch) -> int:
        """The number of images."""
        return len(batch.labels_B)

    def rows(self, batch: ImageBatch) -> list[str]:
        """The files of a micro-batch."""
        return [self.source.location(number) for number in batch.examples]


def _around(image_3HW: Tensor, box: tuple[float, float, float, float]) -> Tensor:
    """The square around a box with a margin, as far as it is inside of the image."""
    x0, y0, x1, y1 = box
    half = max(x1 - x0, y1 - y0) * (0.5 + MARGIN)
    height, width = image_3HW.shape[1:]
    (left, right), (top, bottom) = (
        (max(0, math.floor((low + high) / 2 - half)), min(side, math.ceil((low + high) / 2 + half)))
        for low, high, side in ((x0, x1, width), (y0, y1, height))
    )
    return image_3HW[:, top : max(bottom, top + 1), left : max(right, left + 1)]


def _random_crop(image_3HW: Tensor, least: float, random: Random) -> Tensor:
    """A part with `least` to all of the area, and an aspect ratio of 3:4 to 4:3 (Inception's augmentation)."""
    height, width = image_3HW.shape[1:]
    area = height * width * random.uniform(least, 1)
    ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
    rows = min(height, max(1, round(math.sqrt(area / ratio))))
    columns = min(width, max(1, round(math.sqrt(area * ratio))))
    top, left = random.randint(0, height - rows), random.randint(0, width - columns)
    return image_3HW[:, top : top + rows, left : left + columns]

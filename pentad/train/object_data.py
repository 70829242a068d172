"""Images with objects to learn from, and their micro-batches.

A step's images, mosaics, maps and colors are a function of (seed, step), as for texts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from random import Random

import torch
from torch import Tensor

from pentad.datasets import augment
from pentad.datasets.augment import Labeled
from pentad.datasets.object_batches import ObjectBatch
from pentad.datasets.objects import LabeledImage, ObjectDataset
from pentad.datasets.order import Order
from pentad.train.recipe import Objects
from pentad.vision.preprocess import pad_batch, resize_masks

CACHE_BYTES = 500_000_000

Fit = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""uint8 [3, H, W] and boxes in its pixels -> the network's float32 input, and the boxes in its pixels."""


@dataclass(frozen=True)
class ObjectExamples:
    """The images of a data set.

    Attributes:
        path: its folder.
        dataset: the images with their objects.
        count: how many of them are used.
    """

    path: str
    dataset: ObjectDataset
    count: int

    @property
    def names(self) -> list[str]:
        """The classes' names."""
        return list(self.dataset.names)

    @property
    def examples(self) -> list[LabeledImage]:
        """The images that are used."""
        return self.dataset.images[: self.count]

    @property
    def skipped(self) -> list[str]:
        """What was left out, and why."""
        return self.dataset.skipped

    def location(self, number: int) -> str:
        """The file of an image."""
        return str(self.dataset.images[number].path)

    @cached_property
    def files(self) -> dict[str, str]:
        """The data set, with a hash of the objects and of the files' sizes."""
        digest = hashlib.sha256()
        for image in self.examples:
            digest.update(f"{image.path.name} {image.path.stat().st_size} {image.objects}\n".encode())
        return {self.path: digest.hexdigest()}


@dataclass(frozen=True)
class ObjectData:
    """Batches of images with objects; crowds are left out.

    Attributes:
        source: the images.
        batch_size: images a step, over all processes.
        micro_batch: the most images of a micro-batch.
        seed: seed of the order and of all changes.
        size: height and width of the network's input.
        fit: makes the network's input.
        divisor: the images of a batch are padded to a multiple of it.
        masks: read the masks.
        changes: the changes of images; None for none, and the images in order: validation.
        flip: mirror half of the images.
        plain_from: the first step without mosaics and mixup.
        rank, world: this process, and the number of processes.
        device: where batches go.
    """

    source: ObjectExamples
    batch_size: int
    micro_batch: int
    seed: int
    size: tuple[int, int]
    fit: Fit
    divisor: int = 1
    masks: bool = False
    changes: Objects | None = None
    flip: bool = False
    plain_from: int = 0
    rank: int = 0
    world: int = 1
    device: torch.device | str = "cpu"

    def step(self, step: int) -> list[ObjectBatch]:
        """This process's micro-batches of a step."""
        mine = range(self.rank, self.batch_size, self.world)
        positions = [step * self.batch_size + position for position in mine]
        whole = step < self.plain_from
        return [
            self._batch(positions[start : start + self.micro_batch], whole)
            for start in range(0, len(positions), self.micro_batch)
        ]

    @cached_property
    def _order(self) -> Order:
        return Order([self.source.count], None, self.seed)

    def _batch(self, positions: Sequence[int], whole: bool) -> ObjectBatch:
        shuffled = self.changes is not None
        numbers = [self._order[position][1] if shuffled else position for position in positions]
        fitted = []
        for number, position in zip(numbers, positions, strict=True):
            one = self._example(number, Random(hash((self.seed, position))), whole)
            image, boxes = self.fit(one.image, one.boxes)
            masks = None if one.masks is None else resize_masks(one.masks, *image.shape[1:])
            fitted.append(Labeled(image, boxes, one.labels, masks))
        device = self.device
        images_BCHW, sizes = pad_batch([one.image for one in fitted], self.divisor)
        return ObjectBatch(
            images_BCHW.to(device).contiguous(memory_format=torch.channels_last),
            tuple(one.boxes.to(device) for one in fitted),
            tuple(one.labels.to(device) for one in fitted),
            tuple(numbers),
            tuple(sizes),
            tuple(one.masks.to(device) for one in fitted if one.masks is not None) if self.masks else None,
        )

    def _example(self, number: int, random: Random, whole: bool) -> Labeled:
        one, changes = self._read(number), self.changes
        if changes is None:
            return one
        if whole and random.random() < (changes.mosaic or 0):
            one = self._mosaic(one, changes, random)
            if random.random() < changes.mixup:
                one = augment.mixup(one, self._mosaic(self._any(random), changes, random))
        if changes.color:
            one = augment.recolor(one, random)
        return augment.mirror(one) if self.flip and random.random() < 0.5 else one

    def _mosaic(self, one: Labeled, changes: Objects, random: Random) -> Labeled:
        parts = [one, *(self._any(random) for _ in range(3))]
        return augment.mosaic(parts, *self.size, (changes.scale[0], changes.scale[1]), random)

    def _any(self, random: Random) -> Labeled:
        return self._read(random.randrange(self.source.count))

    @cached_property
    def _read(self) -> Callable[[int], Labeled]:
        """Reads an image; the last ones are kept in memory."""

        @lru_cache(max(1, CACHE_BYTES // (3 * self.size[0] * self.size[1])))
        def read(number: int) -> Labeled:
            objects = [one for one in self.source.dataset.images[number].objects if not one.crowd]
            boxes = torch.tensor([one.box for one in objects], dtype=torch.float32).view(-1, 4)
            labels = torch.tensor([one.label for one in objects], dtype=torch.int64)
            image = self.source.dataset.pixels(number)
            if not self.masks:
                return Labeled(image, boxes, labels)
            masks = torch.zeros(len(objects), *image.shape[1:], dtype=torch.bool)
            for number, one in enumerate(objects):
                masks[number] = one.mask(*image.shape[1:])
            return Labeled(image, boxes, labels, masks)

        return read

    def tokens(self, batch: ObjectBatch) -> int:
        """The number of images."""
        return len(batch.images_BCHW)

    def rows(self, batch: ObjectBatch) -> list[str]:
        """The files of a micro-batch."""
        return [self.source.location(number) for number in batch.examples]

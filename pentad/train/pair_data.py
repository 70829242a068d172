"""Images with texts to learn from: objects with the names of their classes, or whole images with captions.

A step's pairs, crops and templates are a function of (seed, step), as for texts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from pentad.datasets.object_folders import read_objects
from pentad.datasets.objects import Object, Problems
from pentad.datasets.order import Order
from pentad.errors import BadInput
from pentad.media.images import read_image
from pentad.models.vision.config import Preprocessing
from pentad.nn.batch import Batch, pack
from pentad.train.recipe import Clip
from pentad.vision.classifier import preprocess
from pentad.vision.crops import object_crop

CAPTIONS = "captions.jsonl"
CACHED = 1024  # images; one of 640 x 480 pixels has 1 MB


class Pair(NamedTuple):
    """An image, or an object in it, and its text.

    Attributes:
        path: the image file.
        text: the caption, or the name of the object's class.
        object: None for the whole image.
    """

    path: Path
    text: str
    object: Object | None = None


@dataclass(frozen=True)
class PairExamples:
    """The pairs of a folder.

    Attributes:
        path: the folder.
        examples: the pairs.
        skipped: what was left out, and why.
    """

    path: Path
    examples: list[Pair]
    skipped: list[str]

    @property
    def names(self) -> list[str]:
        """The texts, each once."""
        return [*dict.fromkeys(pair.text for pair in self.examples)]

    def location(self, number: int) -> str:
        """The file of a pair's image."""
        return str(self.examples[number].path)

    @cached_property
    def files(self) -> dict[str, str]:
        """The folder, with a hash of the pairs and of the files' sizes."""
        digest = hashlib.sha256()
        for pair in self.examples:
            digest.update(f"{pair.path.name} {pair.path.stat().st_size} {pair[1:]}\n".encode())
        return {str(self.path): digest.hexdigest()}


def read_pairs(path: Path, texts: str, *, skip_bad: bool = False) -> PairExamples:
    """List the pairs of a folder.

    Args:
        path: a data set in COCO's, YOLO's or Pascal VOC's format; or, for captions, a folder with captions.jsonl, whose
            rows have `image`, a path in the folder, and `caption`.
        texts: "names" or "captions".
        skip_bad: leave out malformed records.

    Raises:
        BadInput: the folder has no pairs, or a record is malformed.
    """
    if texts == "captions":
        examples, skipped = _captions(path, Problems(skip_bad))
    else:
        data = read_objects(path, skip_bad=skip_bad)
        examples = [
            Pair(image.path, data.names[one.label], one)
            for image in data.images
            for one in image.objects
            if not one.crowd
        ]
        skipped = list(data.skipped)
    if not examples:
        raise BadInput(f"{path} has no {'captions' if texts == 'captions' else 'objects'} to learn")
    return PairExamples(path, examples, skipped)


def _captions(folder: Path, problems: Problems) -> tuple[list[Pair], list[str]]:
    file, pairs = folder / CAPTIONS, list[Pair]()
    if not file.is_file():
        raise BadInput(f'{file} is not there; expected rows {{"image": FILE, "caption": TEXT}}, as data scenes writes')
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            image, caption = row["image"], row["caption"]
            if not (isinstance(image, str) and isinstance(caption, str) and caption.strip()):
                raise TypeError
        except (ValueError, TypeError, KeyError):
            problems.add(f"{file}:{number}", f"{line[:60]!r} is no object with image and caption")
            continue
        if not (folder / image).is_file():
            problems.add(f"{file}:{number}", f"{image} is not there")
            continue
        pairs.append(Pair(folder / image, caption))
    return pairs, problems.lines


class PairBatch(NamedTuple):
    """Pairs to learn from.

    Attributes:
        images_B3HW: float32, normalized.
        ids_N: the tokens of all texts.
        layout: of the tokens.
        texts: captions, or names of classes, without a template: equal ones are no negatives of each other.
        examples: the number of each pair.
    """

    images_B3HW: Tensor
    ids_N: Tensor
    layout: Batch
    texts: tuple[str, ...]
    examples: tuple[int, ...]


@dataclass(frozen=True)
class PairData:
    """Batches of pairs.

    Attributes:
        source: the pairs.
        batch_size: pairs a step.
        compared: pairs that are compared with each other.
        seed: seed of the order, crops and templates.
        side: of the images.
        how: their resizing and normalization.
        encode: a text's token ids.
        options: templates and crops.
        flip: mirror half of the images.
        device: where batches go.
        shuffle: False for the pairs in order, all with the first template and the same zoom: validation.
    """

    source: PairExamples
    batch_size: int
    compared: int
    seed: int
    side: int
    how: Preprocessing
    encode: Callable[[str], list[int]]
    options: Clip
    flip: bool = False
    device: torch.device | str = "cpu"
    shuffle: bool = True

    def step(self, step: int) -> list[PairBatch]:
        """The batches of a step."""
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [self._batch(positions[i : i + self.compared]) for i in range(0, len(positions), self.compared)]

    @cached_property
    def _order(self) -> Order:
        return Order([len(self.source.examples)], None, self.seed)

    def _batch(self, positions: Sequence[int]) -> PairBatch:
        numbers = [self._order[position][1] if self.shuffle else position for position in positions]
        images, rows = list[Tensor](), list[list[int]]()
        for number, position in zip(numbers, positions, strict=True):
            random = Random(hash((self.seed, position)))
            images.append(self._image(number, random))
            text, templates = self.source.examples[number].text, self.options.templates
            if self.source.examples[number].object is not None:
                text = (random.choice(templates) if self.shuffle else templates[0]).replace("{}", text)
            rows.append(self.encode(text))
        texts = tuple(self.source.examples[number].text for number in numbers)
        return PairBatch(torch.stack(images).to(self.device), *pack(*rows, device=self.device), texts, tuple(numbers))

    def _image(self, number: int, random: Random) -> Tensor:
        pair, (least, most) = self.source.examples[number], self.options.zoom
        image_3HW = self._read(pair.path)
        flip = self.shuffle and self.flip and random.random() < 0.5
        if pair.object is None:
            normalized_3SS = preprocess(image_3HW, self.how)
            return normalized_3SS.flip(2) if flip else normalized_3SS
        zoom = random.uniform(least, most) if self.shuffle else (least + most) / 2
        mask_HW = pair.object.mask(*image_3HW.shape[1:])
        crop_3SS, mask_SS = object_crop(image_3HW.float(), mask_HW, pair.object.box, zoom, self.side)
        if self.shuffle and random.random() < self.options.alone:
            crop_3SS = crop_3SS * mask_SS
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.how.mean, self.how.std))
        return ((crop_3SS.flip(2) if flip else crop_3SS) / 255 - mean) / std

    @cached_property
    def _read(self) -> Callable[[Path], Tensor]:
        """Reads an image; the last ones are kept in memory."""
        return lru_cache(CACHED)(read_image)

    def tokens(self, batch: PairBatch) -> int:
        """The number of pairs."""
        return len(batch.texts)

    def rows(self, batch: PairBatch) -> list[str]:
        """The files of a batch."""
        return [self.source.location(number) for number in batch.examples]

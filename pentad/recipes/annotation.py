"""Annotating an image with a segmenter: the annotator asks by clicks, and adds the masks that are good enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pentad.datasets.objects import LabeledImage, ObjectDataset
from pentad.errors import BadInput
from pentad.vision.clicks import mask_iou, next_click
from pentad.vision.masks import RLE, encode, rle_box
from pentad.vision.segmenter import Mask, Segmenter

Click = tuple[float, float, int]
"""x, y, and 1 for the object or 0 for the background."""


@dataclass(frozen=True, slots=True)
class Annotation:
    """One object of an image.

    Attributes:
        label: its class.
        rle: its mask.
        source: what made the mask: "clicks", "brush" (drawn by hand), "detector" or "everything".
        predicted_iou, stability_score: the segmenter's; None for a mask drawn by hand.
    """

    label: str
    rle: RLE
    source: str
    predicted_iou: float | None
    stability_score: float | None


class Canvas:
    """An image that is being annotated.

    Args:
        path: its file.
        pixels_3HW: uint8.
        segmenter: answers clicks.
        max_overlap: a mask whose IoU with an older one is larger isn't added.

    Attributes:
        annotations: what has been added.
        clicks: how often the annotator has clicked.
    """

    def __init__(self, path: Path, pixels_3HW: Tensor, segmenter: Segmenter, max_overlap: float = 0.7) -> None:
        self.path, self.pixels, self.segmenter, self.max_overlap = path, pixels_3HW, segmenter, max_overlap
        self.embedded = segmenter.image(pixels_3HW, cached=False)
        self.annotations = list[Annotation]()
        self.clicks = 0
        self._masks = list[Tensor]()

    def click(self, clicks: Sequence[Click], former: Mask | None = None) -> Mask:
        """The mask of an object after one more click.

        Args:
            clicks: all clicks on the object so far.
            former: the mask before the last click.

        Raises:
            BadInput: a click is outside of the image, or malformed.
        """
        self.clicks += 1
        [mask] = self.embedded.masks(points=[one[:2] for one in clicks], labels=[one[2] for one in clicks], mask=former)
        return mask

    def overlap(self, mask_HW: Tensor) -> float:
        """The largest IoU of a mask with those that have been added."""
        return max((mask_iou(mask_HW, other_HW) for other_HW in self._masks), default=0.0)

    def add(self, mask: Mask | Tensor, label: str = "object", source: str = "clicks") -> bool:
        """Add an object, unless its mask is empty or overlaps one that is there; True if it was added.

        Args:
            mask: an answer of the segmenter, or bool [H, W] drawn by hand.
            label: its class.
            source: see `Annotation`.
        """
        mask_HW = mask.mask if isinstance(mask, Mask) else mask
        if mask_HW.shape != self.pixels.shape[1:]:
            raise BadInput(f"a mask has the shape {list(mask_HW.shape)}; expected {list(self.pixels.shape[1:])}")
        rle = mask.rle if isinstance(mask, Mask) else encode(mask_HW)
        twins = [one for one in self.annotations if one.label == label and rle_box(one.rle) == rle_box(rle)]
        if not mask_HW.any() or twins or self.overlap(mask_HW) > self.max_overlap:
            return False
        scores = (mask.predicted_iou, mask.stability_score) if isinstance(mask, Mask) else (None, None)
        self.annotations.append(Annotation(label, rle, source, *scores))
        self._masks.append(mask_HW)
        return True


class Annotator(Protocol):
    """Annotates what a canvas doesn't have yet: a person at a page, or a simulated one."""

    def annotate(self, canvas: Canvas) -> None:
        """Add the objects that are missing; return when the image is done."""
        ...


@dataclass(frozen=True)
class SimulatedAnnotator:
    """Knows the right masks, and clicks where the segmenter's mask is most wrong until it is good enough.

    Where clicks don't suffice the mask is drawn by hand: it is the right one.

    Attributes:
        images: file -> its labeled objects.
        names: of the classes.
        enough: the IoU that is good enough.
        max_clicks: on an object, before it is drawn by hand.
        seen: an object counts as annotated if a mask has at least this IoU with it.
    """

    images: Mapping[Path, LabeledImage]
    names: Sequence[str]
    enough: float = 0.9
    max_clicks: int = 8
    seen: float = 0.5

    @classmethod
    def of(cls, dataset: ObjectDataset, enough: float = 0.9, max_clicks: int = 8) -> SimulatedAnnotator:
        """An annotator who knows a data set.

        Raises:
            BadInput: the data set has no masks.
        """
        if not any(one.segmentation for image in dataset.images for one in image.objects):
            raise BadInput("the data set has no masks; a simulated annotator needs them")
        return cls({image.path: image for image in dataset.images}, dataset.names, enough, max_clicks)

    def annotate(self, canvas: Canvas) -> None:
        labeled = self.images[canvas.path]
        for one in labeled.objects:
            truth_HW = one.mask(labeled.height, labeled.width)
            if not one.crowd and truth_HW.any() and canvas.overlap(truth_HW) < self.seen:
                mask = self._click(canvas, truth_HW)
                canvas.add(truth_HW if mask is None else mask, self.names[one.label], "clicks" if mask else "brush")

    def _click(self, canvas: Canvas, truth_HW: Tensor) -> Mask | None:
        """A mask that is good enough; None if clicks don't suffice."""
        clicks, found, inside_HW = list[Click](), None, torch.zeros_like(truth_HW)
        while len(clicks) < self.max_clicks and (click := next_click(inside_HW, truth_HW)):
            clicks.append(click)
            found = canvas.click(clicks, found)
            inside_HW = found.mask
            if mask_iou(inside_HW, truth_HW) >= self.enough:
                return found
        return None

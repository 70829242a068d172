"""Prompts for a segmenter as users write them: checked, and in pixels of the network's input.

Legend: P prompts, each with K points; M rows and columns of a mask's logits; E width of CLIP's embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pentad.errors import BadInput
from pentad.models.vision.sam.prompt_encoder import Prompts

Numbers = Sequence[Any] | Tensor
"""Nested numbers, or a tensor or an array."""

MAX_PROMPTS = 4096
MAX_POINTS = 1024
SURE = 6.9  # the logit of a pixel of a mask without logits: a probability of 0.999


class Fitted(NamedTuple):
    """An image's size, and the size in which it is in the network's square input.

    Attributes:
        height, width: of the image.
        inner: height and width of its picture in the input.
        pixels: of the input, a side.
    """

    height: int
    width: int
    inner: tuple[int, int]
    pixels: int

    @classmethod
    def of(cls, height: int, width: int, pixels: int) -> Fitted:
        """The longer side fills the input; sizes are rounded as in the published code."""
        scale = pixels / max(height, width)
        return cls(height, width, (max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))), pixels)

    def to_input(self, xy: Tensor) -> Tensor:
        """Coordinates [..., 2] of the image -> of the input."""
        scale = torch.tensor([self.inner[1] / self.width, self.inner[0] / self.height], dtype=torch.float64)
        return (xy.double() * scale).float()


@dataclass(frozen=True)
class Request:
    """P prompts for an image, in its pixels.

    Attributes:
        points_PK2, labels_PK, boxes_P4: None for none.
        masks_P1MM: logits; None for none.
        texts: what a prompt says in words; None for none.
        texts_PE: their embeddings.
    """

    points_PK2: Tensor | None
    labels_PK: Tensor | None
    boxes_P4: Tensor | None
    masks_P1MM: Tensor | None
    texts: tuple[str, ...] | None = None
    texts_PE: Tensor | None = None

    @property
    def count(self) -> int:
        """P."""
        return next(len(part) for part in vars(self).values() if part is not None)

    @property
    def is_ambiguous(self) -> bool:
        """True if the prompts are single points, which may mean a part, an object, or a group; or texts alone."""
        points, texts = self.points_PK2, self.texts
        if self.boxes_P4 is not None or self.masks_P1MM is not None:
            return False
        return texts is not None if points is None else points.shape[1] == 1 and texts is None

    def on(self, fitted: Fitted, chosen: slice) -> Prompts:
        """Some of the prompts, for the network."""
        parts = self.points_PK2, self.labels_PK, self.boxes_P4, self.masks_P1MM, self.texts_PE
        points, labels, boxes, masks, texts = (None if part is None else part[chosen] for part in parts)
        if points is not None:
            points = fitted.to_input(points)
        if boxes is not None:
            boxes = fitted.to_input(boxes.view(-1, 2, 2)).flatten(1)
        return Prompts(points, labels, boxes, masks, texts)

    def describe(self, index: int) -> dict[str, Any]:
        """One prompt as JSON has it."""
        described: dict[str, Any] = {}
        if self.points_PK2 is not None and self.labels_PK is not None:
            described = {"points": self.points_PK2[index].tolist(), "labels": self.labels_PK[index].tolist()}
        if self.boxes_P4 is not None:
            described["box"] = self.boxes_P4[index].tolist()
        if self.texts is not None:
            described["text"] = self.texts[index]
        return described | ({} if self.masks_P1MM is None else {"mask": True})


def read_prompts(
    points: Numbers | None,
    labels: Numbers | None,
    boxes: Numbers | None,
    mask: Numbers | None,
    fitted: Fitted,
    mask_side: int,
    texts: Sequence[str] | None = None,
) -> Request:
    """Check prompts.

    Args:
        points: K points x, y of one prompt, or [P, K, 2].
        labels: 1 (in the object, the default) or 0 (outside) for each point.
        boxes: one box x0, y0, x1, y1, or one a prompt.
        mask: a mask of the image's size, bool or from 0 to 1, or logits of a former answer; or one a prompt.
        fitted: the image's size.
        mask_side: M.
        texts: words, one text a prompt.

    Raises:
        BadInput: there is no prompt, numbers of prompts differ, or values are outside of the image or not finite.
    """
    points_PK2 = labels_PK = boxes_P4 = masks_P1MM = None
    if points is not None:
        points_PK2 = _numbers(points, "points")
        points_PK2 = points_PK2[None, None] if points_PK2.shape == (2,) else points_PK2
        points_PK2 = points_PK2[None] if points_PK2.dim() == 2 else points_PK2
        if points_PK2.dim() != 3 or points_PK2.shape[2] != 2 or not 0 < points_PK2.shape[1] <= MAX_POINTS:
            raise BadInput(
                f"points have the shape {_shape(points)}; expected [points, 2] with 1 to {MAX_POINTS} points, or"
                " [prompts, points, 2]"
            )
        _check_inside(points_PK2.flatten(0, 1), "point", fitted)
        labels_PK = torch.ones(points_PK2.shape[:2]) if labels is None else _numbers(labels, "labels")
        labels_PK = labels_PK.reshape(1, -1) if labels_PK.dim() < 2 and len(points_PK2) == 1 else labels_PK
        if labels_PK.shape != points_PK2.shape[:2]:
            raise BadInput(
                f"labels have the shape {_shape(labels)}; expected {list(points_PK2.shape[:2])}, as the points"
            )
        if wrong := next((label for label in labels_PK.flatten().tolist() if label not in (0, 1)), None):
            raise BadInput(f"a point's label is {wrong:g}; expected 1 for the object or 0 for the background")
        labels_PK = labels_PK.long()
    elif labels is not None:
        raise BadInput("labels are given without points")
    if boxes is not None:
        boxes_P4 = _numbers(boxes, "boxes")
        boxes_P4 = boxes_P4[None] if boxes_P4.dim() == 1 else boxes_P4
        if boxes_P4.dim() != 2 or boxes_P4.shape[1] != 4 or not len(boxes_P4):
            raise BadInput(f"boxes have the shape {_shape(boxes)}; expected [4] or [prompts, 4]")
        for box in boxes_P4.tolist():
            if not (box[0] < box[2] and box[1] < box[3]):
                raise BadInput(f"the box {_text(box)} has no area; expected x0 < x1 and y0 < y1")
        _check_inside(boxes_P4.view(-1, 2), "corner", fitted)
    if mask is not None:
        masks_P1MM = read_mask(mask, fitted, mask_side)
    if texts is not None and not (texts and all(isinstance(one, str) and one.strip() for one in texts)):
        raise BadInput(f"text is {str(texts)[:60]!r}; expected words, or a list of such texts")
    request = Request(points_PK2, labels_PK, boxes_P4, masks_P1MM, None if texts is None else tuple(texts))
    names = "points", "labels", "boxes", "mask", "text"
    counts = {name: len(part) for name, part in zip(names, vars(request).values(), strict=False) if part is not None}
    if not counts:
        raise BadInput("there is no prompt; expected points, boxes, a mask or a text")
    if len({*counts.values()}) > 1:
        found = ", ".join(f"{name} for {count}" for name, count in counts.items() if name != "labels")
        raise BadInput(
            f"prompts differ in number: {found}; expected as many of each, points in the shape [prompts, points, 2]"
        )
    if request.count > MAX_PROMPTS:
        raise BadInput(f"there are {request.count} prompts; expected at most {MAX_PROMPTS}")
    return request


def read_mask(mask: Numbers, fitted: Fitted, side: int) -> Tensor:
    """Masks of an image's size, or their logits, as logits [P, 1, M, M] in the network's square input.

    Raises:
        BadInput: a mask has another size.
    """
    values = torch.as_tensor(mask)
    values = values[None] if values.dim() == 2 else values
    values = values[:, 0] if values.dim() == 4 and values.shape[1] == 1 else values
    image, low = (fitted.height, fitted.width), (side, side)
    if values.dim() != 3 or tuple(values.shape[1:]) not in (image, low):
        raise BadInput(
            f"a mask has the shape {_shape(mask)}; expected {list(image)}, the image's, or logits of {list(low)}"
        )
    values = _finite(values.float(), "the mask")
    if tuple(values.shape[1:]) == low and not (image == low and _is_plain(values)):
        return values[:, None]
    scale = side / fitted.pixels
    inner = tuple(max(1, round(length * scale)) for length in fitted.inner)
    shrunk = F.interpolate(values[:, None], inner, mode="bilinear", antialias=True)
    return F.pad((shrunk * 2 - 1) * SURE, (0, side - inner[1], 0, side - inner[0]), value=-SURE)


def _is_plain(values: Tensor) -> bool:
    return bool(((values == 0) | (values == 1)).all())


def _numbers(values: Numbers, name: str) -> Tensor:
    try:
        tensor = torch.as_tensor(values).double()
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadInput(f"{name} are not numbers in equal rows: {str(error).splitlines()[0][:200]}") from error
    return _finite(tensor, name)


def _finite(tensor: Tensor, name: str) -> Tensor:
    if not tensor.isfinite().all():
        raise BadInput(f"{name} have a value that is not finite; expected numbers")
    return tensor


def _check_inside(points_N2: Tensor, name: str, fitted: Fitted) -> None:
    for x, y in points_N2.tolist():
        if not (0 <= x <= fitted.width and 0 <= y <= fitted.height):
            size = f"{fitted.width} x {fitted.height}"
            raise BadInput(f"the {name} {_text((x, y))} is outside of the image; expected x and y within {size}")


def _text(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


def _shape(values: object) -> list[int]:
    return list(torch.as_tensor(values).shape)

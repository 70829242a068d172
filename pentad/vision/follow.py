"""An object followed through a video: each frame is prompted from the mask of the frame before it.

The network sees single frames and has no memory. An object that is hidden, leaves the picture, or moves by more than
its own size between two frames is lost, and isn't found again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from pentad.errors import BadInput
from pentad.vision.clicks import deepest_point
from pentad.vision.masks import rle_area

if TYPE_CHECKING:
    from pentad.media.video import Frame
    from pentad.vision.segmenter import Mask, Segmenter


@dataclass(frozen=True, kw_only=True)
class Following:
    """How prompts are made, and when the object counts as lost.

    Attributes:
        margin: each side of the next frame's box is moved out by so much of the box's width or height.
        min_iou: the least predicted IoU.
        max_change: the most by which the area may grow or shrink from a frame to the next one, as a factor.
    """

    margin: float = 0.1
    min_iou: float = 0.5
    max_change: float = 4.0

    def __post_init__(self) -> None:
        if not self.margin >= 0:
            raise BadInput(f"margin is {self.margin}; expected a number of at least 0")
        if not self.max_change > 1:
            raise BadInput(f"max_change is {self.max_change}; expected a number above 1")


class Step(NamedTuple):
    """What was found in a frame.

    Attributes:
        frame: the frame.
        mask: the object; None if it is lost.
        lost: why it is lost, in a few words.
    """

    frame: Frame
    mask: Mask | None
    lost: str = ""


def follow(
    segmenter: Segmenter, frames: Iterable[Frame], how: Following | None = None, **prompts: Any
) -> Iterator[Step]:
    """Follow the object that prompts mean in the first frame; memory doesn't grow with the length of the video.

    Args:
        segmenter: the network.
        frames: see `pentad.media.video.read_video`.
        how: settings.
        prompts: for the first frame: points, labels, boxes (one), mask and text of `EmbeddedImage.masks`.

    Yields:
        The mask of each frame. If the object is lost, the last step has none, and tells why.

    Raises:
        BadInput: there is no prompt, there are several, or one is outside of the frame.
    """
    how, last = how or Following(), None
    for frame in frames:
        given = prompts if last is None else next_prompts(last, how.margin)
        found = segmenter.image(frame.image, cached=False).masks(**given)
        if len(found) > 1:
            raise BadInput(f"there are {len(found)} prompts; expected one object to follow")
        lost = reason(found[0], last, how)
        yield Step(frame, None if lost else found[0], lost)
        if lost:
            return
        last = found[0]


def next_prompts(mask: Mask, margin: float) -> dict[str, Any]:
    """Prompts for the frame after a mask: its box, enlarged; the pixel deepest inside; and its logits."""
    height, width = mask.rle["size"]
    x0, y0, x1, y1 = mask.box
    dx, dy = margin * (x1 - x0), margin * (y1 - y0)
    box = max(0.0, x0 - dx), max(0.0, y0 - dy), min(float(width), x1 + dx), min(float(height), y1 + dy)
    return {"points": [deepest_point(mask.mask)], "boxes": box, "mask": mask}


def reason(mask: Mask, last: Mask | None, how: Following) -> str:
    """Why the object counts as lost; nothing if it doesn't."""
    area, before = rle_area(mask.rle), None if last is None else rle_area(last.rle)
    if not area:
        return "the mask is empty"
    if mask.predicted_iou < how.min_iou:
        return f"the predicted IoU is {mask.predicted_iou:.2f}; expected at least {how.min_iou:g}"
    if before is not None and not before / how.max_change <= area <= before * how.max_change:
        return f"the mask has {area} pixels after {before}; expected a change of at most {how.max_change:g} times"
    return ""

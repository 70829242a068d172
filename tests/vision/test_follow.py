"""An object followed through frames, with a network that segments by color."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pentad
from pentad.datasets.scenes import Scenes
from pentad.errors import BadInput
from pentad.media.video import Frame
from pentad.vision.clicks import deepest_point, mask_iou
from pentad.vision.follow import Following, follow, next_prompts
from pentad.vision.masks import encode, rle_box
from pentad.vision.segmenter import Mask
from tests.helpers.sam import meta_sam

Object = tuple[int, int, int, int]


def mask_of(inside: Tensor, iou: float = 0.9, **prompt: Any) -> Mask:
    rle = encode(inside)
    return Mask(rle, rle_box(rle), iou, 1.0, prompt, torch.zeros(4, 4))


class ByColor:
    """Segments all pixels of about a color (by default white), but for those outside of the box."""

    def __init__(self, iou: float = 0.9, color: Tensor | None = None) -> None:
        self.iou, self.asked = iou, list[dict[str, Any]]()
        self.color = torch.full((3,), 255.0) if color is None else color

    def image(self, pixels: Tensor, *, cached: bool) -> "ByColor":
        assert not cached
        self.pixels = pixels
        return self

    def masks(self, points: Any, boxes: Any = None, mask: Any = None) -> list[Mask]:
        self.asked.append({"boxes": boxes, "mask": mask})
        assert len(points) == 1
        inside = (self.pixels - self.color[:, None, None]).abs().amax(0) < 40
        if boxes is not None:
            x0, y0, x1, y1 = (round(side) for side in boxes)
            within = torch.zeros_like(inside)
            within[y0:y1, x0:x1] = True
            inside &= within
        return [mask_of(inside, self.iou)]


def frames(*objects: Object) -> Iterator[Frame]:
    """Gray frames, each with a white object; a second white one never moves."""
    for number, (x0, y0, x1, y1) in enumerate(objects):
        image = torch.full((3, 60, 90), 100, dtype=torch.uint8)
        image[:, 50:58, 2:20] = 255
        image[:, y0:y1, x0:x1] = 255
        yield Frame(image, number / 10, number)


def test_the_object_is_followed_and_its_like_is_not() -> None:
    path = [(10 + 2 * i, 5 + i, 34 + 2 * i, 25 + i) for i in range(20)]
    network = ByColor()
    steps = list(follow(network, frames(*path), points=[(20, 12)], boxes=(5, 0, 40, 30)))  # type: ignore[arg-type]
    assert [step.frame.number for step in steps] == list(range(20))
    for step, (x0, y0, x1, y1) in zip(steps, path, strict=True):
        truth = torch.zeros(60, 90, dtype=torch.bool)
        truth[y0:y1, x0:x1] = True
        assert step.mask is not None
        assert mask_iou(step.mask.mask, truth) == 1
    assert [one["mask"] for one in network.asked[1:]] == [step.mask for step in steps[:-1]]


def test_prompts_are_the_last_box_with_a_margin_its_middle_and_its_logits() -> None:
    mask = torch.zeros(40, 60, dtype=torch.bool)
    mask[5:26, 0:31] = True
    last = mask_of(mask)
    prompts = next_prompts(last, 0.1)
    assert prompts["boxes"] == pytest.approx((0, 5 - 2.1, 31 + 3.1, 26 + 2.1))
    assert prompts["mask"] is last
    [(x, y)] = prompts["points"]
    assert y == 15
    assert 10 <= x <= 20


def test_digits_of_scenes_are_followed_as_they_move_and_turn() -> None:
    """With a network that knows the object's color, and nothing else, IoU of each frame."""
    for number in range(4):
        scenes = list(Scenes(4, seed=3, size=96, objects=(2, 3)).video(number, 12))
        sample, track = scenes[0].sample, scenes[0].tracks[-1]
        truth = sample.masks[-1]
        color = sample.image[:, truth].float().median(1).values
        videos = (Frame(scene.sample.image, index / 12, index) for index, scene in enumerate(scenes))
        start = {"points": [deepest_point(truth)], "boxes": sample.boxes[-1].tolist()}
        steps = list(follow(ByColor(color=color), videos, **start))  # type: ignore[arg-type]
        assert len(steps) == 12
        for step, scene in zip(steps, scenes, strict=True):
            assert step.mask is not None
            assert mask_iou(step.mask.mask, scene.sample.masks[scene.tracks.index(track)]) > 0.6


@pytest.mark.parametrize(
    ("path", "iou", "frames_found", "why"),
    [
        ([(10, 5, 34, 25), (12, 5, 36, 25), (70, 30, 84, 40)], 0.9, 2, "the mask is empty"),  # it jumped away
        ([(10, 5, 34, 25), (16, 12, 20, 16)], 0.9, 1, "16 pixels after 480; expected a change of at most 4 times"),
        ([(10, 5, 34, 25)] * 2, 0.4, 0, "the predicted IoU is 0.40; expected at least 0.5"),
    ],
)
def test_a_lost_object_ends_it(path: list[Object], iou: float, frames_found: int, why: str) -> None:
    steps = list(follow(ByColor(iou), frames(*path), points=[(20, 12)], boxes=(5, 0, 40, 30)))  # type: ignore[arg-type]
    assert [step.mask is not None for step in steps] == [True] * frames_found + [False]
    assert why in steps[-1].lost
    assert not any(step.lost for step in steps[:-1])


def test_a_real_network_takes_these_prompts(tmp_path: Path) -> None:
    meta_sam(tmp_path / "sam.pth")
    sam: Any = pentad.load(tmp_path / "sam.pth")
    how = Following(min_iou=-100, max_change=1e9)
    steps = list(follow(sam, frames(*[(10, 5, 34, 25)] * 3), how, points=[(20, 12)]))
    assert steps[0].mask is not None
    assert "box" not in steps[0].mask.prompt
    if len(steps) > 1 and steps[1].mask is not None:
        assert steps[1].mask.prompt.keys() == {"points", "labels", "box", "mask"}
    with pytest.raises(BadInput, match="2 prompts; expected one object"):
        next(follow(sam, frames((10, 5, 34, 25)), how, boxes=[(1, 1, 9, 9), (2, 2, 9, 9)]))
    with pytest.raises(BadInput, match="outside of the image"):
        next(follow(sam, frames((10, 5, 34, 25)), how, points=[(95, 3)]))


def test_what_is_refused() -> None:
    with pytest.raises(BadInput, match="max_change is 1"):
        Following(max_change=1)
    with pytest.raises(BadInput, match="margin is -1"):
        Following(margin=-1)

"""A canvas and the simulated annotator, with a segmenter that answers as told."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pentad.datasets.objects import LabeledImage, Object, ObjectDataset
from pentad.errors import BadInput
from pentad.recipes.annotation import Canvas, SimulatedAnnotator
from pentad.vision.masks import decode, encode, rle_box
from pentad.vision.segmenter import Mask

PATH = Path("a.png")


def block(x0: int, y0: int, x1: int, y1: int) -> Tensor:
    mask = torch.zeros(40, 60, dtype=torch.bool)
    mask[y0:y1, x0:x1] = True
    return mask


def mask_of(inside: Tensor) -> Mask:
    rle = encode(inside)
    return Mask(rle, rle_box(rle), 0.9, 1.0, {})


class Scripted:
    """Gives masks in order, and remembers the clicks."""

    def __init__(self, *masks: Tensor) -> None:
        self.answers, self.asked = list(masks), list[dict[str, Any]]()

    def image(self, pixels: Tensor, *, cached: bool) -> "Scripted":
        return self

    def masks(self, **prompts: Any) -> list[Mask]:
        self.asked.append(prompts)
        return [mask_of(self.answers.pop(0))]


def canvas(*answers: Tensor) -> tuple[Canvas, Scripted]:
    network = Scripted(*answers)
    return Canvas(PATH, torch.zeros(3, 40, 60, dtype=torch.uint8), network), network  # type: ignore[arg-type]


def annotator(*truth: Tensor, **settings: Any) -> SimulatedAnnotator:
    objects = [Object(rle_box(encode(one)), label, encode(one)) for label, one in enumerate(truth)]
    names = tuple("abc"[: len(truth)])
    return SimulatedAnnotator.of(ObjectDataset(names, [LabeledImage(PATH, 40, 60, tuple(objects), 1)]), **settings)


def test_clicks_correct_a_mask_until_it_is_good_enough() -> None:
    truth = block(5, 5, 35, 35)
    first, better = block(5, 5, 20, 35), block(5, 5, 34, 35)  # a half, and nearly all
    easel, network = canvas(first, better)
    annotator(truth).annotate(easel)
    assert easel.clicks == 2
    assert [asked["labels"] for asked in network.asked] == [[1], [1, 1]]
    assert [asked["mask"] for asked in network.asked] == [None, mask_of(first)]
    (x0, _), (x1, _) = network.asked[1]["points"]
    assert 5 <= x0 < 35
    assert 20 <= x1 < 35  # in the half that is missing
    [found] = easel.annotations
    assert (found.label, found.source, found.predicted_iou) == ("a", "clicks", 0.9)
    assert torch.equal(decode(found.rle), better)


def test_what_clicks_dont_mend_is_drawn() -> None:
    truth, bad = block(5, 5, 35, 35), block(50, 5, 58, 9)
    easel, network = canvas(bad, bad, bad)
    annotator(truth, max_clicks=3).annotate(easel)
    assert easel.clicks == len(network.asked) == 3
    assert network.asked[-1]["labels"][0] == 1
    [found] = easel.annotations
    assert (found.source, found.predicted_iou) == ("brush", None)
    assert torch.equal(decode(found.rle), truth)


def test_objects_that_are_there_are_not_annotated_again() -> None:
    one, other = block(5, 5, 35, 35), block(40, 5, 55, 20)
    easel, _ = canvas(other)
    assert easel.add(mask_of(block(5, 5, 33, 35)), "thing", "detector")
    annotator(one, other).annotate(easel)
    assert [(found.label, found.source) for found in easel.annotations] == [("thing", "detector"), ("b", "clicks")]


def test_empty_masks_and_overlaps_are_not_added() -> None:
    easel, _ = canvas()
    assert easel.add(block(5, 5, 35, 35))
    assert not easel.add(block(5, 5, 34, 35))  # IoU 29/30
    assert not easel.add(block(0, 0, 0, 0))
    assert easel.add(block(5, 5, 20, 35))  # a part: IoU 1/2
    ring = block(5, 5, 35, 35) & ~block(8, 8, 32, 32)
    assert not easel.add(ring)  # a data set has a box of a class once
    assert easel.add(ring, "ring")
    assert len(easel.annotations) == 3
    with pytest.raises(BadInput, match=r"\[2, 2\]; expected \[40, 60\]"):
        easel.add(torch.ones(2, 2, dtype=torch.bool))


def test_a_data_set_without_masks_is_refused() -> None:
    boxes = [LabeledImage(PATH, 40, 60, (Object((1, 1, 9, 9), 0),), 1)]
    with pytest.raises(BadInput, match="has no masks"):
        SimulatedAnnotator.of(ObjectDataset(("a",), boxes))

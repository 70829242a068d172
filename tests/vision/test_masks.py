"""Run-length codes, polygons and pasted masks, compared with pycocotools and torchvision."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco
from torch import Tensor

import tests.helpers.torchvision_stub  # noqa: F401 - before torchvision
from pentad import BadInput
from pentad.vision import masks


def blobs(height: int, width: int, share: float = 0.5) -> Tensor:
    return torch.rand(height, width) < share


def their_mask(mask: Tensor) -> dict:
    return coco.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))


SHAPES = [(1, 1), (7, 5), (40, 3), (64, 300)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_codes_have_pycocotools_bytes(shape: tuple[int, int], share: float) -> None:
    mask = blobs(*shape, share)
    ours, theirs = masks.encode(mask), their_mask(mask)
    assert ours["counts"] == theirs["counts"].decode()
    assert ours["size"] == list(theirs["size"])
    assert torch.equal(masks.decode(ours), mask)
    assert torch.equal(masks.decode(theirs), mask)
    assert masks.rle_area(ours) == coco.area(theirs)
    x, y, w, h = coco.toBbox(theirs)
    assert masks.rle_box(ours) == (x, y, x + w, y + h)


def test_uncompressed_codes_are_read_and_written() -> None:
    counts = [0, 4, 100, 2000, 5, 1, 390]
    text = coco.frPyObjects({"size": [50, 50], "counts": counts}, 50, 50)["counts"].decode()
    assert masks.to_text(counts) == text
    assert masks.rle_counts({"size": [50, 50], "counts": text}) == counts
    assert masks.decode({"size": [50, 50], "counts": counts}).sum() == 2005


@pytest.mark.parametrize(
    ("rle", "said"),
    [
        ({"size": [2, 2]}, "counts"),
        ({"size": [2], "counts": [4]}, "size"),
        ({"size": [2, -2], "counts": [4]}, "size"),
        ({"size": [2, 2], "counts": [5]}, "5 pixels"),
        ({"size": [2, 2], "counts": [-1, 5]}, "whole numbers"),
        ({"size": [2, 2], "counts": [float("nan")]}, "whole numbers"),
        ({"size": [100_000, 100_000], "counts": [10**10]}, "at most"),
        ({"size": [2, 2], "counts": "é"}, "COCO"),
        ({"size": [2, 2], "counts": "o"}, "end within"),
        ({"size": [2, 2], "counts": "oooooooooooooo0"}, "COCO"),
    ],
)
def test_bad_codes_are_refused(rle: dict, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        masks.decode(rle)


@given(st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=40), st.integers(0, 20), st.integers(0, 20))
def test_any_text_is_a_mask_or_bad_input(text: str, height: int, width: int) -> None:
    try:
        mask = masks.decode({"size": [height, width], "counts": text})
    except BadInput:
        return
    assert mask.shape == (height, width)


@given(st.lists(st.integers(0, 10**6), max_size=30))
def test_counts_survive_their_text(counts: list[int]) -> None:
    assert masks._from_text(masks.to_text(counts)) == counts


points = st.floats(-30, 70, allow_nan=False)


@given(st.lists(st.lists(st.tuples(points, points), min_size=3, max_size=8), min_size=1, max_size=3))
def test_polygons_are_filled_as_by_pycocotools(shapes: list[list[tuple[float, float]]]) -> None:
    polygons = [[value for point in shape for value in point] for shape in shapes]
    theirs = coco.merge(coco.frPyObjects(polygons, 37, 45))
    assert masks.from_polygons(polygons, 37, 45)["counts"] == theirs["counts"].decode()


@pytest.mark.parametrize("share", [0.1, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(6, 7), (30, 40)])
def test_outlines_give_their_mask_again_with_its_holes(shape: tuple[int, int], share: float) -> None:
    mask = blobs(*shape, share)
    polygons = masks.to_polygons(mask)
    assert torch.equal(masks.decode(masks.from_polygons(polygons, *shape)), mask)


def test_outlines_have_only_corners() -> None:
    square = torch.zeros(9, 9, dtype=torch.bool)
    square[2:5, 3:8] = True
    assert masks.to_polygons(square) == [[3, 2, 8, 2, 8, 5, 3, 5]]
    assert masks.to_polygons(torch.zeros(4, 4, dtype=torch.bool)) == []


def test_pasted_masks_are_torchvisions() -> None:
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    small = torch.rand(6, 28, 28)
    start = torch.rand(6, 2) * 60 - 10
    boxes = torch.cat((start, start + torch.rand(6, 2) * 60), 1)
    boxes[0] = torch.tensor([200.0, 200.0, 220.0, 220.0])
    theirs = paste_masks_in_image(small[1:, None], boxes[1:], (50, 70))[:, 0]
    assert torch.equal(masks.paste_masks(small, boxes, 50, 70, threshold=None)[1:], theirs)
    assert torch.equal(masks.paste_masks(small, boxes, 50, 70)[1:], theirs > 0.5)
    assert not masks.paste_masks(small, boxes, 50, 70)[0].any()  # torchvision fails outside of the image

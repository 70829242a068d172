"""Boxes, captions and masks on pictures."""

import pytest
import torch

from pentad.media.drawing import color, draw_detections


def changed(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    return (before != after).any(0)


@pytest.mark.parametrize("size", [(24, 40), (300, 200), (900, 1200)])
def test_lines_and_letters_grow_with_the_picture(size: tuple[int, int]) -> None:
    height, width = size
    image = torch.full((3, height, width), 90, dtype=torch.uint8)
    box = torch.tensor([[0.2 * width, 0.4 * height, 0.7 * width, 0.9 * height]])
    drawn = draw_detections(image, box, ["dog 0.93"], label_ids=[16])
    assert drawn.shape == image.shape
    assert torch.equal(image.unique(), torch.tensor([90], dtype=torch.uint8))  # the original stays
    x, y = int(0.2 * width), int(0.85 * height)
    assert drawn[:, y, x].tolist() == list(color(16))
    share = changed(image, drawn).float().mean()
    assert share > 0.005
    assert share < 0.3 or max(size) < 50


@pytest.mark.parametrize("corner", [(0, 0), (190, 0), (0, 140), (190, 140)])
def test_captions_stay_inside_of_the_picture(corner: tuple[int, int]) -> None:
    """The caption is whole at every border: as many of its pixels are seen as in the middle."""
    image = torch.zeros(3, 150, 200, dtype=torch.uint8)

    def ink(x: int, y: int) -> float:
        drawn = draw_detections(image, torch.tensor([[x, y, x + 10, y + 10]]), ["person 0.5"])
        return changed(image, drawn).sum().item()

    assert ink(*corner) == pytest.approx(ink(90, 70), rel=0.15)


def test_captions_do_not_cover_each_other() -> None:
    image = torch.zeros(3, 200, 300, dtype=torch.uint8)
    box = torch.tensor([[100.0, 80.0, 180.0, 160.0]])
    one = changed(image, draw_detections(image, box, ["first"])).sum()
    two = changed(image, draw_detections(image, box.expand(2, 4), ["first", "other"])).sum()
    assert two > one + 300


def test_masks_are_translucent_with_an_outline() -> None:
    image = torch.full((3, 60, 60), 100, dtype=torch.uint8)
    mask = torch.zeros(1, 60, 60, dtype=torch.bool)
    mask[0, 20:50, 20:50] = True
    drawn = draw_detections(image, torch.tensor([[0.0, 0.0, 5.0, 5.0]]), [""], label_ids=[3], masks_NHW=mask)
    inside = drawn[:, 35, 35].float()
    expected = 0.55 * 100 + 0.45 * torch.tensor(color(3)).float()
    assert (inside - expected).abs().max() <= 1
    assert drawn[:, 20, 30].tolist() == list(color(3))
    assert drawn[:, 55, 55].tolist() == [100, 100, 100]


def test_nothing_to_draw_and_odd_boxes_leave_a_picture() -> None:
    image = torch.zeros(3, 20, 20, dtype=torch.uint8)
    assert torch.equal(draw_detections(image, torch.zeros(0, 4), []), image)
    outside = torch.tensor([[-50.0, -50.0, 500.0, 500.0], [30.0, 30.0, 25.0, 25.0]])
    assert draw_detections(image, outside, ["a caption that is wider than the picture", "x"]).shape == image.shape


def test_neighboring_labels_have_different_colors() -> None:
    colors = [torch.tensor(color(index)).float() for index in range(12)]
    distances = [(one - other).norm() for i, one in enumerate(colors) for other in colors[:i]]
    assert min(distances) > 40

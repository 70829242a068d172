"""Clicks: deep inside of areas, where masks are wrong."""

import pytest
import torch

from pentad.errors import BadInput
from pentad.vision.clicks import deepest_point, mask_iou, next_click


def area(*blocks: tuple[int, int, int, int]) -> torch.Tensor:
    mask = torch.zeros(20, 30, dtype=torch.bool)
    for x0, y0, x1, y1 in blocks:
        mask[y0:y1, x0:x1] = True
    return mask


def test_the_deepest_point_is_in_the_middle_of_the_widest_part() -> None:
    assert deepest_point(area((2, 3, 9, 10), (12, 0, 15, 20))) == (5, 6)
    assert deepest_point(area((0, 0, 5, 5))) == (2, 2)  # the image's edge is a border
    with pytest.raises(BadInput, match="empty"):
        deepest_point(area())


@pytest.mark.parametrize(
    ("found", "click"),
    [
        (area((0, 0, 10, 20)), (14, 9, 1)),  # a part of 9 by 20 pixels is missing
        (area((0, 0, 30, 20)), (24, 9, 0)),  # 11 by 20 too many
        (area((0, 0, 19, 20)), None),
    ],
)
def test_the_next_click_is_in_the_error(found: torch.Tensor, click: tuple[int, int, int] | None) -> None:
    truth = area((0, 0, 19, 20))
    at = next_click(found, truth)
    assert (at is None) == (click is None)
    if at is not None and click is not None:
        assert at[2] == click[2]
        assert abs(at[0] - click[0]) <= 1
        assert (found ^ truth)[at[1], at[0]]


def test_iou() -> None:
    assert mask_iou(area((0, 0, 10, 10)), area((5, 0, 15, 10))) == pytest.approx(1 / 3)
    assert mask_iou(area(), area()) == 0

"""Overlap, coding, suppression and pooling of boxes, compared with torchvision's."""

import pytest
import torch
from torch import Tensor

import tests.helpers.torchvision_stub  # noqa: F401 - before torchvision
from pentad.nn.boxes import (
    batched_nms,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    nms,
    pairwise_iou,
    roi_align,
    roi_pool,
    to_centers,
    to_corners,
)


def boxes(count: int, size: float = 100.0, *, whole: bool = False) -> Tensor:
    start, extent = torch.rand(count, 2) * size, torch.rand(count, 2) * size / 4 + 1
    corners = torch.cat((start, start + extent), 1)
    return corners.round() if whole else corners


def test_iou_is_torchvisions() -> None:
    from torchvision.ops import box_iou

    one, other = boxes(20), boxes(30)
    assert torch.equal(pairwise_iou(one, other), box_iou(one, other))
    assert pairwise_iou(torch.zeros(1, 4), torch.zeros(1, 4)).item() == 0
    assert pairwise_iou(torch.zeros(0, 4), other).shape == (0, 30)


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("count", [0, 1, 127, 700])
def test_nms_keeps_torchvisions_indices(count: int, threshold: float) -> None:
    """Whole numbers and few levels of scores give many ties, of scores and of overlaps with the threshold."""
    from torchvision.ops import nms as theirs

    for whole in (False, True):
        corners = boxes(count, 30, whole=whole)
        scores = (torch.rand(count) * 8).round() / 8 if whole else torch.rand(count)
        assert nms(corners, scores, threshold).tolist() == theirs(corners, scores, threshold).tolist()


def test_an_overlap_equal_to_the_threshold_is_kept() -> None:
    """0.1 in float32 is above 0.1: the comparison is in double, as torchvision's."""
    from torchvision.ops import nms as theirs

    pair, scores = torch.tensor([[0.0, 0.0, 10.0, 1.0], [0.0, 0.0, 1.0, 1.0]]), torch.tensor([0.9, 0.8])
    for threshold in (0.1, 0.09, 0.11):
        assert nms(pair, scores, threshold).tolist() == theirs(pair, scores, threshold).tolist()
    halves = torch.tensor([[0.0, 0.0, 4.0, 1.0], [0.0, 0.0, 2.0, 1.0]])
    assert nms(halves, scores, 0.5).tolist() == [0, 1]
    assert nms(halves.half(), scores, 0.49).tolist() == [0]


def test_boxes_without_area_survive() -> None:
    flat = torch.tensor([[1.0, 1.0, 1.0, 5.0], [1.0, 1.0, 1.0, 5.0]])
    assert nms(flat, torch.ones(2), 0.5).tolist() == [0, 1]


@pytest.mark.parametrize("count", [200, 1100])
def test_labels_are_suppressed_apart(count: int) -> None:
    corners, labels = boxes(count, 30, whole=True), torch.randint(5, (count,))
    scores = (torch.rand(count) * 9).round() / 9
    kept = batched_nms(corners, scores, labels, 0.4)
    expected = torch.cat(
        [m[nms(corners[m], scores[m], 0.4)] for i in range(5) for m in [(labels == i).nonzero()[:, 0]]]
    )
    assert sorted(kept.tolist()) == sorted(expected.tolist())
    assert scores[kept].tolist() == sorted(scores[kept].tolist(), reverse=True)
    assert batched_nms(corners[:0], scores[:0], labels[:0], 0.4).shape == (0,)


def test_coding_is_torchvisions_and_has_an_inverse() -> None:
    from torchvision.models.detection._utils import BoxCoder

    weights = (10.0, 10.0, 5.0, 5.0)
    target, anchors = boxes(40), boxes(40)
    deltas = encode_boxes(target, anchors, weights)
    assert torch.allclose(deltas, BoxCoder(weights).encode_single(target, anchors), atol=1e-5)
    assert torch.allclose(decode_boxes(deltas, anchors, weights), target, atol=1e-3)
    wild = torch.randn(40, 4) * 30
    theirs = BoxCoder(weights).decode_single(wild, anchors)
    assert torch.allclose(decode_boxes(wild, anchors, weights), theirs, rtol=1e-5, atol=1e-3)


def test_centers_and_corners_are_inverse_and_clipping_stops_at_borders() -> None:
    corners = boxes(10)
    assert torch.allclose(to_corners(to_centers(corners)), corners, atol=1e-5)
    assert clip_boxes(torch.tensor([[-3.0, 2.0, 50.0, 70.0]]), 60, 40).tolist() == [[0, 2, 40, 60]]


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sampling", [0, 2])
def test_roi_align_and_its_gradient_are_torchvisions(sampling: int, aligned: bool) -> None:
    from torchvision.ops import roi_align as theirs

    features = torch.randn(2, 5, 20, 30, requires_grad=True)
    copy = features.detach().clone().requires_grad_()
    corners, images = boxes(12, 60).clamp(max=75) + 1, torch.randint(2, (12,))
    ours = roi_align(features, corners, images, (3, 4), 0.25, sampling, aligned)
    regions = torch.cat((images[:, None].float(), corners), 1)
    expected = theirs(copy, regions, (3, 4), 0.25, sampling or -1, aligned)
    assert torch.allclose(ours, expected, atol=1e-5)
    weight = torch.randn_like(ours)
    (ours * weight).sum().backward()
    (expected * weight).sum().backward()
    assert features.grad is not None
    assert torch.allclose(features.grad, copy.grad, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_coordinates_are_exact_in_any_dtype(dtype: torch.dtype) -> None:
    """With coordinates in bfloat16 a box at 200 would be off by a pixel."""
    features, corners = torch.randn(1, 3, 64, 64), torch.tensor([[201.3, 190.7, 243.9, 230.1]])
    expected = roi_align(features, corners, torch.tensor([0]), (7, 7), 0.25, 2)
    ours = roi_align(features.to(dtype), corners, torch.tensor([0]), (7, 7), 0.25, 2)
    assert ours.dtype == dtype
    assert torch.allclose(ours.float(), expected, atol=0.03)


def sampled(features: Tensor, box: list[float], cells: int, samples: int) -> Tensor:
    """RoIAlign of one box and one channel, sample by sample; one that is further than a pixel outside counts as 0."""
    height, width = features.shape
    x0, y0, x1, y1 = (edge - 0.5 for edge in box)
    result = torch.zeros(cells, cells)
    for row in range(cells):
        for column in range(cells):
            for i in range(samples):
                for j in range(samples):
                    y = y0 + (row + (i + 0.5) / samples) * (y1 - y0) / cells
                    x = x0 + (column + (j + 0.5) / samples) * (x1 - x0) / cells
                    if not (-1 <= y <= height and -1 <= x <= width):
                        continue
                    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
                    top, left = min(int(y), height - 2), min(int(x), width - 2)
                    down, right = y - top, x - left
                    corner = features[top : top + 2, left : left + 2]
                    value = torch.tensor([1.0 - down, down]) @ corner @ torch.tensor([1.0 - right, right])
                    result[row, column] += value / samples**2
    return result


def test_roi_align_beyond_the_borders() -> None:
    features = torch.randn(8, 10)
    for box in ([-4.0, -3.0, 5.0, 6.0], [6.0, 3.0, 15.0, 12.0], [20.0, 20.0, 30.0, 30.0]):
        ours = roi_align(features[None, None], torch.tensor([box]), torch.tensor([0]), (3, 3), 1.0, 2)
        assert torch.allclose(ours[0, 0], sampled(features, box, 3, 2), atol=1e-5)
    empty = roi_align(features[None, None], torch.tensor([[2.0, 2.0, 2.0, 2.0]]), torch.tensor([0]), (3, 3))
    assert empty.tolist() == torch.zeros(1, 1, 3, 3).tolist()
    assert roi_align(features[None, None], torch.zeros(0, 4), torch.zeros(0).long(), (3, 3)).shape == (0, 1, 3, 3)


def test_roi_pool_takes_the_maximum_of_rounded_cells() -> None:
    features = torch.randn(1, 1, 8, 10, requires_grad=True)
    corners = torch.tensor([[2.4, 1.0, 13.6, 11.0], [-9.0, 0.0, -4.0, 4.0]])
    ours = roi_pool(features, corners, torch.zeros(2).long(), (2, 2), 0.5)
    region = features[0, 0, 1:7, 1:8]  # 0.5 rounds up
    expected = torch.stack([region[a:b, c:d].max() for a, b in ((0, 3), (3, 6)) for c, d in ((0, 4), (3, 7))])
    assert ours[0, 0].flatten().tolist() == expected.tolist()
    assert ours[1].abs().sum() == 0
    ours.sum().backward()
    assert features.grad is not None
    assert features.grad.sum() == 4

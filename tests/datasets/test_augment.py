"""Changed images keep their objects under the boxes."""

from random import Random

import pytest
import torch

from pentad.datasets.augment import GRAY, Labeled, affine, mirror, mixup, mosaic, recolor
from pentad.nn.boxes import mask_boxes

COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]


def painted(label: int, seed: int, height: int = 80, width: int = 100, *, with_masks: bool = False) -> Labeled:
    """A gray image with a rectangle in the color of its label."""
    random = Random(seed)
    x0, y0 = random.randint(0, width - 40), random.randint(0, height - 40)
    x1, y1 = x0 + random.randint(20, 40), y0 + random.randint(20, 40)
    image = torch.full((3, height, width), GRAY, dtype=torch.uint8)
    image[:, y0:y1, x0:x1] = torch.tensor(COLORS[label], dtype=torch.uint8)[:, None, None]
    box = torch.tensor([[x0, y0, x1, y1]], dtype=torch.float32)
    return Labeled(image, box, torch.tensor([label]), (image[0] != GRAY)[None] if with_masks else None)


def assert_boxes_fit(one: Labeled, slack: float) -> None:
    """Each box is the bounding box of its color, within some pixels."""
    assert one.image.dtype == torch.uint8
    for box, label in zip(one.boxes, one.labels.tolist(), strict=True):
        color = torch.tensor(COLORS[label])[:, None, None]
        seen = ((one.image.int() - color).abs().amax(0) < 60).nonzero()
        (y0, x0), (y1, x1) = seen.amin(0).tolist(), (seen.amax(0) + 1).tolist()
        assert torch.allclose(box, torch.tensor([x0, y0, x1, y1]).float(), atol=slack)


@pytest.mark.parametrize("seed", range(8))
def test_a_mosaic_keeps_four_images_objects(seed: int) -> None:
    parts = [painted(label, seed * 4 + label) for label in range(4)]
    made = mosaic(parts, 96, 128, (0.8, 1.2), Random(seed))
    assert made.image.shape == (3, 96, 128)
    assert_boxes_fit(made, 8)  # the box of a turned box
    again = mosaic(parts, 96, 128, (0.8, 1.2), Random(seed))
    assert torch.equal(made.image, again.image)


@pytest.mark.parametrize("seed", range(4))
def test_masks_move_with_their_objects(seed: int) -> None:
    parts = [painted(label, seed * 4 + label, with_masks=True) for label in range(4)]
    one = mosaic(parts, 96, 128, (0.8, 1.2), Random(seed))
    one = mixup(mirror(one), mosaic(parts[::-1], 96, 128, (0.8, 1.2), Random(seed)))
    halves = one.image.int() - GRAY
    for box, label, mask in zip(one.boxes, one.labels.tolist(), one.masks, strict=True):
        assert torch.equal(box, mask_boxes(mask[None])[0])
        color = (torch.tensor(COLORS[label])[:, None, None] - GRAY) / 2
        near = (halves - color).abs().amax(0) < 6
        assert (near & mask).sum() > 0.5 * mask.sum()


def test_mosaics_show_most_objects() -> None:
    counts = [
        len(mosaic([painted(i, s + i) for i in range(4)], 96, 128, (0.5, 1.0), Random(s)).labels) for s in range(20)
    ]
    assert sum(counts) > 40


@pytest.mark.parametrize("seed", range(4))
def test_affine_maps(seed: int) -> None:
    assert_boxes_fit(affine(painted(1, seed), 80, 100, (0.9, 1.1), Random(seed)), 8)


def test_mirrors_mixtures_and_colors() -> None:
    one, other = painted(0, 1), painted(2, 2)
    assert_boxes_fit(mirror(one), 0)
    assert torch.equal(mirror(mirror(one)).image, one.image)
    both = mixup(one, other)
    assert both.labels.tolist() == [0, 2]
    assert torch.equal(both.image[:, 0, 0], torch.full((3,), GRAY, dtype=torch.uint8))
    colored = recolor(one, Random(0))
    assert torch.equal(colored.boxes, one.boxes)
    assert 0 < (colored.image.int() - one.image.int()).abs().max() <= 60

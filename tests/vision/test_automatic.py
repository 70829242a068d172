"""Everything in an image: the masks of Meta's SamAutomaticMaskGenerator, in its order."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pentad
from pentad.vision.automatic import Everything, remove_small_regions
from pentad.vision.prompts import Request
from pentad.vision.segmenter import EmbeddedImage, Mask, Segmenter
from tests.helpers.progress import Watcher
from tests.helpers.sam import PATCH, SIDE, meta_sam, segment_anything
from tests.vision.test_segmenter import photo

GRID = {"points_per_side": 6, "stability_score_thresh": 0.6, "pred_iou_thresh": 0.75}
CENTERS = torch.tensor([[9.0, 11], [14, 30], [31, 22], [40, 8], [52, 33], [58, 15], [30, 41]])


def spots(points_P2: Tensor) -> tuple[Tensor, Tensor]:
    """What a trained network might say: three disks around the object next to a point, with a hole and an island, and
    their predicted IoU, which is higher for points near the middle."""
    side = 4 * SIDE
    distances_PC = torch.cdist(points_P2.float(), CENTERS)
    nearest_P = distances_PC.argmin(1)
    at = (torch.arange(side) + 0.5) * (SIDE * PATCH / side)
    grid_UU2 = torch.stack(torch.meshgrid(at, at, indexing="xy"), -1)
    logits, iou = [], []
    for index, (distance, center) in enumerate(zip(distances_PC.amin(1), CENTERS[nearest_P], strict=True)):
        away_UU = (grid_UU2 - center).norm(dim=-1)
        radii = torch.tensor([4.0, 6.5, 10.0]) + 0.3 * (index % 3)
        disks_3UU = (radii[:, None, None] - away_UU) * torch.tensor([0.5, 1.0, 4.0])[:, None, None]
        disks_3UU[1, (away_UU - 2).abs() < 0.7] = -2
        disks_3UU[2, (away_UU - 13).abs() < 0.5] = 2
        logits.append(disks_3UU)
        iou.append(1 - 0.02 * distance - torch.tensor([0.1, 0.05, 0.08]))
    return torch.stack(logits), torch.stack(iou)


@pytest.fixture
def sam(tmp_path: Path) -> Segmenter:
    meta_sam(tmp_path / "sam.pth")
    loaded = pentad.load(tmp_path / "sam.pth")
    assert isinstance(loaded, Segmenter)
    return loaded


def meta_masks(image: Tensor, settings: dict[str, Any], spotted: bool) -> list[dict[str, Any]]:
    generator = segment_anything.SamAutomaticMaskGenerator(meta_sam(), **settings)
    predictor = generator.predictor

    def predict(points: Tensor, labels: Tensor, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
        logits, iou = spots(points[:, 0])
        return predictor.model.postprocess_masks(logits, predictor.input_size, predictor.original_size), iou, logits

    if spotted:
        predictor.predict_torch = predict
        predictor.model.image_encoder.forward = lambda image: image
    found: list[dict[str, Any]] = generator.generate(image.permute(1, 2, 0).numpy())
    return found


def assert_equal_masks(found: list[Mask], expected: list[dict[str, Any]], wrong: int) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        x0, y0, x1, y1 = ours.box
        left, top, width, height = theirs["crop_box"]
        assert (ours.mask.numpy() != theirs["segmentation"]).sum() <= wrong
        if not wrong:
            assert [x0, y0, max(x1 - x0 - 1, 0), max(y1 - y0 - 1, 0)] == theirs["bbox"]
        assert ours.predicted_iou == pytest.approx(theirs["predicted_iou"], abs=1e-4)
        assert ours.stability_score == pytest.approx(theirs["stability_score"], abs=1e-3)
        assert ours.prompt["points"][0] == pytest.approx(theirs["point_coords"][0])
        assert ours.prompt.get("crop", [0, 0, 130, 90]) == [left, top, left + width, top + height]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"box_nms_thresh": 0.95, "min_mask_region_area": 60},
        {"crop_n_layers": 1, "crop_n_points_downscale_factor": 2, "crop_nms_thresh": 0.8, "box_nms_thresh": 0.9},
        {"crop_n_layers": 1, "min_mask_region_area": 30, "points_per_batch": 7},
    ],
    ids=str,
)
def test_filters_are_those_of_meta(sam: Segmenter, settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(self: Any, request: Request, chosen: slice, multimask: bool) -> tuple[Tensor, Tensor]:
        points = request.on(self.fitted, chosen).points_PK2
        assert points is not None
        return spots(points[:, 0])

    monkeypatch.setattr(EmbeddedImage, "decode", decode)
    monkeypatch.setattr(sam, "embed", lambda image: image)
    image = photo(90, 130)
    expected = meta_masks(image, {**GRID, **settings}, spotted=True)
    assert len(expected) > 5
    assert_equal_masks(sam.everything(image, **{**GRID, **settings}), expected, 0)


def test_masks_of_random_weights_equal_those_of_meta(sam: Segmenter) -> None:
    settings = {"points_per_side": 4, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0}
    image = photo(90, 130)
    expected = meta_masks(image, settings, spotted=False)
    assert len(expected) == 3 * 16
    assert_equal_masks(sam.everything(image, **settings), expected, 3)


def test_memory_is_bounded_by_batches_that_change_nothing(sam: Segmenter) -> None:
    image, watcher = photo(90, 130), Watcher()
    settings = {"points_per_side": 5, "pred_iou_thresh": 0.1, "stability_score_thresh": 0.0, "box_nms_thresh": 0.99}
    together = sam.everything(image, **settings, progress=watcher)
    assert len(together) > 2
    alone = sam.everything(image, **settings, points_per_batch=1)
    assert [one.prompt for one in alone] == [one.prompt for one in together]
    assert all((one.mask != other.mask).sum() < 5 for one, other in zip(alone, together, strict=True))
    assert (watcher.tasks[0], watcher.counts[0], watcher.open) == (("points", 25), 25, 0)


@pytest.mark.parametrize("size", [(90, 130), (333, 40), (7, 5)], ids=str)
def test_crops_are_those_of_meta(size: tuple[int, int]) -> None:
    from segment_anything.utils.amg import build_all_layer_point_grids, generate_crop_boxes

    how = Everything(crop_n_layers=3, crop_n_points_downscale_factor=2)
    boxes, layers = generate_crop_boxes(size, 3, how.crop_overlap_ratio)
    assert [[*crop] for crop in how.crops(*size)] == [[*box, layer] for box, layer in zip(boxes, layers, strict=True)]
    for layer, grid in enumerate(build_all_layer_point_grids(32, 3, 2)):
        assert np.array_equal(how.grid(layer).numpy(), grid)


@pytest.mark.parametrize("holes", [False, True])
def test_small_regions_are_removed_as_by_opencv(holes: bool) -> None:
    from segment_anything.utils.amg import remove_small_regions as theirs

    generator = np.random.default_rng(1)
    for share in (0.02, 0.4, 0.6, 0.97):
        mask = generator.random((40, 50)) < share
        expected, _ = theirs(mask, 6, "holes" if holes else "islands")
        assert np.array_equal(remove_small_regions(torch.from_numpy(mask), 6, holes=holes).numpy(), expected)


def test_nothing_may_be_found(sam: Segmenter) -> None:
    assert sam.everything(photo(30, 40), points_per_side=2, pred_iou_thresh=1.0, min_mask_region_area=5) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"points_per_side": 0}, "points_per_side is 0; expected a number from 1 to 256"),
        ({"stability_score_thresh": float("nan")}, "stability_score_thresh is nan; expected a number from 0 to 1"),
        ({"crop_n_layers": 9}, "crop_n_layers is 9; expected a number from 0 to 4"),
        ({"points": 3}, "unknown setting 'points'; known settings: points_per_side"),
    ],
)
def test_settings_out_of_range(sam: Segmenter, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(pentad.BadInput, match=message):
        sam.everything(photo(30, 40), **settings)

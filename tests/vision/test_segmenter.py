"""A segmenter gives the masks of Meta's SamPredictor, and refuses prompts that make no sense."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pentad
from pentad.vision import segmenter as module
from pentad.vision.masks import decode, encode
from pentad.vision.prompts import Fitted
from pentad.vision.segmenter import Segmenter
from pentad.vision.thresholding import Thresholder
from tests.helpers.sam import SIDE, meta_sam, segment_anything


def photo(height: int, width: int) -> Tensor:
    """Soft spots, so that masks have shapes."""
    coarse = torch.rand(1, 3, 5, 6, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0].clamp(0, 1).mul(255).byte()


@pytest.fixture
def sam(tmp_path: Path) -> Segmenter:
    meta_sam(tmp_path / "sam.pth")
    loaded = pentad.load(tmp_path / "sam.pth")
    assert isinstance(loaded, Segmenter)
    return loaded


def predictor(image: Tensor) -> Any:
    peer = segment_anything.SamPredictor(meta_sam())
    peer.set_image(image.permute(1, 2, 0).numpy())
    return peer


PROMPTS: dict[str, dict[str, Any]] = {
    "points": {"points": [[9.5, 12], [20, 3]], "labels": [1, 0]},
    "box": {"boxes": [2.5, 3, 21, 17]},
    "point and box": {"points": [[9.5, 12]], "boxes": [2.5, 3, 21, 17]},
}


@pytest.mark.parametrize("size", [(64, 64), (47, 131), (201, 30), (24, 22)], ids=str)
@pytest.mark.parametrize("name", PROMPTS)
def test_masks_equal_those_of_meta(sam: Segmenter, size: tuple[int, int], name: str) -> None:
    image, prompts = photo(*size), PROMPTS[name]
    points = prompts.get("points")
    masks, iou, logits = predictor(image).predict(
        point_coords=None if points is None else np.array(points, dtype=float),
        point_labels=None if points is None else np.array(prompts.get("labels", [1] * len(points))),
        box=np.array(prompts["boxes"], dtype=float) if "boxes" in prompts else None,
        multimask_output=True,
    )
    found = sam.image(image).masks(**prompts, multimask=True)
    assert [one.predicted_iou for one in found] == pytest.approx(sorted(iou.tolist(), reverse=True), abs=1e-4)
    for one, index in zip(found, np.argsort(-iou), strict=True):
        assert (one.logits_UU - torch.from_numpy(logits[index])).abs().max() < 1e-3
        assert (one.mask.numpy() != masks[index]).mean() < 1e-3
        rows, columns = np.nonzero(masks[index])
        if len(rows) and (one.mask.numpy() == masks[index]).all():
            assert one.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_refinement_equals_that_of_meta(sam: Segmenter) -> None:
    image = photo(47, 131)
    peer, embedded = predictor(image), sam.image(image)
    _, iou, logits = peer.predict(np.array([[60.0, 20]]), np.array([1]))
    [first] = embedded.masks(points=[60, 20])
    assert first.predicted_iou == pytest.approx(iou.max(), abs=1e-4)
    points = [[60, 20], [5, 5]]
    masks, iou, _ = peer.predict(
        np.array(points, dtype=float), np.array([1, 0]), mask_input=logits[iou.argmax()][None], multimask_output=False
    )
    [second] = embedded.masks(points=points, labels=[1, 0], mask=first)
    assert second.predicted_iou == pytest.approx(iou[0], abs=1e-4)
    assert (second.mask.numpy() != masks[0]).mean() < 1e-3
    assert second.prompt == {"points": [[60, 20], [5, 5]], "labels": [1, 0], "mask": True}


def test_prompts_in_a_batch_are_answered_as_alone(sam: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROMPTS_AT_ONCE", 2)
    embedded = sam.image(photo(40, 60))
    boxes = [[1, 2, 30, 30], [10, 10, 50, 39], [5, 0, 20, 20]]
    together = embedded.masks(boxes=boxes)
    alone = [mask for box in boxes for mask in embedded.masks(boxes=box)]
    assert [one.prompt for one in together] == [{"box": box} for box in boxes]
    assert [one.predicted_iou for one in together] == pytest.approx([one.predicted_iou for one in alone], abs=1e-5)
    points = torch.tensor([[[3.0, 4]], [[20, 20]]])
    assert len(embedded.masks(points=points)) == 2
    assert len(embedded.masks(points=points, boxes=boxes[:2], multimask=True)) == 6


def test_a_mask_of_the_image_is_a_prompt(sam: Segmenter) -> None:
    embedded = sam.image(photo(40, 60))
    rough = torch.zeros(40, 60, dtype=torch.bool)
    rough[10:30, 20:50] = True
    logits = module.read_prompts(None, None, None, rough, embedded.fitted, 4 * SIDE).masks_P1MM
    assert logits is not None
    assert (F_area := float((logits > 0).sum())) == pytest.approx(20 * 30 * (4 * SIDE / 60) ** 2, rel=0.15), F_area
    assert len(embedded.masks(mask=rough)) == len(embedded.masks(mask=logits)) == 1


@pytest.mark.parametrize("size", [(64, 64), (300, 200), (47, 131), (1, 90)], ids=str)
def test_thresholding_is_that_of_the_whole_image_upscaled_twice(size: tuple[int, int]) -> None:
    fitted = Fitted.of(*size, 64)
    threshold = Thresholder(fitted, 32)
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    spot = 4 - ((y - 9) ** 2 + (x - 13) ** 2).sqrt()
    for logits in (spot, -spot, torch.randn(32, 32, generator=torch.Generator().manual_seed(0)), -1 - spot.abs()):
        square = torch.nn.functional.interpolate(logits[None, None], (64, 64), mode="bilinear")
        inner = square[..., : fitted.inner[0], : fitted.inner[1]]
        whole = torch.nn.functional.interpolate(inner, size, mode="bilinear")[0, 0]
        found = threshold(logits)
        assert found.rle == encode(whole > 0)
        stability = (whole > 1).sum() / (whole > -1).sum().clamp(min=1)
        assert found.stability_score == pytest.approx(float(stability), abs=1e-6)
        assert found.columns_WH.shape[0] <= size[1]
    part = Thresholder(fitted, 32, (size[0] + 9, size[1] + 7), 4, 3)(spot).rle
    assert torch.equal(decode(part), torch.nn.functional.pad(decode(threshold(spot).rle), (3, 4, 4, 5)))


def test_an_image_is_embedded_once_and_the_cache_is_bounded(sam: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CACHED", 2)
    embedded = []
    embed = sam.embed
    monkeypatch.setattr(sam, "embed", lambda image: embedded.append(image) or embed(image))
    images = [photo(30, 40), photo(40, 30), photo(31, 40)]
    for image in (*images, images[2], images[1]):
        sam.image(image)
    assert len(embedded) == 3
    sam.image(images[0])
    assert len(embedded) == 4


def test_an_embedded_image_is_saved(sam: Segmenter, tmp_path: Path) -> None:
    embedded = sam.image(photo(30, 40))
    embedded.save(tmp_path / "photo.safetensors")
    again = sam.open_image(tmp_path / "photo.safetensors")
    assert (again.width, again.height) == (40, 30)
    assert again.masks(points=[5, 5]) == embedded.masks(points=[5, 5])
    with torch.no_grad():
        sam.sam.image_encoder.neck[-1].weight[0] += 1
    with pytest.raises(pentad.BadInput, match="was embedded by another network"):
        sam.open_image(tmp_path / "photo.safetensors")
    (tmp_path / "other.safetensors").write_bytes(b"no")
    with pytest.raises(pentad.BadInput, match=r"other\.safetensors"):
        sam.open_image(tmp_path / "other.safetensors")


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (3, 2)])
def test_odd_images(sam: Segmenter, size: tuple[int, int]) -> None:
    image = torch.zeros(3, *size, dtype=torch.uint8)
    [one] = sam.image(image).masks(points=[0.5, 0.5])
    assert one.mask.shape == size


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({}, "there is no prompt; expected points, boxes, a mask or a text"),
        ({"points": [[70, 5]]}, "the point 70,5 is outside of the image; expected x and y within 60 x 40"),
        ({"points": [[5, -1]]}, "the point 5,-1 is outside"),
        ({"points": [[math.nan, 5]]}, "points have a value that is not finite"),
        ({"points": []}, r"points have the shape \[0\]; expected"),
        ({"points": [[1, 2, 3]]}, r"points have the shape \[1, 3\]; expected"),
        ({"points": [[1, 2], [3]]}, "points are not numbers in equal rows"),
        ({"points": [[1, 2]], "labels": [2]}, "a point's label is 2; expected 1 for the object or 0"),
        ({"points": [[1, 2]], "labels": [1, 0, 1]}, r"labels have the shape \[3\]; expected \[1, 1\]"),
        ({"labels": [1]}, "labels are given without points"),
        ({"boxes": [20, 5, 10, 30]}, "the box 20,5,10,30 has no area; expected x0 < x1 and y0 < y1"),
        ({"boxes": [5, 5, 5, 30]}, "has no area"),
        ({"boxes": [5, 5, 70, 30]}, "the corner 70,30 is outside of the image"),
        ({"boxes": [5, 5, math.inf, 30]}, "boxes have a value that is not finite"),
        ({"boxes": [1, 2, 3]}, r"boxes have the shape \[3\]; expected \[4\] or \[prompts, 4\]"),
        ({"points": [[1, 2]], "boxes": [[1, 1, 9, 9]] * 2}, "prompts differ in number: points for 1, boxes for 2"),
        ({"mask": torch.zeros(3, 3)}, r"a mask has the shape \[3, 3\]; expected \[40, 60\], the image's, or logits"),
        ({"mask": torch.full((40, 60), math.nan)}, "the mask have a value"),
    ],
    ids=str,
)
def test_prompts_that_make_no_sense(sam: Segmenter, prompts: dict[str, Any], message: str) -> None:
    with pytest.raises(pentad.BadInput, match=message):
        sam.image(photo(40, 60)).masks(**prompts)

"""AP and AR of boxes and masks as pycocotools', mean IoU and top-k accuracy."""

import contextlib
import io
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pentad import BadInput
from pentad.datasets.coco import coco_json
from pentad.datasets.objects import LabeledImage, Object
from pentad.datasets.scenes import Scenes
from pentad.evaluate.vision import Confusion, coco_metrics, coco_results, top_k_accuracy
from pentad.vision import masks


@pytest.fixture(scope="module")
def truth() -> list[LabeledImage]:
    """Scenes of small and large objects, some of them crowds."""
    images = []
    for scenes in (Scenes(8, seed=1, size=320), Scenes(8, seed=2, size=96)):
        for labeled in map(scenes.labeled, range(8)):
            objects = tuple(
                Object(o.box, o.label % 3, o.segmentation, crowd=index == 2, area=o.area)
                for index, o in enumerate(labeled.objects)
            )
            images.append(LabeledImage(Path(f"{len(images)}.png"), labeled.height, labeled.width, objects, len(images)))
    return images


def guesses(images: list[LabeledImage]) -> list[dict[str, Any]]:
    """Detections that are near the truth, far from it, doubled, of a wrong class, or missing."""
    results = []
    for image in images:
        shift = [torch.randint(-6, 7, (2,)).tolist() for _ in range(2 * len(image.objects))]
        found = [o for o in image.objects * 2 if torch.rand(()) < 0.8]
        moved: list[Tensor] = [
            torch.roll(o.mask(image.height, image.width), by, (0, 1)) for o, by in zip(found, shift, strict=False)
        ]
        codes = [masks.encode(mask) for mask in moved]
        boxes = torch.tensor([masks.rle_box(code) for code in codes]).view(-1, 4)
        labels = torch.tensor([(o.label + (torch.rand(()).item() < 0.2)) % 3 for o in found], dtype=torch.int64)
        results += coco_results(image, boxes, torch.rand(len(found)), labels, codes)
    return results


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_numbers_are_pycocotools(kind: str, truth: list[LabeledImage]) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    names, results = ["a", "b", "c"], guesses(truth)
    ours = coco_metrics(names, truth, results, masks=kind == "segm")
    with contextlib.redirect_stdout(io.StringIO()):
        peer = COCO()
        peer.dataset = coco_json(names, truth)
        peer.createIndex()
        kept = "segmentation" if kind == "segm" else "bbox"
        shown = [{k: r[k] for k in ("image_id", "category_id", "score", kept)} for r in results]
        theirs = COCOeval(peer, peer.loadRes(shown), kind)
        theirs.evaluate()
        theirs.accumulate()
        theirs.summarize()
    expected = [None if number < 0 else number for number in theirs.stats.tolist()]
    assert list(astuple(ours)[1:]) == pytest.approx(expected, abs=1e-9)
    assert 0.05 < ours.ap50 < 0.95
    precision = theirs.eval["precision"]
    assert ours.by_class == pytest.approx({n: precision[:, :, i, 0, -1].mean() for i, n in enumerate(names)})


def test_perfect_missing_and_strange_results(truth: list[LabeledImage]) -> None:
    names, first = ["a", "b", "c"], truth[0]
    perfect = [
        result
        for image in truth
        for result in coco_results(
            image,
            torch.tensor([o.box for o in image.objects]),
            torch.ones(len(image.objects)),
            torch.tensor([o.label for o in image.objects]),
            [o.rle(image.height, image.width) for o in image.objects],
        )
    ]
    assert coco_metrics(names, truth, perfect, masks=True).ap == pytest.approx(1)
    assert coco_metrics(names, truth, []).ap == 0
    assert coco_metrics(names, [], []).ap is None
    with pytest.raises(BadInput, match="image 0, which"):
        coco_metrics(names, truth[1:], perfect[:1])
    boxed = LabeledImage(first.path, first.height, first.width, (Object((1, 1, 5, 5), 0, area=16),), first.number)
    with pytest.raises(BadInput, match="no mask"):
        coco_metrics(names, [boxed], perfect[:1], masks=True)


def test_mean_iou_ignores_and_leaves_out_absent_classes() -> None:
    confusion = Confusion(3)
    confusion.add(torch.tensor([[0, 1], [1, 1]]), torch.tensor([[0, 0], [1, 255]]))
    assert confusion.iou()[:2].tolist() == [0.5, 0.5]
    assert confusion.mean_iou() == 0.5
    assert confusion.accuracy() == pytest.approx(2 / 3)
    confusion.add(torch.tensor([2]), torch.tensor([1]))
    assert confusion.mean_iou() == pytest.approx((0.5 + 1 / 3 + 0) / 3)


def test_top_k_accuracy() -> None:
    logits = torch.tensor([[3.0, 2, 1], [1, 2, 3], [2, 3, 1]])
    labels = torch.tensor([0, 1, 2])
    assert [top_k_accuracy(logits, labels, k) for k in (1, 2, 3, 9)] == pytest.approx([1 / 3, 2 / 3, 1, 1])

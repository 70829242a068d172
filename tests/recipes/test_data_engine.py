"""The data engine from its first stage to its last, on tiny scenes with a tiny network; interruptions lose nothing."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import pentad
from pentad.datasets.object_folders import read_objects
from pentad.errors import BadInput
from pentad.recipes.annotation import Canvas, SimulatedAnnotator
from pentad.recipes.data_engine import Acceptance, annotate, retrain
from pentad.vision.clicks import mask_iou
from pentad.vision.detector import Detection, Detections
from tests.helpers.annotation_world import RECIPE, write_world

ANYTHING = Acceptance(min_iou=-100, min_stability=0, max_overlap=0.5, points_per_side=2)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def images(world: Path) -> list[Path]:
    return [image.path for image in read_objects(world / "scenes").images]


def segmenter(path: Path) -> Any:
    return pentad.load(path)


def person(world: Path) -> SimulatedAnnotator:
    return SimulatedAnnotator.of(read_objects(world / "scenes"), max_clicks=2)


class Boxes:
    """A detector that finds the first object of each scene; its box reaches beyond the image."""

    name = "boxes"

    def __init__(self, world: Path) -> None:
        dataset = read_objects(world / "scenes")
        self.samples = [dataset[index] for index in range(len(dataset))]

    def detect(self, pixels: torch.Tensor, *, threshold: float) -> list[Detections]:
        [sample] = [one for one in self.samples if torch.equal(one.image, pixels)]
        x0, y0, x1, y1 = sample.boxes[0].tolist()
        outside = Detection((-9.0, -9.0, -1.0, -1.0), "digit", 0, 0.8)
        return [Detections(None, 64, 64, (Detection((x0 - 70, y0, x1, y1), "digit", 0, 0.9), outside))]


def test_the_whole_engine(tmp_path: Path, world: Path) -> None:
    files, truth = images(world), read_objects(world / "scenes")
    first = annotate("assisted", files, segmenter(world / "sam"), tmp_path / "1", annotator=person(world))
    objects = sum(len(image.objects) for image in truth.images)
    assert (first.images, first.masks, first.proposed) == (4, objects, 0)
    assert first.clicked + first.drawn == objects
    assert first.clicks_per_mask is not None
    assert 1 <= first.clicks_per_mask <= 2
    made = read_objects(tmp_path / "1")
    for index in range(4):
        for mask, right in zip(made[index].masks, truth[index].masks, strict=True):
            assert mask_iou(mask, right) >= 0.9
    model = retrain(world / "recipe.toml", str(world / "sam"), [tmp_path / "1"], tmp_path / "run-1")

    settings: dict[str, Any] = {"annotator": person(world), "detector": Boxes(world), "acceptance": ANYTHING}
    second = annotate("semi", files, segmenter(model), tmp_path / "2", **settings)
    assert second.proposed == 4
    assert second.masks > second.proposed
    rows = json.loads((tmp_path / "2/annotations.json").read_text())["annotations"]
    assert {row["source"] for row in rows} <= {"detector", "clicks", "brush"}
    assert all(("predicted_iou" in row) == (row["source"] != "brush") for row in rows)
    stages = [tmp_path / "1", tmp_path / "2"]
    model = retrain(world / "recipe.toml", str(model), stages, tmp_path / "run-2")
    assert len(read_objects(tmp_path / "run-2-data")) == 8
    with pytest.raises(BadInput, match="the recipe differs"):
        retrain(world / "recipe.toml", str(world / "sam"), [tmp_path / "2"], tmp_path / "run-1")

    third = annotate("automatic", files, segmenter(model), tmp_path / "3", acceptance=ANYTHING)
    assert (third.images, third.clicked, third.drawn, third.clicks_per_mask) == (4, 0, 0, None)
    assert third.masks == third.proposed > 0
    for sample in read_objects(tmp_path / "3"):  # type: ignore[attr-defined]
        for number, mask in enumerate(sample.masks):
            assert all(mask_iou(mask, other) <= 0.5 for other in sample.masks[:number])


def test_only_confident_and_stable_masks_are_kept(tmp_path: Path, world: Path) -> None:
    sam, files = segmenter(world / "sam"), images(world)[:1]
    for number, strict in enumerate((replace(ANYTHING, min_iou=1.0), replace(ANYTHING, min_stability=1.0))):
        for stage, more in (("automatic", {}), ("semi", {"detector": Boxes(world)})):
            found = annotate(stage, files, sam, tmp_path / f"{stage}{number}", acceptance=strict, **more)  # type: ignore[arg-type]
            assert (found.images, found.masks) == (1, 0)


class Interrupted(BaseException):
    pass


class Tired(SimulatedAnnotator):
    """Is interrupted in the third image, after its objects were added."""

    def annotate(self, canvas: Canvas) -> None:
        super().annotate(canvas)
        if canvas.path.name == "000002.png":
            raise Interrupted


def test_an_interrupted_stage_continues_with_the_images_that_are_left(tmp_path: Path, world: Path) -> None:
    files, sam = images(world), segmenter(world / "sam")
    annotate("assisted", files, sam, tmp_path / "whole", annotator=person(world))
    patient = person(world)
    with pytest.raises(Interrupted):
        annotate("assisted", files, sam, tmp_path / "out", annotator=Tired(**vars(patient)))
    assert not (tmp_path / "out/annotations.json").exists()
    with (tmp_path / "out/annotations.jsonl").open("a") as lines:
        lines.write('{"image": "000002.png", "sour')  # as a process that is killed while it writes
    seen = list[Path]()

    class Noted(SimulatedAnnotator):
        def annotate(self, canvas: Canvas) -> None:
            seen.append(canvas.path)
            super().annotate(canvas)

    report = annotate("assisted", files, sam, tmp_path / "out", annotator=Noted(**vars(patient)))
    assert seen == files[2:]
    assert report.images == 4
    assert (tmp_path / "out/annotations.json").read_text() == (tmp_path / "whole/annotations.json").read_text()
    with pytest.raises(BadInput, match="was begun with stage assisted; it is automatic now"):
        annotate("automatic", files, sam, tmp_path / "out")


def test_damaged_images_are_skipped_and_equal_names_kept_apart(tmp_path: Path, world: Path) -> None:
    [file, other, *_] = images(world)
    (tmp_path / "a").mkdir()
    (tmp_path / "a/000000.png").write_bytes(other.read_bytes())
    (tmp_path / "a/bad.png").write_text("no picture")
    files = [file, tmp_path / "a/bad.png", tmp_path / "a/000000.png"]
    report = annotate("automatic", files, segmenter(world / "sam"), tmp_path / "out", acceptance=ANYTHING)
    assert report.images == 2
    assert "bad.png" in report.skipped[0]
    written = read_objects(tmp_path / "out").images
    assert [image.path.read_bytes() for image in written] == [file.read_bytes(), other.read_bytes()]


@pytest.mark.parametrize(
    ("stage", "facts"),
    [("manual", "expected one of assisted, semi, automatic"), ("assisted", "no annotator"), ("semi", "no detector")],
)
def test_what_is_refused(tmp_path: Path, world: Path, stage: str, facts: str) -> None:
    with pytest.raises(BadInput, match=facts):
        annotate(stage, images(world), segmenter(world / "sam"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_folders_and_recipes_are_refused(tmp_path: Path, world: Path) -> None:
    with pytest.raises(BadInput, match="no annotation was begun in it"):
        annotate("automatic", images(world), segmenter(world / "sam"), world / "scenes")
    (tmp_path / "detect.toml").write_text(RECIPE.replace('"segment"', '"detect"'))
    with pytest.raises(BadInput, match="the objective is detect; expected segment"):
        retrain(tmp_path / "detect.toml", str(world / "sam"), [world / "scenes"], tmp_path / "run")

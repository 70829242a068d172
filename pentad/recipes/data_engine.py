"""The data engine of Segment Anything (arXiv:2304.02643, section 4): a segmenter helps to make the masks that train it.

Three stages, with training between them: in the assisted one an annotator clicks; in the semi-automatic one boxes of a
detector propose masks, confident ones are kept, and the annotator adds what is missing; the automatic one keeps the
confident and stable masks of everything.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from pentad.datasets.object_folders import read_objects, write_objects
from pentad.datasets.objects import ObjectDataset
from pentad.errors import BadInput
from pentad.recipes.annotation import Annotator, Canvas
from pentad.recipes.annotation_folder import AnnotationFolder, open_annotations
from pentad.train.recipe import read_recipe
from pentad.train.run import open_run
from pentad.vision.detector import Detector
from pentad.vision.segmenter import Mask, Segmenter
from pentad.weights.cache import Progress, task

STAGES = ("assisted", "semi", "automatic")


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """Which masks that nobody looked at are kept.

    Attributes:
        min_iou: their predicted IoU is above it.
        min_stability: their stability is at least this.
        max_overlap: their IoU with a mask that was kept before is at most this.
        threshold: the least score of a detector's box.
        points_per_side: of the grid that asks for everything.
    """

    min_iou: float = 0.88
    min_stability: float = 0.95
    max_overlap: float = 0.7
    threshold: float = 0.5
    points_per_side: int = 32

    def accepts(self, mask: Mask) -> bool:
        return mask.predicted_iou > self.min_iou and mask.stability_score >= self.min_stability


class StageReport(NamedTuple):
    """What a stage gave, over all of its runs.

    Attributes:
        images, masks: how many are done.
        masks_per_image: the mean.
        proposed: masks that were kept without an annotator.
        clicked, drawn: masks that the annotator made by clicks, and by hand.
        clicks_per_mask, seconds_per_mask: the annotator's time and clicks for a mask of theirs; None without any.
            Seconds of a simulated annotator are those of the computer.
        computing_seconds: an image, without the annotator's.
        skipped: images that can't be read, and why.
    """

    images: int
    masks: int
    masks_per_image: float
    proposed: int
    clicked: int
    drawn: int
    clicks_per_mask: float | None
    seconds_per_mask: float | None
    computing_seconds: float
    skipped: list[str]


def annotate(
    stage: str,
    images: Sequence[Path],
    segmenter: Segmenter,
    folder: Path,
    *,
    annotator: Annotator | None = None,
    detector: Detector | None = None,
    acceptance: Acceptance | None = None,
    done: bool = True,
    progress: Progress | None = None,
) -> StageReport:
    """Annotate images, and write them as a data set in COCO's format.

    A run that was interrupted continues with the images that are left, if it is called with the same settings.

    Args:
        stage: one of `STAGES`.
        images: files.
        segmenter: the network.
        folder: a new folder, or that of an interrupted run.
        annotator: needed by "assisted"; in "semi" adds what is missing.
        detector: needed by "semi".
        acceptance: which proposed masks are kept.
        done: False if an annotator will go on with the images later.
        progress: counts images.

    Raises:
        BadInput: the stage is unknown or lacks the annotator or the detector, or the folder doesn't fit.
        PentadError: the disk is full, or can't be written.
    """
    accepted = acceptance or Acceptance()
    if stage not in STAGES:
        raise BadInput(f"the stage is {stage!r}; expected one of {', '.join(STAGES)}")
    if stage == "assisted" and annotator is None:
        raise BadInput("the assisted stage has no annotator; expected one")
    if stage == "semi" and detector is None:
        raise BadInput("the semi-automatic stage has no detector; expected one whose boxes propose masks")
    if stage == "automatic":
        annotator = None
    settings = stage_settings(stage, segmenter.name, detector.name if detector is not None else None, accepted)
    skipped = list[str]()
    with open_annotations(folder, settings) as written:
        left = written.left(images) if done else [path for path in images if str(path) not in written.records]
        with task(progress or Progress(), "Annotating", len(left)):
            for path in left:
                started = time.perf_counter()
                try:
                    canvas = Canvas(path, _pixels(path), segmenter, accepted.max_overlap)
                except BadInput as error:
                    skipped.append(str(error))
                    continue
                propose(stage, canvas, detector, accepted)
                proposed = time.perf_counter()
                if annotator is not None:
                    annotator.annotate(canvas)
                ended = time.perf_counter()
                seconds = {"computing_seconds": proposed - started, "annotator_seconds": ended - proposed}
                written.add(canvas, done=done, **seconds)
                if progress is not None:
                    progress.advance(1)
        written.finish(images)
        return report(written, skipped)


def stage_settings(stage: str, model: str, detector: str | None, acceptance: Acceptance) -> dict[str, Any]:
    """The settings of a run; an interrupted one continues only with the same."""
    settings = {"stage": stage, "model": model} | ({"detector": detector} if stage == "semi" else {})
    return settings if stage == "assisted" else settings | asdict(acceptance)


def propose(stage: str, canvas: Canvas, detector: Detector | None, acceptance: Acceptance) -> None:
    """Add the masks of a stage that need no annotator."""
    if stage == "semi" and detector is not None:
        height, width = canvas.pixels.shape[1:]
        [found] = detector.detect(canvas.pixels, threshold=acceptance.threshold)
        boxes = [(max(0.0, x0), max(0.0, y0), min(width, x1), min(height, y1)) for x0, y0, x1, y1 in _boxes(found)]
        inside = [(box, one.label) for box, one in zip(boxes, found.detections, strict=True) if _has_area(box)]
        masks = canvas.embedded.masks(boxes=[box for box, _ in inside]) if inside else []
        for mask, (_, label) in zip(masks, inside, strict=True):
            if acceptance.accepts(mask):
                canvas.add(mask, label, "detector")
    if stage == "automatic":
        settings: dict[str, Any] = {
            "points_per_side": acceptance.points_per_side,
            "pred_iou_thresh": acceptance.min_iou,
            "stability_score_thresh": acceptance.min_stability,
        }
        for mask in canvas.segmenter.everything(canvas.pixels, **settings):  # by falling predicted IoU
            canvas.add(mask, "object", "everything")


def _boxes(found: Any) -> list[tuple[float, float, float, float]]:
    return [one.box for one in found.detections]


def _has_area(box: tuple[float, float, float, float]) -> bool:
    return box[0] < box[2] and box[1] < box[3]


def _pixels(path: Path) -> Any:
    from pentad.media.images import read_image

    return read_image(path)


def report(written: AnnotationFolder, skipped: list[str]) -> StageReport:
    """Count what a folder holds, without the images that the annotator has skipped."""
    records = [record for record in written.records.values() if not record.get("skipped")]
    sources = [one["source"] for record in records for one in record["objects"]]
    clicked, drawn = sources.count("clicks"), sources.count("brush")
    own, images = clicked + drawn, max(1, len(records))
    clicks, seconds, computing = (
        sum(record[name] for record in records) for name in ("clicks", "annotator_seconds", "computing_seconds")
    )
    return StageReport(
        images=len(records),
        masks=len(sources),
        masks_per_image=len(sources) / images,
        proposed=len(sources) - own,
        clicked=clicked,
        drawn=drawn,
        clicks_per_mask=clicks / own if own else None,
        seconds_per_mask=seconds / own if own else None,
        computing_seconds=computing / images,
        skipped=skipped,
    )


def retrain(
    recipe: Path, model: str, folders: Sequence[Path], out: Path, *, note: Callable[[str], None] = lambda _: None
) -> Path:
    """Train a segmenter further, on the annotations of stages, and return the folder of the new model.

    A run that was interrupted continues from its newest checkpoint, if it is called with the same arguments.

    Args:
        recipe: a recipe of `pentad train` with the objective segment; model, data and the run's folder are filled in.
        model: where training starts: the last stage's model.
        folders: what stages wrote.
        out: the folder of the run.
        note: receives what the user should know.

    Raises:
        BadInput: the recipe, the model or the annotations don't fit; see `pentad.train.run.open_run`.
    """
    data = folders[0]
    if len(folders) > 1:
        data = out.with_name(f"{out.name}-data")
        shutil.rmtree(data, ignore_errors=True)
        write_objects(joined([read_objects(folder) for folder in folders]), data)
    values = {"model.base": model, "data.train": str(data), "run.out": str(out)}
    filled = read_recipe(recipe, [f"{name}={json.dumps(value)}" for name, value in values.items()])
    if filled.objective != "segment":
        raise BadInput(f"{recipe}: the objective is {filled.objective}; expected segment")
    return open_run(filled).train(resume=out.exists(), note=note, report=lambda _: None)


def joined(datasets: Sequence[ObjectDataset]) -> ObjectDataset:
    """One data set of several, with the classes of all."""
    names = tuple(dict.fromkeys(name for dataset in datasets for name in dataset.names))
    images = [
        replace(
            image, objects=tuple(replace(one, label=names.index(dataset.names[one.label])) for one in image.objects)
        )
        for dataset in datasets
        for image in dataset.images
    ]
    return ObjectDataset(names, [replace(image, number=number) for number, image in enumerate(images, 1)])

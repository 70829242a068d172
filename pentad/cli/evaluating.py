"""``pentad evaluate``: how good a model is at a task."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from pentad.cli import options as o
from pentad.cli import output
from pentad.cli.paths import model_names

if TYPE_CHECKING:
    from pentad.evaluate.vision import CocoMetrics


class Suite(StrEnum):
    """What is measured."""

    coco = "coco"


def evaluate(
    model: Annotated[
        str, Argument(metavar="MODEL", help="A detector: as --model of pentad detect.", autocompletion=model_names)
    ],
    source: Annotated[
        Path,
        Argument(metavar="DATA", help="Labeled images: a folder in COCO's, YOLO's or Pascal VOC's format, or a file."),
    ],
    suite: Annotated[Suite, Option(metavar="NAME", help="coco: AP and AR of boxes, and of masks.")] = Suite.coco,
    split: Annotated[
        str | None, Option(metavar="NAME", help="A part of the data, such as val or val2017. Default: as pentad data.")
    ] = None,
    letterbox: Annotated[
        bool, Option("--letterbox", help="Keep the aspect ratio, as Darknet does. By default images are stretched.")
    ] = False,
    skip_bad: Annotated[bool, Option("--skip-bad", help="Leave out malformed records, and list them.")] = False,
    *,
    loading: o.VisionLoading,
    as_json: o.Json = False,
) -> None:
    """Measure how good a detector is on labeled images, as COCO's tools do.

    Classes are matched by name, or by number where the model has as many as the data.

    JSON: model, data, suite, images, objects, seconds (for all images), missing (classes that the
    model doesn't know), boxes {ap, ap50, ap75, ap_small, ap_medium, ap_large, ar1, ar10, ar100,
    ar_small, ar_medium, ar_large, by_class {name: ap}}, masks (the same, or null).
    """
    from pentad.datasets.object_folders import read_objects
    from pentad.evaluate.detectors import evaluate_detector

    dataset = read_objects(source, split, skip_bad=skip_bad)
    for line in dataset.skipped:
        output.note(f"pentad: {line}")
    detector = loading.load(model, "detect")
    report = evaluate_detector(detector, dataset, letterbox=letterbox, progress=output.progress("images"))
    objects = sum(dataset.counts().values())
    if as_json:
        facts = {"model": model, "data": str(source), "suite": suite.value, "images": len(dataset), "objects": objects}
        output.write_json({**facts, **asdict(report)})
        return
    if report.missing:
        output.note(f"pentad: {model} doesn't know {', '.join(report.missing[:10])}")
    ms = 1000 * report.seconds / max(1, len(dataset))
    output.write(f"{len(dataset)} images, {objects} objects, {ms:.0f} ms an image\n")
    output.write_table([*_rows("box", report.boxes), *(_rows("mask", report.masks) if report.masks else ())])


def _rows(kind: str, metrics: CocoMetrics) -> list[tuple[str, str]]:
    shown = {name.upper().replace("_", " "): value for name, value in vars(metrics).items() if name != "by_class"}
    return [(f"{kind} {name}", "-" if value is None else f"{100 * value:.1f}") for name, value in shown.items()]

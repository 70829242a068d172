"""The folder of annotations that are being made: after each image it can be continued.

It has stage.json (the settings), images/, annotations.jsonl (a line for each image that is done) and, when all are
done, annotations.json, which makes it a data set in COCO's format.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pentad.datasets.coco import coco_json
from pentad.datasets.object_folders import place_image
from pentad.datasets.objects import LabeledImage, Object
from pentad.errors import BadInput
from pentad.recipes.annotation import Annotation, Canvas
from pentad.vision.masks import rle_area, rle_box
from pentad.weights.atomic import disk_errors, lock

SETTINGS, LINES, FINISHED = "stage.json", "annotations.jsonl", "annotations.json"


@contextmanager
def open_annotations(folder: Path, settings: dict[str, Any]) -> Iterator[AnnotationFolder]:
    """Make the folder, or continue in it; other processes are kept out.

    Args:
        folder: a new folder, or one that was begun with the same settings.
        settings: how images are annotated, as JSON has it.

    Raises:
        BadInput: the folder has other files, was begun with other settings, or another process annotates in it.
        PentadError: the disk is full, or can't be written.
    """
    with disk_errors(folder), ExitStack() as stack:
        if folder.exists() and not folder.is_dir():
            raise BadInput(f"{folder} is a file; expected a folder")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock(folder, stack)
        except BlockingIOError:
            raise BadInput(f"{folder}: another process annotates in it; choose another --out") from None
        file = folder / SETTINGS
        if file.is_file():
            _check(folder, json.loads(file.read_text()), settings)
        elif any(folder.glob("[!.]*")):
            raise BadInput(f"{folder} exists already, and no annotation was begun in it; choose another --out")
        else:
            _replace(file, json.dumps(settings, indent=2) + "\n")
        yield AnnotationFolder(folder)


def _check(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    for name in new:
        if old.get(name) != new[name]:
            values = f"{name} {old.get(name)}; it is {new[name]} now"
            raise BadInput(f"{folder} was begun with {values}; use the same to continue, or another --out")


def _replace(file: Path, text: str) -> None:
    partial = file.with_name(f".{file.name}.part")
    partial.write_text(text)
    os.replace(partial, file)


class AnnotationFolder:
    """See `open_annotations`.

    Attributes:
        records: the images that are done, by their files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lines = folder / LINES
        content = self._lines.read_bytes() if self._lines.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]  # a killed process may leave a part of a line
        if whole != content:
            os.truncate(self._lines, len(whole))
        records = [json.loads(line) for line in whole.splitlines()]
        self.records: dict[str, dict[str, Any]] = {record["source"]: record for record in records}

    def add(self, canvas: Canvas, **facts: Any) -> None:
        """Keep an image and its annotations.

        Args:
            canvas: the image.
            facts: of how it was annotated, for the report.
        """
        used = {record["image"] for record in self.records.values()}
        name = canvas.path.name if canvas.path.name not in used else f"{len(used):06}-{canvas.path.name}"
        height, width = canvas.pixels.shape[1:]
        objects = [asdict(one) for one in canvas.annotations]
        size = {"height": height, "width": width}
        record = {
            "image": name,
            "source": str(canvas.path),
            **size,
            "objects": objects,
            "clicks": canvas.clicks,
            **facts,
        }
        images = self.folder / "images"
        images.mkdir(exist_ok=True)
        (images / name).unlink(missing_ok=True)
        place_image(canvas.path, images / name)
        with self._lines.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.records[record["source"]] = record

    def finish(self, sources: Sequence[Path]) -> None:
        """Write COCO's annotations of some images, in their order, with the masks' scores and sources."""
        records = [self.records[str(source)] for source in sources if str(source) in self.records]
        found = [[Annotation(**one) for one in record["objects"]] for record in records]
        names = list(dict.fromkeys(one.label for objects in found for one in objects)) or ["object"]
        images = [
            LabeledImage(
                self.folder / "images" / record["image"],
                record["height"],
                record["width"],
                tuple(_object(one, names) for one in objects),
                number,
            )
            for number, (record, objects) in enumerate(zip(records, found, strict=True), 1)
        ]
        content = coco_json(names, images, self.folder)
        flat = [one for objects in found for one in objects]
        for row, one in zip(content["annotations"], flat, strict=True):
            scores = {"predicted_iou": one.predicted_iou, "stability_score": one.stability_score}
            row |= {"source": one.source, **{name: score for name, score in scores.items() if score is not None}}
        _replace(self.folder / FINISHED, json.dumps(content))


def _object(one: Annotation, names: list[str]) -> Object:
    return Object(rle_box(one.rle), names.index(one.label), one.rle, area=float(rle_area(one.rle)))

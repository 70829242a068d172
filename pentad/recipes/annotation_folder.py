"""The folder of annotations that are being made: after each image it can be continued.

It has stage.json (the settings), images/, annotations.jsonl (a line for each image that is done; the last one counts)
and annotations.json, which makes it a data set in COCO's format.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pentad.datasets.object_folders import place_image
from pentad.errors import BadInput
from pentad.recipes.annotation import Canvas
from pentad.vision.annotations import coco_of
from pentad.weights.atomic import disk_errors, lock, replace_text

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
            replace_text(file, json.dumps(settings, indent=2) + "\n")
        yield AnnotationFolder(folder)


def _check(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    for name in new:
        if old.get(name) != new[name]:
            values = f"{name} {old.get(name)}; it is {new[name]} now"
            raise BadInput(f"{folder} was begun with {values}; use the same to continue, or another --out")


class AnnotationFolder:
    """See `open_annotations`.

    Attributes:
        records: the images that are done or begun, by their files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lines = folder / LINES
        content = self._lines.read_bytes() if self._lines.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]  # a killed process may leave a part of a line
        records = [json.loads(line) for line in whole.splitlines()]
        self.records: dict[str, dict[str, Any]] = {record["source"]: record for record in records}
        if whole != content or len(records) > len(self.records):
            replace_text(self._lines, "".join(json.dumps(record) + "\n" for record in self.records.values()))

    def left(self, images: Sequence[Path]) -> list[Path]:
        """The images that aren't done."""
        return [path for path in images if not self.records.get(str(path), {}).get("done")]

    def add(self, canvas: Canvas, *, done: bool = True, **facts: Any) -> None:
        """Keep an image and its annotations.

        Args:
            canvas: the image.
            done: False if the annotator will go on with it.
            facts: of how it was annotated, for the report.
        """
        height, width = canvas.pixels.shape[1:]
        objects = [asdict(one) for one in canvas.annotations]
        self.put(canvas.path, height, width, objects, done=done, clicks=canvas.clicks, **facts)

    def put(self, path: Path, height: int, width: int, objects: Sequence[Mapping[str, Any]], **facts: Any) -> None:
        """`add`, also for an image that was added before.

        Args:
            path: the image.
            height, width: its size.
            objects: the fields of `Annotation`, and those of `pentad.vision.annotations.FACTS`.
            facts: see `add`.

        Raises:
            BadInput: a mask is malformed, or of another size.
        """
        known = self.records.get(str(path))
        used = {record["image"] for record in self.records.values()}
        name = path.name if path.name not in used else f"{len(used):06}-{path.name}"
        name = known["image"] if known else name
        size = {"height": height, "width": width}
        record = {"image": name, "source": str(path), **size, "objects": [*objects], **facts}
        coco_of([_described(record)])
        images = self.folder / "images"
        images.mkdir(exist_ok=True)
        if not known:
            (images / name).unlink(missing_ok=True)
            place_image(path, images / name)
        with self._lines.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.records[record["source"]] = record

    def finish(self, sources: Sequence[Path]) -> None:
        """Write COCO's annotations of some images, in their order, with the masks' scores and sources."""
        records = [self.records[str(source)] for source in sources if str(source) in self.records]
        content = coco_of([_described(record) for record in records if not record.get("skipped")])
        replace_text(self.folder / FINISHED, json.dumps(content))


def _described(record: Mapping[str, Any]) -> dict[str, Any]:
    return {**record, "image": f"images/{record['image']}", "masks": record["objects"]}

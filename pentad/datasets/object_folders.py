"""Folders of labeled objects in any format: recognized, read and written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pentad.datasets.coco import annotation_file, coco_json, read_coco
from pentad.datasets.objects import LabeledImage, ObjectDataset, Objects
from pentad.datasets.voc import read_voc, voc_xml
from pentad.datasets.yolo import read_yolo, yolo_lines
from pentad.errors import BadInput
from pentad.weights.atomic import new_folder
from pentad.weights.cache import Progress, task

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FORMATS", "fill", "place_image", "read_objects", "write_objects"]

Entry = tuple[LabeledImage, "Tensor | None"]


def read_objects(path: str | Path, split: str | None = None, *, skip_bad: bool = False) -> ObjectDataset:
    """Read a data set in COCO's, YOLO's or Pascal VOC's format.

    Args:
        path: a folder, or COCO's JSON file, or YOLO's data.yaml.
        split: of YOLO's and VOC's folders; of COCO's, a part of the annotations' name, such as val2017.
        skip_bad: leave out malformed records and list them in `skipped`, instead of raising the first.

    Raises:
        BadInput: the folder has none of these formats, or a record is malformed.
    """
    path = Path(path)
    if (path / "Annotations").is_dir():
        return read_voc(path, split, skip_bad=skip_bad)
    if path.suffix == ".json":
        return read_coco(path, skip_bad=skip_bad)
    if path.is_dir() and annotation_file(path):
        files = sorted(path.glob(f"annotations/*{split}.json")) if split else []
        return read_coco(files[0] if files else path, skip_bad=skip_bad)
    if path.exists():
        return read_yolo(path, split, skip_bad=skip_bad)
    raise BadInput(f"{path} is not there; expected a folder in COCO's, YOLO's or Pascal VOC's format")


def write_objects(
    dataset: Objects, folder: str | Path, layout: str = "coco", *, progress: Progress | None = None
) -> None:
    """Write images and annotations into a new folder, all or nothing.

    Image files are linked where the disk allows it, or copied; those of scenes are drawn.

    Args:
        dataset: what is written, one image at a time.
        folder: is made.
        layout: one of `FORMATS`: "coco", "yolo" (boxes), "yolo-segments" (outlines) or "voc" (boxes).
        progress: is told of each image.

    Raises:
        BadInput: the folder exists, or there is no such layout.
    """

    def entries() -> Iterator[Entry]:
        for index in range(len(dataset)):
            labeled = dataset.labeled(index)
            yield labeled, None if labeled.path.is_file() else dataset[index].image

    with new_folder(Path(folder)) as root, task(progress or Progress(), "Writing images", len(dataset)):
        fill(root, dataset.names, entries(), layout, progress)


def fill(
    root: Path, names: Sequence[str], entries: Iterable[Entry], layout: str, progress: Progress | None = None
) -> None:
    """Write images and their annotations into a folder.

    Args:
        root: the folder.
        names: of the classes.
        entries: the objects of each image, and its pixels unless they are in a file.
        layout: one of `FORMATS`.
        progress: is told of each image.
    """
    if layout not in FORMATS:
        raise BadInput(f"the format is {layout!r}; expected one of {', '.join(FORMATS)}")
    images = root / ("JPEGImages" if layout == "voc" else "images")
    images.mkdir()
    written = list[LabeledImage]()
    for labeled, pixels in entries:
        target = images / labeled.path.name
        if target.exists():  # of images in several folders some have the same name
            target = images / f"{len(written):06}-{labeled.path.name}"
        place_image(labeled.path, target, pixels)
        written.append(LabeledImage(target, labeled.height, labeled.width, labeled.objects, labeled.number))
        if progress is not None:
            progress.advance(1)
    FORMATS[layout](list(names), written, root)


def place_image(source: Path, target: Path, pixels: Tensor | None = None) -> None:
    """Link or copy an image file, or write pixels."""
    if pixels is not None:
        from pentad.media.images import write_image

        write_image(target, pixels)
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _write_coco(names: list[str], images: list[LabeledImage], root: Path) -> None:
    (root / "annotations.json").write_text(json.dumps(coco_json(names, images, root), allow_nan=False))


def _write_yolo(names: list[str], images: list[LabeledImage], root: Path, *, segments: bool = False) -> None:
    (root / "labels").mkdir()
    for image in images:
        lines = "".join(f"{line}\n" for line in yolo_lines(image, segments=segments))
        (root / "labels" / f"{image.path.stem}.txt").write_text(lines)
    listed = "".join(f"  {number}: {json.dumps(name)}\n" for number, name in enumerate(names))
    (root / "data.yaml").write_text(f"train: images\nval: images\nnames:\n{listed}")


def _write_segments(names: list[str], images: list[LabeledImage], root: Path) -> None:
    _write_yolo(names, images, root, segments=True)


def _write_voc(names: list[str], images: list[LabeledImage], root: Path) -> None:
    (root / "Annotations").mkdir()
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for image in images:
        (root / "Annotations" / f"{image.path.stem}.xml").write_text(voc_xml(names, image))
    stems = "".join(f"{image.path.stem}\n" for image in images)
    (root / "ImageSets" / "Main" / "train.txt").write_text(stems)


FORMATS: dict[str, Callable[[list[str], list[LabeledImage], Path], None]] = {
    "coco": _write_coco,
    "yolo": _write_yolo,
    "yolo-segments": _write_segments,
    "voc": _write_voc,
}

"""COCO's JSON of objects: https://cocodataset.org/#format-data."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from os.path import isfile
from pathlib import Path
from typing import Any

from pentad.datasets.objects import LabeledImage, Object, ObjectDataset, Problems, fitting_box
from pentad.errors import BadInput
from pentad.vision import masks

__all__ = ["annotation_file", "coco_json", "read_coco"]

_SIDES = range(1, 65_536)


def annotation_file(folder: Path) -> Path | None:
    """The JSON file of a folder in COCO's layout, or None."""
    patterns = ("annotations.json", "_annotations.coco.json", "annotations/instances_*.json", "annotations/*.json")
    for pattern in (*patterns, "instances_*.json"):
        if found := sorted(folder.glob(pattern)):
            return found[0]
    return None


def read_coco(path: str | Path, images: str | Path | None = None, *, skip_bad: bool = False) -> ObjectDataset:
    """Read annotations, and check that their images are there.

    Args:
        path: the JSON file, or the folder that it is in.
        images: the folder of the images; by default the file's own, or one beside it that holds the first image.
        skip_bad: leave out malformed records and list them in `skipped`, instead of raising the first.

    Raises:
        BadInput: the file is no such JSON, or a record is malformed; the message names the file and the record.
    """
    path = Path(path)
    if path.is_dir():
        path = annotation_file(path) or path / "annotations.json"
    content = _content(path)
    problems = Problems(skip_bad)
    names = _names(path, content["categories"])
    folder = Path(images) if images is not None else _images_folder(path, content["images"])
    found = _read_images(path, content["images"], folder, problems)
    labels = {number: label for label, number in enumerate(names)}
    objects = _read_annotations(path, content["annotations"], found, labels, problems)
    complete = [replace(image, objects=tuple(objects[number])) for number, image in found.items()]
    return ObjectDataset(tuple(names.values()), complete, problems.lines)


def _read_images(path: Path, records: list[Any], folder: Path, problems: Problems) -> dict[int, LabeledImage]:
    """The images by their ids."""
    found, files = dict[int, LabeledImage](), set[Path]()
    for index, record in enumerate(records):
        try:
            image = _image(record, folder)
            if image.number in found:
                raise BadInput("the id was used before")
            if image.path in files:
                raise BadInput(f"{record['file_name']} was named before")
        except BadInput as error:
            problems.add(f"{path}, image {_id(record, index)}", str(error))
            continue
        files.add(image.path)
        found[image.number] = image
    return found


def _read_annotations(
    path: Path, records: list[Any], images: dict[int, LabeledImage], labels: dict[int, int], problems: Problems
) -> dict[int, list[Object]]:
    """The objects of each image."""
    objects: dict[int, list[Object]] = {number: [] for number in images}
    used = set[str]()
    for index, record in enumerate(records):
        name = _id(record, index)
        try:
            image, one = _object(record, images, labels)
            if name in used:
                raise BadInput("the id was used before")
            if any(one.box == other.box and one.label == other.label for other in objects[image.number]):
                raise BadInput("the same box and category are in the image already")
        except BadInput as error:
            problems.add(f"{path}, annotation {name}", str(error))
            continue
        used.add(name)
        objects[image.number].append(one)
    return objects


def _content(path: Path) -> dict[str, Any]:
    content: dict[str, Any]
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise BadInput(f"{path} is not there; expected COCO's annotations") from None
    except OSError as error:
        raise BadInput(f"{path} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not JSON: {error}") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise BadInput(f"{path} has no list '{key}'; expected COCO's annotations of objects")
    return content


def _names(path: Path, categories: list[Any]) -> dict[int, str]:
    """The names of categories by their ids, which may have gaps."""
    names = dict[int, str]()
    for index, record in enumerate(categories):
        where = f"{path}, category {_id(record, index)}"
        if not isinstance(record, dict) or type(record.get("id")) is not int or not isinstance(record.get("name"), str):
            raise BadInput(f"{where}: expected an id and a name")
        if record["id"] in names or record["name"] in names.values():
            raise BadInput(f"{where}: the id or the name {record['name']!r} was used before")
        names[record["id"]] = record["name"]
    return dict(sorted(names.items()))


def _id(record: Any, index: int) -> str:
    number = record.get("id") if isinstance(record, dict) else None
    return f"{number}" if isinstance(number, int | str) else f"at place {index}"


def _images_folder(path: Path, images: list[Any]) -> Path:
    name = images[0].get("file_name") if images and isinstance(images[0], dict) else None
    split = path.stem.rpartition("_")[2]  # instances_val2017
    places = [path.parent, path.parent / "images", path.parent.parent / "images", path.parent.parent / split]
    places += [path.parent.parent / "images" / split, path.parent.parent]
    return next((place for place in places if isinstance(name, str) and isfile(place / name)), path.parent)


def _image(record: Any, folder: Path) -> LabeledImage:
    if not isinstance(record, dict) or type(record.get("id")) is not int:
        raise BadInput("expected a whole number as its id")
    name, height, width = record.get("file_name"), record.get("height"), record.get("width")
    if not isinstance(name, str) or not name:
        raise BadInput(f"file_name is {name!r}; expected a file's name")
    if type(height) is not int or type(width) is not int or height not in _SIDES or width not in _SIDES:
        raise BadInput(f"width and height are {width!r} and {height!r}; expected whole numbers from 1 to {_SIDES[-1]}")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise BadInput(f"file_name is {name!r}; expected a path inside of the images' folder")
    if not isfile(folder / name):  # unlike Path's, False for names that no disk takes
        raise BadInput(f"{folder / name} is not there")
    return LabeledImage(folder / name, height, width, (), record["id"])


def _object(record: Any, images: dict[int, LabeledImage], labels: dict[int, int]) -> tuple[LabeledImage, Object]:
    if not isinstance(record, dict):
        raise BadInput("expected an object of JSON")
    image_id, category = record.get("image_id"), record.get("category_id")
    if type(image_id) is not int or image_id not in images:
        raise BadInput(f"image_id is {image_id!r}, of no image")
    if type(category) is not int or category not in labels:
        raise BadInput(f"category_id is {category!r}, of no category")
    image, box = images[image_id], record.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise BadInput(f"bbox is {box!r}; expected [x, y, width, height]")
    x, y, w, h = map(float, box)
    fitted = fitting_box((x, y, x + w, y + h), image.height, image.width)
    area = record.get("area", w * h)
    if not _is_number(area) or not area >= 0:
        raise BadInput(f"area is {area!r}; expected a number of at least 0")
    segmentation = _segmentation(record.get("segmentation"), image)
    return image, Object(fitted, labels[category], segmentation, bool(record.get("iscrowd")), float(area))


def _segmentation(value: Any, image: LabeledImage) -> Any:
    if value in (None, []):
        return None
    if isinstance(value, dict):
        if value.get("size") != [image.height, image.width]:
            raise BadInput(f"segmentation's size is {value.get('size')!r}; expected [{image.height}, {image.width}]")
        counts = masks.rle_counts(value)
        return {
            "size": value["size"],
            "counts": value["counts"] if type(value["counts"]) is str else masks.to_text(counts),
        }
    if not isinstance(value, list) or not all(map(_is_polygon, value)):
        raise BadInput("segmentation is neither an RLE nor polygons of at least 3 points")
    return [[float(number) for number in polygon] for polygon in value]


def _is_polygon(value: Any) -> bool:
    if not isinstance(value, list) or len(value) < 6 or len(value) % 2:
        return False
    return all(_is_number(n) and math.isfinite(n) for n in value)


def _is_number(value: Any) -> bool:
    """True for what a float can hold; whether it is finite, and in the image, is checked later."""
    return type(value) is float or (type(value) is int and abs(value) < 2**53)


def coco_json(names: Sequence[str], images: Iterable[LabeledImage], root: Path | None = None) -> dict[str, Any]:
    """Annotations as COCO writes them, with names of files below `root` or alone; categories count from 1."""
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": number, "name": name} for number, name in enumerate(names, 1)],
    }
    for image in images:
        content["images"].append(
            {
                "id": image.number,
                "file_name": image.path.name if root is None else image.path.relative_to(root).as_posix(),
                "width": image.width,
                "height": image.height,
            }
        )
        for one in image.objects:
            x0, y0, x1, y1 = one.box
            segmentation = one.segmentation
            if segmentation is not None and not isinstance(segmentation, list) and one.crowd:
                segmentation = {"size": segmentation["size"], "counts": masks.rle_counts(segmentation)}  # as COCO's
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": image.number,
                    "category_id": one.label + 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": one.area,
                    "iscrowd": int(one.crowd),
                    **({} if segmentation is None else {"segmentation": segmentation}),
                }
            )
    return content

"""Folders of YOLO's text files: one line an object, ``class x y width height`` or ``class x0 y0 x1 y1 …``.

Numbers are shares of the image's size. Labels are in ``labels`` where images are in ``images``, or beside them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pentad.datasets.objects import LabeledImage, Object, ObjectDataset, Problems, fitting_box
from pentad.errors import BadInput
from pentad.vision import masks

__all__ = ["SUFFIXES", "read_yolo", "yolo_lines"]

SUFFIXES = frozenset((".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))


def read_yolo(path: str | Path, split: str | None = None, *, skip_bad: bool = False) -> ObjectDataset:
    """Read a folder of text files.

    Args:
        path: a folder with data.yaml, or such a file; or a folder with images, labels and the classes' names, one a
            line, in classes.txt or any file \\*.names.
        split: the entry of data.yaml with the images: train (the default), val or test.
        skip_bad: as for `read_coco`.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    config = _config(path if path.is_file() else folder / "data.yaml")
    names = tuple(config["names"]) if config else _listed_names(folder)
    files = list(_image_files(folder, config, split))
    if not files:
        raise BadInput(f"{folder} has no images")
    problems = Problems(skip_bad)
    images = []
    for number, file in enumerate(files, 1):
        try:
            images.append(_labeled(file, number, len(names), problems))
        except BadInput as error:
            problems.add(str(file), str(error).removeprefix(f"{file} "))
    return ObjectDataset(names, images, problems.lines)


def _config(path: Path) -> dict[str, Any] | None:
    """The content of data.yaml, checked; None if there is no such file."""
    import yaml

    if not path.is_file():
        return None
    try:
        content = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, dict):  # number: name
        if set(names) != set(range(len(names))):
            raise BadInput(f"{path}: the classes' numbers are {list(names)}; expected 0 to {len(names) - 1}")
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or not names or len(set(map(str, names))) < len(names):
        raise BadInput(f"{path} has no names of classes, each its own")
    return {**content, "names": [str(name) for name in names]}


def _listed_names(folder: Path) -> tuple[str, ...]:
    lists = [folder / "classes.txt", folder / "labels" / "classes.txt", *sorted(folder.glob("*.names"))]
    for file in lists:
        if file.is_file():
            return tuple(line.strip() for line in file.read_text(errors="replace").splitlines() if line.strip())
    raise BadInput(f"{folder} has neither data.yaml nor classes.txt nor a .names file; expected the classes' names")


def _image_files(folder: Path, config: dict[str, Any] | None, split: str | None) -> Iterator[Path]:
    places: Any = "images" if (folder / "images").is_dir() else "."
    if config:
        root = config.get("path")
        folder = folder / root if isinstance(root, str) and (folder / root).is_dir() else folder
        places = config.get(split or "train")
        if places is None:
            raise BadInput(f"data.yaml has no entry {split or 'train'!r}")
    elif split:
        places = f"images/{split}"
    for place in places if isinstance(places, list) else [places]:
        # Some archives write a path from the folder above, though data.yaml is in the folder itself.
        target = next((p for p in (folder / str(place), folder / str(place).removeprefix("../")) if p.exists()), None)
        if target is None:
            raise BadInput(f"{folder / str(place)} is not there; expected a folder of images, or a list of them")
        if target.is_dir():
            yield from sorted(file for file in target.rglob("*") if file.suffix.lower() in SUFFIXES)
        else:
            yield from (target.parent / line.strip() for line in target.read_text().splitlines() if line.strip())


def _labeled(file: Path, number: int, classes: int, problems: Problems) -> LabeledImage:
    from pentad.media.images import image_size

    height, width = image_size(file)
    parts = list(file.parts)
    if "images" in parts:
        last = len(parts) - 1 - parts[::-1].index("images")
        parts[last] = "labels"
    text = Path(*parts).with_suffix(".txt")
    objects = list[Object]()
    seen = set[str]()
    lines = text.read_text(errors="replace").splitlines() if text.is_file() else []
    for index, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            if line in seen:
                raise BadInput("the line repeats an earlier one")
            objects.append(_object(line.split(), height, width, classes))
            seen.add(line)
        except BadInput as error:
            problems.add(f"{text}, line {index}", str(error))
    return LabeledImage(file, height, width, tuple(objects), number)


def _object(words: list[str], height: int, width: int, classes: int) -> Object:
    try:
        label, *numbers = int(words[0]), *map(float, words[1:])
    except ValueError:
        raise BadInput(f"{' '.join(words[:6])!r} are not numbers; expected class x y width height") from None
    if not 0 <= label < classes:
        raise BadInput(f"the class is {label}; expected 0 to {classes - 1}")
    if not all(map(math.isfinite, numbers)):
        raise BadInput("a number is not finite")
    if len(numbers) == 4:
        x, y, w, h = numbers
        box = (x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height
        fitted = fitting_box(box, height, width)
        return Object(fitted, label, area=(fitted[2] - fitted[0]) * (fitted[3] - fitted[1]))
    if len(numbers) < 6 or len(numbers) % 2:
        raise BadInput(f"there are {len(numbers)} numbers after the class; expected 4, or the points of a polygon")
    polygon = [value * (height if place % 2 else width) for place, value in enumerate(numbers)]
    box = min(polygon[::2]), min(polygon[1::2]), max(polygon[::2]), max(polygon[1::2])
    area = float(masks.fill_polygons([polygon], height, width).sum())
    return Object(fitting_box(box, height, width), label, [polygon], area=area)


def yolo_lines(image: LabeledImage, *, segments: bool = False) -> Iterable[str]:
    """The lines of an image's text file; crowds have none.

    Args:
        image: the objects.
        segments: write outlines, where they are known, instead of boxes.
    """
    for one in image.objects:
        if one.crowd:
            continue
        x0, y0, x1, y1 = one.box
        numbers = [(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]
        if segments and one.segmentation is not None:
            polygons = one.segmentation
            if not isinstance(polygons, list):
                polygons = masks.to_polygons(masks.decode(polygons))
            numbers = [number for polygon in polygons for number in (*polygon, *polygon[:2], *polygons[0][:2])]
            numbers = polygons[0] if len(polygons) == 1 else numbers
        shares = (value / (image.height if place % 2 else image.width) for place, value in enumerate(numbers))
        yield " ".join([str(one.label), *(f"{share:.8g}" for share in shares)])

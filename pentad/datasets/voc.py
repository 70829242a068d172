"""Folders in the layout of Pascal VOC: Annotations/\\*.xml, JPEGImages and ImageSets/Main/\\*.txt. Boxes, no masks."""

from __future__ import annotations

from collections.abc import Sequence
from os.path import isfile
from pathlib import Path
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from pentad.datasets.objects import LabeledImage, Object, ObjectDataset, Problems, fitting_box
from pentad.errors import BadInput

__all__ = ["read_voc", "voc_xml"]


def read_voc(
    path: str | Path, split: str | None = None, *, names: Sequence[str] | None = None, skip_bad: bool = False
) -> ObjectDataset:
    """Read a folder.

    Args:
        path: the folder that Annotations is in.
        split: a list of images, ImageSets/Main/SPLIT.txt; all by default.
        names: the classes; by default all that occur, in alphabetical order, as VOC's own.
        skip_bad: as for `read_coco`.
    """
    folder = Path(path)
    problems = Problems(skip_bad)
    images, labels = list[LabeledImage](), list[list[str]]()
    for number, file in enumerate(_files(folder, split), 1):
        try:
            image, words = _read(file, folder, number, problems)
        except BadInput as error:
            problems.add(str(file), str(error))
            continue
        images.append(image)
        labels.append(words)
    known = tuple(names) if names is not None else tuple(sorted({word for words in labels for word in words}))
    complete = []
    for image, words in zip(images, labels, strict=True):
        objects = []
        for one, word in zip(image.objects, words, strict=True):
            if word not in known:
                problems.add(f"{image.path}", f"the class {word!r} is none of {', '.join(known)}")
                continue
            objects.append(Object(one.box, known.index(word), None, one.crowd, one.area))
        complete.append(LabeledImage(image.path, image.height, image.width, tuple(objects), image.number))
    return ObjectDataset(known, complete, problems.lines)


def _files(folder: Path, split: str | None) -> list[Path]:
    if split is None:
        if not (files := sorted((folder / "Annotations").glob("*.xml"))):
            raise BadInput(f"{folder} has no Annotations/*.xml; expected a folder in the layout of Pascal VOC")
        return files
    listing = folder / "ImageSets" / "Main" / f"{split}.txt"
    if not listing.is_file():
        raise BadInput(f"{listing} is not there; expected a list of images")
    return [
        folder / "Annotations" / f"{line.split()[0]}.xml" for line in listing.read_text().splitlines() if line.strip()
    ]


def _read(file: Path, folder: Path, number: int, problems: Problems) -> tuple[LabeledImage, list[str]]:
    """An image and the names of its objects' classes; their labels are still 0."""
    root = _parsed(file)
    size = [_whole(root.findtext(f"size/{side}")) for side in ("height", "width")]
    if not all(size):
        raise BadInput("size has no width and height from 1")
    height, width = size
    name = (root.findtext("filename") or file.with_suffix(".jpg").name).strip()
    path = folder / "JPEGImages" / Path(name).name
    if not isfile(path):
        path = next((path.with_suffix(s) for s in (".jpg", ".png", ".jpeg") if isfile(path.with_suffix(s))), path)
    if not isfile(path):
        raise BadInput(f"{path} is not there")
    objects, names = list[Object](), list[str]()
    for index, record in enumerate(root.iter("object"), 1):
        try:
            word, one = _object(record, height, width)
            if any(one.box == other.box and word == named for other, named in zip(objects, names, strict=True)):
                raise BadInput("the same box and name are in the image already")
        except BadInput as error:
            problems.add(f"{file}, object {index}", str(error))
            continue
        objects.append(one)
        names.append(word)
    return LabeledImage(path, height, width, tuple(objects), number), names


def _parsed(file: Path) -> ElementTree.Element:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise BadInput(f"can't be read: {error.strerror}") from error
    if b"<!" in data.replace(b"<!--", b""):
        raise BadInput("has a document type or other declarations; expected plain XML")  # they can expand without end
    try:
        return ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError) as error:
        raise BadInput(f"is not XML: {error}") from error


def _object(record: ElementTree.Element, height: int, width: int) -> tuple[str, Object]:
    word = (record.findtext("name") or "").strip()
    if not word:
        raise BadInput("it has no name")
    try:
        corners = [float(record.findtext(f"bndbox/{side}") or "") for side in ("xmin", "ymin", "xmax", "ymax")]
    except ValueError:
        raise BadInput("its bndbox has no xmin, ymin, xmax and ymax") from None
    box = fitting_box((corners[0] - 1, corners[1] - 1, corners[2], corners[3]), height, width)  # they count from 1
    hard = record.findtext("difficult", "0").strip() == "1"
    return word, Object(box, 0, None, hard, (box[2] - box[0]) * (box[3] - box[1]))


def _whole(text: str | None) -> int:
    try:
        return max(0, int(text or ""))
    except ValueError:
        return 0


def voc_xml(names: Sequence[str], image: LabeledImage) -> str:
    """The annotations of an image, as VOC's; crowds are marked as difficult."""
    lines = [
        "<annotation>",
        f"  <filename>{escape(image.path.name)}</filename>",
        f"  <size><width>{image.width}</width><height>{image.height}</height><depth>3</depth></size>",
    ]
    for one in image.objects:
        x0, y0, x1, y1 = one.box
        corners = zip(("xmin", "ymin", "xmax", "ymax"), (x0 + 1, y0 + 1, x1, y1), strict=True)
        box = "".join(f"<{side}>{value:.10g}</{side}>" for side, value in corners)
        hard = f"<difficult>{int(one.crowd)}</difficult>"
        lines.append(f"  <object><name>{escape(names[one.label])}</name>{hard}<bndbox>{box}</bndbox></object>")
    return "\n".join([*lines, "</annotation>", ""])

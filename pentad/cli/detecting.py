"""``pentad detect``: objects in images."""

from __future__ import annotations

import glob
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Exit, Option

from pentad.cli import options as o
from pentad.cli import output
from pentad.errors import BadInput

if TYPE_CHECKING:
    from pentad.vision.detector import Detections

DEFAULT_DETECTOR = "yolov3-tiny"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
"""Files of a folder that are images."""

Images = Annotated[list[str], Argument(metavar="IMAGE…", help="Image files, folders of images, or patterns ('*.jpg').")]
Threshold = Annotated[float, Option(min=0, max=1, metavar="X", help="The least score of an object.")]
Out = Annotated[Path | None, Option(metavar="DIR", help="Draw the boxes, and write the pictures into DIR.")]
Letterbox = Annotated[
    bool, Option("--letterbox", help="Keep the aspect ratio, as Darknet does. By default images are stretched.")
]
Classes = Annotated[
    str | None, Option(metavar="A,B", help="Look for these classes only: labels or numbers, with commas.")
]
BatchSize = Annotated[int, Option(min=1, max=1024, metavar="N", help="Images that go through the network together.")]
Model = Annotated[str, Option("--model", "-m", metavar="NAME", help="A name, or a .cfg file with its .weights beside.")]


def detect(
    images: Images,
    model: Model = DEFAULT_DETECTOR,
    threshold: Threshold = 0.25,
    letterbox: Letterbox = False,
    classes: Classes = None,
    out: Out = None,
    batch_size: BatchSize = 1,
    as_json: o.Json = False,
) -> None:
    """Find objects in images.

    JSON lines, one an image: image, width, height, detections [{box [x0, y0, x1, y1] in pixels, label,
    label_id, score}].
    """
    paths = list(find_images(images))
    with output.status(f"loading {model} …"):
        from pentad.loading import load
        from pentad.models.family import TASKS
        from pentad.vision.detector import Detector

        detector = load(model, progress=output.progress())
        if not isinstance(detector, Detector):
            raise BadInput(f"{model} is {TASKS[getattr(detector, 'task', 'language')]}")
    chosen = None if classes is None else [one.strip() for one in classes.split(",")]
    failed = False
    for path in paths:
        started = time.perf_counter()
        try:
            (found,) = detector.detect(path, threshold=threshold, letterbox=letterbox, classes=chosen)
        except BadInput as error:
            output.fail(str(error))
            failed = True
            continue
        seconds = time.perf_counter() - started
        show(found, seconds, as_json=as_json)
        if out is not None:
            draw(found, path, out)
    if failed:
        raise Exit(2)


def find_images(given: list[str]) -> Iterator[Path]:
    """The files that arguments name: files, the images of folders, and what patterns match."""
    for one in given:
        path = Path(one)
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
            if not found:
                raise BadInput(f"{one} is a folder without images ({', '.join(SUFFIXES)})")
            yield from found
        elif path.exists() or not glob.has_magic(one):
            yield path
        else:
            matches = sorted(glob.glob(one, recursive=True))
            if not matches:
                raise BadInput(f"no file matches {one!r}")
            yield from map(Path, matches)


def show(found: Detections, seconds: float, *, as_json: bool) -> None:
    """Write the objects of one image."""
    if as_json:
        output.write_json(found.to_json())
        return
    counts = Counter(one.label for one in found.detections)
    words = ", ".join(f"{count} {label}" for label, count in counts.items()) or "nothing found"
    output.write(f"{found.image}  {found.width} x {found.height}  {words}  ({seconds * 1000:.0f} ms)\n")
    if found.detections:
        rows = [
            (f"  {one.label}", f"{one.score:.2f}", *(f"{side:.0f}" for side in one.box)) for one in found.detections
        ]
        output.write_table([("  label", "score", "x0", "y0", "x1", "y1"), *rows])


def draw(found: Detections, path: Path, folder: Path) -> None:
    import torch

    from pentad.media.drawing import draw_detections
    from pentad.media.images import read_image, write_image

    boxes = torch.tensor([one.box for one in found.detections]).reshape(-1, 4)
    captions = [f"{one.label} {one.score:.2f}" for one in found.detections]
    ids = [one.label_id for one in found.detections]
    folder.mkdir(parents=True, exist_ok=True)
    write_image(folder / path.name, draw_detections(read_image(path), boxes, captions, label_ids=ids))

"""``pentad detect``: objects in images and videos."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

from typer import Argument, Exit, Option

from pentad.cli import options as o
from pentad.cli.detections import VIDEOS, Job, Source, write_coco
from pentad.cli.downloads import download, is_url
from pentad.cli.image_files import IMAGES, image_files
from pentad.cli.paths import model_names
from pentad.errors import BadInput

DEFAULT_DETECTOR = "yolov3-tiny"
PICTURES = (".jpg", ".jpeg", ".png", ".webp")
"""Formats of images whose pictures with boxes have the same format; the others become .png."""


def detect(
    images: Annotated[
        list[str],
        Argument(metavar="IMAGE…", help="Image and video files, folders of them, or patterns such as '*.jpg'."),
    ],
    model: Annotated[
        str,
        Option(
            "--model",
            "-m",
            metavar="NAME",
            help="A detector: a known name, or a Darknet .cfg with its .weights beside it.",
            autocompletion=model_names,
        ),
    ] = DEFAULT_DETECTOR,
    threshold: Annotated[float, Option(min=0, max=1, metavar="X", help="Report objects whose score exceeds X.")] = 0.25,
    classes: Annotated[
        str | None, Option(metavar="A,B", help="Report only these classes: labels or numbers, with commas.")
    ] = None,
    out: Annotated[
        Path | None, Option(metavar="DIR", help="Write the pictures with boxes to DIR, videos as .mp4.")
    ] = None,
    coco_out: Annotated[
        Path | None, Option(metavar="FILE", help="Write the objects of all images to FILE in COCO's JSON, with scores.")
    ] = None,
    letterbox: Annotated[
        bool, Option("--letterbox", help="Keep the aspect ratio, as Darknet does. By default images are stretched.")
    ] = False,
    batch_size: Annotated[
        int, Option(min=1, max=1024, metavar="N", help="Images that go through the network together.")
    ] = 1,
    allow_url: Annotated[bool, Option("--allow-url", help="Download images whose names are http(s):// URLs.")] = False,
    *,
    loading: o.VisionLoading,
    as_json: o.Json = False,
) -> None:
    """Find objects in images and videos, and draw them.

    An image that can't be read is reported, and the others are processed.

    JSON lines, one an image or frame: image, width, height, detections [{box [x0, y0, x1, y1] in
    pixels, label, label_id, score}]; of videos also frame and time (in seconds).
    """
    if out is not None and out.exists() and not out.is_dir():
        raise BadInput(f"--out {out} is a file; expected a folder")
    if coco_out is not None and (coco_out.is_dir() or not coco_out.parent.is_dir()):
        raise BadInput(f"--coco-out {coco_out} can't be written; expected a file in a folder that is there")
    with TemporaryDirectory(prefix="pentad-") as downloads:
        sources = list(_sources(images, out, Path(downloads) if allow_url else None))
        detector = loading.load(model, "detect")
        chosen = None if classes is None else [detector.label_id(one.strip()) for one in classes.split(",")]
        job = Job(detector, threshold, chosen, letterbox, batch_size, as_json, coco=[] if coco_out else None)
        job.run(sources)
    if coco_out is not None:
        write_coco(coco_out, job.coco or [], detector.labels)
    if job.code:
        raise Exit(job.code)


def _sources(arguments: Sequence[str], out: Path | None, downloads: Path | None) -> Iterator[Source]:
    """What the arguments name.

    Raises:
        BadInput: nothing has such a name, a URL isn't allowed, or a picture would replace its image.
    """
    targets = set[Path]()
    for argument in arguments:
        if is_url(argument):
            if downloads is None:
                raise BadInput(f"{argument[:200]} is a URL; expected a file, or --allow-url to download it")
            paths = [download(argument, downloads)]
        else:
            paths = image_files([argument], (*IMAGES, *VIDEOS))
        for path in paths:
            target = None if out is None else _target(path, out, targets)
            if target is not None and target.exists() and target.samefile(path):
                raise BadInput(f"{target} would be replaced by its picture with boxes: use another folder for --out")
            yield Source(argument if is_url(argument) else str(path), path, target)


def _target(path: Path, folder: Path, used: set[Path]) -> Path:
    """The file to write for an image: of its name, with a number if another image has the same."""
    ending = path.suffix.lower()
    suffix = ".mp4" if ending in VIDEOS else path.suffix if ending in PICTURES else ".png"
    names = (f"{path.stem}{'' if number == 1 else f'-{number}'}{suffix}" for number in range(1, len(used) + 2))
    target = next(folder / name for name in names if folder / name not in used)
    used.add(target)
    return target

"""``pentad data``: make, convert and check data sets of labeled images."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Exit, Option, Typer

from pentad.cli import output
from pentad.cli.annotating import annotate
from pentad.cli.options import Json, with_groups
from pentad.errors import BadInput

if TYPE_CHECKING:
    from pentad.datasets.objects import ObjectDataset


class Layout(StrEnum):
    """Formats of folders with labeled images."""

    coco = "coco"
    yolo = "yolo"
    yolo_segments = "yolo-segments"
    voc = "voc"


Out = Annotated[Path, Option("--out", "-o", metavar="DIR", help="The output folder. It must not exist yet.")]
Format = Annotated[
    Layout, Option("--format", metavar="NAME", help="coco, yolo (boxes), yolo-segments (outlines) or voc (boxes).")
]
Source = Annotated[
    Path, Argument(metavar="SRC", help="A folder in COCO's, YOLO's or Pascal VOC's format, COCO's JSON, or data.yaml.")
]
Split = Annotated[
    str | None,
    Option(metavar="NAME", help="A part of it, such as val (YOLO: train by default) or val2017 (COCO). Default: all."),
]
SkipBad = Annotated[bool, Option("--skip-bad", help="Leave out malformed records, and list them.")]


def scenes(
    out: Out,
    pictures: Annotated[int, Option("--images", min=1, max=10_000_000, metavar="N", help="Number of pictures.")] = 100,
    seed: Annotated[int, Option(min=0, max=2**32 - 1, metavar="N", help="Another seed gives other scenes.")] = 0,
    size: Annotated[int, Option(min=32, max=1024, metavar="N", help="Height and width in pixels.")] = 160,
    objects: Annotated[int, Option(min=1, max=20, metavar="N", help="Most objects in a scene.")] = 4,
    layout: Format = Layout.coco,
    videos: Annotated[int, Option(min=0, metavar="N", help="Also write the first N scenes as videos.")] = 0,
    frames: Annotated[int, Option(min=1, max=1000, metavar="N", help="Frames of a video.")] = 16,
    held_out: Annotated[
        bool, Option("--held-out", help="Compose of other digits and other parts of the photographs, for evaluation.")
    ] = False,
    fashion: Annotated[
        Path | None, Option(metavar="DIR", help="A folder of Fashion-MNIST's IDX files: clothes instead of digits.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compose pictures of real handwritten digits, with exact boxes, masks and captions.

    A scene depends on the seed and its number alone: more pictures are the same ones and others.
    Beside the annotations are captions.jsonl and, with --videos, videos.json (in the layout of
    YouTube-VIS) and video_captions.jsonl.

    JSON: path, format, images, videos, names (of the classes).
    """
    if videos > pictures:
        raise BadInput(f"--videos is {videos}; expected at most --images, which is {pictures}")
    from pentad.datasets.scene_folders import write_scenes
    from pentad.datasets.scenes import Scenes

    made = Scenes(pictures, seed, size=size, objects=(1, objects), held_out=held_out, fashion_folder=fashion)
    names = list(made.names)
    write_scenes(made, out, layout, videos=videos, frames=frames, progress=output.progress("scenes"))
    if as_json:
        facts = {"path": str(out), "format": layout.value, "images": pictures, "videos": videos, "names": names}
        output.write_json(facts)
    else:
        output.write(f"{out}\n")


def convert(
    source: Source,
    out: Out,
    layout: Format = Layout.coco,
    split: Split = None,
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Write a data set of labeled images in another format.

    Image files are linked where the disk allows it, or copied.

    JSON: path, format, images, objects, skipped.
    """
    from pentad.datasets.object_folders import write_objects

    dataset = _read(source, split, skip_bad)
    write_objects(dataset, out, layout, progress=output.progress("images"))
    if as_json:
        facts = {"path": str(out), "format": layout.value, **_facts(dataset)}
        output.write_json(facts)
    else:
        output.write(f"{out}\n")


def check(source: Source, split: Split = None, as_json: Json = False) -> None:
    """Check a data set of labeled images: list every malformed record, and count the objects of each class.

    The exit code is 2 if a record is malformed.

    JSON: images, objects, skipped (the malformed records), classes {name: objects}.
    """
    dataset = _read(source, split, skip_bad=True)
    counts = dataset.counts()
    if as_json:
        output.write_json({**_facts(dataset), "classes": counts})
    else:
        output.write_table([("images", len(dataset)), ("objects", sum(counts.values())), *counts.items()])
    if dataset.skipped:
        raise Exit(2)


def _read(source: Path, split: str | None, skip_bad: bool) -> ObjectDataset:
    from pentad.datasets.object_folders import read_objects

    dataset = read_objects(source, split, skip_bad=skip_bad)
    for line in dataset.skipped:
        output.note(f"pentad: {line}")
    return dataset


def _facts(dataset: ObjectDataset) -> dict[str, object]:
    return {"images": len(dataset), "objects": sum(dataset.counts().values()), "skipped": dataset.skipped}


data = Typer(help="Make, convert and check data sets of labeled images.")
for command in (scenes, annotate, convert, check):
    data.command()(with_groups(command))

"""``pentad classify``: what images show."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from typer import Argument, Exit, Option

from pentad.cli import options as o
from pentad.cli import output
from pentad.cli.image_files import image_files
from pentad.cli.paths import model_names
from pentad.errors import BadInput


def classify(
    images: Annotated[list[str], Argument(metavar="IMAGE…", help="Image files, folders, or patterns such as '*.jpg'.")],
    model: Annotated[
        str,
        Option(
            "--model",
            "-m",
            metavar="NAME",
            help="A classifier (ViT, ResNet or NFNet): a file, a folder, or org/name[@revision].",
            autocompletion=model_names,
        ),
    ],
    top_k: Annotated[int, Option(min=1, metavar="N", help="How many classes to name.")] = 5,
    *,
    loading: o.VisionLoading,
    as_json: o.Json = False,
) -> None:
    """Name what images show, with the probability of each class.

    An image that can't be read is reported, and the others are classified.

    JSON lines: image (its path), labels [{index, label, score}].
    """
    files = image_files(images)
    loaded = loading.load(model, "classify")
    failed = False
    for file in files:
        try:
            labels = loaded.classify(file, top_k=top_k)
        except BadInput as error:
            output.fail(str(error))
            failed = True
            continue
        if as_json:
            output.write_json({"image": str(file), "labels": [asdict(label) for label in labels]})
            continue
        if len(files) > 1:
            output.write(f"{file}\n")
        indent = "  " if len(files) > 1 else ""
        rows: list[tuple[Any, ...]] = [(f"{indent}{label.score:7.2%}", label.label) for label in labels]
        output.write_table(rows)
    if failed:
        raise Exit(2)

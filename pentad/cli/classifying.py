"""``pentad classify``: what images show."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
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
            help="A classifier (ViT, ResNet or NFNet) or a CLIP: a file, a folder, or org/name[@revision].",
            autocompletion=model_names,
        ),
    ],
    top_k: Annotated[int, Option(min=1, metavar="N", help="How many classes to name.")] = 5,
    labels: Annotated[
        str | None, Option(metavar="A,B", help="For CLIP: the classes to choose from, with commas.")
    ] = None,
    template: Annotated[
        str | None,
        Option(metavar="TEXT", help="For CLIP: the text of a class, with {} for its label. Default: a photo of a {}."),
    ] = None,
    *,
    loading: o.VisionLoading,
    as_json: o.Json = False,
) -> None:
    """Name what images show, with the probability of each class.

    A classifier has its classes; CLIP chooses among those of --labels, which may be any words.
    An image that can't be read is reported, and the others are classified.

    JSON lines: image (its path), labels [{index, label, score}].
    """
    files = image_files(images)
    names = None if labels is None else [label.strip() for label in labels.split(",")]
    if names is not None and not all(names):
        raise BadInput(f"--labels is {labels!r}; expected names with commas between them")
    loaded = loading.load(model, "classify", "embed")
    if loaded.task == "classify" and (names or template is not None):
        raise BadInput(f"--{'labels' if names else 'template'} is for CLIP; {model} has classes of its own")
    if loaded.task == "embed" and not names:
        raise BadInput(f"{model} is a CLIP, which has no classes of its own; expected --labels A,B")
    classify = loaded.classify
    if names:
        options = {} if template is None else {"template": template}
        loaded.embed_classes(names, **options)  # reports bad classes once, not for each image
        classify = partial(classify, labels=names, **options)
    failed = False
    for file in files:
        try:
            found = classify(file, top_k=top_k)
        except BadInput as error:
            output.fail(str(error))
            failed = True
            continue
        if as_json:
            output.write_json({"image": str(file), "labels": [asdict(label) for label in found]})
            continue
        if len(files) > 1:
            output.write(f"{file}\n")
        indent = "  " if len(files) > 1 else ""
        rows: list[tuple[Any, ...]] = [(f"{indent}{label.score:7.2%}", label.label) for label in found]
        output.write_table(rows)
    if failed:
        raise Exit(2)

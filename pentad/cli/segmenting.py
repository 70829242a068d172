"""``pentad segment``: the object that a click, a box, a mask or words mean."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from pentad.cli import options as o
from pentad.cli import output
from pentad.cli.detections import VIDEOS
from pentad.cli.following import follow_object
from pentad.cli.paths import model_names
from pentad.errors import BadInput, PentadError

if TYPE_CHECKING:
    from torch import Tensor

    from pentad.vision.segmenter import Mask


DEFAULT_SEGMENTER = "sam-scenes"


def segment(
    image: Annotated[
        str, Argument(metavar="IMAGE", help="An image file, or a video through which an object is followed.")
    ],
    model: Annotated[
        str,
        Option(
            "--model",
            "-m",
            metavar="NAME",
            help="A Segment Anything: Meta's .pth, a folder, or org/name[@revision].",
            autocompletion=model_names,
        ),
    ] = DEFAULT_SEGMENTER,
    point: Annotated[
        list[str] | None,
        Option(metavar="X,Y[,LABEL]", help="A point in the object or, with label 0, outside; may be repeated."),
    ] = None,
    box: Annotated[
        list[str] | None, Option(metavar="X0,Y0,X1,Y1", help="A box around an object; one more for each object.")
    ] = None,
    mask: Annotated[
        Path | None, Option(metavar="FILE", help="A rough mask: white on black, of the image's size.")
    ] = None,
    text: Annotated[
        list[str] | None,
        Option(metavar="WORDS", help="Words for an object, such as 'the dog'; one more for each object."),
    ] = None,
    multimask: Annotated[
        bool, Option("--multimask", help="Three masks for each prompt: as a rule a whole, a part and a smaller part.")
    ] = False,
    everything: Annotated[
        bool, Option("--everything", help="Segment everything: ask for a grid of points, and drop bad masks.")
    ] = False,
    points_per_side: Annotated[
        int | None, Option(min=1, max=256, metavar="N", help="With --everything: points a side. Default: 32.")
    ] = None,
    crop_layers: Annotated[
        int | None,
        Option(min=0, max=4, metavar="N", help="With --everything: also look at N layers of crops. Default: 0."),
    ] = None,
    min_area: Annotated[
        int | None,
        Option(min=0, metavar="N", help="With --everything: remove parts and holes of fewer pixels. Default: 0."),
    ] = None,
    min_iou: Annotated[
        float | None,
        Option(max=1, metavar="X", help="With --everything: drop masks of lower predicted IoU. Default: 0.88."),
    ] = None,
    min_stability: Annotated[
        float | None,
        Option(min=0, max=1, metavar="X", help="With --everything: drop less stable masks. Default: 0.95."),
    ] = None,
    out: Annotated[
        Path | None, Option(metavar="DIR", help="Write masks (PNG), a picture of them, and COCO's JSON to DIR.")
    ] = None,
    view: Annotated[
        bool, Option("--view", help="Open a page where clicks and boxes segment, and save to DIR or beside the image.")
    ] = False,
    no_browser: Annotated[bool, Option("--no-browser", help="With --view: only print the page's address.")] = False,
    port: Annotated[int, Option(min=0, max=65535, metavar="N", help="With --view: the port; 0: a free one.")] = 0,
    *,
    loading: o.VisionLoading,
    as_json: o.Json = False,
) -> None:
    """Segment the objects of an image that points, boxes, a mask or words mean, or everything.

    All points are one prompt, together with the box, the mask and the words. Coordinates are pixels, from the
    top left corner. For a single point, or words alone, the best of
    three masks is chosen. Words need a model that was trained with a CLIP.

    The default model is trained on this machine at its first use, and knows drawn scenes only (see
    pentad data scenes). Photographs want published weights.

    In a video the prompt is for the first frame. Each later frame is prompted from the mask before
    it, until the object is lost: its predicted IoU or its area collapses.

    JSON: image, width, height, masks [{rle (COCO's), box [x0, y0, x1, y1], predicted_iou,
    stability_score, prompt {points, labels, box, mask, text, crop}}]; of videos one line a frame, also with
    frame and time (in seconds), and lost (why), which ends it.
    """
    points = [_numbers(text, "--point", (2, 3)) for text in point or ()]
    boxes = [_numbers(text, "--box", (4,)) for text in box or ()]
    settings = {
        "points_per_side": points_per_side,
        "crop_n_layers": crop_layers,
        "min_mask_region_area": min_area,
        "pred_iou_thresh": min_iou,
        "stability_score_thresh": min_stability,
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    if everything and (points or boxes or mask or text):
        raise BadInput("--everything is a prompt of its own; expected no --point, --box, --mask or --text")
    if view and (points or boxes or mask or text or everything or multimask):
        raise BadInput("--view asks for prompts on a page; expected none of them as options")
    if settings and not everything:
        raise BadInput("--points-per-side, --crop-layers, --min-… are for --everything")
    if not (points or boxes or mask or text or everything or view):
        raise BadInput(
            "there is no prompt; expected --point X,Y, --box X0,Y0,X1,Y1, --mask FILE, --text WORDS or --everything"
        )
    for option, count in (("--box", len(boxes)), ("--text", len(text or ()))):
        if count > 1 and (points or mask):
            raise BadInput(f"{count} {option} are {count} prompts, and points or a mask are one; expected one {option}")
    if out is not None and out.exists() and not out.is_dir():
        raise BadInput(f"--out {out} is a file; expected a folder")
    is_video = Path(image).suffix.lower() in VIDEOS
    if is_video and (view or everything or multimask or max(len(boxes), len(text or ())) > 1):
        raise BadInput(f"{image} is a video; expected one object: points, a box, --mask or --text, for its first frame")
    if view:
        from pentad.cli.viewing import view_image

        view_image(image, model, out, loading, port=port, browser=not no_browser, as_json=as_json)
        return
    from pentad.media.images import read_image

    pixels = None if is_video else read_image(image)
    rough = None if mask is None else read_image(mask).float().mean(0) > 127
    segmenter = loading.load(model, "segment")
    prompts: dict[str, Any] = {"boxes": boxes or None, "mask": rough, "text": text or None}
    if points:
        prompts |= {"points": [xy[:2] for xy in points], "labels": [xy[2] if xy[2:] else 1 for xy in points]}
    if pixels is None:
        follow_object(segmenter, image, prompts, out, as_json=as_json)
        return
    if everything:
        found = segmenter.everything(pixels, progress=output.progress("points"), **settings)
        report(image, pixels, found, out, as_json=as_json)
        return
    with output.status(f"embedding {image} …"):
        embedded = segmenter.image(pixels)
    found = embedded.masks(**prompts, multimask=True if multimask else None)
    report(image, pixels, found, out, as_json=as_json)


def report(image: str, pixels: Tensor, masks: Sequence[Mask], out: Path | None, *, as_json: bool) -> None:
    """Write the masks of an image to standard output and to a folder."""
    height, width = pixels.shape[1:]
    facts: dict[str, Any] = {"image": image, "width": width, "height": height}
    files = [] if out is None else _write(out, facts, pixels, masks)
    if as_json:
        output.write_json(facts | {"masks": [one.to_json() for one in masks]})
        return
    from pentad.vision.masks import rle_area

    output.write(f"{image}  {width} x {height}  {len(masks)} mask{'' if len(masks) == 1 else 's'}\n")
    words = any("text" in one.prompt for one in masks)
    header = "  IoU", "stability", "pixels", *(side.rjust(5) for side in ("x0", "y0", "x1", "y1"))
    rows: list[tuple[str, ...]] = [(*header, "text") if words else header]
    for one in masks:
        sides = (f"{side:.0f}".rjust(5) for side in one.box)
        rows.append(
            (
                f"  {one.predicted_iou:.2f}",
                f"{one.stability_score:.2f}",
                str(rle_area(one.rle)),
                *sides,
                *([one.prompt.get("text", "")] if words else ()),
            )
        )
    if masks:
        output.write_table(rows)
    for file in files:
        output.note(f"wrote {file}")


def _write(folder: Path, facts: dict[str, Any], pixels: Tensor, masks: Sequence[Mask]) -> list[Path]:
    """Write each mask, a picture of all, and their annotations in COCO's format."""
    import torch

    from pentad.media.drawing import draw_masks
    from pentad.media.images import write_image
    from pentad.vision.annotations import coco_of
    from pentad.vision.masks import rle_area

    stem = Path(facts["image"]).stem
    digits = len(str(len(masks)))
    images = {folder / f"{stem}-mask-{index:0{digits}}.png": one for index, one in enumerate(masks, 1)}
    picture, annotations = folder / f"{stem}-masks.jpg", folder / f"{stem}-coco.json"
    prompts = [one.prompt for one in masks]
    points, labels = ([value for prompt in prompts for value in prompt.get(name, ())] for name in ("points", "labels"))
    boxes = [prompt["box"] for prompt in prompts if "box" in prompt]
    by_size = sorted(masks, key=lambda one: rle_area(one.rle))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, one in images.items():
            write_image(path, one.mask.to(torch.uint8).mul_(255).expand(3, -1, -1))
        shown = draw_masks(pixels, (one.mask for one in by_size), points_N2=points, labels_N=labels, boxes_N4=boxes)
        write_image(picture, shown)
        annotations.write_text(json.dumps(coco_of([{**facts, "masks": [one.to_json() for one in masks]}])))
    except OSError as error:
        raise PentadError(f"{folder} can't be written: {error.strerror}") from error
    return [*images, picture, annotations]


def _numbers(text: str, option: str, counts: tuple[int, ...]) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in counts:
        expected = "X,Y or X,Y,LABEL" if 2 in counts else "X0,Y0,X1,Y1"
        raise BadInput(f"{option} is {text!r}; expected {expected} in pixels")
    return values

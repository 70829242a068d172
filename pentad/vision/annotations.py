"""Masks of images as a data set in COCO's format."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pentad.errors import BadInput
from pentad.vision.masks import rle_area, rle_box, rle_counts

FACTS = ("predicted_iou", "stability_score", "prompt", "source")
"""What an annotation has beside COCO's fields, as far as it is known."""


def coco_of(images: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The data set.

    Args:
        images: for each its `image` (a name), `width`, `height` and `masks`; for each of these its `rle`, `label` (by
            default "object") and `FACTS`.

    Raises:
        BadInput: an RLE is malformed, or of another size.
    """
    labels = [str(mask.get("label", "object")) for image in images for mask in image["masks"]]
    names = list(dict.fromkeys(labels)) or ["object"]
    content: dict[str, Any] = {"images": [], "annotations": []}
    for number, image in enumerate(images, 1):
        size = {"width": image["width"], "height": image["height"]}
        content["images"].append({"id": number, "file_name": image["image"], **size})
        for mask in image["masks"]:
            row = {"id": len(content["annotations"]) + 1, "image_id": number}
            row["category_id"] = names.index(str(mask.get("label", "object"))) + 1
            facts = {name: mask[name] for name in FACTS if mask.get(name) is not None}
            content["annotations"].append({**row, **_shape(image, mask["rle"]), **facts})
    return content | {"categories": [{"id": number, "name": name} for number, name in enumerate(names, 1)]}


def _shape(image: Mapping[str, Any], rle: Any) -> dict[str, Any]:
    rle_counts(rle)
    if [*rle["size"]] != [image["height"], image["width"]]:
        raise BadInput(f"a mask has the size {rle['size']}; expected {[image['height'], image['width']]}")
    x0, y0, x1, y1 = rle_box(rle)
    return {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": rle_area(rle), "segmentation": rle, "iscrowd": 0}


def read_masks(path: Path, height: int, width: int) -> list[dict[str, Any]]:
    """The masks of a file that has what `coco_of` returns for one image.

    Raises:
        BadInput: it is another file, or of another image.
    """
    try:
        content = json.loads(path.read_bytes())
        names = {one["id"]: one["name"] for one in content["categories"]}
        [image] = content["images"]
        masks = [
            {"rle": row["segmentation"], "label": names[row["category_id"]], **{k: row[k] for k in FACTS if k in row}}
            for row in content["annotations"]
        ]
        coco_of([{"image": image["file_name"], "height": height, "width": width, "masks": masks}])
    except (KeyError, TypeError, ValueError, AttributeError, BadInput) as error:
        reason = str(error) if isinstance(error, BadInput) else "pentad didn't write it"
        raise BadInput(f"{path} can't be continued: {reason}; move it away, or use --out DIR") from error
    return masks

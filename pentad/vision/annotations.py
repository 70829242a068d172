"""The masks of one image as a data set in COCO's format."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pentad.errors import BadInput
from pentad.vision.masks import rle_area, rle_box, rle_counts

SCORES = ("predicted_iou", "stability_score", "prompt")


def coco_of(image: Mapping[str, Any], masks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The data set.

    Args:
        image: its `image` (a name), `width` and `height`.
        masks: for each its `rle`; `label` (by default "object"), and the scores that are known.

    Raises:
        BadInput: an RLE is malformed, or of another size.
    """
    names = list(dict.fromkeys(str(mask.get("label", "object")) for mask in masks)) or ["object"]
    rows = []
    for number, mask in enumerate(masks, 1):
        rle = mask["rle"]
        rle_counts(rle)
        if [*rle["size"]] != [image["height"], image["width"]]:
            raise BadInput(f"a mask has the size {rle['size']}; expected {[image['height'], image['width']]}")
        x0, y0, x1, y1 = rle_box(rle)
        shape = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": rle_area(rle), "segmentation": rle, "iscrowd": 0}
        scores = {name: mask[name] for name in SCORES if mask.get(name) is not None}
        category = names.index(str(mask.get("label", "object"))) + 1
        rows.append({"id": number, "image_id": 1, "category_id": category, **shape, **scores})
    size = {"width": image["width"], "height": image["height"]}
    return {
        "images": [{"id": 1, "file_name": image["image"], **size}],
        "annotations": rows,
        "categories": [{"id": number, "name": name} for number, name in enumerate(names, 1)],
    }


def read_masks(path: Path, height: int, width: int) -> list[dict[str, Any]]:
    """The masks of a file that has what `coco_of` returns.

    Raises:
        BadInput: it is another file, or of another image.
    """
    try:
        content = json.loads(path.read_bytes())
        names = {one["id"]: one["name"] for one in content["categories"]}
        [image] = content["images"]
        masks = [
            {"rle": row["segmentation"], "label": names[row["category_id"]], **{k: row[k] for k in SCORES if k in row}}
            for row in content["annotations"]
        ]
        coco_of({"image": image["file_name"], "height": height, "width": width}, masks)
    except (KeyError, TypeError, ValueError, AttributeError, BadInput) as error:
        reason = str(error) if isinstance(error, BadInput) else "pentad didn't write it"
        raise BadInput(f"{path} can't be continued: {reason}; move it away, or use --out DIR") from error
    return masks

"""Small data sets of labeled images."""

import json
from pathlib import Path
from typing import Any

from PIL import Image


def coco_content() -> dict[str, Any]:
    """COCO's annotations of two images: a box, polygons, an RLE and a crowd; the categories' ids have gaps."""
    return {
        "images": [
            {"id": 7, "file_name": "a.png", "width": 40, "height": 30},
            {"id": 9, "file_name": "b.png", "width": 20, "height": 10},
        ],
        "categories": [{"id": 3, "name": "dog"}, {"id": 1, "name": "cat"}, {"id": 8, "name": "unseen"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 3, "bbox": [2, 3, 10, 5], "area": 50, "iscrowd": 0},
            {
                "id": 2,
                "image_id": 7,
                "category_id": 1,
                "bbox": [20, 10, 10, 10],
                "area": 100,
                "segmentation": [[20, 10, 30, 10, 30, 20, 20, 20]],
            },
            {
                "id": 3,
                "image_id": 9,
                "category_id": 1,
                "bbox": [0, 0, 20, 10],
                "area": 100,
                "iscrowd": 1,
                "segmentation": {"size": [10, 20], "counts": [0, 100, 100]},
            },
        ],
    }


def write_coco(folder: Path, content: Any = None) -> Path:
    """A folder with the images and an annotation file, whose path is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30)).save(folder / "a.png")
    Image.new("RGB", (20, 10)).save(folder / "b.png")
    file = folder / "annotations.json"
    file.write_text(json.dumps(coco_content() if content is None else content))
    return file

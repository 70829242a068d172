"""The images of a stage of the data engine, which a person annotates one after the other at a page."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pentad.errors import BadInput
from pentad.media.images import image_size
from pentad.recipes.annotation_folder import FINISHED, AnnotationFolder
from pentad.serve.page import for_browsers


class Stage:
    """Shows the first image that isn't done, with the masks that it has; see `pentad.serve.page.Shown`.

    Args:
        written: keeps each image as soon as it changes.
        images: all of them.
        model: its name in the API.
        ended: is called when all are done.

    Attributes:
        file: the run's annotations.
    """

    def __init__(
        self, written: AnnotationFolder, images: Sequence[Path], model: str, ended: Callable[[], None]
    ) -> None:
        self._written, self._images, self._model, self._ended = written, images, model, ended
        self.file = written.folder / FINISHED

    def describe(self) -> dict[str, Any]:
        left = self._written.left(self._images)
        facts = {"model": self._model, "file": str(self.file), "total": len(self._images), "left": len(left)}
        if not left:
            return {**facts, "number": None, "name": "All images are done", "masks": []}
        record = self._written.records.get(str(left[0]), {})
        names = "clicks", "annotator_seconds", "computing_seconds"
        facts |= {name: record.get(name, 0) for name in names}
        return {
            **facts,
            "number": self._images.index(left[0]),
            "name": left[0].name,
            "masks": record.get("objects", []),
        }

    def photo(self, number: int) -> bytes:
        return for_browsers(self._path(number))

    def save(self, number: int, masks: Sequence[dict[str, Any]], facts: dict[str, Any]) -> None:
        path = self._path(number)
        if path not in self._written.left(self._images):
            raise BadInput(f"{path.name} is done; reload the page for the next image")
        record = self._written.records.get(str(path))
        height, width = (record["height"], record["width"]) if record else image_size(path)
        self._written.put(path, height, width, masks, **facts)
        self._written.finish(self._images)
        if not self._written.left(self._images):
            self._ended()

    def _path(self, number: int) -> Path:
        if number >= len(self._images):
            raise BadInput(f"the image {number} is unknown; expected at most {len(self._images) - 1}")
        return self._images[number]

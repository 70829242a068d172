"""What ``pentad detect`` does with each image and video."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pentad.cli import output
from pentad.errors import BadInput, PentadError

if TYPE_CHECKING:
    from torch import Tensor

    from pentad.media.video import Frame
    from pentad.vision.detector import Detections, Detector

VIDEOS = (".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".webm")


@dataclass(frozen=True)
class Source:
    """An image or a video.

    Attributes:
        name: what the user calls it.
        path: the file.
        target: the picture or video to write; None for none.
    """

    name: str
    path: Path
    target: Path | None

    @property
    def is_video(self) -> bool:
        """True for a video, by its suffix."""
        return self.path.suffix.lower() in VIDEOS


@dataclass
class Job:
    """One run of the command.

    Attributes:
        coco: what has been found in each image, if it is wanted.
        code: the exit code so far.
    """

    detector: Detector
    threshold: float
    classes: Sequence[int] | None
    letterbox: bool
    batch_size: int
    as_json: bool
    coco: list[Detections] | None = None
    code: int = field(default=0, init=False)

    def run(self, sources: Sequence[Source]) -> None:
        """Process all sources; those that can't be read are reported."""
        waiting: list[tuple[Source, Tensor]] = []
        for source in sources:
            try:
                if source.is_video:
                    self._images(waiting)
                    self._video(source)
                else:
                    from pentad.media.images import read_image

                    waiting.append((source, read_image(source.path, name=source.name)))
                    if len(waiting) == self.batch_size:
                        self._images(waiting)
            except PentadError as error:
                output.fail(str(error))
                self.code = max(self.code, 2 if isinstance(error, BadInput) else 1)
        self._images(waiting)

    def _detect(self, images: Sequence[Tensor]) -> list[Detections]:
        options: dict[str, Any] = {"threshold": self.threshold, "letterbox": self.letterbox, "classes": self.classes}
        return self.detector.detect(images, batch_size=self.batch_size, **options)

    def _images(self, waiting: list[tuple[Source, Tensor]]) -> None:
        """Process a batch of images, and empty the list."""
        batch = [*waiting]
        waiting.clear()
        started = time.perf_counter()
        results = self._detect([image for _, image in batch])
        seconds = (time.perf_counter() - started) / max(1, len(batch))
        for (source, image), found in zip(batch, results, strict=True):
            self._report(replace(found, image=source.name), seconds)
            if source.target is not None:
                from pentad.media.images import write_image

                source.target.parent.mkdir(parents=True, exist_ok=True)
                write_image(source.target, drawn(image, found))

    def _report(self, found: Detections, seconds: float) -> None:
        if self.coco is not None:
            self.coco.append(found)
        if self.as_json:
            output.write_json(found.to_json())
            return
        counts = Counter(one.label for one in found.detections).most_common()
        words = ", ".join(f"{count} {label}" for label, count in counts) or "nothing found"
        output.write(f"{found.image}  {found.width} x {found.height}  {words}  ({seconds * 1000:.0f} ms)\n")
        rows: list[tuple[str, ...]] = [
            (f"  {one.label}", f"{one.score:.2f}", *(f"{side:.0f}".rjust(5) for side in one.box))
            for one in found.detections
        ]
        if rows:
            output.write_table([("  label", "score", *(name.rjust(5) for name in ("x0", "y0", "x1", "y1"))), *rows])

    def _video(self, source: Source) -> None:
        """Process a video frame by frame; memory doesn't grow with its length.

        Raises:
            BadInput: the video is damaged; the frames before have been reported and written.
        """
        from pentad.media.video import VideoWriter, read_video, video_facts
        from pentad.weights.cache import Progress, task

        facts, started, problem = video_facts(source.path), time.perf_counter(), None
        seen, count, size = Counter[str](), 0, ""
        progress = output.progress("frames") or Progress()
        with ExitStack() as stack:
            writer = None
            if source.target is not None:
                source.target.parent.mkdir(parents=True, exist_ok=True)
                writer = stack.enter_context(VideoWriter(source.target, facts.rate))
            stack.enter_context(task(progress, source.name, facts.frames))
            try:
                for frame, found in self._frames(read_video(source.path)):
                    count, size = count + 1, f"{found.width} x {found.height}"
                    seen.update({one.label for one in found.detections})
                    if self.as_json:
                        output.write_json(replace(found, image=source.name).to_json(frame.number, frame.time))
                    if writer is not None:
                        writer.write(drawn(frame.image, found), frame.time)
                    progress.advance(1)
            except BadInput as error:
                problem = error
        if count and not self.as_json:
            words = ", ".join(f"{label} in {number}" for label, number in seen.most_common()) or "nothing found"
            speed = f"{count} frames, {count / (time.perf_counter() - started):.1f} a second"
            output.write(f"{source.name}  {size}  {speed}: {words}\n")
        if problem is not None:
            raise problem

    def _frames(self, frames: Iterator[Frame]) -> Iterator[tuple[Frame, Detections]]:
        while batch := list(islice(frames, self.batch_size)):
            yield from zip(batch, self._detect([frame.image for frame in batch]), strict=True)


def drawn(image_3HW: Tensor, found: Detections) -> Tensor:
    """An image with the boxes and masks of its objects."""
    import torch

    from pentad.media.drawing import draw_detections
    from pentad.vision.masks import decode

    boxes = torch.tensor([one.box for one in found.detections]).reshape(-1, 4)
    captions = [f"{one.label} {one.score:.2f}" for one in found.detections]
    codes = [one.mask for one in found.detections if one.mask is not None]
    masks_NHW = torch.stack([decode(code) for code in codes]) if codes else None
    numbers = [one.label_id for one in found.detections]
    return draw_detections(image_3HW, boxes, captions, label_ids=numbers, masks_NHW=masks_NHW)


def write_coco(path: Path, results: Sequence[Detections], labels: Sequence[str]) -> None:
    """Write the objects of images as a COCO data set whose annotations have scores.

    COCO's 80 classes have COCO's numbers, and images whose names are numbers, as COCO's, have these; others count from
    1.
    """
    from pentad.vision.masks import rle_area
    from pentad.weights.labels import COCO, COCO_IDS

    ids = COCO_IDS if tuple(labels) == COCO else range(1, len(labels) + 1)
    stems = [Path(str(found.image)).stem for found in results]
    numbered = all(stem.isdecimal() for stem in stems) and len(set(map(int, stems))) == len(stems)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for count, (stem, found) in enumerate(zip(stems, results, strict=True), 1):
        number = int(stem) if numbered else count
        images.append({"id": number, "file_name": found.image, "width": found.width, "height": found.height})
        for one in found.detections:
            x0, y0, x1, y1 = one.box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": ids[one.label_id],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": 0,
                    "score": one.score,
                    **({} if one.mask is None else {"segmentation": one.mask, "area": rle_area(one.mask)}),
                }
            )
    categories = [{"id": number, "name": label} for number, label in zip(ids, labels, strict=True)]
    text = json.dumps({"images": images, "annotations": annotations, "categories": categories})
    partial = path.with_name(f".{path.name}.part")
    try:
        partial.write_text(text)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise PentadError(f"{path} can't be written: {error.strerror}") from error

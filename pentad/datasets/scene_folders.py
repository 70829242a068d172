"""Folders of scenes: pictures with annotations and captions, and videos."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pentad.datasets.object_folders import Entry, fill
from pentad.datasets.scenes import Scene, Scenes, labeled_image
from pentad.vision import masks
from pentad.weights.atomic import new_folder
from pentad.weights.cache import Progress, task

__all__ = ["write_scenes"]

_RATE = 12  # frames a second


def write_scenes(
    scenes: Scenes,
    folder: str | Path,
    layout: str = "coco",
    *,
    videos: int = 0,
    frames: int = 16,
    progress: Progress | None = None,
) -> None:
    """Write scenes into a new folder: images, annotations, and captions.jsonl with ``image`` and ``caption``.

    Args:
        scenes: all of them are written as images.
        folder: is made.
        layout: as for `pentad.datasets.object_folders.write_objects`.
        videos: the first scenes are also written as videos, with videos.json in the layout of YouTube-VIS: the mask
            and the box of each object in each frame.
        frames: of a video.
        progress: is told of each image and video.
    """
    progress = progress or Progress()
    with new_folder(Path(folder)) as root, task(progress, "Drawing scenes", len(scenes) + videos):
        captions = list[str]()
        fill(root, scenes.names, _entries(scenes, captions), layout, progress)
        images = sorted(
            file.relative_to(root).as_posix() for file in (*root.glob("images/*"), *root.glob("JPEGImages/*"))
        )
        _write_lines(root / "captions.jsonl", "image", images, captions)
        if videos:
            _write_videos(scenes, root, min(videos, len(scenes)), frames, progress)


def _entries(scenes: Scenes, captions: list[str]) -> Iterator[Entry]:
    for index in range(len(scenes)):
        scene = scenes.scene(index)
        captions.append(scene.caption)
        yield labeled_image(scene.sample, Path(f"{index:06}.png"), index + 1), scene.sample.image


def _write_lines(file: Path, kind: str, names: list[str], captions: list[str]) -> None:
    rows = zip(names, captions, strict=True)
    file.write_text("".join(json.dumps({kind: name, "caption": caption}) + "\n" for name, caption in rows))


def _write_videos(scenes: Scenes, root: Path, count: int, frames: int, progress: Progress) -> None:
    from pentad.media.video import VideoWriter

    (root / "videos").mkdir()
    content: dict[str, list[Any]] = {"videos": [], "annotations": []}
    content["categories"] = [{"id": number, "name": name} for number, name in enumerate(scenes.names, 1)]
    captions = list[str]()
    for index in range(count):
        name = f"videos/{index:06}.mp4"
        shown = list[Scene]()
        with VideoWriter(root / name, _RATE) as writer:
            for scene in scenes.video(index, frames):
                writer.write(scene.sample.image)
                shown.append(scene)
        size = {"width": scenes.size, "height": scenes.size, "length": frames}
        captions.append(shown[0].caption)
        content["videos"].append({"id": index + 1, "file_name": name, "caption": captions[-1], **size})
        for track in _tracks(shown):
            number = len(content["annotations"]) + 1
            content["annotations"].append({"id": number, "video_id": index + 1, **track, "iscrowd": 0, **size})
        progress.advance(1)
    (root / "videos.json").write_text(json.dumps(content))
    _write_lines(root / "video_captions.jsonl", "video", [video["file_name"] for video in content["videos"]], captions)


def _tracks(frames: list[Scene]) -> Iterator[dict[str, Any]]:
    """The annotations of a video: one for each object, with None where it is hidden."""
    for track in sorted({track for frame in frames for track in frame.tracks}):
        found = [frame.tracks.index(track) if track in frame.tracks else None for frame in frames]
        codes, boxes, category = list[Any](), list[Any](), 0
        for frame, place in zip(frames, found, strict=True):
            if place is None:
                codes.append(None)
                boxes.append(None)
                continue
            x0, y0, x1, y1 = frame.sample.boxes[place].tolist()
            codes.append(masks.encode(frame.sample.masks[place]))
            boxes.append([x0, y0, x1 - x0, y1 - y0])
            category = int(frame.sample.labels[place]) + 1
        areas = [code and masks.rle_area(code) for code in codes]
        yield {"category_id": category, "segmentations": codes, "bboxes": boxes, "areas": areas}

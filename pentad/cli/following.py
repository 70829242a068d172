"""What ``pentad segment`` does with a video."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pentad.cli import output
from pentad.errors import BadInput, PentadError

if TYPE_CHECKING:
    from pentad.vision.follow import Step
    from pentad.vision.segmenter import Mask, Segmenter


def follow_object(
    segmenter: Segmenter, video: str, prompts: dict[str, Any], out: Path | None, *, as_json: bool
) -> None:
    """Follow the object of the first frame, and write its masks to standard output and to a folder."""
    from pentad.media.video import VideoWriter, read_video, video_facts
    from pentad.vision.follow import follow
    from pentad.weights.cache import Progress, task

    facts, path = video_facts(video), Path(video)
    steps: list[tuple[int, float, Mask | None, str]] = []
    size: tuple[int, ...] = (0, 0)
    problem = None
    progress = output.progress("frames") or Progress()
    with ExitStack() as stack:
        writer = None
        if out is not None:
            try:
                out.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise PentadError(f"{out} can't be written: {error.strerror}") from error
            writer = stack.enter_context(VideoWriter(out / f"{path.stem}-masks.mp4", facts.rate))
        stack.enter_context(task(progress, video, facts.frames))
        try:
            for step in follow(segmenter, read_video(video), **prompts):
                number, time, size = step.frame.number, step.frame.time, tuple(step.frame.image.shape[1:])
                steps.append((number, time, step.mask, step.lost))
                if as_json:
                    found = [] if step.mask is None else [step.mask.to_json()]
                    lost = {"lost": step.lost} if step.lost else {}
                    row = {"image": video, "frame": number, "time": time, "width": size[1], "height": size[0]}
                    output.write_json({**row, "masks": found, **lost})
                if out is not None and writer is not None:
                    _draw(writer, out, path.stem, step, first=len(steps) == 1)
                progress.advance(1)
        except BadInput as error:
            if not steps:
                raise
            problem = error  # what was found before is kept
    if out is not None:
        content = vis(video, size, [mask for _, _, mask, _ in steps])
        (out / f"{path.stem}-coco.json").write_text(json.dumps(content))
    if not as_json:
        _report(video, size, steps, out)
    if problem is not None:
        raise problem


def _draw(writer: Any, out: Path, stem: str, step: Step, *, first: bool) -> None:
    """Write a frame of the video with the mask drawn, and the mask's PNG."""
    import torch

    from pentad.media.drawing import draw_masks
    from pentad.media.images import write_image

    if step.mask is None:
        writer.write(step.frame.image, step.frame.time)
        return
    mask_HW, prompt = step.mask.mask, step.mask.prompt if first else {}
    write_image(out / f"{stem}-mask-{step.frame.number:06}.png", mask_HW.to(torch.uint8).mul_(255).expand(3, -1, -1))
    drawn = {"points_N2": prompt.get("points", ()), "labels_N": prompt.get("labels", ())}
    boxes = [prompt["box"]] if "box" in prompt else []
    writer.write(draw_masks(step.frame.image, [mask_HW], **drawn, boxes_N4=boxes), step.frame.time)


def _report(video: str, size: tuple[int, ...], steps: list[Any], out: Path | None) -> None:
    number, time, _, lost = steps[-1]
    followed = len(steps) - bool(lost)
    output.write(f"{video}  {size[1]} x {size[0]}  followed through {followed} frame{'' if followed == 1 else 's'}\n")
    if lost:
        output.write(f"  lost in frame {number} ({time:.2f} s): {lost}\n")
    for name in ("mask-*.png", "masks.mp4", "coco.json") if out is not None else ():
        output.note(f"wrote {out}/{Path(video).stem}-{name}")


def vis(video: str, size: tuple[int, ...], masks: list[Mask | None]) -> dict[str, Any]:
    """The masks in the layout of YouTube-VIS, COCO's for videos: one object with None where it is lost."""
    from pentad.vision.masks import rle_area

    def each(what: Any) -> Iterator[Any]:
        return (None if mask is None else what(mask) for mask in masks)

    facts = {"height": size[0], "width": size[1], "length": len(masks)}
    track = {
        "segmentations": [*each(lambda mask: mask.rle)],
        "bboxes": [*each(lambda mask: [*mask.box[:2], mask.box[2] - mask.box[0], mask.box[3] - mask.box[1]])],
        "areas": [*each(lambda mask: rle_area(mask.rle))],
        "predicted_ious": [*each(lambda mask: mask.predicted_iou)],
    }
    return {
        "videos": [{"id": 1, "file_name": video, **facts}],
        "annotations": [{"id": 1, "video_id": 1, "category_id": 1, **track, "iscrowd": 0, **facts}],
        "categories": [{"id": 1, "name": "object"}],
    }

"""YOLO (arXiv:1506.02640): a network that looks once at the image and gives all boxes is several times as fast as one
that proposes regions and then classifies each, and somewhat less accurate.

A small network with the layers of YOLOv3-tiny and a small Mask R-CNN learn from the same number of the same scenes.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pentad.reproduce import mask_rcnn
from pentad.reproduce.report import Interval, Report, Row
from pentad.reproduce.runs import Workshop

ANCHORS = (0.08, 0.15), (0.12, 0.22), (0.2, 0.2), (0.2, 0.32), (0.28, 0.4), (0.38, 0.5)
"""Widths and heights of the digits' boxes, by the side of a scene."""
CLASSES = 10
EXPECTED = 2.0  # times as fast


@dataclass(frozen=True)
class Size:
    """How much is done.

    Attributes:
        scenes, held_out: the numbers of scenes to train on and to measure with.
        side: of the scenes in pixels.
        images: how many each network learns from, some of them several times.
        batches: images a step of YOLO and of Mask R-CNN.
        width: channels of YOLO's first convolution.
    """

    scenes: int = 2000
    held_out: int = 150
    side: int = 128
    images: int = 6400
    batches: tuple[int, int] = (16, 8)
    width: int = 16


def network(side: int, width: int) -> str:
    """The .cfg of a network with the layers of YOLOv3-tiny: heads at strides 32 and 16."""

    def conv(filters: int, size: int = 3) -> str:
        text = f"[convolutional]\nbatch_normalize=1\nfilters={filters}\nsize={size}\nstride=1\npad=1\n"
        return f"{text}activation=leaky\n\n"

    def head(masks: Sequence[int]) -> str:
        anchors = ", ".join(f"{round(w * side)},{round(h * side)}" for w, h in ANCHORS)
        filters = 3 * (5 + CLASSES)
        last = f"[convolutional]\nfilters={filters}\nsize=1\nstride=1\npad=1\nactivation=linear\n\n"
        mask = ",".join(map(str, masks))
        return f"{last}[yolo]\nmask={mask}\nanchors={anchors}\nnum={len(ANCHORS)}\nclasses={CLASSES}\n\n"

    pool = "[maxpool]\nsize=2\nstride=2\n\n"
    body = f"[net]\nwidth={side}\nheight={side}\nchannels=3\n\n"
    body += "".join(conv(width << i) + pool for i in range(4)) + conv(width << 4) + pool  # layer 8 has stride 16
    coarse = conv(width << 4) + conv(width << 3, 1) + conv(width << 4) + head((3, 4, 5))
    fine = "[route]\nlayers=-4\n\n" + conv(width << 2, 1) + "[upsample]\nstride=2\n\n[route]\nlayers=-1,8\n\n"
    return body + coarse + fine + conv(width << 3) + head((0, 1, 2))


def run(folder: Path, seeds: int, note: Callable[[str], None], size: Size | None = None) -> Report:
    """Train both with each seed, and measure accuracy and time.

    Args:
        folder: an empty folder for data and runs.
        seeds: how many.
        note: receives what is being done.
        size: how much is done.
    """
    size, started, shop = size or Size(), time.perf_counter(), Workshop(folder, note)
    shop.draw_scenes(size.scenes, size.held_out, size.side)
    sides = {"min_size": size.side, "max_size": size.side}
    models = {
        "YOLO": (shop.write("yolo.cfg", network(size.side, size.width)), size.batches[0], {"mosaic": 0.5}),
        "Mask R-CNN": (
            shop.write("mask_rcnn.json", {**mask_rcnn.NETWORK, **sides}),
            size.batches[1],
            {"proposals": mask_rcnn.Size.proposals},
        ),
    }
    ap50: dict[str, list[float]] = {name: [] for name in models}
    times: dict[str, list[float]] = {name: [] for name in models}
    for seed in range(seeds):
        detectors = []
        for name, (model, batch, objects) in models.items():
            folder_name = f"{name.replace(' ', '-')}-{seed}"
            steps = size.images // batch
            trained = shop.train(
                folder_name, "detect", model, steps, batch, seed, objects=objects, optimizer=mask_rcnn.OPTIMIZER
            )
            detectors.append(shop.load(trained))
            ap50[name].append(100 * (shop.evaluate(detectors[-1]).boxes.ap50 or 0.0))
        for name, milliseconds in zip(times, shop.milliseconds(detectors), strict=True):
            times[name].append(milliseconds)
    ratios = [theirs / ours for ours, theirs in zip(*times.values(), strict=True)]
    return Report(
        name="yolo",
        claim="one pass over the image is several times as fast as region proposals (45 images a second against 7 of"
        " Faster R-CNN), and less accurate (63 against 73 mAP)",
        source="Redmon et al. 2015, You Only Look Once (arXiv:1506.02640), table 1",
        setting=f"digits in scenes of {size.side} pixels, {size.images} images each, on this CPU",
        rows=[
            *(Row(f"{name}: box AP50", "%", values) for name, values in ap50.items()),
            *(Row(f"{name}: time", "ms an image", values) for name, values in times.items()),
        ],
        difference=Interval.of(ratios),
        unit="times as fast",
        expected=EXPECTED,
        seconds=time.perf_counter() - started,
    )

"""Mask R-CNN (arXiv:1703.06870): RoIAlign reads features where a box is, RoIPool where the grid is. Half a pixel of a
coarse map is many pixels of the image, which the masks show; the mask branch itself costs little time.

Both networks learn from the same scenes (see `pentad.datasets.scenes`), in the same order.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pentad.reproduce.report import Interval, Report, Row
from pentad.reproduce.runs import Workshop

NETWORK = {
    "model_type": "mask_rcnn",
    "layer_type": "basic",
    "frozen": False,
    "embedding_size": 24,
    "hidden_sizes": [24, 48, 96, 192],
    "depths": [1, 1, 1, 1],
    "pyramid_size": 48,
    "head_size": 192,
}
OPTIMIZER = {"lr": 1e-3, "weight_decay": 0.01, "warmup": 0.05}
EXPECTED = 1.0  # points of mask AP


@dataclass(frozen=True)
class Size:
    """How much is done.

    Attributes:
        scenes, held_out: the numbers of scenes to train on and to measure with.
        side: of the scenes in pixels.
        steps, batch: of each run.
        proposals: boxes an image that the heads learn from.
    """

    scenes: int = 1500
    held_out: int = 150
    side: int = 128
    steps: int = 250
    batch: int = 8
    proposals: int = 32


def run(folder: Path, seeds: int, note: Callable[[str], None], size: Size | None = None) -> Report:
    """Train with RoIAlign and with RoIPool, with each seed; and time the network without its masks.

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
        name: shop.write(f"{name}.json", {**NETWORK, **sides, "roi_align": align})
        for name, align in (("RoIAlign", True), ("RoIPool", False))
    }
    mask_ap: dict[str, list[float]] = {name: [] for name in models}
    mask_ap75: dict[str, list[float]] = {name: [] for name in models}
    cost = []
    for seed in range(seeds):
        for name, model in models.items():
            trained = shop.load(
                shop.train(
                    f"{name}-{seed}",
                    "detect",
                    model,
                    size.steps,
                    size.batch,
                    seed,
                    objects={"proposals": size.proposals},
                    optimizer=OPTIMIZER,
                )
            )
            measured = shop.evaluate(trained).masks
            mask_ap[name].append(100 * ((measured.ap if measured else None) or 0.0))
            mask_ap75[name].append(100 * ((measured.ap75 if measured else None) or 0.0))
            if name == "RoIAlign":
                with_masks, without = shop.milliseconds([trained, shop.without_masks(trained)])
                cost.append(100 * (with_masks / without - 1))
    gains = [align - pool for align, pool in zip(*mask_ap.values(), strict=True)]
    return Report(
        name="mask-rcnn",
        claim="RoIAlign improves masks over RoIPool (by 3 points of AP in the paper, most at strict thresholds),"
        " and masks add about a fifth to the time",
        source="He et al. 2017, Mask R-CNN (arXiv:1703.06870), tables 2c and 2d, and section 4.4",
        setting=f"digits in scenes of {size.side} pixels, {size.steps} steps of {size.batch}",
        rows=[
            *(Row(f"{name}: mask AP", "%", values) for name, values in mask_ap.items()),
            *(Row(f"{name}: mask AP75", "%", values) for name, values in mask_ap75.items()),
            Row("time that masks add", "% more", cost),
        ],
        difference=Interval.of(gains),
        unit="points of mask AP",
        expected=EXPECTED,
        seconds=time.perf_counter() - started,
    )

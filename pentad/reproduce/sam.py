"""Segment Anything (arXiv:2304.02643): an image is embedded once, and each prompt then costs little; each click
improves a mask; and one click is ambiguous, so that three masks serve better than one.

A small network learns from scenes (see `pentad.datasets.scenes`), by clicks and boxes as in the paper's appendix A.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from pentad.datasets.object_folders import read_objects
from pentad.loading import load
from pentad.reproduce.report import Curves, Interval, Report, Row
from pentad.reproduce.runs import Workshop
from pentad.vision.clicks import mask_iou, next_click
from pentad.vision.segmenter import EmbeddedImage, Segmenter

ENCODER = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "mlp_dim": 384, "patch_size": 8}
WINDOWS = {"window_size": 4, "global_attn_indexes": [1, 3], "output_channels": 64}
DECODER = {"mlp_dim": 128, "num_attention_heads": 4, "iou_head_hidden_dim": 64}
OPTIMIZER = {"lr": 1e-3, "weight_decay": 0.05, "warmup": 0.05}
EXPECTED = 1.0  # points of IoU


@dataclass(frozen=True)
class Size:
    """How much is done.

    Attributes:
        scenes, held_out: the numbers of scenes to train on and to measure with.
        side: of the scenes in pixels.
        steps, batch: of each run.
        training_clicks: after the first prompt of an object.
        clicks: on each object of a held-out scene.
        prompts: numbers of prompts in one image whose time is taken, the largest at the end.
    """

    scenes: int = 2000
    held_out: int = 60
    side: int = 64
    steps: int = 600
    batch: int = 8
    training_clicks: int = 2
    clicks: int = 8
    prompts: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)


def run(folder: Path, seeds: int, note: Callable[[str], None], size: Size | None = None) -> Report:
    """Train a network with each seed, and measure its time and its masks.

    Args:
        folder: an empty folder for data and runs.
        seeds: how many.
        note: receives what is being done.
        size: how much is done.
    """
    size, started, shop = size or Size(), time.perf_counter(), Workshop(folder, note)
    shop.draw_scenes(size.scenes, size.held_out, size.side)
    config = {"vision_config": {**ENCODER, **WINDOWS, "image_size": size.side}, "mask_decoder_config": DECODER}
    model = shop.write("sam.json", {"model_type": "sam", **config})
    costs: dict[str, list[tuple[float, float]]] = {}
    by_clicks: list[tuple[float, float]] = []
    embedding, prompt, single = list[float](), list[float](), dict[str, list[float]]()
    for seed in range(seeds):
        trained = shop.train(
            f"sam-{seed}",
            "segment",
            model,
            size.steps,
            size.batch,
            seed,
            segment={"clicks": size.training_clicks},
            optimizer=OPTIMIZER,
        )
        sam = load(trained / "final")
        assert isinstance(sam, Segmenter)
        note(f"sam-{seed}: measuring")
        seconds, points = milliseconds(sam, folder / "held-out", size.prompts)
        embedding.append(seconds)
        prompt.append(points["one embedding, prompt by prompt"][0][1] - seconds)
        for name, of in points.items():
            costs.setdefault(name, []).extend(of)
        ious, one_click = quality(sam, folder / "held-out", size.clicks)
        by_clicks += [(number, iou) for number, iou in enumerate(ious, 1)]
        for name, iou in one_click.items():
            single.setdefault(name, []).append(iou)
    last = size.prompts[-1]
    shared = [y for x, y in costs["one embedding, prompt by prompt"] if x == last]
    gains = [three - one for three, one in zip(single["the best of three masks"], single["one mask"], strict=True)]
    return Report(
        name="sam",
        claim="an image is embedded once for any number of prompts, clicks improve a mask, and for one click, which is"
        " ambiguous, the best of three masks is better than a single one",
        source="Kirillov et al. 2023, Segment Anything (arXiv:2304.02643), section 3, figures 4 and 9",
        setting=f"digits in scenes of {size.side} pixels, {size.steps} steps of {size.batch}; the best of three masks"
        " has the highest predicted IoU, the closest one is chosen by an oracle",
        rows=[
            Row("embedding an image", "ms", embedding),
            Row("a prompt", "ms", prompt),
            Row(f"one of {last} prompts, with its share of the embedding", "ms", shared),
            *(
                Row(
                    f"IoU after {number} click{'s' if number > 1 else ''}",
                    "%",
                    [y for x, y in by_clicks if x == number],
                )
                for number in range(1, size.clicks + 1)
            ),
            *(Row(f"one click, {name}: IoU", "%", values) for name, values in single.items()),
        ],
        difference=Interval.of(gains),
        unit="points of IoU that the best of three masks has over one, after one click",
        expected=EXPECTED,
        seconds=time.perf_counter() - started,
        curves=(
            Curves("prompts in one image", "milliseconds a prompt", costs),
            Curves("clicks on an object", "IoU (%)", {"the best mask": by_clicks}, scale="linear"),
        ),
    )


def milliseconds(
    sam: Segmenter, scenes: Path, prompts: Sequence[int], repeats: int = 3
) -> tuple[float, dict[str, list[tuple[float, float]]]]:
    """The median time of embedding a scene, and of a prompt by the number of prompts in a scene, embedding included."""
    pixels = read_objects(scenes).pixels(0)
    image, embedding = timed(lambda: sam.image(pixels, cached=False), repeats)
    generator = torch.Generator().manual_seed(0)
    points_N12 = torch.rand(prompts[-1], 1, 2, generator=generator) * min(image.height, image.width)
    curves: dict[str, list[tuple[float, float]]] = {}
    for count in prompts:
        chosen = points_N12[:count]
        _, turns = timed(lambda: [image.masks(points=one) for one in chosen], repeats)  # noqa: B023
        _, together = timed(lambda: image.masks(points=chosen), repeats)  # noqa: B023
        for name, taken in (
            ("one embedding, prompt by prompt", (embedding + turns) / count),
            ("one embedding, all prompts at once", (embedding + together) / count),
            ("an embedding for each prompt", embedding + turns / count),
        ):
            curves.setdefault(name, []).append((count, taken))
    return embedding, curves


def timed(work: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """What some work gives, and its median time in milliseconds; it is done once before."""
    result, taken = work(), list[float]()
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        taken.append(1000 * (time.perf_counter() - started))
    return result, median(taken)


def quality(sam: Segmenter, scenes: Path, clicks: int) -> tuple[list[float], dict[str, float]]:
    """The mean IoU in percent of all objects after 1, 2, … clicks, each where the mask is most wrong; and after one
    click the IoU of one mask, of the best of three, and of the closest of three."""
    by_clicks: list[list[float]] = []
    single: dict[str, list[float]] = {"one mask": [], "the best of three masks": [], "the closest of three masks": []}
    for sample in read_objects(scenes):  # type: ignore[attr-defined]
        image = sam.image(sample.image, cached=False)
        for truth_HW in sample.masks:
            by_clicks.append(refined(image, truth_HW, clicks))
            [*point, _] = next_click(torch.zeros_like(truth_HW), truth_HW) or (0, 0, 0)
            three = [mask_iou(one.mask, truth_HW) for one in image.masks(points=point, multimask=True)]
            [one] = image.masks(points=point, multimask=False)
            for of, iou in zip(single.values(), (mask_iou(one.mask, truth_HW), three[0], max(three)), strict=True):
                of.append(iou)
    means = [100 * mean(ious) for ious in zip(*by_clicks, strict=True)]
    return means, {name: 100 * mean(ious) for name, ious in single.items()}


def refined(image: EmbeddedImage, truth_HW: torch.Tensor, clicks: int) -> list[float]:
    """The IoU after each click; of a mask that is right before the last one, that mask's."""
    points, labels, ious = list[tuple[int, int]](), list[int](), list[float]()
    former, inside_HW = None, torch.zeros_like(truth_HW)
    while len(ious) < clicks and (click := next_click(inside_HW, truth_HW)):
        points, labels = [*points, click[:2]], [*labels, click[2]]
        [former] = image.masks(points=points, labels=labels, mask=former)
        inside_HW = former.mask
        ious.append(mask_iou(inside_HW, truth_HW))
    return ious + [1.0] * (clicks - len(ious))
